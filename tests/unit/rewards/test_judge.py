"""The judge of answers: a table of pairs with verdicts, whole texts, and what a policy may try."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_amrlhf.rewards.judge.judging import judge
from megatron_amrlhf.rewards.judge.outcomes import DOUBTS

TABLE = Path(__file__).with_name("answers.txt")


def rows() -> dict[str, list[tuple[str, str, str]]]:
    """Verdict, reference and answer, by the table's sections."""
    found: dict[str, list[tuple[str, str, str]]] = {}
    for line in TABLE.read_text(encoding="ascii").splitlines():
        if line.startswith("## "):
            pairs = found.setdefault(line[3:], [])
        elif "::" in line and not line.startswith("#"):
            verdict, reference, answer = (cell.strip() for cell in line.split(" :: "))
            pairs.append((verdict.removesuffix(" both"), reference, answer))
            if verdict.endswith(" both"):
                pairs.append((verdict.removesuffix(" both"), answer, reference))
    return found


SECTIONS = rows()


def verdict_of(reference: str, text: str) -> str:
    outcome = judge(reference, text)
    if isinstance(outcome, bool):
        return "right" if outcome else "wrong"
    assert outcome.detail
    return outcome.reason


@pytest.mark.parametrize("section", SECTIONS)
def test_pairs_have_their_verdict(section):
    found = [(verdict_of(r, rf"\boxed{{{a}}}"), r, a) for _, r, a in SECTIONS[section]]
    assert found == SECTIONS[section]


@pytest.mark.parametrize("section", SECTIONS)
def test_a_reference_answer_is_right_against_itself(section):
    for reference in dict.fromkeys(r for _, r, _ in SECTIONS[section] if r.strip(r"?\text{ }")):
        boxed, stated = rf"So \boxed{{{reference}}}.", f"The answer is {reference}"
        for text in (boxed, rf"So $\boxed{{{reference}}}$", f"It is so.\n#### {reference}", stated):
            assert verdict_of(reference, text) == "right", text


def test_the_table_is_large_and_has_every_verdict():
    pairs = [row for section in SECTIONS.values() for row in section]
    assert len(pairs) >= 200
    assert {verdict for verdict, _, _ in pairs} >= {"right", "wrong", "form", "unit", "unreadable"}
    assert {verdict for verdict, _, _ in pairs} <= {"right", "wrong", *DOUBTS}
