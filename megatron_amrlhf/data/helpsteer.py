"""HelpSteer: five attributes from 0 to 4 of a whole answer, or of each of its sentences (A.2).

Whole answers, either of

* ``{"prompt", "response", "helpfulness", "correctness", "coherence", "complexity", "verbosity"}``
* ``{"text", "label"}``: the conversation with ``<extra_id_0>System``, ``<extra_id_1>User`` and
  ``<extra_id_1>Assistant`` before the turns and ``<extra_id_2>`` after the last; the last five of
  the label's numbers are the attributes.

Sentences: ``{"prompt", "chosen", "rejected", "chosen_scores", "rejected_scores"}`` with scores
[dimension][sentence]. Answers are lists of sentences, or texts that are cut by `split_sentences`.
"""

from __future__ import annotations

import re
from typing import Any

from megatron_amrlhf.data.chat import user_turn
from megatron_amrlhf.data.keys import is_text, need, need_steps, need_text, number
from megatron_amrlhf.data.known_chat import Message
from megatron_amrlhf.data.sentences import split_sentences
from megatron_amrlhf.data.step_record import (
    ATTRIBUTES,
    MAX_SCORE,
    StepRecord,
    check_counts,
    scores_by_dimension,
)
from megatron_amrlhf.errors import UserError

PROMPT_KEYS = ("prompt", "instruction")
_TURN = re.compile(r"<extra_id_[01]>(System|User|Assistant)\n")
_ROLES = {"System": "system", "User": "user", "Assistant": "assistant"}
_LAST_MARK = "<extra_id_2>"


def read_whole_answer(record: dict, where: str) -> list[StepRecord]:
    """One answer with one label, at its end.

    Raises:
        UserError: missing keys, empty answer, scores out of range, an answer that was cut off.
    """
    if "text" in record:
        turns, answer = _conversation(need_text(record, "text", where), where)
        scores = _last_five(need(record, "label", where), where)
    else:
        turns = _turns_of_prompt(need_text(record, "prompt", where), where)
        answer = need_text(record, "response", where)
        scores = [number(need(record, x, where), 0, MAX_SCORE, x, where) for x in ATTRIBUTES]
    label = tuple(score / MAX_SCORE for score in scores)
    return [StepRecord(turns, (answer,), (label,), joined=True)]


def read_sentences(record: dict, where: str) -> list[StepRecord]:
    """Both answers of a pair with a label at the end of each sentence.

    Raises:
        UserError: missing keys, empty answer, another count of scores than of sentences.
    """
    key = next((key for key in PROMPT_KEYS if key in record), PROMPT_KEYS[0])
    turns = _turns_of_prompt(need_text(record, key, where), where)
    return [_judged_sentences(record, side, turns, where) for side in ("chosen", "rejected")]


def _judged_sentences(
    record: dict, side: str, turns: tuple[Message, ...], where: str
) -> StepRecord:
    sentences = _sentences(record, side, where)
    key = f"{side}_scores"
    labels = scores_by_dimension(need(record, key, where), key, where)
    check_counts(len(sentences), len(labels), "sentences", key, where)
    return StepRecord(turns, sentences, tuple(labels), joined=True)


def _sentences(record: dict, side: str, where: str) -> tuple[str, ...]:
    """Pieces that hold the white space between them."""
    if isinstance(need(record, side, where), list):
        first, *others = need_steps(record, side, where)
        return (first, *(x if x[0].isspace() else f" {x}" for x in others))
    return tuple(split_sentences(need_text(record, side, where)))


def _turns_of_prompt(prompt: str, where: str) -> tuple[Message, ...]:
    """A prompt of one question, or a conversation whose later turns have their marks."""
    if not _TURN.search(prompt):
        return user_turn(prompt)
    marked = prompt if _TURN.match(prompt) else f"<extra_id_1>User\n{prompt}"
    turns = _split_turns(marked, where)
    if turns[-1]["role"] == "assistant" and not turns[-1]["content"]:
        turns.pop()
    return tuple(turns)


def _conversation(text: str, where: str) -> tuple[tuple[Message, ...], str]:
    """Turns and the last answer of a marked text."""
    body = text.rstrip()
    if not body.endswith(_LAST_MARK):
        message = f"{where}: 'text' does not end with {_LAST_MARK}: the labelled answer is"
        raise UserError(f"{message} truncated; drop this line")
    turns = _split_turns(body.removesuffix(_LAST_MARK), where)
    if turns[-1]["role"] != "assistant":
        raise UserError(f"{where}: 'text' must end with an Assistant turn; correct this line")
    answer = turns.pop()["content"]
    if not is_text(answer) or not turns:
        raise UserError(f"{where}: 'text' has an empty answer or no question; correct this line")
    return tuple(turns), answer


def _split_turns(text: str, where: str) -> list[Message]:
    before, *parts = _TURN.split(text)
    if before.strip() or not parts:
        raise UserError(f"{where}: the text must begin with <extra_id_0>System; correct this line")
    pairs = zip(parts[0::2], parts[1::2], strict=True)
    turns = [{"role": _ROLES[who], "content": said.strip("\n")} for who, said in pairs]
    return [turn for turn in turns if turn["content"] or turn["role"] != "system"]


def _last_five(value: Any, where: str) -> list[float]:
    if not isinstance(value, list) or len(value) < len(ATTRIBUTES):
        raise UserError(f"{where}: 'label' must have {len(ATTRIBUTES)} scores; correct this line")
    return [number(x, 0, MAX_SCORE, "label", where) for x in value[-len(ATTRIBUTES) :]]
