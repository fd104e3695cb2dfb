"""The model families: one record each, with all in which they differ here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron_amrlhf.errors import UserError

# Rotary frequencies that are the same for every row, whatever its length. transformers computes
# "dynamic" and "longrope" anew from the longest row of a batch, so that a token's rotation would
# depend on the rows packed beside it and keys in the cache would be stale.
ROPE_TYPES = ("default", "linear", "llama3", "yarn")
ROPE_BY_BATCH = ("dynamic", "longrope")
SIZES = (
    "num_hidden_layers",
    "hidden_size",
    "num_attention_heads",
    "intermediate_size",
    "vocab_size",
    "max_position_embeddings",
)


@dataclass(frozen=True)
class Family:
    """A decoder of the Llama kind: RMSNorm, rotary positions, SwiGLU, grouped queries.

    Attributes:
        architecture: transformers' class of the language model.
        qkv_bias: whether q, k and v projections have biases.
        qk_norm: whether each query and key head goes through an RMSNorm before it is rotated.
        absent: what transformers takes for a key that ``config.json`` does not have.
        refused: keys of ``config.json`` that would change the model, if they are set.
        window_switch: the key that switches ``sliding_window`` on; None: the number alone does.
    """

    architecture: str
    qkv_bias: bool = False
    qk_norm: bool = False
    absent: Mapping[str, Any] = field(default_factory=dict)
    refused: tuple[str, ...] = ("attention_bias", "mlp_bias")
    window_switch: str | None = "use_sliding_window"


FAMILIES: dict[str, Family] = {
    "llama": Family("LlamaForCausalLM"),
    "mistral": Family(
        "MistralForCausalLM",
        absent={"num_key_value_heads": 8, "sliding_window": 4096},
        window_switch=None,
    ),
    "qwen2": Family(  # Qwen2.5 too
        "Qwen2ForCausalLM", qkv_bias=True, absent={"num_key_value_heads": 32}, refused=()
    ),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        qk_norm=True,
        absent={"num_key_value_heads": 32, "head_dim": 128},
    ),
}


def family_of(hf_config: Mapping[str, Any]) -> Family:
    """The family of a model, from the parsed ``config.json``.

    Raises:
        UserError: it is none of ours; names its ``model_type`` and architecture.
    """
    model_type = hf_config.get("model_type")
    if model_type not in FAMILIES:
        names = hf_config.get("architectures") or []
        architecture = f" ({', '.join(map(str, names))})" if names else ""
        raise UserError(
            f"model_type {model_type!r}{architecture} is not supported: "
            f"use one of {', '.join(FAMILIES)}"
        )
    return FAMILIES[model_type]


def complete_config(hf_config: Mapping[str, Any]) -> dict[str, Any]:
    """The parsed ``config.json`` with the keys that transformers would fill in for its family.

    Raises:
        UserError: it is no model of ours, or one with parts that we do not have.
    """
    family = family_of(hf_config)
    complete = {**family.absent, **hf_config}
    for key in family.refused:
        if complete.get(key):
            raise UserError(f"{key}: true is not supported for {complete['model_type']} models")
    if complete.get("hidden_act", "silu") != "silu":
        raise UserError(f"hidden_act {complete['hidden_act']!r} is not supported: only silu")
    _check_sizes(complete)
    _check_rope(complete)
    return complete


def _check_sizes(hf_config: Mapping[str, Any]) -> None:
    """Refuses sizes that are missing or no counts, and layers of which some have no type."""
    for key in SIZES:
        found = hf_config.get(key)
        if type(found) is not int or found < 1:
            raise UserError(f"config.json: {key} must be a whole number above 0 (got {found!r})")
    epsilon = hf_config.get("rms_norm_eps")
    if not isinstance(epsilon, int | float) or isinstance(epsilon, bool) or epsilon < 0:
        raise UserError(f"config.json: rms_norm_eps must be a number from 0 on (got {epsilon!r})")
    layers, types = hf_config["num_hidden_layers"], hf_config.get("layer_types")
    if types is not None and len(types) != layers:
        raise UserError(f"config.json: layer_types has {len(types)} entries for {layers} layers")


def window_of(hf_config: Mapping[str, Any]) -> int | None:
    """Positions that a token attends to, itself among them; None: all before it."""
    switch = FAMILIES[hf_config["model_type"]].window_switch
    is_on = switch is None or hf_config.get(switch)
    return hf_config.get("sliding_window") if is_on else None


def _check_rope(hf_config: Mapping[str, Any]) -> None:
    """Refuses rotary positions that are not ours, as transformers 4 or 5 writes them."""
    key = "rope_parameters" if hf_config.get("rope_parameters") else "rope_scaling"
    rope = hf_config.get(key) or {}
    if not isinstance(rope, Mapping) or any(isinstance(x, Mapping) for x in rope.values()):
        raise UserError(f"{key} must be one set of numbers for all layers (got {rope})")
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind in ROPE_BY_BATCH:
        raise UserError(
            f"{key}: rope type {kind!r} is not supported: its frequencies depend on the longest "
            f"row of a batch, use {' or '.join(ROPE_TYPES)}"
        )
    if kind not in ROPE_TYPES:
        raise UserError(
            f"{key}: rope type {kind!r} is not supported: use {' or '.join(ROPE_TYPES)}"
        )
    part = rope.get("partial_rotary_factor", hf_config.get("partial_rotary_factor"))
    if part not in (None, 1, 1.0):
        raise UserError(f"partial_rotary_factor {part} is not supported: only 1")
