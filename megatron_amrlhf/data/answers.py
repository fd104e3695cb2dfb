"""Given answers to score: a JSONL file to rows of token ids."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from megatron_amrlhf.config.data_section import DataSection
from megatron_amrlhf.data.chat import encode_solution, user_turn
from megatron_amrlhf.data.jsonl import read_numbered_jsonl
from megatron_amrlhf.data.keys import need_steps, need_text
from megatron_amrlhf.data.known_chat import Message
from megatron_amrlhf.data.limits import check_row, encode_limited
from megatron_amrlhf.data.rows import Selection, select_rows
from megatron_amrlhf.data.step_record import answer_end
from megatron_amrlhf.data.turns import conversation
from megatron_amrlhf.errors import UserError

PROMPT_KEYS, ANSWER_KEYS = ("prompt", "problem"), ("steps", "response", "answer")


@dataclass(frozen=True)
class GivenAnswer:
    """A prompt with its answer.

    Attributes:
        row: token ids of prompt, answer and end-of-turn token, 1-D int64 on CPU.
        prompt_length: tokens of the prompt.
        turns: the conversation that is answered, as in `EncodedPrompt`.
        ended: the answer is whole; False: it was cut off and has no end-of-turn token.
        steps: texts of the steps; empty where the answer is given as one text.
        step_ends: index in the response of each step's last token, its separator included.
        extra: what else the line says (``problem_id``, ``correct``).
        where: ``path:line`` that it comes from.
    """

    row: Tensor
    prompt_length: int
    turns: tuple[Message, ...]
    ended: bool
    steps: tuple[str, ...]
    step_ends: tuple[int, ...]
    extra: dict[str, Any]
    where: str

    @property
    def prompt(self) -> str:
        """The question."""
        return self.turns[-1]["content"]


def load_answers(
    path: str | Path, tokenizer: PreTrainedTokenizerBase, section: DataSection
) -> tuple[list[GivenAnswer], Selection]:
    """Reads ``{"prompt" or "problem", "steps" or "response" or "answer"}`` lines.

    And what `conversation` reads.
    The rows have no step markers: scoring puts those of the PRM in.
    ``"finished": false`` and ``"truncated": true`` mean what they mean in `step_lists`.

    Raises:
        UserError: missing keys, empty answers, rows over the limits; with ``path:line:``.
    """
    records = read_numbered_jsonl(path, {})

    def encode(record: dict, where: str) -> list[GivenAnswer]:
        return [_encode(record, where, tokenizer, section)]

    return select_rows(path, records, encode, section)


def _encode(
    record: dict,
    where: str,
    tokenizer: PreTrainedTokenizerBase,
    section: DataSection,
) -> GivenAnswer:
    prompt = need_text(record, _first(record, PROMPT_KEYS, where), where)
    key = _first(record, ANSWER_KEYS, where)
    is_steps = key == "steps"
    pieces = need_steps(record, key, where) if is_steps else (need_text(record, key, where),)
    end = answer_end(record, where)
    turns = conversation(record, user_turn(prompt), section, where)
    head = encode_limited(turns, tokenizer, section, where)
    separator = section.step_separator if is_steps else ""
    ids, ends = encode_solution(
        tokenizer, head, pieces, separator=separator, marker_id=None, end=end
    )
    check_row(len(ids), section, where)
    return GivenAnswer(
        row=torch.tensor(ids, dtype=torch.int64),
        prompt_length=len(head),
        turns=turns,
        ended=end == "whole",
        steps=tuple(pieces) if is_steps else (),
        step_ends=tuple(end - len(head) for end in ends) if is_steps else (),
        extra={name: record[name] for name in ("problem_id", "correct") if name in record},
        where=where,
    )


def _first(record: dict, keys: tuple[str, ...], where: str) -> str:
    for key in keys:
        if key in record:
            return key
    found = ", ".join(map(repr, record)) or "none"
    wanted = " or ".join(map(repr, keys))
    raise UserError(f"{where}: no key {wanted} (keys here: {found}); add one")
