"""The official PRM800K schema: labelled alternatives for every step of a solution.

``{"question": {"problem"}, "label": {"steps": [{"completions": [{"text", "rating", "flagged"}],
"human_completion", "chosen_completion"}], "finish_reason"}, "is_quality_control_question",
"is_initial_screening_question"}``

A solution goes on from the completion that ``chosen_completion`` numbers, or from
``human_completion`` where that is null; where there is neither, it ends.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megatron_amrlhf.data.chat import user_turn
from megatron_amrlhf.data.keys import need, need_text
from megatron_amrlhf.data.rows import RowLeftOut
from megatron_amrlhf.data.step_lists import rating_label
from megatron_amrlhf.data.step_record import StepRecord
from megatron_amrlhf.errors import UserError

LEFT_OUT = {
    "is_quality_control_question": "quality-control rows",
    "is_initial_screening_question": "initial-screening rows",
}
RATING = "rating"
FINAL = "# Answer"  # in the last step of a solution that is whole


@dataclass(frozen=True)
class _Completion:
    """A text for one step; ``label`` is None if it was not rated or is flagged as unsuitable."""

    text: str
    label: tuple[float] | None


def read_prm800k(
    record: dict, where: str, keep_screening: bool, alternatives: bool
) -> list[StepRecord]:
    """The solutions of one line: the path that was chosen, and one for each alternative to a step.

    The chosen path has a label at each rated step of it; where it ends without a choice, the
    step's first completion, the one that the model had sampled, ends it. An alternative is its
    path up to there and one labelled step. A path goes on unless its last step gives the answer.
    Human-written steps, null ratings and completions that
    are flagged as unsuitable have no label.

    Args:
        record: the line's object.
        where: ``path:line``.
        keep_screening: use quality-control and screening rows too.
        alternatives: False: the chosen path only.

    Raises:
        RowLeftOut: quality-control or screening row, bad problem, or nothing in it is labelled.
        UserError: another schema, a rating out of range.
    """
    for key, reason in LEFT_OUT.items():
        if record.get(key) and not keep_screening:
            raise RowLeftOut(reason)
    question, label = need(record, "question", where), need(record, "label", where)
    if not isinstance(question, dict) or not isinstance(label, dict):
        raise UserError(f"{where}: 'question' and 'label' must be objects; correct this line")
    turns = user_turn(need_text(question, "problem", where))
    if label.get("finish_reason") == "bad_problem":
        raise RowLeftOut("bad problems")
    steps = need(label, "steps", where)
    if not isinstance(steps, list):
        raise UserError(f"{where}: 'label.steps' must be a list; correct this line")
    paths = _paths(steps, f"{where}: step", alternatives)
    labelled = [path for path in paths if any(step.label is not None for step in path)]
    if not labelled:
        raise RowLeftOut("rows without a label")
    return [
        StepRecord(
            turns,
            tuple(step.text for step in path),
            tuple(step.label for step in path),
            end="whole" if FINAL in path[-1].text else "after step",
        )
        for path in labelled
    ]


def _paths(steps: list, where: str, alternatives: bool) -> list[list[_Completion]]:
    """The chosen path first, then each alternative with unlabelled steps before it."""
    path: list[_Completion] = []
    others: list[list[_Completion]] = []
    for place, step in enumerate(steps, start=1):
        if not isinstance(step, dict):
            raise UserError(f"{where} {place} must be an object; correct this line")
        found = step.get("completions") or []
        if not isinstance(found, list):
            raise UserError(f"{where} {place}: 'completions' must be a list; correct this line")
        completions = [_completion(item, f"{where} {place}") for item in found]
        choice = _choice(step, len(completions), f"{where} {place}")
        before = [_Completion(passed.text, None) for passed in path]
        others += [
            [*before, other]
            for number, other in enumerate(completions)
            if number != choice and other.label is not None
        ]
        if choice is not None:
            path.append(completions[choice])
        elif step.get("human_completion") is not None:
            path.append(_completion(step["human_completion"], f"{where} {place}"))
        else:
            if completions and completions[0].label is not None:
                others.remove([*before, completions[0]])
                path.append(completions[0])
            break
    return [path, *others] if alternatives else [path]


def _completion(value: Any, where: str) -> _Completion:
    if not isinstance(value, dict):
        raise UserError(f"{where}: a completion must be an object; correct this line")
    text, rating = need_text(value, "text", where), value.get(RATING)
    if rating is None or value.get("flagged"):
        return _Completion(text, None)
    return _Completion(text, (rating_label(rating, RATING, where),))


def _choice(step: dict, count: int, where: str) -> int | None:
    choice = step.get("chosen_completion")
    if choice is not None and (type(choice) is not int or not 0 <= choice < count):
        raise UserError(
            f"{where}: 'chosen_completion' is {choice!r}, but there are {count} completions; "
            "correct this line"
        )
    return choice
