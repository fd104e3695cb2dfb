"""A linear head, which Megatron-LM has not: ``head.safetensors`` beside the tracker file."""

from __future__ import annotations

from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from megatron_amrlhf.checkpoint.files import write_tensors
from megatron_amrlhf.conversion.tensors import CheckedWeights
from megatron_amrlhf.models.expected import HEAD_NAMES
from megatron_amrlhf.models.mapping import HEAD_FILE_PREFIX
from megatron_amrlhf.models.weight_files import HEAD_FILE

OUTPUT_LAYER = "output_layer."  # where our last stage has a language model's output or the head


def head_outputs(folder: Path) -> int | None:
    """Outputs of the head; None where there is none."""
    file = folder / HEAD_FILE
    if not file.is_file():
        return None
    with safe_open(file, framework="pt") as tensors:
        return tensors.get_slice(HEAD_NAMES[0]).get_shape()[0]


def read_head(folder: Path, name: str) -> Tensor | None:
    """The head's tensor for a parameter of a stage; None where that is not of a head."""
    file = folder / HEAD_FILE
    if not name.startswith(OUTPUT_LAYER) or not file.is_file():
        return None
    with safe_open(file, framework="pt") as tensors:
        return tensors.get_tensor(HEAD_FILE_PREFIX + name.removeprefix(OUTPUT_LAYER))


def write_head(weights: CheckedWeights, folder: Path) -> None:
    """Writes the head, where the weights have one."""
    if weights.head_outputs is not None:
        head = {name: weights.get(name) for name in HEAD_NAMES}
        write_tensors(folder / HEAD_FILE, head, {"format": "pt"})
