"""Conversations as prompts: messages of system, user and assistant to token ids."""

from __future__ import annotations

from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase

from megatron_amrlhf.config.schema import DataSection
from megatron_amrlhf.data.prompts import encode_limited_prompt
from megatron_amrlhf.errors import UserError

Message = dict[str, str]
"""``{"role": "system" | "user" | "assistant", "content": str}``"""


def user_turn(text: str) -> tuple[Message, ...]:
    """A prompt of one question."""
    return ({"role": "user", "content": text},)


def encode_limited_turns(
    messages: list[Message] | tuple[Message, ...],
    tokenizer: PreTrainedTokenizerBase,
    data_section: DataSection,
    where: str,
) -> list[int]:
    """Token ids of a conversation up to where the next answer starts.

    Args:
        messages: a system message (optional; else the section's system prompt), then user,
            assistant, ..., user. More than one question needs a chat template.
        tokenizer: any.
        data_section: limits and system prompt.
        where: ``path:line`` for the error message.

    Raises:
        UserError: turns in another order, no template for several turns, over the limits.
    """
    messages, system = list(messages), data_section.system_prompt
    if messages[0]["role"] == "system":
        system = messages.pop(0)["content"]
    section = data_section.model_copy(update={"system_prompt": system})
    roles = [message["role"] for message in messages]
    if roles != ["user", "assistant"] * (len(messages) // 2) + ["user"]:
        raise UserError(f"{where}: turns must go human, gpt, ..., human; correct this line")
    if len(messages) == 1:
        return encode_limited_prompt(messages[0]["content"], tokenizer, section, where)
    if not tokenizer.chat_template:
        advice = "use a model with a template or single questions"
        raise UserError(f"{where}: several turns need a chat template; {advice}")
    if system:
        messages.insert(0, {"role": "system", "content": system})
    try:
        ids = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=False
        )
    except TemplateError as error:
        raise UserError(f"{where}: the chat template refuses the turns ({error})") from error
    limit = data_section.max_prompt_tokens
    if len(ids) > limit:
        message = f"{where}: the prompt has {len(ids)} tokens, over data.max_prompt_tokens"
        raise UserError(f"{message} = {limit}; raise the limit or drop this line")
    return list(ids)
