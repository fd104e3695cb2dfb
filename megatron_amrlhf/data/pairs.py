"""Preference pairs: two answers to a prompt, the chosen and the rejected one.

A JSONL file, or one JSON list, of either of these objects (all of a file alike or mixed):

* ``{"prompt": str, "chosen": str, "rejected": str}``
* ``{"conversations": [{"from": "human", "value": str}, ...], "chosen": {"from": "gpt", "value":
  str}, "rejected": {...}}``: turns of ``system`` (first only), ``human`` and ``gpt``, the last of
  ``human``. More than one turn needs a tokenizer with a chat template.

A row's ``system`` and ``history`` are read too (`turns.conversation`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from megatron_amrlhf.config.data_section import DataSection
from megatron_amrlhf.data.chat import turn_end_id, user_turn
from megatron_amrlhf.data.checking import load_rows
from megatron_amrlhf.data.keys import need_text
from megatron_amrlhf.data.known_chat import Message
from megatron_amrlhf.data.lazy_rows import Rows, id_row
from megatron_amrlhf.data.limits import check_row, encode_limited
from megatron_amrlhf.data.readers import ALONE, Readers
from megatron_amrlhf.data.rows import Selection
from megatron_amrlhf.data.turns import conversation, read_turn
from megatron_amrlhf.errors import UserError


@dataclass(frozen=True)
class EncodedPair:
    """A prompt with its chosen and its rejected answer.

    Attributes:
        chosen: token ids of prompt, answer and end-of-turn token, 1-D int64 on CPU.
        rejected: as this.
        prompt_length: tokens of the prompt, the same in both.
        text: the user's text, without the template; of a conversation its last turn.
    """

    chosen: Tensor
    rejected: Tensor
    prompt_length: int
    text: str = ""

    def __post_init__(self):
        assert 0 < self.prompt_length < min(self.chosen.numel(), self.rejected.numel())

    @property
    def rows(self) -> tuple[Tensor, ...]:
        """All token ids."""
        return self.chosen, self.rejected


def load_pairs(
    path: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    section: DataSection,
    readers: Readers = ALONE,
) -> tuple[Rows[EncodedPair], Selection]:
    """Checks a file of preference pairs (formats: see the module), as `load_rows` does.

    Raises:
        UserError: a file that cannot be read, wrong or missing keys, answers that are equal, rows
            or prompts over the limits; with ``path:line:`` (in a list, the line that the object
            starts on).
    """

    def read(record: dict, where: str, tokenizer: PreTrainedTokenizerBase) -> list[EncodedPair]:
        return [encode_pair(record, tokenizer, section, where)]

    return load_rows(path, read, tokenizer, section, readers=readers)


def encode_pair(
    record: dict, tokenizer: PreTrainedTokenizerBase, section: DataSection, where: str
) -> EncodedPair:
    """One object of a file of pairs.

    Raises:
        UserError: as ``load_pairs``; ``where`` is its ``path:line``.
    """
    if "conversations" in record:
        said: Sequence[Message] = _turns(record["conversations"], where)
    else:
        said = user_turn(need_text(record, "prompt", where))
    turns = conversation(record, said, section, where)
    prompt_ids = encode_limited(turns, tokenizer, section, where)
    chosen, rejected = (_answer(record, key, where) for key in ("chosen", "rejected"))
    if chosen == rejected:
        raise UserError(f"{where}: 'chosen' and 'rejected' are equal; drop this line")
    better, worse = (
        _encode_row(tokenizer, prompt_ids, answer, section, where) for answer in (chosen, rejected)
    )
    return EncodedPair(better, worse, prompt_length=len(prompt_ids), text=turns[-1]["content"])


def _answer(record: dict, key: str, where: str) -> str:
    """An answer's text, given as a string or as a turn of ``gpt``."""
    turn = record.get(key)
    if isinstance(turn, dict):
        if turn.get("from") != "gpt":
            raise UserError(f"{where}: '{key}' must be a turn from gpt; correct this line")
        return need_text(turn, "value", where)
    return need_text(record, key, where)


def _turns(turns: Any, where: str) -> list[Message]:
    if not isinstance(turns, list) or not turns:
        raise UserError(f"{where}: 'conversations' must be a list of turns; correct this line")
    return [read_turn(turn, where) for turn in turns]


def _encode_row(
    tokenizer: PreTrainedTokenizerBase,
    prompt_ids: list[int],
    text: str,
    section: DataSection,
    where: str,
) -> Tensor:
    """Prompt, answer and end-of-turn token."""
    answer = tokenizer.encode(text, add_special_tokens=False)
    ids = [*prompt_ids, *answer, turn_end_id(tokenizer)]
    check_row(len(ids), section, where)
    return id_row(ids)
