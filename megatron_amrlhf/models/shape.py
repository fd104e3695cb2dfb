"""The sizes of a model, read from a Hugging Face config.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_amrlhf.config.checks import check_model
from megatron_amrlhf.config.schema import Config
from megatron_amrlhf.errors import UserError
from megatron_amrlhf.models.families import (
    FAMILIES,
    complete_config,
    config_object,
    head_dim_of,
    window_of,
)
from megatron_amrlhf.models.source import read_hf_config


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a model of one of our families, independent of any layout.

    Attributes:
        window: positions that a token attends to, itself among them; None: all before it.
        vocab_multiple: the vocabulary is padded to a multiple of this times the tensor size.
    """

    family: str
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_size: int
    vocab_size: int
    max_positions: int
    norm_eps: float
    tied: bool
    qkv_bias: bool
    qk_norm: bool
    window: int | None
    vocab_multiple: int = 1

    def padded_vocab(self, tensor: int) -> int:
        """Vocabulary rows after padding, at a tensor-parallel size."""
        multiple = self.vocab_multiple * tensor
        return -(-self.vocab_size // multiple) * multiple


def read_shape(hf_config: Mapping[str, Any]) -> ModelShape:
    """Sizes from the parsed config.json.

    Raises:
        UserError: the model, or its rope type, is not supported; names it.
    """
    config = config_object(hf_config)
    family = FAMILIES[config.model_type]
    return ModelShape(
        family=config.model_type,
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=head_dim_of(config),
        ffn_size=config.intermediate_size,
        vocab_size=config.vocab_size,
        max_positions=config.max_position_embeddings,
        norm_eps=config.rms_norm_eps,
        tied=bool(config.tie_word_embeddings),
        qkv_bias=family.qkv_bias,
        qk_norm=family.qk_norm,
        window=window_of(config),
    )


def check_shape(config: Config, folder: str | Path) -> ModelShape:
    """The sizes of a model that a run can use.

    Args:
        config: the run.
        folder: the model's Hugging Face folder.

    Raises:
        UserError: the model is not supported, its sizes do not divide over the layout, or its
            attention reaches less far back than the run's rows are long.
    """
    hf_config = read_hf_config(folder)
    try:
        shape = read_shape(hf_config)
    except UserError as error:
        raise UserError(f"{folder}: {error}") from None
    check_model(config, complete_config(hf_config))
    longest = config.data.max_row_tokens
    if shape.window is not None and shape.window < longest:
        raise UserError(
            f"{folder}: the model's sliding_window of {shape.window} tokens is shorter than "
            f"data.max_row_tokens = {longest}, and sliding windows are not supported: use at most "
            f"{shape.window}, or a model without a window"
        )
    return shape
