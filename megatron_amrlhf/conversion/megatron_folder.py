"""Megatron-LM's classic folders: ``iter_NNNNNNN/mp_rank_TT_PPP/model_optim_rng.pt``, both ways."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_amrlhf.checkpoint.files import write_text
from megatron_amrlhf.config.cut import PipelineCut
from megatron_amrlhf.conversion.head_file import head_outputs, read_head, write_head
from megatron_amrlhf.conversion.megatron_names import (
    RELEASE,
    MegatronTarget,
    megatron_args,
    section_and_name,
    te_name,
)
from megatron_amrlhf.conversion.pickles import load_plain
from megatron_amrlhf.conversion.tensors import CheckedWeights
from megatron_amrlhf.errors import UserError
from megatron_amrlhf.models.mapping import HEAD_FILE_PREFIX, Entry, stage_entries
from megatron_amrlhf.models.shape import ModelShape
from megatron_amrlhf.models.shards import MergedShards

TRACKER, RANK_FILE = "latest_checkpointed_iteration.txt", "model_optim_rng.pt"
RANK = re.compile(r"mp_rank_(\d{2})(?:_(\d{3}))?", re.ASCII)
LAYER = re.compile(r"decoder\.layers\.(\d+)\.")
CHECKPOINT_VERSION = 3.0  # of Megatron-LM's format: how q, k and v are fused


def iteration_folder(folder: Path) -> Path:
    """The newest iteration of a Megatron-LM folder, or the folder itself if it is one.

    Raises:
        UserError: the tracker file names none that is there.
    """
    tracker = folder / TRACKER
    if not tracker.is_file():
        return folder
    text = tracker.read_text(encoding="utf-8").strip()
    name = f"iter_{int(text):07d}" if text.isdecimal() else text
    if name != RELEASE and not text.isdecimal() or not (folder / name).is_dir():
        raise UserError(f"{tracker} names {text!r}, which is not there")
    return folder / name


def write_tracker(target: MegatronTarget, folder: Path) -> None:
    """Writes the file that names the iteration; the last one, as it makes the folder count."""
    write_text(folder / TRACKER, f"{target.iteration or RELEASE}\n")


def has_ranks(folder: Path) -> bool:
    """Whether a folder holds ``mp_rank_TT`` folders."""
    return any(RANK.fullmatch(path.name) for path in folder.iterdir())


def open_megatron(folder: Path, shape: ModelShape) -> MergedShards:
    """A classic folder under Hugging Face names; of either layer spec, at any layout.

    Args:
        folder: with the tracker file, or one iteration's.
        shape: sizes of the model.

    Raises:
        UserError: a rank is missing, a file holds more than tensors and arguments, or layers are
            of another model.
    """
    ranks = _rank_files(iteration_folder(folder))
    stages, tensor = 1 + max(pp for pp, _ in ranks), 1 + max(tp for _, tp in ranks)
    missing = [(pp, tp) for pp in range(stages) for tp in range(tensor) if (pp, tp) not in ranks]
    if missing:
        raise UserError(f"{folder} lacks tensor rank {missing[0][1]} of stage {missing[0][0]}")
    reader = _RankReader(ranks)
    cut = _cut_of(reader, stages, shape, folder)

    def shard(stage: int, rank: int, local: str) -> Tensor:
        section, name = section_and_name(local, cut.virtual)
        if (tensor := read_head(folder, name)) is not None:
            return tensor
        return reader.get(stage, rank, section, name)

    return MergedShards(
        folder, shape, cut, tensor=tensor, head_outputs=head_outputs(folder), shard=shard
    )


def _rank_files(folder: Path) -> dict[tuple[int, int], Path]:
    """Files by (stage, tensor rank)."""
    found = {}
    for path in folder.iterdir():
        if match := RANK.fullmatch(path.name):
            found[int(match[2] or 0), int(match[1])] = path / RANK_FILE
    if not found:
        raise UserError(f"{folder} has no mp_rank_TT folder")
    return found


class _RankReader:
    """Tensors of the ranks; only one stage's files are open at a time."""

    def __init__(self, files: Mapping[tuple[int, int], Path]):
        self._files = files
        self._open: dict[tuple[int, int], dict[str, Any]] = {}

    def sections(self, stage: int, rank: int) -> dict[str, dict[str, Tensor]]:
        """The dictionaries ``model`` or ``model0``, ``model1`` of a rank."""
        if (stage, rank) not in self._open:
            self._open = {place: x for place, x in self._open.items() if place[0] == stage}
            content = load_plain(self._files[stage, rank], [argparse.Namespace])
            models = {k: v for k, v in content.items() if re.fullmatch(r"model\d*", k)}
            if not models or not all(isinstance(x, dict) for x in models.values()):
                raise UserError(f"{self._files[stage, rank]} holds no 'model' of parameters")
            self._open[stage, rank] = models
        return self._open[stage, rank]

    def get(self, stage: int, rank: int, section: str, name: str) -> Tensor:
        model = self.sections(stage, rank).get(section, {})
        for known in (name, te_name(name)):
            if isinstance(model.get(known), Tensor):
                return model[known]
        raise UserError(f"{self._files[stage, rank]} has no parameter {name!r} in {section!r}")


def _cut_of(reader: _RankReader, stages: int, shape: ModelShape, folder: Path) -> PipelineCut:
    """How the layers are cut, by counting them."""
    sizes, virtual = [], 1
    for stage in range(stages):
        models = reader.sections(stage, 0)
        virtual = len(models)
        names = ((section, LAYER.match(name)) for section, x in models.items() for name in x)
        sizes.append(len({(section, match[1]) for section, match in names if match}))
    even = len(set(sizes)) == 1
    first, last = (None, None) if even else (sizes[0], sizes[-1])
    cut = PipelineCut(stages, virtual, first, last)
    try:
        found = [sum(len(x.layers) for x in cut.chunks(shape.num_layers, i)) for i in range(stages)]
    except ValueError:
        found = []
    if found != sizes:
        raise UserError(
            f"{folder} has {' + '.join(map(str, sizes))} layers on its stages, which is no cut of "
            f"the {shape.num_layers} layers of its config.json"
        )
    return cut


def rank_names(target: MegatronTarget) -> dict[tuple[int, int], str]:
    """Folder names by (stage, tensor rank)."""
    stages = target.cut.stages
    return {
        (pp, tp): f"mp_rank_{tp:02d}" + (f"_{pp:03d}" if stages > 1 else "")
        for pp in range(stages)
        for tp in range(target.tensor)
    }


def entries_of(
    shape: ModelShape, target: MegatronTarget, stage: int, head_outputs: int | None
) -> list[Entry]:
    """The parameters of a rank's file: all of the stage but a linear head."""
    entries = stage_entries(shape, target.cut, stage, head_outputs)
    return [entry for entry in entries if not entry.hf[0].startswith(HEAD_FILE_PREFIX)]


def write_megatron(
    weights: CheckedWeights,
    shape: ModelShape,
    hf_config: Mapping[str, Any],
    *,
    target: MegatronTarget,
    folder: Path,
    advance: Callable[[], None],
) -> None:
    """Writes a classic folder, one rank's file in memory at a time.

    A linear head, which Megatron-LM has not, goes to ``head.safetensors`` beside the tracker.

    Args:
        weights: read tensor by tensor, for each tensor rank anew.
        shape: sizes of the model.
        hf_config: the parsed config.json of the model.
        target: the layout.
        folder: an empty folder.
        advance: called after each parameter.

    Raises:
        UserError: a tensor cannot be read or has another shape.
        OSError: the folder cannot be written.
    """
    arguments = megatron_args(shape, hf_config, target, weights.dtype)
    padded = target.padded(shape)
    for (stage, rank), rank_folder in rank_names(target).items():
        models: dict[str, dict[str, Tensor]] = {}
        for entry in entries_of(shape, target, stage, weights.head_outputs):
            section, parameter = section_and_name(entry.local, target.cut.virtual)
            parameter = te_name(parameter) if target.spec == "te" else parameter
            tensors = [weights.get(name) for name in entry.hf]
            shards = entry.layout.split(tensors, target.tensor, padded)
            models.setdefault(section, {})[parameter] = shards[rank].clone(
                memory_format=torch.contiguous_format  # not a view: it would hold the whole
            )
            advance()
        path = folder / target.iteration_name / rank_folder / RANK_FILE
        path.parent.mkdir(parents=True)
        header = {"args": arguments, "checkpoint_version": CHECKPOINT_VERSION}
        torch.save({**header, "iteration": target.iteration, **models}, path)
    write_head(weights, folder)
    write_tracker(target, folder)
