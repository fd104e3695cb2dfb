"""Prompts for rollouts: a JSONL file to rows of token ids."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from megatron_amrlhf.config.schema import DataSection
from megatron_amrlhf.data.chat import user_turn
from megatron_amrlhf.data.jsonl import read_numbered_jsonl
from megatron_amrlhf.data.keys import need_text
from megatron_amrlhf.data.known_chat import Message
from megatron_amrlhf.data.limits import encode_limited
from megatron_amrlhf.data.rows import Selection, select_rows
from megatron_amrlhf.data.turns import conversation
from megatron_amrlhf.errors import UserError


@dataclass(frozen=True)
class EncodedPrompt:
    """A prompt ready for the model.

    Attributes:
        row: token ids up to where the answer starts, 1-D int64 on CPU.
        turns: the conversation that is answered: the row's system message, if it has one of its
            own, and the turns up to the question.
        answer: the reference answer, if the file gives one.
        where: ``path:line`` that it comes from.
    """

    row: Tensor
    turns: tuple[Message, ...]
    answer: str | None
    where: str

    @property
    def rows(self) -> tuple[Tensor, ...]:
        """All token ids."""
        return (self.row,)

    @property
    def text(self) -> str:
        """The question, without the template."""
        return self.turns[-1]["content"]


def load_prompts(
    path: str | Path, tokenizer: PreTrainedTokenizerBase, section: DataSection
) -> tuple[list[EncodedPrompt], Selection]:
    """Reads ``{"prompt": str, "answer"?: str or number}`` lines, and what `conversation` reads.

    Raises:
        UserError: `read_jsonl`'s errors, a wrong ``answer``, a prompt over the limits; with
            ``path:line:``.
    """

    def encode(record: dict, where: str) -> list[EncodedPrompt]:
        return [_encode(record, where, tokenizer, section)]

    return select_rows(path, read_numbered_jsonl(path, {}), encode, section)


def _encode(
    record: dict, where: str, tokenizer: PreTrainedTokenizerBase, section: DataSection
) -> EncodedPrompt:
    text, answer = need_text(record, "prompt", where), record.get("answer")
    if answer is not None and type(answer) not in (str, int, float):
        raise UserError(f"{where}: 'answer' must be a string or a number; correct this line")
    turns = conversation(record, user_turn(text), section, where)
    ids = encode_limited(turns, tokenizer, section, where)
    row = torch.tensor(ids, dtype=torch.int64)
    return EncodedPrompt(row, turns, None if answer is None else str(answer), where)
