"""The demonstration's step-labelled data: sums of small numbers, added one at a time.

They are what a model of 135M parameters can do at times: shown one example, SmolLM2-135M-Instruct
meets the answer in about a third of its tries. A step is labelled 1 if and only if it adds the
next number to the total so far, rightly, and all steps before it are right. Planted errors are
those that the model makes: a wrong result, other numbers than the problem's, all numbers on one
line, an answer that is not the total.
"""

from __future__ import annotations

import hashlib
from itertools import product
from random import Random
from typing import Literal

from megatron_amrlhf.errors import UserError

SYSTEM = "You add numbers step by step."
EXAMPLE = (2, 3, 4)
LARGEST, TERMS = 8, 3
HELDOUT_SHARE = 5
"""One problem in this many, by a hash of its numbers, belongs to the held-out split."""

_KINDS = ("result", "result", "operand", "operand", "line", "answer")
Split = Literal["train", "heldout"]


def generate_sums(count: int, seed: int, split: Split = "train", error_rate: float = 0.6) -> list:
    """Makes ``count`` different sums with labelled solutions.

    The problems depend on (seed, split) only. No problem is in both splits, whatever the seeds.

    Args:
        count: problems wanted.
        seed: of everything random.
        split: which of the two disjoint sets of problems to draw from.
        error_rate: share of solutions with an error, in [0, 1].

    Returns:
        ``{"system", "history", "prompt", "steps": [str], "labels": [0 or 1], "answer"}`` each;
        ``history`` is the example. Half of the wrong solutions end with their first wrong step.

    Raises:
        UserError: there are not that many different problems.
    """
    every = [terms for terms in product(range(1, LARGEST + 1), repeat=TERMS) if terms != EXAMPLE]
    mine = [terms for terms in every if _is_heldout(terms) == (split == "heldout")]
    if count > len(mine):
        raise UserError(f"only {len(mine)} of {count} different problems found; ask for fewer")
    drawn = Random(f"sums/{seed}/{split}").sample(mine, len(mine))[:count]
    errors = [Random(f"sum errors/{seed}/{split}/{number}") for number in range(count)]
    return [_problem(terms, rng, error_rate) for terms, rng in zip(drawn, errors, strict=True)]


def _is_heldout(terms: tuple[int, ...]) -> bool:
    digest = hashlib.sha256(repr(terms).encode()).digest()
    return int.from_bytes(digest[:8], "big") % HELDOUT_SHARE == 0


def _problem(terms: tuple[int, ...], rng: Random, error_rate: float) -> dict:
    steps, labels = _solution(terms), [1] * TERMS
    if rng.random() < error_rate:
        steps, first = _wrong(terms, rng)
        labels = [int(place < first) for place in range(len(steps))]
    return {
        "system": SYSTEM,
        "history": [[_question(EXAMPLE), "\n".join(_solution(EXAMPLE))]],
        "prompt": _question(terms),
        "steps": steps,
        "labels": labels,
        "answer": str(sum(terms)),
    }


def _question(terms: tuple[int, ...]) -> str:
    return " + ".join(map(str, terms))


def _solution(terms: tuple[int, ...]) -> list[str]:
    return _go_on([], terms[0], terms[1:])


def _go_on(steps: list[str], total: int, rest: tuple[int, ...]) -> list[str]:
    """Adds what is left to the total, and tells the answer."""
    for term in rest:
        steps = [*steps, f"{total} + {term} = {total + term}"]
        total += term
    return [*steps, f"The answer is {total}."]


def _wrong(terms: tuple[int, ...], rng: Random) -> tuple[list[str], int]:
    """A solution with one error, and the number of the first wrong step."""
    right, kind = _solution(terms), rng.choice(_KINDS)
    if kind == "answer":
        return [*right[:-1], f"The answer is {_other(sum(terms), rng)}."], TERMS - 1
    if kind == "line":
        result = _other(sum(terms), rng)
        return _go_on([f"{_question(terms)} = {result}"], result, ()), 0
    first = rng.randrange(TERMS - 1)
    left, term = sum(terms[: first + 1]), terms[first + 1]
    result = left + term
    if kind == "result":
        result = _other(result, rng)
    elif rng.random() < 0.5:
        left = _other(left, rng)
        result = left + term
    else:
        term = _other(term, rng)
        result = left + term
    steps = [*right[:first], f"{left} + {term} = {result}"]
    stops = rng.random() < 0.5
    return (steps if stops else _go_on(steps, result, terms[first + 2 :])), first


def _other(number: int, rng: Random) -> int:
    """Another number of about the same size."""
    return rng.choice([x for x in range(1, max(10, number + 10)) if x != number])
