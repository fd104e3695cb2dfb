"""The model families: one record each, with all in which they differ here."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers import AutoConfig, PretrainedConfig

from megatron_amrlhf.errors import UserError
from megatron_amrlhf.models.rope import check_rope

SIZES = (
    "num_hidden_layers",
    "hidden_size",
    "num_attention_heads",
    "intermediate_size",
    "vocab_size",
    "max_position_embeddings",
)
SIZES_OR_NULL = ("num_key_value_heads", "head_dim", "sliding_window")
MOST, MOST_LAYERS = 2**31 - 1, 10_000
ACTIVATIONS = ("silu", "swish")  # two names of one function
LAYER_TYPES = ("full_attention", "sliding_attention")


@dataclass(frozen=True)
class Family:
    """A decoder of the Llama kind: RMSNorm, rotary positions, SwiGLU, grouped queries.

    Attributes:
        architecture: transformers' class of the language model.
        qkv_bias: whether q, k and v projections have biases.
        qk_norm: whether each query and key head goes through an RMSNorm before it is rotated.
        refused: keys of ``config.json`` that would change the model, if they are set.
        windowed: whether transformers' class reads ``sliding_window``.
    """

    architecture: str
    qkv_bias: bool = False
    qk_norm: bool = False
    refused: tuple[str, ...] = ("attention_bias", "mlp_bias")
    windowed: bool = True


FAMILIES: dict[str, Family] = {
    "llama": Family("LlamaForCausalLM", windowed=False),
    "mistral": Family("MistralForCausalLM"),
    "qwen2": Family("Qwen2ForCausalLM", qkv_bias=True, refused=()),  # Qwen2.5 too
    "qwen3": Family("Qwen3ForCausalLM", qk_norm=True),
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


def config_object(hf_config: Mapping[str, Any]) -> PretrainedConfig:
    """transformers' own configuration of a model, which fills in what ``config.json`` leaves out.

    Everything here reads this object and not the file, so that two keys for one thing mean what
    they mean to transformers. The mapping itself is left as it is.

    Raises:
        UserError: it is no model of ours, one with parts that we do not have, or one whose numbers
            make no sense.
    """
    family = family_of(hf_config)
    _check_meaning(hf_config, family)
    for key in (*SIZES, *SIZES_OR_NULL):
        if key in hf_config and not (key in SIZES_OR_NULL and hf_config[key] is None):
            _check_count(key, hf_config[key])
    try:
        config = AutoConfig.for_model(**copy.deepcopy(dict(hf_config)))
    except Exception as error:  # of many kinds: each check of theirs has its own
        raise UserError(f"config.json: transformers refuses it ({one_line(error)})") from None
    _check_numbers(config)
    check_rope(config)
    return config


def complete_config(hf_config: Mapping[str, Any]) -> dict[str, Any]:
    """``config_object`` as a mapping."""
    return config_object(hf_config).to_dict()


def one_line(error: Exception) -> str:
    """An error of another library with its kind."""
    return " ".join(f"{type(error).__name__}: {error}".split())


def _check_meaning(hf_config: Mapping[str, Any], family: Family) -> None:
    """Refuses what says that the model is another one than its family's plain decoder."""
    kind = hf_config["model_type"]
    quantized = hf_config.get("quantization_config") or hf_config.get("compression_config")
    if quantized:
        method = quantized.get("quant_method") if isinstance(quantized, Mapping) else None
        raise UserError(
            f"config.json: quantization_config ({method or 'unnamed'}): quantized models are not "
            "supported, give the folder of the model with float32, bfloat16 or float16 weights"
        )
    said = hf_config.get("auto_map")
    code = said if isinstance(said, Mapping) else {}
    named = [x for x in code if x.startswith("AutoModel")]
    if named:
        raise UserError(
            f"config.json: auto_map names code of its own for {', '.join(named)} "
            f"({code[named[0]]}), which is not run here: give a model that is a plain {kind}"
        )
    if hf_config.get("is_causal") is False:
        raise UserError("config.json: is_causal: false is not supported: attention is causal here")
    for key in ("per_layer_config", "transformers_weights"):
        if hf_config.get(key):
            raise UserError(f"config.json: {key} is not supported")
    for key in family.refused:
        if hf_config.get(key):
            raise UserError(f"{key}: true is not supported for {kind} models")
    if hf_config.get("hidden_act", "silu") not in ACTIVATIONS:
        raise UserError(f"hidden_act {hf_config['hidden_act']!r} is not supported: only silu")


def _check_count(key: str, found: Any) -> None:
    most = MOST_LAYERS if key == "num_hidden_layers" else MOST
    if type(found) is not int or not 1 <= found <= most:
        raise UserError(
            f"config.json: {key} must be a whole number above 0 and at most {most} (got {found!r})"
        )


def _check_numbers(config: PretrainedConfig) -> None:
    """Refuses sizes that do not go together, and layers of which some have no type."""
    epsilon = config.rms_norm_eps
    if not 0 <= epsilon < 1:  # NaN neither
        raise UserError(
            f"config.json: rms_norm_eps must be a number from 0 to below 1 (got {epsilon!r})"
        )
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    if heads % groups:
        raise UserError(
            f"config.json: num_attention_heads ({heads}) must be a multiple of "
            f"num_key_value_heads ({groups})"
        )
    if head_dim_of(config) % 2:
        raise UserError(f"config.json: head_dim must be even (got {head_dim_of(config)})")
    layers, types = config.num_hidden_layers, getattr(config, "layer_types", None)
    if types is None:
        return
    if len(types) != layers:
        raise UserError(f"config.json: layer_types has {len(types)} entries for {layers} layers")
    if other := sorted(set(types) - set(LAYER_TYPES)):
        raise UserError(f"config.json: layer_types: {other[0]!r} is not supported")
    if "sliding_attention" in types and window_of(config) is None:
        raise UserError("config.json: layer_types has sliding_attention without a sliding_window")


def head_dim_of(config: PretrainedConfig) -> int:
    """Size of an attention head."""
    said = getattr(config, "head_dim", None)
    return said or config.hidden_size // config.num_attention_heads


def window_of(config: PretrainedConfig) -> int | None:
    """Positions that a token of some layer attends to, itself among them; None: all before it."""
    types = getattr(config, "layer_types", None)
    if not FAMILIES[config.model_type].windowed or not getattr(config, "use_sliding_window", True):
        return None
    return config.sliding_window if types is None or "sliding_attention" in types else None
