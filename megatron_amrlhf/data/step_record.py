"""One step-labelled solution before tokenization, and the checks that all formats share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megatron_amrlhf.data.chat import End
from megatron_amrlhf.data.keys import number
from megatron_amrlhf.data.known_chat import Message
from megatron_amrlhf.errors import UserError

MAX_SCORE = 4
"""HelpSteer's highest score; scores are divided by it."""
ATTRIBUTES = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")
Labels = tuple[tuple[float, ...] | None, ...]
"""Of each step its D labels in [0, 1], or None for a step that nobody has judged."""


@dataclass(frozen=True)
class StepRecord:
    """A prompt and an answer in judged pieces.

    Attributes:
        turns: the conversation that is answered.
        steps: texts of the pieces.
        labels: of each piece.
        joined: the pieces hold the text between them (sentences); else a separator is put there.
        end: where the answer ends.
    """

    turns: tuple[Message, ...]
    steps: tuple[str, ...]
    labels: Labels
    joined: bool = False
    end: End = "whole"

    def __post_init__(self):
        assert len(self.steps) == len(self.labels) > 0


def answer_end(record: dict, where: str) -> End:
    """Where an answer ends: ``truncated`` (within its last step), not ``finished``, or whole.

    Raises:
        UserError: one of the keys is not true or false.
    """
    for key in ("truncated", "finished"):
        if type(record.get(key, False)) is not bool:
            raise UserError(f"{where}: '{key}' must be true or false; correct this line")
    if record.get("truncated", False):
        return "within step"
    return "whole" if record.get("finished", True) else "after step"


def check_counts(steps: int, labels: int, unit: str, key: str, where: str) -> None:
    """One label a step.

    Raises:
        UserError: more or fewer.
    """
    if labels == steps:
        return
    hint = "; is the answer cut off?" if labels > steps else ""
    raise UserError(
        f"{where}: {steps} {unit} but {labels} in '{key}'{hint}; give one label a {unit[:-1]}"
    )


def scores_by_dimension(value: Any, key: str, where: str) -> list[tuple[float, ...]]:
    """``[dimension][piece]`` of scores 0 to 4 as labels ``[piece][dimension]`` in [0, 1].

    Raises:
        UserError: another shape or range.
    """
    size = len(ATTRIBUTES)
    is_table = isinstance(value, list) and all(isinstance(row, list) for row in value)
    if not is_table or len(value) != size or len({len(row) for row in value}) != 1:
        shape = f"{size} lists (one a dimension) of one length (one score a step)"
        raise UserError(f"{where}: '{key}' must be {shape}; correct this line")
    table = [[number(x, 0, MAX_SCORE, key, where) / MAX_SCORE for x in row] for row in value]
    return list(zip(*table, strict=True))
