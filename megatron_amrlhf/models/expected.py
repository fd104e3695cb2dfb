"""Which tensors a model must have, and whether a folder has them, known from the files' headers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from megatron_amrlhf.errors import UserError
from megatron_amrlhf.models.families import config_object, one_line
from megatron_amrlhf.models.mapping import HEAD_PARTS
from megatron_amrlhf.models.shards import NamedWeights
from megatron_amrlhf.models.source import EMBEDDING_NAME, ShardedWeights, read_hf_config

LM_HEAD, HEAD_NAMES = "lm_head.weight", tuple(f"head.{part}" for part in HEAD_PARTS)
# By the name that safetensors has for it.
FLOATS = {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}
# Parts of quantized weights: GPTQ and AWQ, bitsandbytes, FP8, compressed-tensors.
QUANTIZED_PARTS = (
    *(".qweight", ".qzeros", ".g_idx", ".scales"),
    *(".absmax", ".quant_map", ".nested_absmax", ".SCB"),
    *("_scale", "_scale_inv"),
    *(".weight_packed", ".weight_shape", ".weight_zero_point"),
)
# What may lie beside a model's tensors: heads that are not used, and what old Llama folders hold
# although the configuration says it.
BESIDE = ("v_head.", "value_head.", "score.", "head.", "classifier.")
COMPUTED = "rotary_emb.inv_freq"


def expected_shapes(
    hf_config: Mapping[str, Any], head_outputs: int | None
) -> dict[str, tuple[int, ...]]:
    """Shapes by Hugging Face name, as transformers would make the tensors, in its order.

    Args:
        hf_config: the parsed config.json.
        head_outputs: None for a language model, else outputs of a linear head in the LM head's
            place.

    Raises:
        UserError: transformers does not take the config; says why.
    """
    config = config_object(hf_config)
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except Exception as error:  # of many kinds: each check of theirs has its own
        raise UserError(f"config.json: transformers refuses it ({one_line(error)})") from None
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings or head_outputs:
        # A tied head is in state_dict() under its own name too, but need not be in the files.
        shapes.pop(LM_HEAD, None)
    if head_outputs:
        sizes = (head_outputs, config.hidden_size), (head_outputs,)
        shapes |= dict(zip(HEAD_NAMES, sizes, strict=True))
    return shapes


def check_weights(folder: str | Path, head_outputs: int | None) -> None:
    """Checks a folder before it is loaded: all tensors of its model are there, and no others.

    Args:
        folder: a Hugging Face folder.
        head_outputs: None for a language model, else outputs of its linear head, which may be
            missing: it starts at zero then.

    Raises:
        UserError: a tensor is missing or quantized, its shape is not that of the config, or
            there is one more that could change what the model computes.
    """
    weights = ShardedWeights(folder)
    hf_config = read_hf_config(folder)
    try:
        expected = expected_shapes(hf_config, head_outputs)
    except UserError as error:
        raise UserError(f"{folder}: {error}") from None
    found = weights.headers()
    _check_unquantized(weights, {name: dtype for name, (_, dtype) in found.items()})
    for name, shape in expected.items():
        if name not in found and name in HEAD_NAMES:
            continue
        if name not in found:
            raise UserError(f"model folder {folder} has no tensor {name!r}")
        if found[name][0] != shape:
            raise UserError(
                f"{folder}: {name} has shape {found[name][0]}, but config.json and this run need "
                f"{shape}"
            )
    others = [name for name in found if name not in expected and not is_beside(name)]
    # A head that is not used may lie there; check_tied compares that of a tied model.
    if others := [name for name in others if name != LM_HEAD]:
        raise UserError(
            f"{folder} has {len(others)} of {len(found)} tensors that are no part of its "
            f"config.json's model and would be left out ({_some(others)}): take the config.json of "
            "these weights, or take them away"
        )
    if head_outputs is None:
        check_tied(weights, hf_config)


def check_tied(weights: NamedWeights, hf_config: Mapping[str, Any]) -> None:
    """Refuses a head of its own in a model that is said to have none.

    transformers takes such a model for not tied; here the file has to say so.

    Raises:
        UserError: the head is not the embedding.
    """
    if not hf_config.get("tie_word_embeddings") or LM_HEAD not in weights:
        return
    if not torch.equal(weights.get(LM_HEAD), weights.get(EMBEDDING_NAME)):
        raise UserError(
            f"{weights.folder}: config.json says tie_word_embeddings: true, but {LM_HEAD} is not "
            f"{EMBEDDING_NAME}: set it to false to use that head, or take the tensor away"
        )


def is_beside(name: str) -> bool:
    """Whether a tensor that is no part of a model can lie beside it unread."""
    return name.startswith(BESIDE) or name.endswith(COMPUTED)


def _check_unquantized(weights: ShardedWeights, dtypes: Mapping[str, str]) -> None:
    parts = [name for name in dtypes if name.endswith(QUANTIZED_PARTS)]
    small = [name for name in dtypes if dtypes[name] not in FLOATS and name not in parts]
    if parts or small:
        kinds = ", ".join(sorted({dtypes[name] for name in small})) or "another form"
        raise UserError(
            f"{weights.folder} holds quantized weights ({len(small)} tensors of {kinds}, "
            f"{len(parts)} scales or other parts: {_some([*small, *parts])}), which are not "
            "supported: give the folder of the model with float32, bfloat16 or float16 weights"
        )


def _some(names: Iterable[str]) -> str:
    return ", ".join(sorted(names)[:3])
