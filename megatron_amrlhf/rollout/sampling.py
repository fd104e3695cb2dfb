"""Choosing the next token: temperature, top-k, top-p, and randomness that no layout changes."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class SamplingSettings:
    """How answers are sampled (paper, app. B).

    Attributes:
        max_new_tokens: longest answer.
        max_row_tokens: longest prompt + answer.
        temperature: 0 means greedy.
        top_k: 0 means all tokens.
        top_p: 1 means no nucleus cut.
        end_ids: tokens that end an answer; they belong to it.
        usable: ``[V]`` bool, ids that are tokens, the only ones that are sampled; None: all.
    """

    max_new_tokens: int
    max_row_tokens: int
    temperature: float
    top_k: int
    top_p: float
    end_ids: tuple[int, ...]
    usable: Tensor | None = None


def uniforms(seed: int, step: int, sample_ids: Tensor, count: int) -> Tensor:
    """``[B, count]`` float64 uniforms in [0, 1); a row depends on (seed, step, sample id) only."""
    rows = []
    for sample in sample_ids.tolist():
        digest = hashlib.blake2b(f"{seed}/{step}/{sample}".encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
        rows.append(torch.rand(count, generator=generator, dtype=torch.float64))
    return torch.stack(rows) if rows else torch.zeros(0, count, dtype=torch.float64)


def next_tokens(logits: Tensor, uniform: Tensor, settings: SamplingSettings) -> Tensor:
    """Samples one token a row by inverting the cumulative distribution.

    The filters are those of Hugging Face's ``generate`` in its order: temperature, top-k, top-p
    (the likeliest tokens whose mass reaches ``top_p``).

    Args:
        logits: ``[B, V]`` float32.
        uniform: ``[B]`` float64 in [0, 1).
        settings: sampling settings.

    Returns:
        ``[B]`` int64 token ids. Where logits are not finite it is any one: what the answer's
        log-probs are tells of it.
    """
    if settings.usable is not None:
        logits = logits.masked_fill(~settings.usable, float("-inf"))
    if settings.temperature == 0:
        return logits.argmax(dim=-1)
    count = min(settings.top_k or logits.shape[-1], logits.shape[-1])
    values, tokens = logits.topk(count, dim=-1)
    probs = (values.double() / settings.temperature).softmax(dim=-1)
    # The mass before a token decides, so the likeliest one stays whatever top_p is.
    before = probs.cumsum(dim=-1) - probs
    probs = probs * (before < settings.top_p)
    cumulative = probs.cumsum(dim=-1)
    # Times what is left of the mass, in place of dividing the probabilities by it.
    target = uniform[:, None] * cumulative[:, -1:]
    last = (probs > 0).sum(dim=-1, keepdim=True) - 1  # where rounding makes target the whole sum
    choice = torch.searchsorted(cumulative, target, right=True).minimum(last)
    # -1 where no token has mass: logits that are NaN.
    return tokens.gather(-1, choice.clamp(min=0))[:, 0]
