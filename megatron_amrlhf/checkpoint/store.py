"""Checkpoints to resume from: every rank writes its part, one rename makes them count.

``checkpoints/step-N/`` holds, for each trainable role and rank,
``ROLE-tpTT-ppPP-dpDDDD.safetensors`` (``NAME.master``, ``NAME.exp_avg``, ``NAME.exp_avg_sq`` by
local parameter name; the header's metadata tells which slice of which shard each one is), then
``state.json`` (layout, counters, the caller's state) and last ``manifest.json`` (size and SHA-256
of each file). ``checkpoints/latest`` names the newest. Nothing is pickled.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch.distributed as dist

from megatron_amrlhf.checkpoint.files import (
    FileRecord,
    deleted_on_failure,
    on_all_ranks,
    on_main_rank,
    write_tensors,
    write_text,
)
from megatron_amrlhf.checkpoint.folders import (
    FORMAT,
    MANIFEST_FILE,
    STATE_FILE,
    Retention,
    begin,
    check_free_space,
    delete_old,
    publish,
)
from megatron_amrlhf.checkpoint.parts import SavedLayout, part_name
from megatron_amrlhf.engine.role import Role
from megatron_amrlhf.engine.zero3 import Zero3Engine
from megatron_amrlhf.files import fsync
from megatron_amrlhf.parallel.collectives import broadcast_object_from_last_stage, gather_objects
from megatron_amrlhf.parallel.mesh import Mesh

BYTES_PER_ELEMENT = 12  # master and two moments, float32


@dataclass(frozen=True)
class _Pending:
    """A checkpoint whose parts are being written.

    Attributes:
        folder: its name when it is complete.
        temporary: where its files are.
        text: of ``state.json``.
        parts: this rank's part files.
    """

    folder: Path
    temporary: Path
    text: str
    parts: Future[list[FileRecord]]

    @property
    def doing(self) -> str:
        return f"cannot write the checkpoint {self.folder}"


class CheckpointWriter:
    """Writes ``checkpoints/step-N``. Every method is entered by every rank.

    All nodes must see the same file system.

    Args:
        engine: its trainable roles are saved.
        checkpoints: folder of all checkpoints of the run; made if missing.
        retention: which checkpoints are kept.
        asynchronous: write in a thread while training goes on, from a copy of the states in
            host memory (12 bytes for each parameter that this rank has of a trained role).
    """

    def __init__(
        self,
        engine: Zero3Engine,
        checkpoints: Path,
        retention: Retention,
        asynchronous: bool = False,
    ):
        self._engine, self._checkpoints = engine, checkpoints
        self._retention, self._asynchronous = retention, asynchronous
        self._pending: _Pending | None = None
        self.seconds: float | None = None  # from a save's start to this rank's parts on the disk

    def save(self, step: int, state: dict) -> float:
        """Saves the state after a step; an asynchronous one counts after ``poll`` or ``finish``.

        An earlier save is finished first. A ``step-N`` that is already there is replaced.

        Args:
            step: completed steps.
            state: what else the run needs to go on, JSON-able; that of the last stage's (DP rank
                0, TP rank 0) is saved, as scores and baselines exist there only.

        Returns:
            Seconds that training had to wait.

        Raises:
            UserError: a rank cannot write (the same message on every rank); older checkpoints
                stay.
        """
        start = time.perf_counter()
        self.finish()
        engine, mesh, folder = self._engine, self._engine.mesh, self._checkpoints / f"step-{step}"
        text = _state_text(engine, step, broadcast_object_from_last_stage(state, mesh))
        doing = f"cannot write the checkpoint {folder}"
        sizes = on_all_ranks(lambda: _part_bytes(engine), doing)

        temporary = on_main_rank(lambda: begin(self._checkpoints, step), doing, mesh.is_main)
        with deleted_on_failure(temporary, "checkpoint", mesh.is_main):
            room = partial(check_free_space, self._checkpoints, sum(sizes))
            on_main_rank(room, doing, mesh.is_main)
        work = self._writing(temporary)

        def timed() -> list[FileRecord]:
            records = work()
            self.seconds = time.perf_counter() - start
            return records

        parts = _start(timed, self._asynchronous)
        self._pending = _Pending(folder, temporary, text, parts)
        if not self._asynchronous:
            self.finish()
        return time.perf_counter() - start

    def poll(self) -> Path | None:
        """Completes a save whose parts are all written; its folder, or None."""
        if self._pending is None:
            return None
        done = gather_objects(self._pending.parts.done(), dist.group.WORLD)
        return self.finish() if all(done) else None

    def finish(self) -> Path | None:
        """Waits for a save that is under way and completes it; its folder, or None.

        Raises:
            UserError: as ``save``.
        """
        pending, self._pending = self._pending, None
        if pending is None:
            return None
        mesh = self._engine.mesh

        def complete() -> None:
            if mesh.is_main:
                records = [record for part in parts for record in part]
                records.append(write_text(pending.temporary / STATE_FILE, pending.text))
                _write_manifest(pending.temporary, records)
                publish(pending.temporary, pending.folder)
                delete_old(self._checkpoints, pending.folder, self._retention)

        with deleted_on_failure(pending.temporary, "checkpoint", mesh.is_main):
            parts = on_all_ranks(pending.parts.result, pending.doing)
            on_all_ranks(complete, pending.doing)
        return pending.folder

    def _writing(self, folder: Path) -> Callable[[], list[FileRecord]]:
        """The work of writing this rank's parts, from copies where training will go on."""
        roles, mesh = self._engine.trainable(), self._engine.mesh
        states = {name: role.weights.read_states() for name, role in roles.items()}
        if self._asynchronous:
            states = {
                name: {key: x.clone() for key, x in tensors.items()}
                for name, tensors in states.items()
            }
        metadata = {name: _metadata(role) for name, role in roles.items()}
        return lambda: [
            write_tensors(folder / _own_part(name, mesh), tensors, metadata[name])
            for name, tensors in states.items()
        ]


def _start(work: Callable[[], list[FileRecord]], in_thread: bool) -> Future[list[FileRecord]]:
    if in_thread:
        executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        future = executor.submit(work)
        executor.shutdown(wait=False)
        return future
    future = Future()
    try:
        future.set_result(work())
    except Exception as error:
        future.set_exception(error)
    return future


def _own_part(role: str, mesh: Mesh) -> str:
    return part_name(role, mesh.tp_rank, mesh.pp_rank, mesh.dp_rank)


def _metadata(role: Role) -> dict[str, str]:
    """Of a part file: which slice of which parameter it holds.

    One key, as safetensors writes several in an order that changes from file to file.
    """
    slices = {name: asdict(place) for name, place in role.weights.slices().items()}
    return {"slices": json.dumps(slices)}


def _state_text(engine: Zero3Engine, step: int, state: dict) -> str:
    roles = {
        name: {
            "dtype": role.spec.dtype_name,
            "model": role.spec.sizes(role.shape),
            **role.weights.counters(),
        }
        for name, role in engine.trainable().items()
    }
    header = {
        "format": FORMAT,
        "step": step,
        "layout": SavedLayout.of(engine.mesh).as_json(),
        "roles": roles,
        "engine": engine.counters(),
        "state": state,
    }
    return json.dumps(header, indent=2) + "\n"


def _part_bytes(engine: Zero3Engine) -> int:
    """Bytes that this rank will write, about."""
    total = 0
    for role in engine.trainable().values():
        total += sum(place.length for place in role.weights.slices().values())
    return total * BYTES_PER_ELEMENT


def _write_manifest(folder: Path, records: list[FileRecord]) -> None:
    for record in records:
        if (folder / record.name).stat().st_size != record.size:
            raise OSError(f"{folder / record.name} has another size than its rank wrote")
    files = {record.name: {"size": record.size, "sha256": record.sha256} for record in records}
    assert len(files) == len(records), "two ranks wrote the same file"
    manifest = {"format": FORMAT, "files": dict(sorted(files.items()))}
    write_text(folder / MANIFEST_FILE, json.dumps(manifest, indent=2) + "\n")
    fsync(folder)
