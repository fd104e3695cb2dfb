"""Going on from a checkpoint, at the layout it was taken at or at any other."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from megatron_amrlhf.checkpoint.files import on_all_ranks
from megatron_amrlhf.checkpoint.folders import (
    MANIFEST_FILE,
    STATE_FILE,
    ManifestEntry,
    damaged,
    file_problem,
    read_manifest,
    step_of,
)
from megatron_amrlhf.checkpoint.header import Header, check_layout, read_header
from megatron_amrlhf.checkpoint.parts import RoleParts, SavedLayout, other_sizes
from megatron_amrlhf.engine.role import Role
from megatron_amrlhf.engine.weights import MASTER, MOMENTS
from megatron_amrlhf.engine.zero3 import Zero3Engine
from megatron_amrlhf.errors import UserError
from megatron_amrlhf.parallel.mesh import Mesh


@dataclass(frozen=True)
class Loaded:
    """What a checkpoint held beside the roles.

    Attributes:
        state: the ``state`` given when it was saved.
        layout: that it was saved at.
        notes: what changes for the roles, one line each.
    """

    state: dict
    layout: SavedLayout
    notes: tuple[str, ...]


def load_checkpoint(engine: Zero3Engine, path: Path) -> Loaded:
    """Restores the trainable roles of ``engine``. Entered by every rank.

    Every file is checked by one of the ranks before anything is changed. At the layout of the
    checkpoint the continued run is bit for bit what an uninterrupted one would have been, as long
    as its configuration is the same; at another layout it goes on from the same weights, moments
    and counters. A changed learning rate or schedule takes effect; with
    another number of optimizer steps the rate goes on from where it was.

    Args:
        engine: with the same roles; tensor and pipeline parallelism, data-parallel ranks and ZeRO
            stage may be others.
        path: ``checkpoints/step-N``.

    Raises:
        UserError: a file is missing or damaged, or the model or the roles are others; the same
            message on every rank.
    """
    reader = _Reader(path, engine.mesh)
    doing = f"cannot read the checkpoint {path}"
    header = on_all_ranks(lambda: reader.check(engine), doing)[engine.mesh.rank]
    tensors: dict[str, dict[str, Tensor]] = {}

    def read() -> None:
        for name, role in engine.trainable().items():
            tensors[name] = reader.states(name, role, header)

    on_all_ranks(read, doing)  # before what enters collectives
    notes = []
    for name, role in engine.trainable().items():
        counters = header.roles[name].counters()
        role.weights.write_states(tensors.pop(name), counters)
        if note := role.weights.schedule.restore(counters["schedule"], header.step):
            notes.append(f"{name}: {note}")
    engine.set_counters(header.engine.model_dump())
    return Loaded(header.state, header.saved_layout, tuple(notes))


@dataclass(frozen=True)
class _Reader:
    """Checks a checkpoint before it is used."""

    path: Path
    mesh: Mesh

    def check(self, engine: Zero3Engine) -> Header:
        """The content of ``state.json``, after a look at this rank's share of the files."""
        step_of(self.path)
        manifest = read_manifest(self.path)
        if manifest is None:
            raise damaged(self.path, MANIFEST_FILE, "is missing or unreadable")
        self._check_file(STATE_FILE, manifest)
        header = read_header(self.path)
        self._check_roles(header, engine)
        for name, role in engine.trainable().items():
            self._check_model(name, header.roles[name].model, role)
            check_layout(self.path, header, role.shape.num_layers, set(manifest))
        names = [name for role in header.roles for name in header.saved_layout.parts_of(role)]
        for name in names[self.mesh.rank :: self.mesh.world_size]:
            self._check_file(name, manifest)
        return header

    def states(self, name: str, role: Role, header: Header) -> dict[str, Tensor]:
        """This rank's slices of a role's states, by ``NAME.KIND``. Enters no collective."""
        kinds = (MASTER,) if header.roles[name].optimizer_step is None else (MASTER, *MOMENTS)
        layout, outputs = header.saved_layout, role.spec.head_outputs
        parts = RoleParts(self.path, name, layout, role.shape, outputs)
        entries, mesh = {entry.local: entry for entry in role.entries}, self.mesh
        return {
            f"{local}.{kind}": parts.read(entries[local], kind, mesh.tp_size, mesh.tp_rank, place)
            for local, place in role.weights.slices().items()
            for kind in kinds
        }

    def _check_file(self, name: str, manifest: dict[str, ManifestEntry]) -> None:
        if problem := file_problem(self.path, name, manifest):
            raise damaged(self.path, name, problem)

    def _check_roles(self, header: Header, engine: Zero3Engine) -> None:
        def describe(roles: dict[str, str]) -> str:
            return ", ".join(f"{name} ({dtype})" for name, dtype in sorted(roles.items()))

        then = {name: role.dtype for name, role in header.roles.items()}
        now = {name: role.spec.dtype_name for name, role in engine.trainable().items()}
        if then != now:
            raise UserError(
                f"{self.path} holds the trained roles {describe(then)}, this run trains "
                f"{describe(now)}: use the checkpoint's configuration or another run.name"
            )

    def _check_model(self, name: str, then: dict, role: Role) -> None:
        if other := other_sizes(then, role.spec.sizes(role.shape)):
            raise UserError(
                f"{self.path} is of another model than this run's {name} ({other}): "
                "use the checkpoint's model.path or another run.name"
            )
