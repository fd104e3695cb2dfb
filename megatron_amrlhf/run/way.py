"""What stands where a run would write: its own earlier files, or somebody else's."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from megatron_amrlhf.errors import UserError, printable
from megatron_amrlhf.files import clear_temporaries, free_name
from megatron_amrlhf.owned import claim, is_ours, make_folder
from megatron_amrlhf.run.beats import HEARTBEAT_NAME
from megatron_amrlhf.run.heartbeat import OUR_NAMES
from megatron_amrlhf.run.status_file import STATUS_NAME, read_status
from megatron_amrlhf.run.stop_request import STOP_NAME

CONFIG_NAME, METRICS_NAME, SAMPLES_NAME = "config.resolved.yaml", "metrics.jsonl", "samples.jsonl"
WATCHDOG_NAME, PICTURE_NAME, FROM_START_NAME = "watchdog.txt", "curves.png", "from-start"
CHECKPOINTS_NAME, EXPORT_NAME, TENSORBOARD_NAME = "checkpoints", "export", "tensorboard"
# What a run writes over; in a folder that is no run's these are somebody else's.
OUR_FILES = (
    *(CONFIG_NAME, STATUS_NAME, METRICS_NAME, SAMPLES_NAME),
    *(WATCHDOG_NAME, PICTURE_NAME, FROM_START_NAME),
)
OUR_FOLDERS = (HEARTBEAT_NAME, CHECKPOINTS_NAME, TENSORBOARD_NAME, EXPORT_NAME)
WRITTEN = re.compile("|".join([r"config\.resolved(\.\d+)?\.yaml", *map(re.escape, OUR_FILES)]))


def refuse_others_files(path: Path) -> None:
    """A folder becomes a run's only where nothing in it would be written over.

    What earlier versions left has no note, but a status and a configuration.

    Raises:
        UserError: names what has to be moved.
    """
    files = (*OUR_FILES, STOP_NAME)
    wrong = [x for x in files if (path / x).exists() and not (path / x).is_file()]
    wrong += [x for x in OUR_FOLDERS if (path / x).exists() and not (path / x).is_dir()]
    if wrong:
        raise UserError(f"{path / wrong[0]} is in the run's way: move it away")
    is_run = is_ours(path, "run") or (path / CONFIG_NAME).is_file() and read_status(path)
    there = [name for name in OUR_FILES if (path / name).exists()]
    beats = path / HEARTBEAT_NAME
    there += [HEARTBEAT_NAME] if beats.is_dir() and any(beats.iterdir()) else []
    if there and not is_run:
        raise UserError(
            f"{path} is no run's folder, but has {', '.join(there)}, which a run writes: choose "
            "another run.name or move them away"
        )


def make_heartbeats(folder: Path, attempt: int) -> None:
    """An empty folder but for what others have put there; an earlier attempt's beats go."""
    is_there = folder.exists() or folder.is_symlink()
    is_empty = folder.is_dir() and not any(folder.iterdir())
    if is_there and not is_empty and not is_ours(folder, "heartbeat"):
        aside = free_name(folder.with_name(f"{folder.name}-before-attempt-{attempt}"))
        folder.rename(aside)
        line = f"note: {folder} was not made by this version: it is now {aside.name}"
        print(printable(line), file=sys.stderr, flush=True)
    if is_empty:
        claim(folder, "heartbeat")  # where a link leads to, as a rule
    elif not folder.exists():
        make_folder(folder, "heartbeat")
    clear_temporaries(folder, OUR_NAMES)
    for file in folder.iterdir():
        if OUR_NAMES.fullmatch(file.name) and (file.is_symlink() or file.is_file()):
            file.unlink()
