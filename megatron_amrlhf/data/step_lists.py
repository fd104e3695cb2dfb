"""Solutions given as lists of steps: ``{prompt or problem, steps, labels, ratings or scores}``.

=================================  =====================  ====================================
keys                               num_attributes         label of a step
=================================  =====================  ====================================
``prompt, steps, labels``          1                      0, 1, false, true, or a float in [0, 1]
``problem, steps, ratings``        1 (PRM800K)            -1, 0 or 1, mapped to (r + 1) / 2
``prompt, steps, labels``          5                      [5 numbers in 0..4], divided by 4
``prompt, steps, scores``          5 (HelpSteer, A.2)     as above, but [dimension][sentence]
=================================  =====================  ====================================

A label or rating of null is a step that nobody has judged. ``"finished": false`` says that the
solution goes on after its last step, as where annotators stopped at the first mistake;
``"truncated": true`` that it was cut off within its last step, which then must have no label.
"""

from __future__ import annotations

from typing import Any

from megatron_amrlhf.data.chat import user_turn
from megatron_amrlhf.data.keys import need, need_steps, need_text, number
from megatron_amrlhf.data.step_record import (
    ATTRIBUTES,
    MAX_SCORE,
    Labels,
    StepRecord,
    answer_end,
    check_counts,
    scores_by_dimension,
)
from megatron_amrlhf.errors import UserError

PROMPT_KEYS = ("prompt", "problem")
LABEL_KEYS = {1: ("labels", "ratings"), 5: ("labels", "scores")}


def detect_keys(record: dict, num_attributes: int) -> tuple[str, str] | None:
    """(prompt key, label key) of a record, or None if it is of no known kind."""
    for prompt_key in PROMPT_KEYS:
        for label_key in LABEL_KEYS[num_attributes]:
            if prompt_key in record and "steps" in record and label_key in record:
                return prompt_key, label_key
    return None


def read_step_list(
    record: dict, where: str, keys: tuple[str, str], num_attributes: int
) -> list[StepRecord]:
    """One solution of a line.

    Args:
        record: the line's object.
        where: ``path:line``.
        keys: from `detect_keys` of the file's first line.
        num_attributes: D, 1 or 5.

    Raises:
        UserError: missing keys, wrong types, counts or ranges.
    """
    prompt_key, label_key = keys
    prompt = need_text(record, prompt_key, where)
    steps = need_steps(record, "steps", where)
    value = need(record, label_key, where)
    if not isinstance(value, list):
        raise UserError(f"{where}: '{label_key}' must be a list; correct this line")
    labels = _labels(value, label_key, num_attributes, where)
    check_counts(len(steps), len(labels), "steps", label_key, where)
    end = answer_end(record, where)
    if end == "within step" and labels[-1] is not None:
        raise UserError(
            f"{where}: the answer is truncated, so its last step is not whole and cannot have a "
            f"label: make it null in '{label_key}' or drop the step"
        )
    return [StepRecord(user_turn(prompt), steps, labels, end=end)]


def _labels(value: list, key: str, num_attributes: int, where: str) -> Labels:
    if key == "scores":
        return tuple(scores_by_dimension(value, key, where))
    if num_attributes == 1:
        return tuple(_correctness(item, key, where) for item in value)
    return tuple(_attributes(item, key, where) for item in value)


def _correctness(item: Any, key: str, where: str) -> tuple[float, ...] | None:
    if item is None:
        return None
    if key == "labels":
        return (number(item, 0, 1, key, where),)
    return (rating_label(item, key, where),)


def rating_label(item: Any, key: str, where: str) -> float:
    """PRM800K's rating -1, 0 or 1 as 0, 0.5 or 1.

    Raises:
        UserError: it is something else.
    """
    rating = number(item, -1, 1, key, where)
    if rating % 1:
        raise UserError(f"{where}: '{key}' must be -1, 0 or 1; correct this line")
    return (rating + 1) / 2


def _attributes(item: Any, key: str, where: str) -> tuple[float, ...] | None:
    if item is None:
        return None
    if not isinstance(item, list):
        raise UserError(f"{where}: '{key}' must be lists of scores; correct this line")
    if len(item) != len(ATTRIBUTES):
        raise UserError(f"{where}: '{key}' must have {len(ATTRIBUTES)} scores a step")
    return tuple(number(x, 0, MAX_SCORE, key, where) / MAX_SCORE for x in item)
