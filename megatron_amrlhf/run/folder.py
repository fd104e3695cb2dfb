"""The folder that a run leaves: its resolved configuration, its status and where the rest lies."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from megatron_amrlhf.config.load import dump_config, parse_yaml
from megatron_amrlhf.config.schema import Config
from megatron_amrlhf.errors import UserError
from megatron_amrlhf.files import clear_temporaries, free_name, write_atomic
from megatron_amrlhf.owned import claim, refuse_other_folder
from megatron_amrlhf.reading import Unreadable, read_text
from megatron_amrlhf.run.beats import HEARTBEAT_NAME
from megatron_amrlhf.run.living import refuse_living_run
from megatron_amrlhf.run.status_file import STATUS_NAME, State, last_attempt
from megatron_amrlhf.run.stop_request import STOP_NAME, process_age
from megatron_amrlhf.run.way import (
    CHECKPOINTS_NAME,
    CONFIG_NAME,
    EXPORT_NAME,
    FROM_START_NAME,
    METRICS_NAME,
    SAMPLES_NAME,
    TENSORBOARD_NAME,
    WATCHDOG_NAME,
    WRITTEN,
    make_heartbeats,
    refuse_others_files,
)

PREPARED_VARIABLE = "AMRLHF_PREPARED"  # of ranks whose launch script has removed an old stop file


@dataclass(frozen=True)
class RunFolder:
    """``runs/NAME/``. Every rank has one, only rank 0's writes.

    Attributes:
        path: the folder.
        attempt: 1 for the first start of this run, one more for each start after it. Certain on
            rank 0 only: on other ranks it is 0.
        is_writer: whether this process writes (global rank 0).
        changed: keys of the configuration that the last attempt had otherwise, with both values;
            rank 0 only.
    """

    path: Path
    attempt: int
    is_writer: bool
    changed: tuple[str, ...] = ()

    @classmethod
    def create(cls, config: Config, rank: int) -> RunFolder:
        """Makes the folder or goes on in an existing one.

        An earlier attempt's configuration is kept as ``config.resolved.N.yaml`` where it differs.

        Args:
            config: the run.
            rank: global rank of this process.

        Raises:
            UserError: the folder belongs to another run or to one that is going on, or it cannot
                be made; on rank 0 alone.
        """
        path = config.run.path
        if rank != 0:
            return cls(path, 0, False)
        refuse_other_run(path, config)
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"run.folder: cannot make {path} ({error.strerror})") from None
        attempt = last_attempt(path) + 1
        claim(path, "run")
        clear_temporaries(path, WRITTEN)
        changed = _write_config(path, config, attempt)
        make_heartbeats(path / HEARTBEAT_NAME, attempt)
        (path / WATCHDOG_NAME).unlink(missing_ok=True)  # an earlier attempt's
        folder = cls(path, attempt, True, changed)
        folder.status("running", 0, "started")
        folder._clear_old_stop()
        return folder

    @property
    def metrics(self) -> Path:
        """One JSON object a step."""
        return self.path / METRICS_NAME

    @property
    def samples(self) -> Path:
        """One JSON object a logged sample."""
        return self.path / SAMPLES_NAME

    @property
    def tensorboard(self) -> Path:
        """TensorBoard's event files."""
        return self.path / TENSORBOARD_NAME

    @property
    def checkpoints(self) -> Path:
        """Resumable checkpoints."""
        return self.path / CHECKPOINTS_NAME

    @property
    def export(self) -> Path:
        """The trained model as a Hugging Face folder."""
        return self.path / EXPORT_NAME

    @property
    def stop(self) -> Path:
        """Its existence asks the run to save a checkpoint and leave."""
        return self.path / STOP_NAME

    @property
    def from_start(self) -> Path:
        """The Slurm job that has last begun the run from the start (``checkpoint.resume: false``).

        It is empty outside of Slurm.
        """
        return self.path / FROM_START_NAME

    @property
    def watchdog(self) -> Path:
        """Who held the others up, with the stacks of all ranks; there once a run has stalled."""
        return self.path / WATCHDOG_NAME

    def status(
        self,
        state: State,
        step: int,
        message: str,
        total: int | None = None,
        step_seconds: float | None = None,
    ) -> None:
        """Writes ``status.json`` (rank 0 only).

        Args:
            state: what the run does now.
            step: completed steps.
            message: one line for a person: what is going on, or why it failed.
            total: steps of the run, once known.
            step_seconds: mean time of this attempt's steps, once there is one.
        """
        if not self.is_writer:
            return
        record = {
            "state": state,
            "step": step,
            "message": message,
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "attempt": self.attempt,
            "total": total,
            "step_seconds": step_seconds,
        }
        write_atomic(self.path / STATUS_NAME, json.dumps(record, indent=2) + "\n")

    def clear_stop(self) -> None:
        """The request has been answered (rank 0 only)."""
        if self.is_writer:
            self.stop.unlink(missing_ok=True)

    def _clear_old_stop(self) -> None:
        """Removes the stop file of an earlier attempt.

        Where a launch script has done so, a file that is there now is a request, even if older
        than this process. Two times of one file system are compared; a process takes itself for
        up to 10 ms older than it is, so that in doubt a file is a request.
        """
        if not self.stop.exists() or PREPARED_VARIABLE in os.environ:
            return
        now = (self.path / STATUS_NAME).stat().st_mtime  # just written
        if now - self.stop.stat().st_mtime > process_age():
            self.clear_stop()


def refuse_other_run(path: Path, config: Config) -> None:
    """Changes nothing. Takes some seconds where a run has just been killed on another host.

    A start that failed before it did anything is no run.

    Raises:
        UserError: the folder belongs to another run (algorithm.kind or model.path differ), to one
            that is going on, or to no run, and has files that one would write over.
    """
    refuse_living_run(path)
    refuse_others_files(path)
    if config.checkpoint.export:
        refuse_other_folder(path / EXPORT_NAME, "export")
    now = config.model_dump(mode="json")
    earlier = _has_results(path) and _read_config(path / CONFIG_NAME) or now
    for section, key in (("algorithm", "kind"), ("model", "path")):
        before = earlier[section].get(key)
        if before != now[section][key]:
            raise UserError(
                f"{path} holds a run with {section}.{key} {before}, this one has "
                f"{now[section][key]}: choose another run.name or delete the folder"
            )


def _has_results(path: Path) -> bool:
    """Whether a run's folder has a step or a checkpoint."""
    metrics = path / METRICS_NAME
    has_steps = metrics.is_file() and metrics.stat().st_size > 0
    return has_steps or (path / CHECKPOINTS_NAME).is_dir()


def _read_config(path: Path) -> dict[str, Any] | None:
    text = _read(path)
    return None if text is None else _parse_config(path, text)


def _parse_config(path: Path, text: str) -> dict[str, Any]:
    try:
        earlier = parse_yaml(text)
    except yaml.YAMLError:
        earlier = None
    if not _has_sections(earlier):
        raise UserError(f"{path} is damaged: choose another run.name or delete the folder")
    return earlier


def _has_sections(content: Any) -> bool:
    return isinstance(content, dict) and all(
        isinstance(content.get(section), dict) for section in ("algorithm", "model")
    )


def _read(path: Path) -> str | None:
    """None where there is no file; bytes that are no text become a text that is no record."""
    try:
        return read_text(path)
    except FileNotFoundError:
        return None
    except Unreadable as error:
        raise UserError(f"{path}: {error}; move it away") from None


def _write_config(path: Path, config: Config, attempt: int) -> tuple[str, ...]:
    """Which keys the file before had otherwise."""
    target, text = path / CONFIG_NAME, dump_config(config)
    earlier = _read(target)
    if earlier == text:
        return ()
    changed: tuple[str, ...] = ()
    if earlier is not None:
        kept = path / f"config.resolved.{attempt - 1}.yaml"
        if kept.exists() and _read(kept) != earlier:
            kept = free_name(kept)  # the attempts are counted anew
        write_atomic(kept, earlier)
        with suppress(UserError):  # damaged, of a start that left no results
            now = config.model_dump(mode="json")
            changed = tuple(_differences(_parse_config(target, earlier), now))
    write_atomic(target, text)
    return changed


def _differences(before: Any, now: Any, key: str = "") -> Iterator[str]:
    """``key: before -> now`` of each value that is not the same in two configurations."""
    if isinstance(before, dict) and isinstance(now, dict):
        for name in before | now:
            inner = f"{key}.{name}" if key else name
            yield from _differences(before.get(name), now.get(name), inner)
    elif before != now:
        yield f"{key}: {before} -> {now}"
