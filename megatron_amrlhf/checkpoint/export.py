"""A role's weights as a Hugging Face folder that ``transformers`` opens.

Every pipeline stage writes one file; shards of the tensor group are put together one parameter at
a time. The folder appears under its name only when it is complete.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from megatron_amrlhf.checkpoint.files import (
    deleted_on_failure,
    on_all_ranks,
    on_main_rank,
    write_tensors,
    write_text,
)
from megatron_amrlhf.data.chat import end_token_ids, end_tokens_listed
from megatron_amrlhf.engine.role import Role
from megatron_amrlhf.engine.zero3 import Zero3Engine
from megatron_amrlhf.models.expected import HEAD_NAMES
from megatron_amrlhf.models.heads import STORED_NAMES, Form, with_form
from megatron_amrlhf.models.mapping import REPLICATED, Entry
from megatron_amrlhf.models.source import read_hf_config
from megatron_amrlhf.models.weight_files import INDEX_FILE
from megatron_amrlhf.owned import begin_beside, put_in_place
from megatron_amrlhf.parallel.mesh import Mesh
from megatron_amrlhf.reading import read_object
from megatron_amrlhf.rewards.kinds import head_form, with_meaning

GENERATION_FILE = "generation_config.json"


def export_role(
    engine: Zero3Engine, role_name: str, folder: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Writes a role as a Hugging Face folder. Entered by every rank.

    Weights keep the role's dtype. A model with a linear head becomes one of transformers' token
    classifiers, an outcome reward model a sequence classifier. All nodes must see the same file
    system. An export that is already there is replaced when the new one is complete.

    Args:
        engine: holds the role.
        role_name: which role.
        folder: where to; its parent is made if missing.
        tokenizer: saved beside the weights, with its chat template.

    Raises:
        UserError: a rank cannot write (the same message on every rank); an earlier export stays.
    """
    role, mesh = engine.roles[role_name], engine.mesh
    folder = folder.resolve()  # a link may lead to a larger disk
    hf_config = with_meaning(read_hf_config(role.spec.folder), role.spec.name, engine.config)
    form = None if role.spec.head_outputs is None else head_form(hf_config)
    doing = f"cannot write the export {folder}"
    temporary = on_main_rank(lambda: begin_beside(folder, "export"), doing, mesh.is_main)

    def finish() -> None:
        if mesh.is_main:
            _write_index(temporary, [places for places, _ in written])
            bias = next((bias for _, bias in written if bias), [])
            _write_config(temporary, role, with_form(hf_config, form, role.spec.head_outputs, bias))
            write_end_tokens(role.spec.folder, temporary, tokenizer)
            tokenizer.save_pretrained(temporary)
            put_in_place(temporary, folder, "export")

    with deleted_on_failure(temporary, "export", mesh.is_main):
        tensors = _full_tensors(role, mesh)
        written = on_all_ranks(lambda: _write_weights(temporary, tensors, form, mesh), doing)
        on_all_ranks(finish, doing)


def _full_tensors(role: Role, mesh: Mesh) -> dict[str, Tensor]:
    """This stage's Hugging Face tensors on CPU, on tensor rank 0 of DP rank 0; else empty."""
    tensors: dict[str, Tensor] = {}
    with role.window() as module:
        if mesh.dp_rank > 0:
            return tensors
        parameters = dict(module.named_parameters())
        for entry in role.entries:
            if _is_second_copy(entry, role, mesh):
                continue
            shards = _gather_shards(parameters[entry.local].data, entry, mesh)
            if shards is None:
                continue
            merged = entry.layout.merge(shards, role.shape)
            for name, tensor in zip(entry.hf, merged, strict=True):
                tensors[name] = tensor.to("cpu", copy=True).contiguous()
    return tensors


def _is_second_copy(entry: Entry, role: Role, mesh: Mesh) -> bool:
    """Whether this is the last stage's copy of an embedding that the first stage writes."""
    return entry.local == role.tied and not mesh.is_first_stage


def _gather_shards(local: Tensor, entry: Entry, mesh: Mesh) -> list[Tensor] | None:
    """All shards on tensor rank 0, None elsewhere. Entered by the tensor group."""
    if mesh.tp_size == 1 or entry.layout is REPLICATED:
        return [local] * mesh.tp_size if mesh.tp_rank == 0 else None
    shards = None
    if mesh.tp_rank == 0:
        shards = [torch.empty_like(local) for _ in range(mesh.tp_size)]
    target = dist.get_process_group_ranks(mesh.tp_group)[0]
    dist.gather(local.contiguous(), shards, dst=target, group=mesh.tp_group)
    return shards


def _write_weights(
    folder: Path, tensors: dict[str, Tensor], form: Form | None, mesh: Mesh
) -> tuple[dict[str, tuple], list[float]]:
    """Writes this stage's file; gives the file and the bytes of each tensor.

    Also the bias of a head whose class has none.
    """
    file = f"model-{mesh.pp_rank + 1:05d}-of-{mesh.pp_size:05d}.safetensors"
    bias: list[float] = []
    if form == "sequence-classification" and HEAD_NAMES[1] in tensors:
        bias = tensors.pop(HEAD_NAMES[1]).tolist()
    stored = {STORED_NAMES.get(name, name): tensor for name, tensor in tensors.items()}
    if stored:
        write_tensors(folder / file, stored, {"format": "pt"})
    return {name: (file, tensor.nbytes) for name, tensor in stored.items()}, bias


def _write_index(folder: Path, maps: list[dict[str, tuple]]) -> None:
    merged = {name: place for one in maps for name, place in one.items()}
    assert len(merged) == sum(map(len, maps)), "two stages wrote the same tensor"
    for file in {file for file, _ in merged.values()}:
        if not (folder / file).is_file():
            raise OSError(f"{folder / file} is not seen by rank 0: use a folder all nodes share")
    index = {
        "metadata": {"total_size": sum(size for _, size in merged.values())},
        "weight_map": {name: merged[name][0] for name in sorted(merged)},
    }
    write_text(folder / INDEX_FILE, json.dumps(index, indent=2) + "\n")


def _write_config(folder: Path, role: Role, hf_config: dict[str, Any]) -> None:
    config = {key: value for key, value in hf_config.items() if key != "torch_dtype"}
    config["dtype"] = role.spec.dtype_name
    write_text(folder / "config.json", json.dumps(config, indent=2) + "\n")


def write_end_tokens(source: Path, folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """The source's generation_config.json, with the token that the export ends answers with.

    Who generates stops at the tokenizer's EOS and at what this file lists; a base model's folder
    may name neither the token that its template ends turns with.
    """
    file = source / GENERATION_FILE
    end, *others = end_token_ids(tokenizer, source)
    if end == tokenizer.eos_token_id or end in end_tokens_listed(source):
        if file.is_file():
            shutil.copyfile(file, folder / GENERATION_FILE)
        return
    settings = read_object(file, strict=False) if file.is_file() else {}
    settings["eos_token_id"] = [end, *others]
    write_text(folder / GENERATION_FILE, json.dumps(settings, indent=2) + "\n")
