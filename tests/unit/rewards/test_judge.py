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
    references = dict.fromkeys(r for _, r, _ in SECTIONS[section])
    for reference in references:
        boxed, stated = rf"So \boxed{{{reference}}}.", f"The answer is {reference}"
        for text in (boxed, rf"So $\boxed{{{reference}}}$", f"It is so.\n#### {reference}", stated):
            assert verdict_of(reference, text) == "right", text


def test_the_table_is_large_and_has_every_verdict():
    pairs = [row for section in SECTIONS.values() for row in section]
    assert len(pairs) >= 200
    assert {verdict for verdict, _, _ in pairs} >= {"right", "wrong", "form", "unit", "unreadable"}
    assert {verdict for verdict, _, _ in pairs} <= {"right", "wrong", *DOUBTS}


MATRIX = r"\begin{pmatrix} 1 \\ 2 \\ 5 \end{pmatrix}"
TEXTS = [
    # the last box counts, outside of reasoning
    ("7", r"First \boxed{14}. Wait, that is wrong. \boxed{7}", "right"),
    ("14", r"First \boxed{14}. Wait, that is wrong. \boxed{7}", "wrong"),
    ("7", r"<think>I get \boxed{14}.</think> So \boxed{7}.", "right"),
    ("7", r"I get \boxed{14}.</think> So \boxed{7}.", "right"),
    ("7", r"<think>I get \boxed{7}.</think> So \boxed{14}.", "wrong"),
    ("7", r"<think>I get \boxed{7}. Let me", "wrong"),
    ("7", r"[THINK]\boxed{14}[/THINK]The answer is 7.", "right"),
    ("7", r"\boxed{\boxed{7}}", "right"),
    ("3, 5", r"$x=\boxed{3}$ or $x=\boxed{5}$", "right"),
    ("3", r"$x=\boxed{3}$ or $x=\boxed{5}$", "wrong"),
    (MATRIX, MATRIX, "right"),
    (MATRIX, r"\boxed{5}", "wrong"),
    (r"10\pi \text{ cm}^2", r"The area is $\boxed{10\pi}$ cm$^2$.", "right"),
    ("7", r"\boxed{7}. So the answer is 7.", "right"),
    # then hashes, then what is stated, then the last number
    ("72", "24 + 48 = 72 clips.\n#### 72", "right"),
    ("72", "#### Step 1\nAdd: 24 + 48.\n#### 72\nQuestion: What is 5?", "right"),
    ("71", "24 + 48 = 72 clips.\n#### 72", "wrong"),
    ("18", "The answer is 18 because 9 * 2 = 18 and not 20.", "right"),
    ("18", "Answer: **18**", "right"),
    (
        "18",
        "The final answer to the question is: $18$. I hope that helps, see 3!",
        "right",
    ),
    ("0", "So it is.\n\n# Answer\n\n0", "right"),
    (r"(-\infty, \infty)", "Right.\n\n# Answer\n\n(-\\infty, \\infty)", "right"),
    ("5", "The answer is +5.", "right"),
    ("3.5", "The answer is 3.5. Thanks.", "right"),
    ("(2, 3)", "The answer is (2, 3).", "right"),
    ("3, 5", "The answers are 3, 5.", "right"),
    ("18", r"She makes \$18 every day.", "right"),
    ("18 dollars", "It costs 18", "right"),
    ("18", "She has 18 apples left and Tom is happy.", "right"),
    ("12", "\u7b54\u6848\u662f12\u3002", "right"),
    ("1:2", "The ratio is 1:2.", "right"),
    ("x=3", "So $x = 3$.", "right"),
    ("2\\sqrt{3}", "So it is $2\\sqrt{3}$.", "right"),
    ("2\\sqrt{3}", "So it is 2.", "wrong"),
    ("5 cm", "It is 5 m.", "wrong"),
    ("-3", "The answer is 3", "wrong"),
    ("-3", "We get 10 - 3", "ambiguous"),
    ("30", "It was at 3:30", "ambiguous"),
    ("7", "3 + 4 = 7", "right"),
    ("B", "The correct answer is (B) Evelyn.", "right"),
    ("B", "The answer is B because it is large.", "right"),
    ("Evelyn", "The answer is Evelyn, since she ran.", "right"),
    ("yes", "Yes.", "right"),
    ("July 4", "The party is on July 4.", "right"),
    ("yes", "Yes, it is odd.", "ambiguous"),
    ("no", "I cannot tell.", "wrong"),
    ("B", "I choose (B).", "form"),
    ("B", "A bee.", "form"),
    ("6", "The answer is 6 apples, not 5.", "unreadable"),
    ("1200", "So $x = 1,200$.", "right"),
    # a reference may be a whole solution
    ("16 - 7 = 9\n#### 9", "The answer is 9", "right"),
    (r"It is \boxed{\frac{1}{2}}.", r"\boxed{0.5}", "right"),
    # nothing to compare with
    ("?", "12", "bad_reference"),
    ("n/a", "n/a", "bad_reference"),
    ("...", "12", "bad_reference"),
]


@pytest.mark.parametrize(("reference", "text", "verdict"), TEXTS)
def test_texts_have_their_verdict(reference, text, verdict):
    assert verdict_of(reference, text) == verdict


@pytest.mark.parametrize(
    ("reference", "text"),
    [
        # several answers, one of them right
        ("3", "The answer is 1 or 2 or 3."),
        ("3", r"\boxed{1}, \boxed{2}, \boxed{3}"),
        ("3", r"\boxed{1} \boxed{2} \boxed{3}"),
        ("3", "The answer is 1. The answer is 2. The answer is 3."),
        ("3", "#### 1\n#### 2\n#### 3"),
        ("3", r"It is \boxed{1}. It is \boxed{2}. It is \boxed{3}."),
        ("3", r"Either \boxed{4} holds, but \boxed{3} does too."),
        ("3", "".join(rf"The answer is \boxed{{{n}}}. Wait, wrong. " for n in range(9, 2, -1))),
        ("3", r"\boxed{4}. The answer is 3."),
        ("3", r"\boxed{3}. The answer is 4."),
        ("3", r"\boxed{3}" + "\n#### 4"),
        ("3", "It is 1, 2 or 3"),
        ("3", "The answer is 4, or maybe 3."),
        ("3", "The answer is 3, or maybe 4."),
        ("3", "The answer is between 2 and 3."),
        ("3", "The answer is 1-3."),
        ("B", "The answer is A, B, C or D."),
        ("B", r"\boxed{A B C D}"),
        ("B", "(A) 3 (B) 4 (C) 5 (D) 6"),
        ("B", "The answer is (A) 3 (B) 4."),
        ("yes", "The answer is yes and no."),
        ("yes", "The answer is yes or no."),
        ("even", "The answer is not even."),
        ("3, 5", r"\boxed{1, 2, 3, 4, 5}"),
        # guessed, denied, asked, taken back
        ("7", r"It is not \boxed{7}."),
        ("7", r"Perhaps it is \boxed{7}."),
        ("7", r"\boxed{7} is wrong."),
        ("7", r"\boxed{7}. Wait, I made a mistake."),
        ("7", r"Is it \boxed{7}?"),
        ("7", "Is it 7?"),
        ("7", "The answer isn't 7"),
        ("7", "I do not know, maybe 7"),
        # nothing, or not finished
        ("7", ""),
        ("7", r"\boxed{}"),
        ("7", r"\boxed{7} so \boxed{}"),
        ("7", r"\boxed{7"),
        ("72", r"\boxed{7}\boxed{2}"),
        ("12", r"\boxed{1 2}"),
        ("1200", r"\boxed{1,20,0}"),
        # the question's expression for its value
        ("391", r"\boxed{17 \times 23}"),
        ("391", "The answer is 17 * 23."),
        ("391", r"\boxed{x = 17 \cdot 23}"),
        ("3/7", r"\boxed{\frac{42}{98}}"),
        ("18", "The answer is 5 more than 13"),
        ("5", "The answer is 5 more than 13"),
        ("5", "The answer is 5 plus 13"),
        ("18", "The answer is 18 thousand"),
        ("18", "There are 18 and a half"),
        ("8", "It is 2^8"),
        ("7", r"\boxed{7 = 8}"),
        ("8", r"\boxed{7 = 8}"),
        ("7", r"\boxed{x = 8, y = 7}"),
        ("7", r"\boxed{xy = 7}"),
        ("7", r"\boxed{2x = 7}"),
        ("7", r"\boxed{x > 7}"),
        ("7", r"\boxed{7x}"),
        ("7", "We get x > 7"),
        ("7", "So 2x = 7"),
        ("7", "It is at least 7"),
        ("3", r"So x = \pm 3"),
        ("4", "It was July 4"),
        ("y = 5", "So x = 5"),
        ("7", r"\boxed{7 \cdot \infty}"),
        ("7", r"\boxed{\frac{7}{0}}"),
        ("7", r"\boxed{7 + 10^{-30}}"),
        ("7", r"\boxed{7.0000000000000000000000000001}"),
        ("1.6e-19", r"\boxed{0}"),
        ("x^2", r"\boxed{x^2 + 10^{-40}}"),
    ],
)
def test_what_a_policy_may_try_is_not_right(reference, text):
    assert verdict_of(reference, text) != "right"
