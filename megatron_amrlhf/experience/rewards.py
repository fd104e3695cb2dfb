"""What the rewards say about a batch of answers, with those whose reward failed taken out."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megatron_amrlhf.experience.context import count_metric
from megatron_amrlhf.losses.reduce import Metrics
from megatron_amrlhf.rewards.judge.outcomes import DOUBTS, REASONS

JUDGED = -1  # in the place of a reason's number


@dataclass(frozen=True)
class Verdicts:
    """Whether answers meet their reference answers.

    Attributes:
        rewards: ``[B]`` 1, 0, or NaN where an answer is not judged.
        not_judged: ``[B]`` int64 place in ``REASONS`` of why it is not, ``JUDGED`` where it is.
        problem: the first one in words, or an empty text.
    """

    rewards: Tensor
    not_judged: Tensor
    problem: str


@dataclass(frozen=True)
class Rewards:
    """What the reward says about a batch of answers. On last stages only.

    Attributes:
        tokens: ``[B, R]`` weighted sum at each token, raw units; 0 outside ``valid``.
        sequences: ``[B]`` weighted sum of each answer; NaN if it failed.
        valid: ``[B, R]`` bool, response tokens of the answers whose reward did not fail.
        not_judged: ``[B]`` int64, of `Verdicts`; all judged where nothing is verified.
        problem: why the first failed answer failed, or an empty text.
        broken: role whose numbers are not finite, or an empty text.
        num_broken: answers for which they are not.
    """

    tokens: Tensor
    sequences: Tensor
    valid: Tensor
    not_judged: Tensor
    problem: str
    broken: str = ""
    num_broken: int = 0

    @property
    def failed(self) -> Tensor:
        """``[B]`` bool."""
        return ~self.valid.any(dim=1)

    @property
    def doubted(self) -> Tensor:
        """``[B]`` bool, where the reward failed for a doubt about the answer, not by a fault."""
        return (self.not_judged >= 0) & (self.not_judged < len(DOUBTS))

    def reasons(self) -> Metrics:
        """``not_judged/REASON``, the share of answers of each reason."""
        count = self.not_judged.numel()
        return {
            f"not_judged/{reason}": count_metric((self.not_judged == place).sum(), count)
            for place, reason in enumerate(REASONS)
        }

    def where_finite(self, **numbers: Tensor | None) -> Rewards:
        """These rewards where the roles' ``[B, R, ...]`` log-probs and values are finite too.

        Advantages and signals are made of them, and one NaN there would reach every baseline.
        """
        finite, broken, count = torch.ones_like(self.failed), self.broken, self.num_broken
        for role, found in numbers.items():
            if found is not None:
                is_finite = found.flatten(1).isfinite().all(dim=1)
                if not broken and not is_finite.all():
                    broken, count = role, int((~is_finite).sum())
                finite &= is_finite
        left = without_failures(
            self.tokens,
            # A NaN reward is what a failure is to all that follows.
            torch.where(finite, self.sequences, torch.nan),
            self.valid,
            self.not_judged,
            self.problem or not_finite(broken),
        )
        return replace(left, broken=broken, num_broken=count)

    def without(self, rows: Tensor) -> Rewards:
        """These rewards with the answers at ``rows`` (``[B]`` bool) as if they were not there."""
        return replace(
            self,
            tokens=self.tokens.masked_fill(rows[:, None], 0.0),
            sequences=self.sequences.masked_fill(rows, torch.nan),
            valid=self.valid & ~rows[:, None],
        )

    def less(self, amount: float, rows: Tensor) -> Rewards:
        """These rewards with ``amount`` taken off at all tokens of the answers at ``rows``."""
        is_there = rows[:, None] & self.valid
        return replace(
            self,
            tokens=torch.where(is_there, self.tokens - amount, self.tokens),
            sequences=torch.where(rows, self.sequences - amount, self.sequences),
        )


def without_failures(
    tokens: Tensor, sequences: Tensor, valid: Tensor, not_judged: Tensor, problem: str
) -> Rewards:
    """Takes answers with a reward that is not finite out of the valid ones.

    Args:
        tokens: ``[B, R]`` rewards, NaN or infinite where one failed.
        sequences: ``[B]`` as this.
        valid: ``[B, R]`` bool, response tokens.
        not_judged: ``[B]`` int64, of `Verdicts`.
        problem: why the first one failed, if that is known.
    """
    finite = torch.where(valid, tokens, 0.0).isfinite().all(dim=1) & sequences.isfinite()
    if not problem and not finite.all():
        problem = "a reward model gave a number that is not finite"
    valid = valid & finite[:, None]
    return Rewards(
        tokens=torch.where(valid, tokens, 0.0),
        sequences=torch.where(finite, sequences, torch.nan),
        valid=valid,
        not_judged=not_judged,
        problem=problem,
    )


def not_finite(role: str) -> str:
    """What there is to say of a role's numbers; nothing of no role."""
    kind = {"": "", "actor": "log-probs", "reference": "log-probs", "critic": "values"}
    what = kind.get(role, "rewards")
    return f"the {what} of the {role} are not finite" if what else ""
