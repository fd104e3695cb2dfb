"""Token ids of prompts and rows, refused where they are over the limits of the data section."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from megatron_amrlhf.config.data_section import DataSection
from megatron_amrlhf.data.chat import encode_turns
from megatron_amrlhf.data.known_chat import Message
from megatron_amrlhf.data.turns import split_system
from megatron_amrlhf.errors import UserError

ADVICE = "raise the limit or drop this line"


def encode_limited(
    turns: Sequence[Message],
    tokenizer: PreTrainedTokenizerBase,
    section: DataSection,
    where: str,
) -> list[int]:
    """Token ids of a conversation up to where the next answer starts.

    Args:
        turns: a system message (optional; else the section's system prompt), then user,
            assistant, ..., user. More than one question needs a chat template.
        tokenizer: any.
        section: limits and system prompt.
        where: ``path:line`` for the error message.

    Raises:
        UserError: turns in another order, no template for several turns, more than
            ``max_prompt_tokens``, or no room for an answer in ``max_row_tokens``.
    """
    turns, system = split_system(turns, section.system_prompt)
    roles = [turn["role"] for turn in turns]
    if roles != ["user", "assistant"] * (len(turns) // 2) + ["user"]:
        raise UserError(f"{where}: turns must go human, gpt, ..., human; correct this line")
    try:
        ids = encode_turns(tokenizer, turns, system)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    size = f"{where}: the prompt has {len(ids)} tokens"
    if len(ids) > section.max_prompt_tokens:
        limit = f"data.max_prompt_tokens = {section.max_prompt_tokens}"
        raise UserError(f"{size}, over {limit}; {ADVICE}")
    if len(ids) >= section.max_row_tokens:
        limit = f"data.max_row_tokens = {section.max_row_tokens}"
        raise UserError(f"{size}, no room for an answer in {limit}; {ADVICE}")
    return ids


def check_row(num_tokens: int, section: DataSection, where: str) -> None:
    """Prompt and answer together.

    Raises:
        UserError: more than ``max_row_tokens``.
    """
    if num_tokens > section.max_row_tokens:
        limit = f"data.max_row_tokens = {section.max_row_tokens}"
        raise UserError(f"{where}: the row has {num_tokens} tokens, over {limit}; {ADVICE}")
