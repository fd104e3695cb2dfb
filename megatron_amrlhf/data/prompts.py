"""Prompts for rollouts: a JSONL file to rows of token ids."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from megatron_amrlhf.config.data_section import DataSection
from megatron_amrlhf.data.chat import user_turn
from megatron_amrlhf.data.checking import Accept, load_rows
from megatron_amrlhf.data.keys import need_text
from megatron_amrlhf.data.known_chat import Message
from megatron_amrlhf.data.lazy_rows import Rows, id_row
from megatron_amrlhf.data.limits import encode_limited
from megatron_amrlhf.data.readers import ALONE, Readers
from megatron_amrlhf.data.rows import Selection
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
    path: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    section: DataSection,
    readers: Readers = ALONE,
    accept: Accept | None = None,
) -> tuple[Rows[EncodedPrompt], Selection]:
    """Reads ``{"prompt": str, "answer"?: str or number}`` lines, and what `conversation` reads.

    ``readers`` and ``accept`` are those of `load_rows`.

    Raises:
        UserError: `read_jsonl`'s errors, a wrong ``answer``, a prompt over the limits; with
            ``path:line:``.
    """

    def read(record: dict, where: str, tokenizer: PreTrainedTokenizerBase) -> list[EncodedPrompt]:
        return [_encode(record, where, tokenizer, section)]

    return load_rows(path, read, tokenizer, section, readers=readers, accept=accept)


def _encode(
    record: dict, where: str, tokenizer: PreTrainedTokenizerBase, section: DataSection
) -> EncodedPrompt:
    text, answer = need_text(record, "prompt", where), record.get("answer")
    if answer is not None and type(answer) not in (str, int, float):
        raise UserError(f"{where}: 'answer' must be a string or a number; correct this line")
    turns = conversation(record, user_turn(text), section, where)
    ids = encode_limited(turns, tokenizer, section, where)
    return EncodedPrompt(id_row(ids), turns, None if answer is None else str(answer), where)
