"""The judge of answers: a reference answer and a whole text in, right, wrong or a doubt out."""

from __future__ import annotations

import re

from megatron_amrlhf.rewards.judge.comparing import compare
from megatron_amrlhf.rewards.judge.final_answer import Statement, final_of, given_answer
from megatron_amrlhf.rewards.judge.kinds import Equation, Formula, Words, read
from megatron_amrlhf.rewards.judge.outcomes import Doubt, Outcome
from megatron_amrlhf.rewards.judge.text import tidy

_PLACEHOLDERS = {"unknown", "n/a", "nan", "null", "tbd", "todo"}
_WORD = re.compile(r"[A-J]|[A-Za-z]{2,}(?: [A-Za-z]+)*")
_REASON = re.compile(r"[,;]?\s+(?:because|since)\b")
_CLAUSE = re.compile(r"\s+(?:as|so|which|where|when|after|given|due|for)\b|[,;:]\s+(?!\d)|\s+\(")
# In a clause that may change what stands before it.
_OPEN = re.compile(
    r"\d|\b(?:not|or|but|maybe|perhaps|possibly|probably|guess|unless|if|and|alternatively|think|"
    r"half|hundred|thousand|million|dozen)\b",
    re.IGNORECASE,
)


def judge(reference: str, text: str) -> Outcome:
    """Whether ``text`` gives ``reference`` as its final answer.

    Args:
        reference: an answer, or a whole solution with ``#### answer`` or ``\\boxed{answer}``.
        text: the policy's whole answer.
    """
    reference = given_answer(reference)
    tidied = tidy(reference)
    if not re.search(r"[A-Za-z0-9\\]", tidied) or tidied.lower() in _PLACEHOLDERS:
        return Doubt("bad_reference", f"nothing to compare with in {reference[:40]!r}")
    final = final_of(text, type(read(tidied)))
    if final is None:
        return False
    outcome = _meets(reference, final.statement)
    others = [_meets(reference, other) for other in final.others]
    if outcome is True and (final.doubt or any(other is not True for other in others)):
        return Doubt("ambiguous", final.doubt or "another answer stands beside it")
    if outcome is False and True in others:
        return Doubt("ambiguous", "another answer stands beside it")
    is_named = not final.is_stated and _WORD.fullmatch(tidied) and _holds(text, tidied)
    if outcome is False and is_named:
        return Doubt("ambiguous", "it is named, but not as the answer")
    return outcome


def _holds(text: str, word: str) -> bool:
    flags = 0 if len(word) == 1 else re.IGNORECASE  # "a" is no choice
    return bool(re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text, flags))


def _meets(reference: str, statement: Statement) -> Outcome:
    """Whether a statement gives the reference answer, without the clause that explains it."""
    outcome = compare(reference, statement.text)
    said = _REASON.split(statement.text)[0]
    if outcome is True or not said.strip():
        return outcome
    if said != statement.text:
        outcome = compare(reference, said)
    cut = _CLAUSE.search(said)
    if outcome is True or cut is None or _OPEN.search(said[cut.start() :]):
        return outcome
    if not isinstance(read(tidy(said)), Words | Formula | Equation):
        return outcome
    return compare(reference, said[: cut.start()])
