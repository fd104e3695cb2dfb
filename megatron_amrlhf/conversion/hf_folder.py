"""Writes a Hugging Face folder, one tensor in memory at a time."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from megatron_amrlhf.checkpoint.files import write_text
from megatron_amrlhf.conversion.folders import copy_travelling, write_config
from megatron_amrlhf.conversion.tensors import CheckedWeights
from megatron_amrlhf.models.expected import HEAD_NAMES
from megatron_amrlhf.models.heads import STORED_NAMES, Form, with_form
from megatron_amrlhf.models.weight_files import INDEX_FILE

SAFETENSORS_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


@dataclass(frozen=True)
class PlannedFile:
    """A file to write: its name, its tensors by (name in the file, our name), and their bytes."""

    name: str
    tensors: tuple[tuple[str, str], ...]
    nbytes: int


def plan_hf(weights: CheckedWeights, shard_bytes: int, form: Form | None) -> list[PlannedFile]:
    """Cuts tensors into files of at most ``shard_bytes`` (or one tensor), in the model's order.

    A linear head is ``score`` among the others; a sequence classifier's has no bias there.
    """
    groups: list[list[tuple[str, str]]] = [[]]
    size = 0
    for name in weights.names():
        if name == HEAD_NAMES[1] and form == "sequence-classification":
            continue
        if groups[-1] and size + weights.nbytes(name) > shard_bytes:
            groups.append([])
            size = 0
        groups[-1].append((STORED_NAMES.get(name, name), name))
        size += weights.nbytes(name)
    count = len(groups)
    names = [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    names = ["model.safetensors"] if count == 1 else names
    return [
        PlannedFile(file, tuple(tensors), sum(weights.nbytes(ours) for _, ours in tensors))
        for file, tensors in zip(names, groups, strict=True)
    ]


def write_hf(
    weights: CheckedWeights,
    plan: list[PlannedFile],
    hf_config: Mapping[str, Any],
    *,
    form: Form | None,
    files_from: Path,
    folder: Path,
    advance: Callable[[], None],
) -> None:
    """Writes the files of ``plan_hf``, the index, the config and what travels along.

    Args:
        weights: read tensor by tensor.
        plan: the files.
        hf_config: the parsed config.json of the model.
        form: of the folder; None for a language model.
        files_from: folder of the tokenizer files and generation settings.
        folder: an empty folder.
        advance: called after each tensor.

    Raises:
        UserError: a tensor cannot be read or has another shape.
        OSError: the folder cannot be written.
    """
    for file in plan:
        with (folder / file.name).open("wb") as stream:
            write_safetensors(stream, file, weights, advance)
    if len(plan) > 1:
        places = {stored: file.name for file in plan for stored, _ in file.tensors}
        total = sum(file.nbytes for file in plan)
        index = {"metadata": {"total_size": total}, "weight_map": places}
        write_text(folder / INDEX_FILE, json.dumps(index, indent=2) + "\n")
    write_config(folder, output_config(hf_config, weights, form))
    copy_travelling(files_from, folder)


def output_config(
    hf_config: Mapping[str, Any], weights: CheckedWeights, form: Form | None
) -> dict[str, Any]:
    """The config.json to write: the model's own, with the dtype and what it is for."""
    config = {key: value for key, value in hf_config.items() if key != "torch_dtype"}
    config["dtype"] = str(weights.dtype).removeprefix("torch.")
    bias = weights.get(HEAD_NAMES[1]).tolist() if form == "sequence-classification" else []
    return with_form(config, form, weights.head_outputs, bias)


def write_safetensors(
    stream: BinaryIO, file: PlannedFile, weights: CheckedWeights, advance: Callable[[], None]
) -> None:
    """Writes one safetensors file as its tensors come.

    The library's ``save_file`` needs all of them in memory. Format: an eight byte length, a JSON
    header with each tensor's dtype, shape and place, then the bytes
    (https://huggingface.co/docs/safetensors/index#format).
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for stored, ours in file.tensors:
        end = start + weights.nbytes(ours)
        header[stored] = {
            "dtype": SAFETENSORS_DTYPES[weights.dtype],
            "shape": list(weights.shapes[ours]),
            "data_offsets": [start, end],
        }
        start = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # tensors start at a multiple of eight bytes
    stream.write(len(text).to_bytes(8, "little") + text)
    for _, ours in file.tensors:
        stream.write(weights.get(ours).contiguous().reshape(-1).view(torch.uint8).numpy().data)
        advance()
