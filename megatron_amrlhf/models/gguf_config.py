"""The configuration of a GGUF file's model: every key of its family is read, or refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import torch
from transformers import AutoConfig, PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from megatron_amrlhf.errors import UserError
from megatron_amrlhf.models.families import config_object

GGUF_FAMILIES = ("llama", "qwen2", "qwen3")
ROPE_SCALINGS = ("linear", "yarn")
ROPE_FREQS, EMBEDDING, HEAD = "rope_freqs.weight", "token_embd.weight", "output.weight"
# llama.cpp's converter writes the factors of these alone; the largest one is the model's own.
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
COUNTS = {
    "num_hidden_layers": "block_count",
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count",
    "max_position_embeddings": "context_length",
}
OTHERS = (
    *("attention.head_count_kv", "attention.key_length", "attention.value_length"),
    *("attention.layer_norm_rms_epsilon", "rope.dimension_count", "rope.freq_base"),
    *("rope.scaling.type", "rope.scaling.factor", "rope.scaling.original_context_length"),
    "vocab_size",
)
# What these say changes nothing: how a file was made, and what embeddings are pooled by.
NO_MATTER = ("rope.scaling.finetuned", "tensor_data_layout", "pooling_type")
NEUTRAL = {"attention.causal": True, "rope.scaling.attn_factor": 1.0}  # others: 0 or false


def gguf_field(reader: gguf.GGUFReader, key: str) -> Any:
    """The value of a key, None without it."""
    field = reader.get_field(key)
    return None if field is None else field.contents()


def gguf_config(reader: gguf.GGUFReader, file: Path) -> PretrainedConfig:
    """transformers' configuration of the model in a file, for weights in float32.

    Raises:
        UserError: the family, or what a key says, is not supported.
    """
    family = gguf_field(reader, "general.architecture")
    kind, parts = gguf_field(reader, "general.type"), gguf_field(reader, "split.count")
    if kind not in (None, "model"):
        raise UserError(f"{file}: holds a GGUF {kind}, not a whole model")
    if parts and parts > 1:
        raise UserError(f"{file}: is one of {parts} parts: put them together (llama-gguf-split)")
    if family not in GGUF_FAMILIES:
        raise UserError(f"{file}: GGUF family {family!r}; known are {', '.join(GGUF_FAMILIES)}")
    _check_keys(reader, family, file)
    said = {key: gguf_field(reader, f"{family}.{name}") for key, name in COUNTS.items()}
    if missing := [COUNTS[key] for key, value in said.items() if value is None]:
        raise UserError(f"{file}: lacks the key {family}.{missing[0]}")
    shapes = {tensor.name: tensor.shape for tensor in reader.tensors}
    if EMBEDDING not in shapes:
        raise UserError(f"{file}: lacks the tensor {EMBEDDING}")
    epsilon = gguf_field(reader, f"{family}.attention.layer_norm_rms_epsilon")
    if epsilon is None:
        raise UserError(f"{file}: lacks the key {family}.attention.layer_norm_rms_epsilon")
    head_dim = _head_dim(reader, family, said, file)
    groups = gguf_field(reader, f"{family}.attention.head_count_kv")
    keys = dict(
        model_type=family,
        **said,
        num_key_value_heads=groups or said["num_attention_heads"],
        head_dim=head_dim,
        vocab_size=int(shapes[EMBEDDING][1]),
        tie_word_embeddings=HEAD not in shapes,
        rms_norm_eps=float(f"{epsilon:.6g}"),  # GGUF holds a rounded float32
        rope_parameters=_rope(reader, family, head_dim, file),
        bos_token_id=gguf_field(reader, "tokenizer.ggml.bos_token_id"),
        eos_token_id=gguf_field(reader, "tokenizer.ggml.eos_token_id"),
        pad_token_id=gguf_field(reader, "tokenizer.ggml.padding_token_id"),
    )
    try:
        config = config_object(keys)
    except UserError as error:
        raise UserError(f"{file}: {str(error).removeprefix('config.json: ')}") from None
    config.dtype = "float32"
    return config


def _check_keys(reader: gguf.GGUFReader, family: str, file: Path) -> None:
    for key in reader.fields:
        name = key.removeprefix(f"{family}.")
        if name == key or name in COUNTS.values() or name in OTHERS or name in NO_MATTER:
            continue
        value = gguf_field(reader, key)
        if value != NEUTRAL.get(name, 0):
            raise UserError(
                f"{file}: {key} = {value} is not supported here: use the model's Hugging Face "
                "folder"
            )


def _head_dim(reader: gguf.GGUFReader, family: str, said: dict[str, int], file: Path) -> int:
    head_dim = gguf_field(reader, f"{family}.attention.key_length")
    head_dim = head_dim or said["hidden_size"] // said["num_attention_heads"]
    for name in ("attention.value_length", "rope.dimension_count"):
        found = gguf_field(reader, f"{family}.{name}")
        if found not in (None, head_dim):
            raise UserError(
                f"{file}: {family}.{name} = {found} is not supported: only the heads' {head_dim}"
            )
    return head_dim


def _rope(reader: gguf.GGUFReader, family: str, head_dim: int, file: Path) -> dict[str, Any]:
    """``rope_parameters``."""

    def scaling(key: str) -> Any:
        return gguf_field(reader, f"{family}.rope.scaling.{key}")

    rope = {"rope_theta": gguf_field(reader, f"{family}.rope.freq_base") or 10000.0}
    kind = scaling("type") or "none"
    freqs = [tensor for tensor in reader.tensors if tensor.name == ROPE_FREQS]
    if kind == "none":
        return _llama3(rope, freqs[0], head_dim, file) if freqs else rope | {"rope_type": "default"}
    if kind not in ROPE_SCALINGS or scaling("factor") is None or freqs:
        raise UserError(
            f"{file}: rope scaling {kind!r}{f' with {ROPE_FREQS}' if freqs else ''} is not "
            f"supported here (known: {', '.join(ROPE_SCALINGS)}, with a factor): use the model's "
            "Hugging Face folder"
        )
    rope |= {"rope_type": kind, "factor": float(f"{scaling('factor'):.6g}")}
    if kind == "yarn" and (length := scaling("original_context_length")):
        rope["original_max_position_embeddings"] = int(length)
    return rope


def _llama3(
    rope: dict[str, Any], tensor: gguf.ReaderTensor, head_dim: int, file: Path
) -> dict[str, Any]:
    """The rope of Llama 3.1 and newer, of which a file holds what each frequency is divided by."""
    found = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy()).float()
    if bool((found == 1).all()):
        return rope | {"rope_type": "default"}
    whole = rope | LLAMA3 | {"rope_type": "llama3", "factor": float(f"{found.max():.6g}")}
    config = AutoConfig.for_model("llama", head_dim=head_dim, rope_parameters=dict(whole))
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = rope["rope_theta"] ** -(torch.arange(0, head_dim, 2).float() / head_dim)
    expected = plain / scaled
    if found.shape != expected.shape or not torch.allclose(found, expected, rtol=1e-4):
        raise UserError(
            f"{file}: {ROPE_FREQS} holds factors that are not those of Llama 3.1 and newer "
            "(low_freq_factor 1, high_freq_factor 4, 8192 positions before): use the model's "
            "Hugging Face folder"
        )
    return whole
