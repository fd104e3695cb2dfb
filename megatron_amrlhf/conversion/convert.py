"""Conversion of model weights between folders: plan, check, write, verify."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_amrlhf.conversion.folders import (
    check_free_space,
    check_target,
    copy_travelling,
    new_folder,
    travelling_files,
    write_config,
)
from megatron_amrlhf.conversion.hf_folder import plan_hf, write_hf
from megatron_amrlhf.conversion.megatron_folder import (
    entries_of,
    open_megatron,
    rank_names,
    write_megatron,
)
from megatron_amrlhf.conversion.megatron_names import MegatronTarget, lost_in_megatron
from megatron_amrlhf.conversion.sources import Source
from megatron_amrlhf.conversion.tensors import CheckedWeights, checked
from megatron_amrlhf.conversion.torch_dist import open_torch_dist, write_torch_dist
from megatron_amrlhf.conversion.verify import Comparison, compare_logits
from megatron_amrlhf.errors import UserError
from megatron_amrlhf.models.expected import HEAD_NAMES
from megatron_amrlhf.models.heads import Form
from megatron_amrlhf.models.shape import ModelShape, read_shape
from megatron_amrlhf.models.source import ShardedWeights
from megatron_amrlhf.rewards.kinds import head_form

NORM = "model.norm.weight"  # which every model has
KEY = re.compile(r"(?:\bparallel)?\.([a-z_]+)")  # of a run, in a message


@dataclass(frozen=True)
class HfTarget:
    """A Hugging Face folder: the most bytes of a file, and of a model with a head its class.

    None: the class that reads the head where its numbers mean something.
    """

    shard_bytes: int
    form: Form | None


@dataclass(frozen=True)
class TorchDistTarget:
    """A ``torch_dist`` folder of megatron-core, which has no layout of its own."""

    layout: MegatronTarget


Target = HfTarget | MegatronTarget | TorchDistTarget


@dataclass(frozen=True)
class PlanLine:
    """A file that will be written: its name, how many tensors it has, and their bytes."""

    name: str
    num_tensors: int
    nbytes: int


class Conversion:
    """A conversion whose input was checked as far as headers tell.

    Args:
        source: what to convert.
        target: what to write.
        dtype: of the written weights; None: as the source's.

    Raises:
        UserError: tensors are missing or unknown, or the layout does not fit the model.
    """

    def __init__(self, source: Source, target: Target, dtype: str | None):
        self.source, self.target = source, target
        self.shape: ModelShape = read_shape(source.hf_config)
        self.weights: CheckedWeights = checked(
            source.weights, source.hf_config, dtype or source.dtype
        )
        if isinstance(target, HfTarget):
            if target.form is not None and self.weights.head_outputs is None:
                raise UserError(f"{self.weights.folder} has no linear head to classify with")
        else:
            _check_layout(self.shape, self._layout)

    @property
    def _form(self) -> Form | None:
        """Of a Hugging Face folder with a head; else None."""
        if self.weights.head_outputs is None or not isinstance(self.target, HfTarget):
            return None
        return self.target.form or head_form(self.source.hf_config)

    @property
    def _layout(self) -> MegatronTarget:
        layout = self.target.layout if isinstance(self.target, TorchDistTarget) else self.target
        assert isinstance(layout, MegatronTarget), "a Hugging Face folder has no layout"
        return layout

    def warnings(self) -> list[str]:
        """What the target's own software would compute otherwise, a line for each."""
        if isinstance(self.target, HfTarget):
            return []
        return lost_in_megatron(self.shape, self.source.hf_config)

    def plan(self) -> list[PlanLine]:
        """What will be written, in order."""
        if isinstance(self.target, HfTarget):
            files = plan_hf(self.weights, self.target.shard_bytes, self._form)
            lines = [PlanLine(file.name, len(file.tensors), file.nbytes) for file in files]
        elif isinstance(self.target, TorchDistTarget):
            lines = [PlanLine("torch_dist", len(self.weights.names()), self.weights.total)]
        else:
            lines = self._rank_lines()
        travelling = travelling_files(self.source.model_folder)
        return [*lines, *(PlanLine(x.name, 0, x.stat().st_size) for x in travelling)]

    def _rank_lines(self) -> list[PlanLine]:
        layout, lines = self._layout, []
        for (stage, _), name in rank_names(layout).items():
            entries = entries_of(self.shape, layout, stage, self.weights.head_outputs)
            nbytes = 0
            for entry in entries:
                whole = sum(map(self.weights.nbytes, entry.hf))
                if entry.layout.name == "vocab":  # as it is padded
                    padded = layout.padded(self.shape).padded_vocab(layout.tensor)
                    whole = whole // self.shape.vocab_size * padded
                nbytes += whole if entry.layout.name == "replicated" else whole // layout.tensor
            lines.append(PlanLine(name, len(entries), nbytes))
        if self.weights.head_outputs is not None:
            nbytes = sum(map(self.weights.nbytes, HEAD_NAMES))
            lines.append(PlanLine("head.safetensors", len(HEAD_NAMES), nbytes))
        return lines

    @property
    def num_steps(self) -> int:
        """How often ``write`` calls ``advance``."""
        if isinstance(self.target, MegatronTarget):
            return sum(
                line.num_tensors for line in self._rank_lines()[: len(rank_names(self._layout))]
            )
        return len(self.weights.names()) - (self._form == "sequence-classification")

    def write(
        self,
        folder: Path,
        overwrite: bool,
        advance: Callable[[], None],
        verify: bool,
    ) -> list[Comparison]:
        """Writes the target; it appears under its name when it is complete and verified.

        Args:
            folder: where to.
            overwrite: replace a folder that is there.
            advance: called after each tensor.
            verify: compare logits with the source's.

        Returns:
            The comparisons, if asked for.

        Raises:
            UserError: the source is damaged, the target cannot be written, or the logits differ.
        """
        check_target(folder, self.weights.folder, overwrite)
        check_free_space(folder, sum(line.nbytes for line in self.plan()))
        with new_folder(folder) as temporary:
            self._write(temporary, advance)
            if not verify:
                return []
            found = self._compare(temporary)
            if not all(each.passed for each in found):
                lines = "; ".join(map(str, found))
                raise UserError(f"{folder} is not written, its logits are others: {lines}")
            return found

    def _write(self, folder: Path, advance: Callable[[], None]) -> None:
        source, config = self.source, self.source.hf_config
        if isinstance(self.target, HfTarget):
            plan = plan_hf(self.weights, self.target.shard_bytes, self._form)
            write_hf(
                self.weights,
                plan,
                config,
                form=self._form,
                files_from=source.model_folder,
                folder=folder,
                advance=advance,
            )
            return
        if isinstance(self.target, TorchDistTarget):
            write_torch_dist(
                self.weights,
                self.shape,
                config,
                target=self._layout,
                folder=folder,
                advance=advance,
            )
        else:
            write_megatron(
                self.weights,
                self.shape,
                config,
                target=self._layout,
                folder=folder,
                advance=advance,
            )
        write_config(folder, config)
        copy_travelling(source.model_folder, folder)

    @property
    def _rounds(self) -> bool:
        """Whether the written weights have fewer digits than the source's."""
        own = self.source.weights.get(NORM).dtype
        return torch.promote_types(own, self.weights.dtype) != self.weights.dtype

    def _compare(self, folder: Path) -> list[Comparison]:
        config = self.source.hf_config
        has_head = self.weights.head_outputs is not None
        before: CheckedWeights | Path = self.weights
        if self.source.form == "hf" and not has_head:
            before = self.source.weights.folder
        if isinstance(self.target, HfTarget):
            after: CheckedWeights | Path = folder
            if self._form == "sequence-classification":  # which runs at one token alone
                after = checked(ShardedWeights(folder), config, None)
        else:
            reader = open_torch_dist if isinstance(self.target, TorchDistTarget) else open_megatron
            after = checked(reader(folder, self.shape), config, None)
        return compare_logits(before, after, config, isinstance(before, Path) and self._rounds)


def _check_layout(shape: ModelShape, layout: MegatronTarget) -> None:
    """Refuses sizes that do not divide.

    Raises:
        UserError: tells what would.
    """
    for count, unit in (
        (shape.num_heads, "attention heads"),
        (shape.num_kv_heads, "key-value heads"),
        (shape.ffn_size, "feed-forward units"),
    ):
        if count % layout.tensor:
            raise UserError(f"--tensor {layout.tensor} does not divide the model's {count} {unit}")
    try:
        layout.cut.chunks(shape.num_layers, 0)
    except ValueError as error:  # of a run's keys, as parallel.pipeline and .last_stage_layers
        message = KEY.sub(lambda key: f"--{key[1].replace('_', '-')}", str(error))
        raise UserError(message) from None
