"""What losses learn from: a record each, beside its loss; here is what these have in common."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Targets:
    """Tensors that a loss reads beside the model's values, one entry a row; not differentiable.

    They exist on last pipeline stages only.

    Attributes:
        denominator: ``[B, R]`` a token or ``[B, 1]`` a row, bool: what the loss's mean counts.
    """

    denominator: Tensor

    def select(self, index: Tensor) -> Self:
        """The rows at ``index`` (1-D int64 on any device), in that order."""
        return self.each(lambda x: x[index.to(x.device)])

    def each(self, function: Callable[[Tensor], Tensor]) -> Self:
        """The record with ``function`` of every tensor."""
        names = [field.name for field in fields(self)]
        return replace(self, **{name: function(getattr(self, name)) for name in names})

    @classmethod
    def join(cls, parts: Sequence[Self]) -> Self:
        """The rows of several records one after the other, padded with 0 to the widest."""
        names = [field.name for field in fields(parts[0])]
        joined = {name: _stack([getattr(part, name) for part in parts]) for name in names}
        return replace(parts[0], **joined)


@dataclass(frozen=True)
class AnswerTargets(Targets):
    """Of a policy's loss on answers.

    Attributes:
        mask: ``[B, R]`` bool M of eq. 13, the kept tokens, a subset of ``valid``; ``valid`` itself
            gives the plain algorithm.
        valid: ``[B, R]`` bool, response tokens of answers that have a reward.
        reference_logprobs: ``[B, R]`` of the reference, nats.
    """

    mask: Tensor
    valid: Tensor
    reference_logprobs: Tensor


@dataclass(frozen=True)
class KlTargets(AnswerTargets):
    """Of a loss that may have a KL to the reference in it.

    Attributes:
        kl_scale: ``[B, 1]`` of ``reduce.kl_scale``: 1 but where the loss is divided by kept tokens.
    """

    kl_scale: Tensor


def _stack(tensors: list[Tensor]) -> Tensor:
    """``[B]`` or ``[B, R, ...]`` of several records, padded with 0 to the widest."""
    if tensors[0].dim() == 1:
        return torch.cat(tensors)
    width = max(x.shape[1] for x in tensors)
    # F.pad counts dims from the last one; R is dim 1. A mask is padded with False.
    return torch.cat([F.pad(x, (0, 0) * (x.dim() - 2) + (0, width - x.shape[1])) for x in tensors])
