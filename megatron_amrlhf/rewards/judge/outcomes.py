"""What a judgement can be: right, wrong, or a doubt with its reason."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

# Why an answer is not judged. Each has a metric of its own, told on the algorithms page.
DOUBTS = (  # of the answer
    "ambiguous",  # the text contradicts itself, guesses, or takes the answer back
    "unreadable",  # the answer cannot be read
    "form",  # it may be right, but is not worked out, rounded, or of another kind
    "unit",  # it may be right, but in another unit
    "undecided",  # math-verify and the values at points disagree, or math-verify raises
)
FAILURES = (  # of the data or the machine; too many of them end a run
    "no_reference",  # the prompt has no reference answer
    "bad_reference",  # it cannot be read
    "timeout",  # the comparison took longer than reward.verify_seconds
    "worker",  # the process that compares died or does not start
)
REASONS = DOUBTS + FAILURES


@dataclass(frozen=True)
class Doubt:
    """Why an answer is not judged: one of ``REASONS``, and the case in words."""

    reason: str
    detail: str


Outcome = bool | Doubt


def all_of(outcomes: Iterable[Outcome]) -> Outcome:
    """False where one is; else the first doubt; else True."""
    found = list(outcomes)
    if any(outcome is False for outcome in found):
        return False
    return next((outcome for outcome in found if isinstance(outcome, Doubt)), True)
