"""Prompts for rollouts: a JSONL file to rows of token ids."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from megatron_amrlhf.config.schema import DataSection
from megatron_amrlhf.data.chat import encode_prompt
from megatron_amrlhf.data.jsonl import read_numbered_jsonl
from megatron_amrlhf.errors import UserError


@dataclass(frozen=True)
class EncodedPrompt:
    """A prompt ready for the model.

    Attributes:
        row: token ids up to where the answer starts, 1-D int64 on CPU.
        text: the user's text, without the template.
        answer: the reference answer, if the file gives one.
        where: ``path:line`` that it comes from.
    """

    row: Tensor
    text: str
    answer: str | None
    where: str


def load_prompts(
    path: str | Path, tokenizer: PreTrainedTokenizerBase, data_section: DataSection
) -> list[EncodedPrompt]:
    """Read ``{"prompt": str, "answer"?: str or number}`` lines and encode them.

    Raises:
        UserError: `read_jsonl`'s errors, a wrong ``answer``, a prompt over the limits; with
            ``path:line:``.
    """
    prompts = []
    for number, record in read_numbered_jsonl(path, {"prompt": check_text}):
        where = f"{path}:{number}"
        answer = record.get("answer")
        if answer is not None and type(answer) not in (str, int, float):
            raise UserError(f"{where}: 'answer' must be a string or a number; correct this line")
        ids = encode_limited_prompt(record["prompt"], tokenizer, data_section, where)
        row = torch.tensor(ids, dtype=torch.int64)
        answer = None if answer is None else str(answer)
        prompts.append(EncodedPrompt(row, record["prompt"], answer, where))
    return prompts


def encode_limited_prompt(
    text: str, tokenizer: PreTrainedTokenizerBase, data_section: DataSection, where: str
) -> list[int]:
    """`encode_prompt` with the section's system prompt, refusing what is over its limits.

    Args:
        where: ``path:line`` for the error message.

    Raises:
        UserError: more than ``max_prompt_tokens``, or no room for an answer in ``max_row_tokens``.
    """
    ids = encode_prompt(tokenizer, text, data_section.system_prompt)
    if len(ids) > data_section.max_prompt_tokens:
        limit = f"data.max_prompt_tokens = {data_section.max_prompt_tokens}"
        advice = "raise the limit or drop this line"
        raise UserError(f"{where}: the prompt has {len(ids)} tokens, over {limit}; {advice}")
    if len(ids) >= data_section.max_row_tokens:
        limit = f"data.max_row_tokens = {data_section.max_row_tokens}"
        message = f"{where}: the prompt has {len(ids)} tokens, no room for an answer in {limit}"
        raise UserError(f"{message}; raise the limit or drop this line")
    return ids


def check_text(value: Any) -> str | None:
    """A `jsonl.Requirement`: a string that is not blank."""
    if isinstance(value, str) and value.strip():
        return None
    return "must be a string that is not blank"
