"""The sizes of a model, read from a Hugging Face config.json."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_amrlhf.errors import UserError

FAMILIES = ("llama", "qwen2")


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a Llama or Qwen2 model, independent of any layout."""

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

    def padded_vocab(self, tensor: int) -> int:
        """Vocabulary rows after padding to a multiple of the tensor-parallel size."""
        return -(-self.vocab_size // tensor) * tensor


def read_shape(hf_config: dict) -> ModelShape:
    """Sizes from the parsed config.json; an unsupported model is refused by name."""
    family = hf_config.get("model_type")
    if family not in FAMILIES:
        raise UserError(f"model_type {family!r} is not supported: use one of {', '.join(FAMILIES)}")
    if hf_config.get("hidden_act", "silu") != "silu":
        raise UserError(f"hidden_act {hf_config['hidden_act']!r} is not supported: only silu")
    if hf_config.get("use_sliding_window"):
        raise UserError("use_sliding_window: true is not supported")
    if hf_config.get("mlp_bias") or (family == "llama" and hf_config.get("attention_bias")):
        raise UserError("biases in the MLP or the attention output are not supported")
    heads = hf_config["num_attention_heads"]
    return ModelShape(
        family=family,
        num_layers=hf_config["num_hidden_layers"],
        hidden_size=hf_config["hidden_size"],
        num_heads=heads,
        num_kv_heads=hf_config.get("num_key_value_heads") or heads,
        head_dim=hf_config.get("head_dim") or hf_config["hidden_size"] // heads,
        ffn_size=hf_config["intermediate_size"],
        vocab_size=hf_config["vocab_size"],
        max_positions=hf_config["max_position_embeddings"],
        norm_eps=hf_config["rms_norm_eps"],
        tied=bool(hf_config.get("tie_word_embeddings", False)),
        qkv_bias=family == "qwen2",
    )
