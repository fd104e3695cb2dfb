"""Which tensors a model must have, and whether a folder has them, known from the files' headers."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_amrlhf.errors import UserError
from megatron_amrlhf.models.mapping import HEAD_PARTS
from megatron_amrlhf.models.source import ShardedWeights, read_hf_config

LM_HEAD, HEAD_NAMES = "lm_head.weight", tuple(f"head.{part}" for part in HEAD_PARTS)


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
    try:
        config = AutoConfig.for_model(**copy.deepcopy(dict(hf_config)))  # it writes into them
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except Exception as error:  # of many kinds: each check of theirs has its own
        why = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(f"config.json: transformers refuses it ({why})") from None
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings or head_outputs:
        shapes.pop(LM_HEAD, None)
    if head_outputs:
        sizes = (head_outputs, config.hidden_size), (head_outputs,)
        shapes |= dict(zip(HEAD_NAMES, sizes, strict=True))
    return shapes


def check_weights(folder: str | Path, head_outputs: int | None) -> None:
    """Checks a folder before any of its tensors is read; tensors beside the model's do no harm.

    Args:
        folder: a Hugging Face folder.
        head_outputs: None for a language model, else outputs of its linear head, which may be
            missing: it starts at zero then.

    Raises:
        UserError: a tensor is missing, or its shape is not that of the config.
    """
    found = ShardedWeights(folder).shapes()
    try:
        expected = expected_shapes(read_hf_config(folder), head_outputs)
    except UserError as error:
        raise UserError(f"{folder}: {error}") from None
    for name, shape in expected.items():
        if name not in found and name in HEAD_NAMES:
            continue
        if name not in found:
            raise UserError(f"model folder {folder} has no tensor {name!r}")
        if found[name] != shape:
            raise UserError(
                f"{folder}: {name} has shape {found[name]}, but config.json and this run need "
                f"{shape}"
            )
