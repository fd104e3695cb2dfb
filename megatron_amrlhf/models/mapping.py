"""How a stage's parameters lie in a Hugging Face checkpoint: one table, both directions.

Every local parameter is made of one or more Hugging Face tensors by a ``Layout``; ``split`` cuts
the shard of a tensor rank out of them and ``merge`` puts the shards of all tensor ranks together
again, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_amrlhf.config.cut import PipelineCut
from megatron_amrlhf.models.shape import ModelShape

EMBEDDING, HEAD = "embedding.word_embeddings.weight", "output_layer.weight"  # in a chunk
NORM, QK_NORMS = "layernorm.weight", ("q_layernorm.weight", "k_layernorm.weight")
HF_EMBEDDING = "model.embed_tokens.weight"
HEAD_PARTS = ("weight", "bias")
HEAD_FILE_PREFIX = "head."  # names of a linear head in exported folders: head.weight, head.bias


@dataclass(frozen=True)
class Layout:
    """A way of lying over the tensor axis.

    ``split(tensors, tp_size, shape)`` gives the ``tp_size`` local shards;
    ``merge(shards, shape)`` gives back the Hugging Face tensors.
    """

    name: str
    split: Callable[[list[Tensor], int, ModelShape], list[Tensor]]
    merge: Callable[[list[Tensor], ModelShape], list[Tensor]]


def _split_qkv(tensors: list[Tensor], tp_size: int, shape: ModelShape) -> list[Tensor]:
    """Per KV group: its query heads, then its key, then its value head (megatron's order)."""
    per_group = shape.num_heads // shape.num_kv_heads
    query, key, value = tensors
    rest = query.shape[1:]
    query = query.reshape(shape.num_kv_heads, per_group * shape.head_dim, *rest)
    key, value = (x.reshape(shape.num_kv_heads, shape.head_dim, *rest) for x in (key, value))
    # A chunk over TP then holds whole KV groups; TP divides the number of KV heads.
    fused = torch.cat([query, key, value], dim=1)
    return [group.reshape(-1, *rest) for group in fused.chunk(tp_size)]


def _merge_qkv(shards: list[Tensor], shape: ModelShape) -> list[Tensor]:
    per_group = shape.num_heads // shape.num_kv_heads
    fused = torch.cat(shards)
    fused = fused.reshape(shape.num_kv_heads, -1, *fused.shape[1:])
    sizes = [per_group * shape.head_dim, shape.head_dim, shape.head_dim]
    return [part.reshape(-1, *part.shape[2:]) for part in fused.split(sizes, dim=1)]


def _split_gate_up(tensors: list[Tensor], tp_size: int, shape: ModelShape) -> list[Tensor]:
    gate, up = (x.chunk(tp_size) for x in tensors)
    # A shard is its part of the gate and then its part of up: the MLP halves its own output.
    return [torch.cat(pair) for pair in zip(gate, up, strict=True)]


def _merge_gate_up(shards: list[Tensor], shape: ModelShape) -> list[Tensor]:
    halves = [shard.chunk(2) for shard in shards]
    return [torch.cat([half[i] for half in halves]) for i in range(2)]


def _split_vocab(tensors: list[Tensor], tp_size: int, shape: ModelShape) -> list[Tensor]:
    (weight,) = tensors
    # No token has a row of the padding; as columns of the head they are taken for -inf.
    missing = shape.padded_vocab(tp_size) - weight.shape[0]
    padded = torch.cat([weight, weight.new_zeros(missing, *weight.shape[1:])])
    return list(padded.chunk(tp_size))


REPLICATED = Layout("replicated", lambda t, n, _: [t[0]] * n, lambda s, _: [s[0]])
ROW = Layout("row", lambda t, n, _: list(t[0].chunk(n, dim=1)), lambda s, _: [torch.cat(s, dim=1)])
VOCAB = Layout("vocab", _split_vocab, lambda s, shape: [torch.cat(s)[: shape.vocab_size]])
QKV = Layout("qkv", _split_qkv, _merge_qkv)
GATE_UP = Layout("gate_up", _split_gate_up, _merge_gate_up)


@dataclass(frozen=True)
class Entry:
    """One local parameter: its name, its Hugging Face names, its layout."""

    local: str
    hf: tuple[str, ...]
    layout: Layout

    def is_summed(self, sequence_parallel: bool) -> bool:
        """Whether a tensor rank's gradient is a part, and the whole is the sum over the ranks.

        A norm of queries or keys sees the rank's own heads only; in sequence parallelism every
        norm sees the rank's part of the positions only.
        """
        return self.local.endswith(NORM if sequence_parallel else QK_NORMS)


def _layer_entries(prefix: str, layer: int, shape: ModelShape) -> list[Entry]:
    here, there = prefix, f"model.layers.{layer}."
    qkv = [f"{there}self_attn.{x}_proj." for x in "qkv"]
    entries = [
        Entry(f"{here}input_layernorm.weight", (f"{there}input_layernorm.weight",), REPLICATED),
        Entry(f"{here}self_attention.linear_qkv.weight", tuple(x + "weight" for x in qkv), QKV),
        Entry(
            f"{here}self_attention.linear_proj.weight", (f"{there}self_attn.o_proj.weight",), ROW
        ),
        Entry(
            f"{here}pre_mlp_layernorm.weight",
            (f"{there}post_attention_layernorm.weight",),
            REPLICATED,
        ),
        Entry(
            f"{here}mlp.linear_fc1.weight",
            (f"{there}mlp.gate_proj.weight", f"{there}mlp.up_proj.weight"),
            GATE_UP,
        ),
        Entry(f"{here}mlp.linear_fc2.weight", (f"{there}mlp.down_proj.weight",), ROW),
    ]
    if shape.qk_norm:
        entries += [
            Entry(
                f"{here}self_attention.{x}_layernorm.weight",
                (f"{there}self_attn.{x}_norm.weight",),
                REPLICATED,
            )
            for x in "qk"
        ]
    if shape.qkv_bias:
        entries.append(
            Entry(f"{here}self_attention.linear_qkv.bias", tuple(x + "bias" for x in qkv), QKV)
        )
    return entries


def stage_entries(
    shape: ModelShape, cut: PipelineCut, stage: int, head_outputs: int | None
) -> list[Entry]:
    """All parameters of a stage. The LM head of a tied model maps to the embedding's name."""
    entries = []
    for index, chunk in enumerate(cut.chunks(shape.num_layers, stage)):
        here = f"chunks.{index}."
        if chunk.has_embedding:
            entries.append(Entry(f"{here}{EMBEDDING}", (HF_EMBEDDING,), VOCAB))
        for place, layer in enumerate(chunk.layers):
            entries += _layer_entries(f"{here}decoder.layers.{place}.", layer, shape)
        if chunk.has_head:
            entries += _head_entries(here, shape, cut, head_outputs)
    return entries


def _head_entries(
    here: str, shape: ModelShape, cut: PipelineCut, head_outputs: int | None
) -> list[Entry]:
    norm = Entry(f"{here}decoder.final_layernorm.weight", ("model.norm.weight",), REPLICATED)
    if head_outputs is not None:
        parts = [Entry(f"{here}output_layer.{x}", (f"head.{x}",), REPLICATED) for x in HEAD_PARTS]
        return [norm, *parts]
    if not shape.tied:
        return [norm, Entry(f"{here}{HEAD}", ("lm_head.weight",), VOCAB)]
    # At PP 1 a tied head is the embedding itself and no parameter of its own.
    return [norm, Entry(f"{here}{HEAD}", (HF_EMBEDDING,), VOCAB)] if cut.stages > 1 else [norm]


def tied_name(
    shape: ModelShape, cut: PipelineCut, stage: int, head_outputs: int | None
) -> str | None:
    """Local name of this stage's copy of an embedding that another stage has too, or None."""
    if not shape.tied or head_outputs is not None or cut.stages == 1:
        return None
    if stage == 0:
        return f"chunks.0.{EMBEDDING}"
    return f"chunks.{cut.virtual - 1}.{HEAD}" if stage == cut.stages - 1 else None
