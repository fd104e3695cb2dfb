"""A role's saved states, read for any tensor- and pipeline-parallel layout and number of ranks.

A parameter is found by the Hugging Face tensors that it is made of, which every layout shares. Its
saved shards are put together and cut anew by the same ``Layout`` that loads and exports weights;
where the tensor-parallel size is the same, only the elements that are wanted are read.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from pydantic import NonNegativeInt
from safetensors import safe_open
from torch import Tensor

from megatron_amrlhf.config.cut import PipelineCut
from megatron_amrlhf.engine.weights import Slice
from megatron_amrlhf.errors import UserError
from megatron_amrlhf.models.mapping import REPLICATED, Entry, stage_entries
from megatron_amrlhf.models.shape import ModelShape
from megatron_amrlhf.parallel.mesh import Mesh
from megatron_amrlhf.reading import Record, Unreadable, checked, parse_json


@dataclass(frozen=True)
class SavedLayout:
    """What decides which part has which elements. The ZeRO stage does not."""

    tensor: int
    pipeline: int
    data: int
    virtual_stages: int
    first_stage_layers: int | None
    last_stage_layers: int | None

    @classmethod
    def of(cls, mesh: Mesh) -> SavedLayout:
        """The layout of a running engine."""
        cut = mesh.cut
        ends = cut.first_layers, cut.last_layers
        return cls(mesh.tp_size, mesh.pp_size, mesh.dp_size, cut.virtual, *ends)

    @property
    def cut(self) -> PipelineCut:
        """How the layers lie on the stages."""
        ends = self.first_stage_layers, self.last_stage_layers
        return PipelineCut(self.pipeline, self.virtual_stages, *ends)

    def as_json(self) -> dict[str, int | None]:
        """For ``state.json``; ``SavedLayout(**...)`` reads it."""
        return asdict(self)

    def parts_of(self, role: str) -> list[str]:
        """Names of all part files of a role."""
        return [
            part_name(role, tp, pp, dp)
            for tp in range(self.tensor)
            for pp in range(self.pipeline)
            for dp in range(self.data)
        ]

    def __str__(self) -> str:
        text = f"TP {self.tensor} x PP {self.pipeline} x DP {self.data}"
        if self.virtual_stages != 1:
            text += f" with {self.virtual_stages} virtual stages"
        ends = self.first_stage_layers, self.last_stage_layers
        return f"{text} with {ends[0]} and {ends[1]} layers at the ends" if any(ends) else text


def other_sizes(then: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Which sizes of a saved model are not those of ``now``, for a message; empty if none."""
    other = [f"{key} {then.get(key)}, not {x}" for key, x in now.items() if then.get(key) != x]
    return "; ".join(other)


def part_name(role: str, tp: int, pp: int, dp: int) -> str:
    """File name of a rank's part of a role."""
    return f"{role}-tp{tp:02d}-pp{pp:02d}-dp{dp:04d}.safetensors"


@dataclass(frozen=True)
class RoleParts:
    """The part files of one role in a checkpoint.

    Attributes:
        folder: ``checkpoints/step-N``; its files are complete and undamaged.
        role: the role's name.
        layout: that it was saved at.
        shape: sizes of the model.
        head_outputs: None for a language model, else outputs of its linear head.
    """

    folder: Path
    role: str
    layout: SavedLayout
    shape: ModelShape
    head_outputs: int | None

    def read(self, entry: Entry, kind: str, tp_size: int, tp_rank: int, place: Slice) -> Tensor:
        """A slice of a parameter's state, as it lies at another layout.

        Args:
            entry: the parameter.
            kind: ``master``, ``exp_avg`` or ``exp_avg_sq``.
            tp_size, tp_rank: of the wanted shard.
            place: the slice of that shard.

        Returns:
            ``[place.length]`` float32.
        """
        stage, saved = self._stages[entry.hf]
        name = f"{saved.local}.{kind}"
        end = place.start + place.length
        if entry.layout is REPLICATED:
            return self._read_range(0, stage, name, place.start, end)
        if tp_size == self.layout.tensor:
            return self._read_range(tp_rank, stage, name, place.start, end)
        shards = [self.shard(stage, tp, saved.local, kind) for tp in range(self.layout.tensor)]
        cut_anew = entry.layout.split(entry.layout.merge(shards, self.shape), tp_size, self.shape)
        return cut_anew[tp_rank].flatten()[place.start : end].clone()

    def shard(self, stage: int, tp: int, local: str, kind: str) -> Tensor:
        """A whole saved shard of a state, put together from all data-parallel ranks' parts."""
        shape = self._part(tp, stage, 0).slice_of(local).shape
        return self._read_range(tp, stage, f"{local}.{kind}", 0, math.prod(shape)).view(shape)

    @cached_property
    def _stages(self) -> dict[tuple[str, ...], tuple[int, Entry]]:
        """Saved stage and entry of each parameter; of a tied embedding its first copy."""
        found: dict[tuple[str, ...], tuple[int, Entry]] = {}
        for stage in range(self.layout.pipeline):
            for entry in stage_entries(self.shape, self.layout.cut, stage, self.head_outputs):
                found.setdefault(entry.hf, (stage, entry))
        return found

    @cached_property
    def _open(self) -> dict[str, _Part]:
        return {}

    def _part(self, tp: int, pp: int, dp: int) -> _Part:
        name = part_name(self.role, tp, pp, dp)
        if name not in self._open:
            self._open[name] = _Part(self.folder / name)
        return self._open[name]

    def _read_range(self, tp: int, stage: int, name: str, start: int, end: int) -> Tensor:
        """Elements ``start`` to ``end`` of a flattened saved shard, from the parts that have it."""
        if start == end:
            return torch.empty(0)
        local = name.rpartition(".")[0]
        size = self._part(tp, stage, 0).slice_of(local).length  # the last ranks have fewer
        pieces = []
        for dp in range(start // size, -(-end // size)):
            part = self._part(tp, stage, dp)
            here = part.slice_of(local)
            if here.start != dp * size:
                raise UserError(f"{part.path} has not the slice of {local} that its rank saves")
            first, last = max(start, here.start), min(end, here.start + here.length)
            pieces.append(part.file.get_slice(name)[first - here.start : last - here.start])
        return torch.cat(pieces)


class SliceRecord(Record):
    """A ``Slice`` as it is written."""

    shape: list[NonNegativeInt]
    start: NonNegativeInt
    length: NonNegativeInt


class SlicesRecord(Record):
    """The slices of a part by local name."""

    slices: dict[str, SliceRecord]


class _Part:
    """One part file: its slices by local name, its tensors by name.

    Raises:
        UserError: it does not say which slices it holds.
    """

    def __init__(self, path: Path):
        self.path, self.file = path, safe_open(path, framework="pt")
        try:
            text = (self.file.metadata() or {}).get("slices", "")
            found = checked(SlicesRecord, {"slices": parse_json(text)}).slices
        except Unreadable as error:
            raise UserError(f"{path} is damaged: its slices: {error}") from None
        self._slices = {
            name: Slice(torch.Size(x.shape), x.start, x.length) for name, x in found.items()
        }

    def slice_of(self, local: str) -> Slice:
        """Which part of a parameter is in the file."""
        if local not in self._slices:
            raise UserError(f"{self.path} has no parameter {local}: its layout is another one")
        return self._slices[local]
