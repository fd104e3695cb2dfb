"""The error of a reward segmentation, eq. 9-12: the four cuts of figure 1 and the exact optimum.

Eq. 12 is the expected squared error of rewarding each token with the mean of its unit's *noisy*
rewards: the mean of n of them has variance c^2 / n, so a unit costs c^2 whatever its length, on top
of ``sum (r_t - r_k)^2`` of the true rewards. K = 1 gives the sequence-wise error (eq. 9, 10), K = T
the token-wise one (eq. 11). Where r_t is the noisy reward itself, a unit has to cost more than c^2,
or the best cut is one that follows the noise: ``PRICES``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import ruptures
import torch
from torch import Tensor

from megatron_amrlhf.mask.messages import message_ids, unit_rewards
from megatron_amrlhf.mask.schmitt import signs
from megatron_amrlhf.mask.threshold import baseline_and_std, delta_in_signal_units

# Median absolute deviation times this is the standard deviation of a normal variable.
MAD_TO_STD = 1.4826
OPTIMUM = "optimum"
# What a unit costs over c^2, from the number of tokens: eq. 12, and Schwarz' criterion.
PRICES = {"variance": lambda length: 1.0, "schwarz": lambda length: 2 * np.log(max(length, 2))}
CUTS = ("sequence", "step", "token", "message", OPTIMUM)


@dataclass(frozen=True)
class DenseAnswer:
    """The token rewards of one answer of T tokens.

    Attributes:
        observed: ``[T]`` float64 rewards as a reward model gives them; the message cut sees these.
        judged: ``[T]`` float64 r_t of eq. 12: the true rewards where they are known (synthetic
            data), else the observed ones.
        steps: ``[T]`` int64 number of the step that each token is in, from 0 on.
    """

    observed: np.ndarray
    judged: np.ndarray
    steps: np.ndarray

    def __post_init__(self):
        assert self.observed.ndim == 1 and len(self.observed) > 0, self.observed.shape
        assert self.observed.shape == self.judged.shape == self.steps.shape


@dataclass(frozen=True)
class CutError:
    """Eq. 12 summed over answers.

    Attributes:
        approximation: err_s, the sum of (r_t - r_k)^2.
        noise: err_t = c^2 K, or another price of a unit times K.
        num_units: K.
    """

    approximation: float
    noise: float
    num_units: int

    @property
    def total(self) -> float:
        """err_s + err_t."""
        return self.approximation + self.noise


@dataclass(frozen=True)
class AdaptiveCut:
    """How the message cut is made; the keys of ``mask`` with the same names.

    Attributes:
        delta: Schmitt offset in standard deviations of the observed rewards of all answers.
        neutral: ``hold`` or ``drop``.
        threshold: ``batch`` (mean over all answers) or ``sequence`` (each answer's own mean).
    """

    delta: float
    neutral: str = "hold"
    threshold: str = "batch"


def cut_error(rewards: np.ndarray, units: np.ndarray, price: float, kind: str) -> CutError:
    """Eq. 12 of one answer under one cut.

    Args:
        rewards: ``[T]`` r_t.
        units: ``[T]`` number of the unit that each token is in, not decreasing.
        price: cost of a unit; in eq. 12 c^2, the variance of the reward model's noise.
        kind: r_k is the ``mean`` of the unit or its ``last`` token's reward.

    Returns:
        The error of this answer.
    """
    ids = torch.from_numpy(np.unique(units, return_inverse=True)[1])[None]
    row = torch.from_numpy(np.asarray(rewards, dtype=np.float64))[None]
    shared = unit_rewards(row, ids, torch.ones_like(ids, dtype=torch.bool), kind)
    num_units = int(ids.max()) + 1
    return CutError(float((row - shared).square().sum()), price * num_units, num_units)


def message_units(answers: Sequence[DenseAnswer], cut: AdaptiveCut) -> list[np.ndarray]:
    """The adaptive cut, by the same code as in training: threshold, Schmitt trigger, messages.

    Args:
        answers: one batch; their observed rewards give the threshold and the deviation.
        cut: how to cut.

    Returns:
        One ``[T]`` int64 array of message numbers an answer.
    """
    rewards, valid = _padded([answer.observed for answer in answers])
    baseline, std = baseline_and_std(rewards, valid, cut.threshold)
    delta = delta_in_signal_units(cut.delta, "deviations", std)
    ids = message_ids(signs(rewards, valid, baseline, delta, cut.neutral), valid)
    return [ids[i, : len(answer.observed)].numpy() for i, answer in enumerate(answers)]


def optimal_units(rewards: np.ndarray, penalty: float) -> np.ndarray:
    """The cut with the least ``sum (r_t - mean_k)^2 + penalty * K``, found exactly by PELT.

    ``ruptures.KernelCPD`` with the linear kernel has the cost of ``Pelt(model="l2")`` with
    ``min_size=1, jump=1`` and searches in C, hundreds of times as fast.

    Args:
        rewards: ``[T]``, T at least 1.
        penalty: cost of a unit, above 0; c^2 for eq. 12.

    Returns:
        ``[T]`` int64 unit numbers.
    """
    assert penalty > 0, penalty
    units = np.zeros(len(rewards), dtype=np.int64)
    if len(rewards) < 2:
        return units
    centred = (rewards - rewards.mean())[:, None]
    search = ruptures.KernelCPD(kernel="linear", min_size=1, jump=1)
    ends = search.fit_predict(centred, pen=penalty)
    units[ends[:-1]] = 1
    return units.cumsum()


def compare_cuts(
    answers: Sequence[DenseAnswer], price: float, cut: AdaptiveCut, kind: str = "mean"
) -> dict[str, CutError]:
    """Eq. 12 of each of ``CUTS``, summed over the answers.

    Args:
        answers: one batch.
        price: cost of a unit, above 0; c^2 for eq. 12.
        cut: how the message cut is made.
        kind: r_k, see ``cut_error``. The optimum is the optimum for ``mean``.
    """
    messages = message_units(answers, cut)
    units = {
        "sequence": [np.zeros(len(answer.judged), dtype=np.int64) for answer in answers],
        "step": [answer.steps for answer in answers],
        "token": [np.arange(len(answer.judged)) for answer in answers],
        "message": messages,
    }
    errors = {name: total_error(answers, cuts, price, kind) for name, cuts in units.items()}
    best = [optimal_units(answer.judged, price) for answer in answers]
    return errors | {OPTIMUM: total_error(answers, best, price, "mean")}


def total_error(
    answers: Sequence[DenseAnswer], units: Sequence[np.ndarray], price: float, kind: str
) -> CutError:
    """Eq. 12 summed over answers, each with its cut."""
    errors = [
        cut_error(answer.judged, cut, price, kind)
        for answer, cut in zip(answers, units, strict=True)
    ]
    return CutError(
        approximation=sum(error.approximation for error in errors),
        noise=sum(error.noise for error in errors),
        num_units=sum(error.num_units for error in errors),
    )


def found_in_noise(
    answers: Sequence[DenseAnswer], noise: float, penalty: str, price: float
) -> CutError:
    """Change points found by PELT in the *observed* rewards, judged on r_t.

    What an exact search that sees no more than the adaptive cut does.

    Args:
        answers: one batch.
        noise: c.
        penalty: of the search, a key of ``PRICES``.
        price: cost of a unit in the result.
    """
    cuts = [
        optimal_units(answer.observed, PRICES[penalty](len(answer.observed)) * noise**2)
        for answer in answers
    ]
    return total_error(answers, cuts, price, "mean")


def error_frontier(answers: Sequence[DenseAnswer], price: float) -> list[CutError]:
    """The least error for a number of units, from one an answer to one a token.

    The convex hull of that curve: PELT at rising penalties gives its corners.

    Args:
        answers: one batch.
        price: cost of a unit, above 0; weighs K in the result, the corners do not depend on it.

    Returns:
        Corners in the order of K.
    """
    largest = max(float(np.square(a.judged - a.judged.mean()).sum()) for a in answers)
    penalties = np.geomspace(1e-3 * price, max(largest, price) * 1.01, 40)
    corners = {}
    for penalty in penalties:
        cuts = [optimal_units(answer.judged, penalty) for answer in answers]
        error = total_error(answers, cuts, price, "mean")
        corners[error.num_units] = error
    tokens = [np.arange(len(answer.judged)) for answer in answers]
    every = total_error(answers, tokens, price, "mean")
    corners[every.num_units] = every
    return [corners[count] for count in sorted(corners)]


def estimate_noise(rewards: Sequence[np.ndarray]) -> float:
    """c of eq. 11 from rewards alone: spread of neighbouring tokens' differences.

    A difference of neighbours is noise of variance 2 c^2, but at the few tokens where the true
    reward jumps; the median absolute deviation does not see these. Where less than half of the
    neighbours differ at all it is 0.

    Args:
        rewards: one ``[T]`` array an answer; differences across answers are not taken.

    Returns:
        c in reward units; 0 where there are no differences.
    """
    differences = np.concatenate([np.zeros(0), *[np.diff(row) for row in rewards]])
    if not differences.size:
        return 0.0
    deviations = np.abs(differences - np.median(differences))
    return float(MAD_TO_STD * np.median(deviations) / np.sqrt(2))


def _padded(rows: Sequence[np.ndarray]) -> tuple[Tensor, Tensor]:
    """Rows as ``[B, R]`` float64 and the bool mask of what is not padding."""
    width = max(len(row) for row in rows)
    rewards = torch.zeros(len(rows), width, dtype=torch.float64)
    valid = torch.zeros(len(rows), width, dtype=torch.bool)
    for place, row in enumerate(rows):
        rewards[place, : len(row)] = torch.from_numpy(np.asarray(row, dtype=np.float64))
        valid[place, : len(row)] = True
    return rewards, valid
