"""Answers in the rows of a PRM that judges each step at a marker token after it."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from transformers import PreTrainedTokenizerBase

from megatron_amrlhf.data.chat import encode_solution, turn_end_id
from megatron_amrlhf.data.lines import line_numbers, written_lines
from megatron_amrlhf.data.token_text import token_texts


@dataclass(frozen=True)
class StepMarker:
    """Where a PRM judges a step.

    Attributes:
        text: of the marker token, such as ``<extra_0>``.
        token_id: its id in the PRM's vocabulary.
        separator: text between a marker and the next step.
    """

    text: str
    token_id: int
    separator: str


@dataclass(frozen=True)
class AnswerSteps:
    """An answer cut into steps.

    Attributes:
        texts: of the steps, without what separates them; none for an answer without text.
        numbers: for each response token, the end token too, the step whose score it has.
    """

    texts: tuple[str, ...]
    numbers: tuple[int, ...]

    @classmethod
    def given(cls, texts: Sequence[str], ends: Sequence[int], num_tokens: int) -> AnswerSteps:
        """Of known steps; ``ends`` are the indices of their last tokens."""
        last = len(texts) - 1
        numbers = (min(bisect_left(ends, place), last) for place in range(num_tokens))
        return cls(tuple(texts), tuple(numbers))


def newline_steps(
    tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], ended: bool
) -> AnswerSteps:
    """Cuts an answer into its lines, as `StepCutter` does (see ``data/lines.py``).

    Newlines and blank lines are in no step's text; their tokens have the score of the step before
    them, at the start that of the first one.

    Args:
        tokenizer: the policy's.
        ids: response tokens.
        ended: the last of them is an end token; it has the score of the last step.
    """
    pieces = token_texts(tokenizer, ids[:-1] if ended else ids)
    text = "".join(pieces)
    texts = tuple(text[start:end] for start, end in written_lines(text))
    return AnswerSteps(texts, tuple(line_numbers([*pieces, ""] if ended else pieces)))


def mark_answer(
    steps: AnswerSteps, ended: bool, tokenizer: PreTrainedTokenizerBase, marker: StepMarker
) -> tuple[list[int], list[int]]:
    """The answer's ids in the PRM's row, and for each response token the place that it reads.

    The ids are those of `encode_solution`, so they are what the PRM was trained on: each step's
    text tokenized on its own, the marker, the separator. An answer without text is an empty step.

    Args:
        steps: of the answer.
        ended: the answer ends with an end token.
        tokenizer: the PRM's.
        marker: the PRM's.
    """
    end: Literal["whole", "within step"] = "whole" if ended else "within step"
    if not steps.texts:
        ids = [marker.token_id]
        if ended:
            end_id = turn_end_id(tokenizer)
            assert end_id is not None, "checked at the start"
            ids.append(end_id)
        return ids, [0] * len(steps.numbers)
    ids, places = encode_solution(
        tokenizer, [], steps.texts, separator=marker.separator, marker_id=marker.token_id, end=end
    )
    return ids, [places[number] for number in steps.numbers]
