"""Hugging Face tensors put together from the shards of tensor ranks and pipeline stages."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from torch import Tensor

from megatron_amrlhf.config.cut import PipelineCut
from megatron_amrlhf.models.mapping import Entry, stage_entries
from megatron_amrlhf.models.shape import ModelShape


class NamedWeights(Protocol):
    """Weights under Hugging Face names, read one at a time, as ``ShardedWeights`` does."""

    @property
    def folder(self) -> Path:
        """Where they are, for messages."""

    def names(self) -> list[str]:
        """Names of all tensors."""

    def get(self, name: str) -> Tensor:
        """The tensor ``name``, on CPU. Raises UserError if it cannot be read."""

    def __contains__(self, name: str) -> bool:
        """Whether there is such a tensor."""


class MergedShards:
    """``NamedWeights`` of a model that lies over tensor ranks and stages.

    Args:
        folder: for messages.
        shape: sizes of the whole model.
        cut: the pipeline axis.
        tensor: tensor-parallel size.
        head_outputs: None for a language model, else outputs of its linear head.
        shard: reads the shard of (stage, tensor rank, local parameter name).
    """

    def __init__(
        self,
        folder: Path,
        shape: ModelShape,
        cut: PipelineCut,
        *,
        tensor: int,
        head_outputs: int | None,
        shard: Callable[[int, int, str], Tensor],
    ):
        self.folder, self._shape, self._tensor, self._shard = folder, shape, tensor, shard
        self._place: dict[str, tuple[int, Entry]] = {}
        for stage in range(cut.stages):
            for entry in stage_entries(shape, cut, stage, head_outputs):
                for name in entry.hf:  # of both copies of a tied embedding the first one
                    self._place.setdefault(name, (stage, entry))
        self._last: tuple[str, dict[str, Tensor]] = ("", {})

    def names(self) -> list[str]:
        """Names of all tensors, stage by stage."""
        return list(self._place)

    def get(self, name: str) -> Tensor:
        """The whole tensor; what is fused with it is kept for the next call, once."""
        stage, entry = self._place[name]
        key = f"{stage} {entry.local}"
        if self._last[0] != key:
            self._last = ("", {})  # frees it before the next one is read
            shards = [self._shard(stage, rank, entry.local) for rank in range(self._tensor)]
            merged = entry.layout.merge(shards, self._shape)
            self._last = (key, dict(zip(entry.hf, merged, strict=True)))
        # Handed over, not kept: as a rule each name is asked for once.
        return self._last[1].pop(name) if name in self._last[1] else self._again(name)

    def _again(self, name: str) -> Tensor:
        self._last = ("", {})
        return self.get(name)

    def __contains__(self, name: str) -> bool:
        return name in self._place
