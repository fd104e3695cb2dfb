"""The attention of every stage: rotary positions, packing, KV cache and torch's SDPA in one module.

Training and scoring pack rows end to end, and each row attends to itself alone, so no mask and no
padding between rows is needed. Decoding keeps each row at its own length in the cache.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.attention import SelfAttention
from torch import Tensor
from torch.utils.checkpoint import checkpoint

# Nothing here is random.
NO_DROPOUT: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}


@dataclass(frozen=True)
class Packing:
    """Rows of the given ``lengths`` end to end in one row of positions; what is left is padding."""

    lengths: tuple[int, ...]


@dataclass
class KVCache:
    """Keys and values of one decoding micro-batch on one stage.

    ``keys[layer]`` and ``values[layer]`` are ``[B, num_kv_heads / TP, capacity, head_dim]``.
    ``lengths`` ``[B]`` int64 counts the tokens of each row that are in the cache, ``used`` those of
    the longest with the one that is being decoded. Rows with the same prompt share its prefill:
    ``prompts`` ``[B]`` int64 is each row's place among the prompts that go in.
    """

    lengths: Tensor
    prompts: Tensor
    capacity: int
    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)
    used: int = 0

    def prefill(self, layer: int, key: Tensor, value: Tensor) -> None:
        """Stores the prompts' ``[P, kv, T, d]`` for each row; padding is overwritten later."""
        assert layer == len(self.keys)
        shape = (self.prompts.numel(), key.shape[1], self.capacity, key.shape[3])
        for store, new in ((self.keys, key), (self.values, value)):
            # At its full size from the start: growing it would copy it for each token.
            buffer = new.new_zeros(shape)
            buffer[:, :, : new.shape[2]] = new[self.prompts]
            store.append(buffer)

    def append(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Writes a token a row ``[B, kv, 1, d]`` at the row's length; returns all keys, values."""
        # Rows have different lengths, so each writes at a column of its own.
        rows = torch.arange(key.shape[0], device=key.device)
        self.keys[layer][rows, :, self.lengths] = key[:, :, 0]
        self.values[layer][rows, :, self.lengths] = value[:, :, 0]
        if layer == 0:  # the same in all layers, and reading it waits for the device
            self.used = int(self.lengths.max()) + 1
        return self.keys[layer][:, :, : self.used], self.values[layer][:, :, : self.used]

    def keep(self, rows: Tensor) -> None:
        """Drops all rows but those at index ``rows``."""
        self.lengths = self.lengths[rows]
        self.keys = [key[rows] for key in self.keys]
        self.values = [value[rows] for value in self.values]


class _Rotary(torch.autograd.Function):
    """One new tensor a direction; by autograd the halves are copied, negated and joined again."""

    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        return _rotated(x, cos, sin)

    @staticmethod
    def backward(ctx, *grads):
        cos, sin = ctx.saved_tensors
        # The way back is a turn by the same angle in the other direction.
        return _rotated(grads[0], cos, -sin), None, None


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    out = x * cos
    out[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-1)
    out[..., half:].addcmul_(x[..., :half], sin[..., half:])
    return out


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates ``[B, heads, T, d]`` by ``[B or 1, T, d]`` tables (half-split layout, as HF).

    Both halves of a table are the same, as both numbers of a pair turn by one angle.
    """
    return _Rotary.apply(x, cos[:, None], sin[:, None])


class RotarySdpaAttention(SelfAttention):
    """megatron-core's fused-qkv self-attention around ``scaled_dot_product_attention``.

    ``rotary_pos_emb`` carries ``[2, B or 1, T, head_dim]`` cos and sin tables; ``attention_mask``
    carries a ``KVCache`` while decoding, a ``Packing`` of one row of positions, or None (causal).
    """

    cache_index: int = -1  # position of this layer in its chunk, set by the stage model
    recompute: bool = False  # the part between the two linear layers, in the backward

    def forward(self, hidden_states, attention_mask=None, rotary_pos_emb=None, **_unused):
        query, key, value = self.get_query_key_value_tensors(hidden_states)
        if self.recompute and torch.is_grad_enabled():
            out = checkpoint(
                self._core, query, key, value, rotary_pos_emb, attention_mask, **NO_DROPOUT
            )
        else:
            out = self._core(query, key, value, rotary_pos_emb, attention_mask)
        return self.linear_proj(out)

    def _core(self, query, key, value, rotary: Tensor, rows: KVCache | Packing | None) -> Tensor:
        """``[T, B, heads * d]`` of ``[T, B, heads, d]`` queries, keys and values."""
        # megatron-core's [T, B, heads, d] to [B, heads, T, d], which SDPA takes.
        query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        cos, sin = rotary
        query, key = apply_rotary(query, cos, sin), apply_rotary(key, cos, sin)
        bias = None
        # Prompts fill the cache layer by layer: only then is this layer the next one in it. Their
        # padding is on the right, where causal attention keeps it from their tokens.
        if isinstance(rows, KVCache) and self.cache_index == len(rows.keys):
            rows.prefill(self.cache_index, key, value)
        elif isinstance(rows, KVCache):
            key, value = rows.append(self.cache_index, key, value)
            positions = torch.arange(key.shape[2], device=key.device)
            # [B, 1, 1, T]: a row sees what it had before and, at its length, the token itself.
            bias = (positions[None, :] <= rows.lengths[:, None])[:, None, None, :]
        if isinstance(rows, Packing):
            out = _attend_within_rows(query, key, value, rows.lengths)
        elif bias is None:
            out = causal_attention(query, key, value)
        else:
            out = _attend_to_cache(query, key, value, bias)
        return out.permute(2, 0, 1, 3).reshape(out.shape[2], out.shape[0], -1)


def causal_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """``[B, heads, T, d]`` of as many queries, and keys and values ``[B, kv_heads, T, d]``.

    Query heads of one KV head stand side by side (``mapping.py``). The fused kernels of CPUs, and
    of GPUs in half precision, read grouped heads as they are; for those of float32 on a GPU keys
    and values are repeated, which takes their memory ``heads / kv_heads`` times.
    """
    groups = query.shape[1] // key.shape[1]
    reads_groups = query.device.type == "cpu" or query.dtype in (torch.bfloat16, torch.float16)
    if groups > 1 and not reads_groups:
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
        groups = 1
    return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=groups > 1)


def _attend_to_cache(query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
    """Of a token a row, ``[B, heads, 1, d]``; no key or value is copied.

    To attention the queries of one KV head are as so many positions: all see the same keys.
    """
    grouped = query.reshape(query.shape[0], key.shape[1], -1, query.shape[3])
    return F.scaled_dot_product_attention(grouped, key, value, attn_mask=bias).reshape(query.shape)


def _attend_within_rows(
    query: Tensor, key: Tensor, value: Tensor, lengths: tuple[int, ...]
) -> Tensor:
    """Causal attention inside each packed row of ``[1, heads, T, d]``; 0 at padding."""
    padding = query.shape[2] - sum(lengths)
    if not lengths:
        # In the graph, as every parameter must be.
        return query * 0 + (key.sum() + value.sum()) * 0
    # The last part is the padding: no attention is computed for it.
    sizes = [*lengths, padding]
    parts = zip(*(x.split(sizes, dim=2) for x in (query, key, value)), strict=True)
    rows = [causal_attention(*row) for row in list(parts)[:-1]]
    return F.pad(torch.cat(rows, dim=2), (0, 0, 0, padding))
