"""megatron-core's ``torch_dist`` checkpoints, in one process without a GPU.

Such a folder has no layout of its own: each tensor is whole in it, those of all layers stacked, and
a run cuts out what it needs. A process of its own is all of that run, so that reading and writing
take memory for the whole model, other than the other forms.
"""

from __future__ import annotations

import argparse
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ShardedObject
from torch import Tensor

from megatron_amrlhf.config.cut import PipelineCut
from megatron_amrlhf.conversion.head_file import head_outputs, read_head, write_head
from megatron_amrlhf.conversion.megatron_folder import (
    CHECKPOINT_VERSION,
    LAYER,
    entries_of,
    iteration_folder,
    write_tracker,
)
from megatron_amrlhf.conversion.megatron_names import (
    MegatronTarget,
    megatron_args,
    section_and_name,
    te_name,
)
from megatron_amrlhf.conversion.pickles import load_plain
from megatron_amrlhf.conversion.tensors import CheckedWeights
from megatron_amrlhf.errors import UserError
from megatron_amrlhf.models.expected import HEAD_NAMES
from megatron_amrlhf.models.shape import ModelShape
from megatron_amrlhf.models.shards import MergedShards
from megatron_amrlhf.parallel.mesh import start_processes
from megatron_amrlhf.reading import Unreadable, read_object

METADATA, COMMON, CONFIG = ".metadata", "common.pt", "metadata.json"
# Modules of a layer for which megatron-core's models ask an object beside the weights, which is
# empty without FP8. Transformer Engine's norms have one too.
LINEARS = (
    "self_attention.linear_qkv",
    "self_attention.linear_proj",
    "mlp.linear_fc1",
    "mlp.linear_fc2",
)
QK_NORMS = ("self_attention.q_layernorm", "self_attention.k_layernorm")
FINAL_NORM = "decoder.final_layernorm"
# What torch's .metadata is made of. It is a pickle; nothing else in one is loaded.
METADATA_CLASSES = {
    "torch.distributed.checkpoint.metadata": {
        "Metadata",
        "MetadataIndex",
        "TensorStorageMetadata",
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "TensorProperties",
        "StorageMeta",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "StorageMeta"},
    "torch.distributed.checkpoint.planner": {
        "SavePlan",
        "TensorWriteData",
        "WriteItem",
        "WriteItemType",
    },
    "torch.serialization": {"_get_layout"},
    "torch": {"Size", "device", "float32", "float16", "bfloat16", "int64", "uint8"},
    "collections": {"OrderedDict"},
    "pathlib": {"PosixPath", "PurePosixPath"},
}


def is_torch_dist(folder: Path) -> bool:
    """Whether a folder, or the iteration that its tracker names, is a ``torch_dist`` one."""
    try:
        config = read_object(iteration_folder(folder) / CONFIG, strict=False)
    except (OSError, Unreadable, UserError):
        return False
    return config.get("sharded_backend") == "torch_dist"


class _MetadataUnpickler(pickle.Unpickler):
    """Makes nothing but the classes that torch's metadata consists of."""

    def find_class(self, module: str, name: str):
        if name not in METADATA_CLASSES.get(module, ()):
            raise pickle.UnpicklingError(f"{module}.{name}")
        return super().find_class(module, name)


def _check_pickles(place: Path) -> None:
    """Refuses a checkpoint whose own metadata hold anything but metadata."""
    try:
        with (place / METADATA).open("rb") as stream:
            _MetadataUnpickler(stream).load()
    except OSError as error:
        raise UserError(f"{place / METADATA}: cannot be read ({error.strerror})") from None
    except Exception as error:
        raise UserError(
            f"{place / METADATA}: holds pickled objects that are never loaded: {error}"
        ) from None
    load_plain(place / COMMON, [argparse.Namespace])


def open_torch_dist(folder: Path, shape: ModelShape) -> MergedShards:
    """A ``torch_dist`` folder under Hugging Face names; all of it is read now.

    Args:
        folder: with the tracker file, or one iteration's.
        shape: sizes of the model.

    Raises:
        UserError: it is damaged, or its metadata hold objects of other classes.
    """
    place = iteration_folder(folder)
    _check_pickles(place)
    start_processes()  # megatron-core asks who else there is
    tensors = dist_checkpointing.load_plain_tensors(str(place))

    def shard(_stage: int, _rank: int, local: str) -> Tensor:
        name = section_and_name(local, 1)[1]
        if (tensor := read_head(folder, name)) is not None:
            return tensor
        for known in (name, te_name(name)):
            layer, stacked = LAYER.match(known), LAYER.sub("decoder.layers.", known)
            if known in tensors:
                return tensors[known]
            if layer and stacked in tensors:
                return tensors[stacked][int(layer[1])]
        raise UserError(f"{place} has no parameter {name!r}")

    return MergedShards(
        folder, shape, PipelineCut(), tensor=1, head_outputs=head_outputs(folder), shard=shard
    )


def write_torch_dist(
    weights: CheckedWeights,
    shape: ModelShape,
    hf_config: Mapping[str, Any],
    *,
    target: MegatronTarget,
    folder: Path,
    advance: Callable[[], None],
) -> None:
    """Writes a ``torch_dist`` folder; arguments as ``write_megatron``'s.

    Raises:
        UserError: a tensor cannot be read or has another shape.
        OSError: the folder cannot be written.
    """
    place, padded = folder / target.iteration_name, target.padded(shape)
    rows = padded.padded_vocab(target.tensor)
    place.mkdir()
    state: dict[str, Any] = {
        "args": megatron_args(shape, hf_config, target, weights.dtype),
        "checkpoint_version": CHECKPOINT_VERSION,
        "iteration": target.iteration,
    }
    for entry in entries_of(
        shape, MegatronTarget(1, PipelineCut(), 1, "te", 0), 0, weights.head_outputs
    ):
        whole = entry.layout.split([weights.get(hf) for hf in entry.hf], 1, padded)[0]
        if entry.layout.name == "vocab":
            whole = torch.cat([whole, whole.new_zeros(rows - len(whole), *whole.shape[1:])])
        key = te_name(section_and_name(entry.local, 1)[1])
        offsets: list[tuple[int, int, int]] = []
        if layer := LAYER.match(key):
            offsets = [(0, int(layer[1]), shape.num_layers)]
        stacked = LAYER.sub("decoder.layers.", key)
        state[key] = ShardedTensor.from_rank_offsets(
            stacked, whole.contiguous(), *offsets, prepend_axis_num=len(offsets)
        )
        for _ in entry.hf:
            advance()
    start_processes()
    dist_checkpointing.save(state | _extra_states(shape, target), str(place))
    write_head(weights, folder)
    for _ in HEAD_NAMES if weights.head_outputs is not None else ():
        advance()
    write_tracker(target, folder)


def _extra_states(shape: ModelShape, target: MegatronTarget) -> dict[str, ShardedObject]:
    """The empty objects without which megatron-core's default strictness refuses a folder."""
    is_te = target.spec == "te"
    modules = [*LINEARS, *(QK_NORMS if is_te and shape.qk_norm else ())]
    keys = [f"decoder.layers.{module}._extra_state" for module in modules]
    found = {
        f"{key}/{layer}": ShardedObject(key, None, (shape.num_layers,), (layer,))
        for key in keys
        for layer in range(shape.num_layers)
    }
    if is_te:
        key = f"{FINAL_NORM}._extra_state"
        found[key] = ShardedObject(key, None, (1,), (0,))
    return found
