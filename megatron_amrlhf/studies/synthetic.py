"""Synthetic dense rewards: what the method assumes, piecewise-constant truth under white noise."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_amrlhf.studies.segmentation import CutError, DenseAnswer, total_error


@dataclass(frozen=True)
class SyntheticRewards:
    """Recipe of a batch of answers with known true rewards.

    Attributes:
        num_answers: answers.
        num_tokens: T of each.
        message_tokens: mean length of a run of constant true reward (geometric lengths).
        step_tokens: mean length of a step (geometric), independent of the runs.
        levels: ``two`` (good and bad in turn, +1 and -1) or ``many`` (each run's own level, from a
            standard normal distribution). Either has unit standard deviation.
    """

    num_answers: int
    num_tokens: int
    message_tokens: float
    step_tokens: float
    levels: str


def make_answers(
    recipe: SyntheticRewards, snr: float, noise: float, seed: int, judge: str = "true"
) -> list[DenseAnswer]:
    """Draws answers.

    Args:
        recipe: what to draw.
        snr: amplitude ratio, standard deviation of the true rewards over that of the noise; with
            two levels the jump between them is 2 * snr * noise.
        noise: c, standard deviation of the white noise.
        seed: the same seed gives the same truth and the same unit noise at every snr.
        judge: r_t of eq. 12: the ``true`` or the ``observed`` rewards.
    """
    generator = np.random.default_rng(seed)
    answers = []
    for _ in range(recipe.num_answers):
        runs = _runs(generator, recipe.num_tokens, recipe.message_tokens)
        if recipe.levels == "two":
            levels = (-1.0) ** (np.arange(runs[-1] + 1) + generator.integers(2))
        elif recipe.levels == "many":
            levels = generator.standard_normal(runs[-1] + 1)
        else:
            raise ValueError(f"unknown levels {recipe.levels!r}")
        true = snr * noise * levels[runs]
        observed = true + noise * generator.standard_normal(recipe.num_tokens)
        steps = _runs(generator, recipe.num_tokens, recipe.step_tokens)
        answers.append(DenseAnswer(observed, true if judge == "true" else observed, steps))
    return answers


def decode_two_levels(
    answers: list[DenseAnswer],
    level: float,
    noise: float,
    penalties: tuple[float, ...],
    price: float,
) -> CutError:
    """How well the observed rewards of two levels can be cut at all: a Viterbi decoder.

    Unlike a threshold it looks at the whole answer, knows both levels and c, and gets the best of
    several costs of a switch.

    Args:
        answers: answers of one length, of levels +level and -level.
        level: the true level.
        noise: c.
        penalties: costs of a switch to try, in units of c^2; the least error counts.
        price: cost of a unit in the error, see ``segmentation.cut_error``.
    """
    observed = np.stack([answer.observed for answer in answers]) / noise
    costs = np.stack([np.square(observed + level / noise), np.square(observed - level / noise)])
    errors = []
    for penalty in penalties:
        states = _viterbi(costs, penalty)
        switches = np.diff(states, axis=1, prepend=states[:, :1]) != 0
        errors.append(total_error(answers, list(switches.cumsum(axis=1)), price, "mean"))
    return min(errors, key=lambda error: error.total)


def _viterbi(costs: np.ndarray, penalty: float) -> np.ndarray:
    """``[B, T]`` cheapest state of each token for ``[2, B, T]`` costs and a cost of a switch."""
    _, num_answers, num_tokens = costs.shape
    best = costs[:, :, 0]
    came_from = np.empty((num_tokens, 2, num_answers), dtype=np.int64)
    own = np.array([[0], [1]])
    for token in range(1, num_tokens):
        switched = best[::-1] + penalty
        came_from[token] = np.where(switched < best, 1 - own, own)
        best = np.minimum(switched, best) + costs[:, :, token]
    states = np.empty((num_answers, num_tokens), dtype=np.int64)
    states[:, -1] = best.argmin(axis=0)
    rows = np.arange(num_answers)
    for token in range(num_tokens - 1, 0, -1):
        states[:, token - 1] = came_from[token, states[:, token], rows]
    return states


def _runs(generator: np.random.Generator, num_tokens: int, mean_tokens: float) -> np.ndarray:
    """``[num_tokens]`` number of the run that each token is in; lengths are geometric."""
    starts = generator.random(num_tokens) < 1.0 / mean_tokens
    starts[0] = False
    return starts.astype(np.int64).cumsum()
