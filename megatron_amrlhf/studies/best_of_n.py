"""Best-of-n accuracy of outcome and process supervision, figure 2, exact instead of sampled."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from megatron_amrlhf.data.jsonl import Requirement, read_numbered_jsonl
from megatron_amrlhf.errors import UserError
from megatron_amrlhf.rewards.outcome import OUTCOMES, aggregate_steps


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


CHOICES = {"PRM_P" if kind == "prefix" else f"PRM_O {kind}": kind for kind in OUTCOMES}
RANDOM, ORACLE = "random", "oracle (pass@n)"


def outcome_scores(solutions: Sequence[ScoredSolution], kind: str) -> list[float]:
    """One score a solution from its steps; ``kind`` as for `aggregate_steps`."""
    width = max(len(solution.steps) for solution in solutions)
    scores = torch.zeros(len(solutions), width, dtype=torch.float64)
    present = torch.zeros(len(solutions), width, dtype=torch.bool)
    for row, solution in enumerate(solutions):
        count = len(solution.steps)
        scores[row, :count] = torch.tensor(solution.steps, dtype=torch.float64)
        present[row, :count] = True
    return aggregate_steps(scores, present, kind).tolist()


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
    by_orm = [[x.orm for x in each if x.orm is not None] for each in problems.values()]
    chosen = {}
    if [len(each) for each in by_orm] == [len(each) for each in problems.values()]:
        chosen["ORM"] = by_orm
    for name, kind in CHOICES.items():
        chosen[name] = [outcome_scores(each, kind) for each in problems.values()]
    correct = [[solution.correct for solution in each] for each in problems.values()]
    table = {RANDOM: [_mean([sum(c) / len(c) for c in correct])] * len(sizes)}
    for name, scores in chosen.items():
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
    required: dict[str, Requirement] = {
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
    try:
        return type(value) in (int, float) and math.isfinite(value)
    except OverflowError:  # an integer that is no float
        return False


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
