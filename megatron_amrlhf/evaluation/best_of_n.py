"""Best-of-n accuracy of outcome and process supervision, figure 2, exact instead of sampled."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from megatron_amrlhf.data.jsonl import read_numbered_jsonl
from megatron_amrlhf.errors import UserError

RIGHT_STEP = 0.5  # a step with this probability or more counts as right


@dataclass(frozen=True)
class ScoredSolution:
    """One answer with its scores.

    Attributes:
        correct: whether it solves the problem.
        orm: score of an outcome reward model, or None.
        steps: the PRM's probability that each step is right; at least one.
    """

    correct: bool
    orm: float | None
    steps: tuple[float, ...]


def right_prefix(steps: Sequence[float]) -> float:
    """PRM_P as read here: the share of the steps before the first one judged wrong.

    Process supervision judges each step on its own, and as in PRM800K nothing after the first
    wrong step counts. Answers without a wrong step tie.
    """
    wrong = (i for i, probability in enumerate(steps) if probability < RIGHT_STEP)
    return next(wrong, len(steps)) / len(steps)


SCORES: dict[str, Callable[[ScoredSolution], float | None]] = {
    "ORM": lambda solution: solution.orm,
    "PRM_O last": lambda solution: solution.steps[-1],
    "PRM_O min": lambda solution: min(solution.steps),
    "PRM_O mean": lambda solution: math.fsum(solution.steps) / len(solution.steps),
    "PRM_O product": lambda solution: math.prod(solution.steps),
    "PRM_P": lambda solution: right_prefix(solution.steps),
}
RANDOM, ORACLE = "random", "oracle (pass@n)"


def best_of_n_accuracy(scores: Sequence[float], correct: Sequence[bool], n: int) -> float:
    """Expected accuracy of the best-scored of n answers drawn without replacement.

    Exact over all subsets: the best of a subset lies among the answers that share a score with
    probability ``[C(rest + ties, n) - C(rest, n)] / C(N, n)``, rest being the answers below; equal
    scores are equally likely to be picked.

    Args:
        scores: ``[N]`` score of each answer to one problem.
        correct: ``[N]``.
        n: 1 to N.
    """
    assert len(scores) == len(correct) and 1 <= n <= len(scores), (len(scores), n)
    ranked = sorted(zip(scores, correct, strict=True), key=lambda pair: -pair[0])
    rest, expected, subsets = len(ranked), 0.0, math.comb(len(ranked), n)
    for _, group in groupby(ranked, key=lambda pair: pair[0]):
        ties = [is_correct for _, is_correct in group]
        picked = math.comb(rest, n) - math.comb(rest - len(ties), n)
        expected += picked / subsets * (sum(ties) / len(ties))
        rest -= len(ties)
    return expected


def pass_at_n(correct: Sequence[bool], n: int) -> float:
    """Probability that at least one of n answers drawn without replacement is correct."""
    return 1.0 - math.comb(len(correct) - sum(correct), n) / math.comb(len(correct), n)


def compare_supervision(
    problems: dict[str, list[ScoredSolution]], sizes: Sequence[int]
) -> dict[str, list[float]]:
    """Accuracy of each way to choose, averaged over problems.

    Args:
        problems: the solutions to each problem; every problem has at least ``max(sizes)``.
        sizes: the n to evaluate.

    Returns:
        Name of the choice to its accuracy at each size. ORM is there only if every answer has one.
    """
    chosen = {
        name: [[score(solution) for solution in solutions] for solutions in problems.values()]
        for name, score in SCORES.items()
    }
    correct = [[solution.correct for solution in each] for each in problems.values()]
    table = {RANDOM: [_mean([sum(c) / len(c) for c in correct])] * len(sizes)}
    for name, scores in chosen.items():
        if all(score is not None for row in scores for score in row):
            table[name] = [
                _mean([best_of_n_accuracy(s, c, n) for s, c in zip(scores, correct, strict=True)])
                for n in sizes
            ]
    return table | {ORACLE: [_mean([pass_at_n(c, n) for c in correct]) for n in sizes]}


def read_solutions(path: str | Path, logits: bool) -> dict[str, list[ScoredSolution]]:
    """Reads scored answers, one JSON object a line, grouped by problem.

    Args:
        path: lines ``{"problem_id", "correct", "step_scores", "orm" (optional)}``.
        logits: step scores are raw head outputs, a sigmoid makes them probabilities; else they
            must be in [0, 1].

    Raises:
        UserError: with file and line.
    """
    required = {
        "problem_id": (str, int),
        "correct": bool,
        "step_scores": _logits if logits else _probabilities,
    }
    problems: dict[str, list[ScoredSolution]] = {}
    with_orm = None
    for number, record in read_numbered_jsonl(path, required):
        orm = record.get("orm")
        if orm is not None and not _is_number(orm):
            raise UserError(f"{path}:{number}: 'orm' must be a finite number; correct this line")
        if with_orm not in (None, orm is not None):
            raise UserError(
                f"{path}:{number}: 'orm' is given on some lines only; give it on all or none"
            )
        with_orm = orm is not None
        steps = [_sigmoid(x) if logits else float(x) for x in record["step_scores"]]
        solution = ScoredSolution(record["correct"], orm, tuple(steps))
        problems.setdefault(str(record["problem_id"]), []).append(solution)
    return problems


def _probabilities(value: Any) -> str | None:
    problem = _logits(value)
    if problem is None and not all(0 <= score <= 1 for score in value):
        problem = "must be probabilities in [0, 1] (raw head outputs: give --logits)"
    return problem


def _logits(value: Any) -> str | None:
    if not isinstance(value, list) or not value or not all(map(_is_number, value)):
        return "must be a list of finite numbers, one a step, at least one"
    return None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
