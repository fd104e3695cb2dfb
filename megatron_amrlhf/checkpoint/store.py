"""Checkpoints to resume from: every rank writes its part, one rename makes them count.

``checkpoints/step-N/`` holds, for each trainable role and rank,
``ROLE-tpTT-ppPP-dpDDDD.safetensors`` (``NAME.master``, ``NAME.exp_avg``, ``NAME.exp_avg_sq`` by
local parameter name; the header's metadata tells which slice of which shard each one is), then
``state.json`` (layout, counters, the caller's state) and last ``manifest.json`` (size and SHA-256
of each file). ``checkpoints/latest`` names the newest. Nothing is pickled.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

from safetensors import safe_open

from megatron_amrlhf.checkpoint.files import (
    FileRecord,
    deleted_on_failure,
    fsync,
    make_empty,
    on_all_ranks,
    sha256_of,
    write_tensors,
    write_text,
)
from megatron_amrlhf.checkpoint.folders import (
    LATEST_FILE,
    MANIFEST_FILE,
    STATE_FILE,
    TEMPORARY,
    find_latest,
    is_complete,
    read_manifest,
    size_of,
    step_folders,
    step_of,
)
from megatron_amrlhf.engine.role import Role
from megatron_amrlhf.engine.zero3 import Zero3Engine
from megatron_amrlhf.errors import UserError
from megatron_amrlhf.parallel.collectives import broadcast_object_from_last_stage
from megatron_amrlhf.parallel.mesh import Mesh

__all__ = ["find_latest", "load_checkpoint", "part_name", "save_checkpoint", "step_of"]

FORMAT = 1
BYTES_PER_ELEMENT = 12  # master and two moments, float32


def save_checkpoint(
    engine: Zero3Engine, checkpoints: Path, step: int, state: dict, keep: int
) -> Path:
    """Writes ``checkpoints/step-N`` and deletes old ones. Entered by every rank, after a step.

    All nodes must see the same file system. A ``step-N`` that is already there is replaced.

    Args:
        engine: its trainable roles are saved.
        checkpoints: folder of all checkpoints of the run; made if missing.
        step: completed steps.
        state: what else the run needs to go on, JSON-able; that of the last stage's (DP rank 0,
            TP rank 0) is saved, as scores and baselines exist there only.
        keep: complete checkpoints to keep, at least 1, this one among them.

    Returns:
        The folder, complete, on every rank.

    Raises:
        UserError: a rank cannot write (the same message on every rank); older checkpoints stay.
    """
    mesh = engine.mesh
    text = _state_text(engine, step, broadcast_object_from_last_stage(state, mesh))
    folder, temporary = checkpoints / f"step-{step}", checkpoints / f"{TEMPORARY}step-{step}"
    doing = f"cannot write the checkpoint {folder}"
    sizes = on_all_ranks(lambda: _part_bytes(engine), doing)

    def start() -> None:
        if mesh.is_main:
            _clear_leftovers(checkpoints)
            make_empty(temporary)
            _check_free_space(checkpoints, sum(sizes))

    def finish() -> None:
        if mesh.is_main:
            records = [record for part in parts for record in part]
            records.append(write_text(temporary / STATE_FILE, text))
            _write_manifest(temporary, records)
            _publish(temporary, folder)
            _delete_old(checkpoints, folder, keep)

    with deleted_on_failure(temporary, mesh.is_main):
        on_all_ranks(start, doing)
        parts = on_all_ranks(lambda: _write_parts(engine, temporary), doing)
        on_all_ranks(finish, doing)
    return folder


def load_checkpoint(engine: Zero3Engine, path: Path) -> dict:
    """Restores the trainable roles of ``engine`` bit for bit. Entered by every rank.

    All files are checked on every rank before anything is changed. The continued run computes
    what an uninterrupted one would have, as long as its configuration is the same; a changed
    learning rate or schedule takes effect.

    Args:
        engine: with the same roles at the same layout as when the checkpoint was taken.
        path: ``checkpoints/step-N``.

    Returns:
        The ``state`` given to ``save_checkpoint``.

    Raises:
        UserError: a file is missing or damaged, or the layout or the roles are others; the same
            message on every rank.
    """
    reader = _Reader(path, engine.mesh)
    doing = f"cannot read the checkpoint {path}"
    header = on_all_ranks(lambda: reader.check(engine), doing)[engine.mesh.rank]
    for name, role in _trainable(engine).items():
        with safe_open(path / part_name(name, engine.mesh), framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}
        role.weights.write_states(tensors, header["roles"][name])
    engine.set_counters(header["engine"])
    return header["state"]


def part_name(role: str, mesh: Mesh) -> str:
    """File name of this rank's part of a role."""
    place = f"tp{mesh.tp_rank:02d}-pp{mesh.pp_rank:02d}-dp{mesh.dp_rank:04d}"
    return f"{role}-{place}.safetensors"


def _trainable(engine: Zero3Engine) -> dict[str, Role]:
    return {name: role for name, role in engine.roles.items() if role.spec.trainable}


def _dtype(role: Role) -> str:
    return str(role.spec.dtype).removeprefix("torch.")


def _role_header(role: Role) -> dict:
    return {"dtype": _dtype(role)} | role.weights.counters()


def _layout(mesh: Mesh) -> dict[str, int | None]:
    """What decides which rank has which elements. The ZeRO stage does not."""
    return {
        "tensor": mesh.tp_size,
        "pipeline": mesh.pp_size,
        "data": mesh.dp_size,
        "virtual_stages": mesh.cut.virtual,
        "first_stage_layers": mesh.cut.first_layers,
        "last_stage_layers": mesh.cut.last_layers,
    }


def _state_text(engine: Zero3Engine, step: int, state: dict) -> str:
    header = {
        "format": FORMAT,
        "step": step,
        "layout": _layout(engine.mesh),
        "roles": {name: _role_header(role) for name, role in _trainable(engine).items()},
        "engine": engine.counters(),
        "state": state,
    }
    return json.dumps(header, indent=2) + "\n"


def _slices_text(role: Role) -> str:
    """Which slice of which parameter a part holds."""
    return json.dumps({name: asdict(place) for name, place in role.weights.slices().items()})


def _part_bytes(engine: Zero3Engine) -> int:
    """Bytes that this rank will write, about."""
    total = 0
    for role in _trainable(engine).values():
        total += sum(place.length for place in role.weights.slices().values())
    return total * BYTES_PER_ELEMENT


def _write_parts(engine: Zero3Engine, folder: Path) -> list[FileRecord]:
    records = []
    for name, role in _trainable(engine).items():
        metadata = {
            "format": "pt",
            "layout": json.dumps(_layout(engine.mesh)),
            "slices": _slices_text(role),
        }
        path = folder / part_name(name, engine.mesh)
        records.append(write_tensors(path, role.weights.read_states(), metadata))
    return records


def _check_free_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"no room for a checkpoint in {folder}: it takes {needed / 2**30:.1f} GiB and "
            f"{free / 2**30:.1f} GiB are free; make room, or lower checkpoint.keep"
        )


def _write_manifest(folder: Path, records: list[FileRecord]) -> None:
    for record in records:
        if (folder / record.name).stat().st_size != record.size:
            raise OSError(f"{folder / record.name} has another size than its rank wrote")
    files = {record.name: {"size": record.size, "sha256": record.sha256} for record in records}
    assert len(files) == len(records), "two ranks wrote the same file"
    manifest = {"format": FORMAT, "files": dict(sorted(files.items()))}
    write_text(folder / MANIFEST_FILE, json.dumps(manifest, indent=2) + "\n")
    fsync(folder)


def _publish(temporary: Path, folder: Path) -> None:
    """Gives the complete checkpoint its name, then points ``latest`` to it."""
    old = folder.with_name(f"{TEMPORARY}old-{folder.name}")
    if folder.exists():
        folder.rename(old)
    temporary.rename(folder)
    fsync(folder.parent)
    write_text(folder.parent / LATEST_FILE, folder.name + "\n")
    if old.exists():
        shutil.rmtree(old)


def _clear_leftovers(checkpoints: Path) -> None:
    """Deletes what a killed save left behind."""
    checkpoints.mkdir(parents=True, exist_ok=True)
    for folder in checkpoints.glob(f"{TEMPORARY}*"):
        shutil.rmtree(folder)


def _delete_old(checkpoints: Path, newest: Path, keep: int) -> None:
    """Keeps ``newest`` and the ``keep - 1`` latest other complete checkpoints."""
    assert keep >= 1
    others = [x for x in step_folders(checkpoints) if x != newest and is_complete(x)]
    for folder in others[: max(len(others) - (keep - 1), 0)]:
        doomed = folder.with_name(f"{TEMPORARY}old-{folder.name}")
        folder.rename(doomed)  # so that no half-deleted one is ever found
        shutil.rmtree(doomed)


@dataclass(frozen=True)
class _Reader:
    """Checks a checkpoint on this rank before it is used."""

    path: Path
    mesh: Mesh

    def check(self, engine: Zero3Engine) -> dict:
        """The parsed ``state.json``, after a look at all that this rank will read."""
        step_of(self.path)
        manifest = read_manifest(self.path)
        if manifest is None:
            raise self._damaged(MANIFEST_FILE, "is missing or unreadable")
        self._check_file(STATE_FILE, manifest)
        header = json.loads((self.path / STATE_FILE).read_text(encoding="utf-8"))
        self._check_layout(header)
        self._check_roles(header, engine)
        for name, role in _trainable(engine).items():
            self._check_file(part_name(name, self.mesh), manifest)
            self._check_slices(part_name(name, self.mesh), role)
        return header

    def _check_file(self, name: str, manifest: dict[str, dict]) -> None:
        file = self.path / name
        if name not in manifest or not file.is_file():
            raise self._damaged(name, "is missing")
        wanted = manifest[name]
        if size_of(file) != wanted["size"]:
            raise self._damaged(name, f"has {size_of(file)} bytes instead of {wanted['size']}")
        if sha256_of(file) != wanted["sha256"]:
            raise self._damaged(name, "is damaged: its SHA-256 is not the manifest's")

    def _damaged(self, name: str, what: str) -> UserError:
        """The error, with the way out: the newest older checkpoint that is complete."""
        step = step_of(self.path)
        folders = [x for x in step_folders(self.path.parent) if step_of(x) < step]
        older = [folder for folder in folders if is_complete(folder)]
        advice = "there is no older complete checkpoint: restore the file or start a new run"
        if older:
            advice = f"delete {self.path} to go on from the older complete checkpoint {older[-1]}"
        return UserError(f"{self.path / name} {what}; {advice}")

    def _check_layout(self, header: dict) -> None:
        if header.get("format") != FORMAT:
            raise UserError(
                f"{self.path} has format {header.get('format')}, this version reads {FORMAT}"
            )
        then, now = header["layout"], _layout(self.mesh)
        if then != now:
            raise UserError(
                f"{self.path} was taken at {_layout_text(then)}, this run has "
                f"{_layout_text(now)}: start it at the checkpoint's layout, or with another "
                "run.name from an exported model"
            )

    def _check_roles(self, header: dict, engine: Zero3Engine) -> None:
        def describe(roles: dict[str, str]) -> str:
            return ", ".join(f"{name} ({dtype})" for name, dtype in sorted(roles.items()))

        then = {name: role["dtype"] for name, role in header["roles"].items()}
        now = {name: _dtype(role) for name, role in _trainable(engine).items()}
        if then != now:
            raise UserError(
                f"{self.path} holds the trained roles {describe(then)}, this run trains "
                f"{describe(now)}: use the checkpoint's configuration or another run.name"
            )

    def _check_slices(self, name: str, role: Role) -> None:
        with safe_open(self.path / name, framework="pt") as file:
            slices = file.metadata()["slices"]
        if slices != _slices_text(role):
            raise UserError(
                f"{self.path / name} holds other parameters than this run's model: use the "
                "checkpoint's model.path or another run.name"
            )


def _layout_text(layout: dict[str, int | None]) -> str:
    text = f"TP {layout['tensor']} x PP {layout['pipeline']} x DP {layout['data']}"
    if layout["virtual_stages"] != 1:
        text += f" with {layout['virtual_stages']} virtual stages"
    ends = layout["first_stage_layers"], layout["last_stage_layers"]
    return f"{text} with {ends[0]} and {ends[1]} layers at the ends" if any(ends) else text
