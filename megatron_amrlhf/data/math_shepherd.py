"""Math-Shepherd's schema: the solution as one text with a mark after each step.

``{"input": "QUESTION Step 1: ... MARK\\nStep 2: ... MARK", "label": with + or - for each MARK}``
"""

from __future__ import annotations

import re

from megatron_amrlhf.data.chat import user_turn
from megatron_amrlhf.data.keys import need_text
from megatron_amrlhf.data.step_record import StepRecord
from megatron_amrlhf.errors import UserError

FIRST_STEP = re.compile(r"\s*(?=Step 1\s*:)")
SIGNS = {"+": (1.0,), "-": (0.0,)}


def read_math_shepherd(record: dict, where: str, mark: str) -> list[StepRecord]:
    """The solution of one line.

    Args:
        record: the line's object.
        where: ``path:line``.
        mark: what stands after each step of ``input``.

    Raises:
        UserError: no mark, text after the last one (a step without a label), or a ``label`` that
            is not ``input`` with signs for marks.
    """
    text, signed = need_text(record, "input", where), need_text(record, "label", where)
    *pieces, rest = text.split(mark)
    if not pieces:
        raise UserError(f"{where}: no step mark {mark!r} in 'input'; see data.input_mark")
    if rest.strip():
        raise UserError(
            f"{where}: 'input' goes on after its last step mark ({rest.strip()[:30]!r}), a step "
            "without a label; is the answer truncated? drop this line"
        )
    labels = _signs(pieces, rest, signed, where)
    question = FIRST_STEP.split(pieces[0], maxsplit=1)
    if len(question) != 2 or not question[0].strip():
        raise UserError(f"{where}: no question before 'Step 1:' in 'input'; correct this line")
    steps = tuple(step.strip() for step in (question[1], *pieces[1:]))
    if not all(steps):
        raise UserError(f"{where}: an empty step between two marks of 'input'; correct this line")
    return [StepRecord(user_turn(question[0].strip()), steps, labels)]


def _signs(pieces: list[str], rest: str, signed: str, where: str) -> tuple[tuple[float], ...]:
    """The sign that stands for each mark, by going along both texts."""
    labels, place = [], 0
    for step, piece in enumerate(pieces, start=1):
        place += len(piece)
        sign = signed[place : place + 1]
        if signed[place - len(piece) : place] != piece or sign not in SIGNS:
            raise UserError(
                f"{where}: 'label' is not 'input' with + or - for each mark (at step {step} of "
                f"{len(pieces)}); correct this line"
            )
        labels.append(SIGNS[sign])
        place += 1
    if signed[place:].strip() != rest.strip():
        raise UserError(f"{where}: 'label' goes on after the last step; correct this line")
    return tuple(labels)
