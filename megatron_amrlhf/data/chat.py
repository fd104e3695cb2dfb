"""Text to token ids: the chat template, the end tokens, and the positions of step ends."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from transformers import PreTrainedTokenizerBase

from megatron_amrlhf.data.continuation import encode_continuation
from megatron_amrlhf.data.known_chat import TEMPLATE_ERRORS, Message, render
from megatron_amrlhf.data.template import Template, read_template
from megatron_amrlhf.data.tokenizer import PROBE, unread_template
from megatron_amrlhf.errors import UserError
from megatron_amrlhf.reading import Unreadable, read_object

End = Literal["whole", "after step", "within step"]
"""Where a solution ends: at its end, or it was cut off after or within its last step.

A solution that goes on after its last step has a separator there, as its other steps have: a PRM
would else learn that the last step of what annotators cut at the first mistake looks different.
"""


def user_turn(text: str) -> tuple[Message, ...]:
    """A conversation of one question."""
    return ({"role": "user", "content": text},)


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase, text: str, system_prompt: str | None
) -> list[int]:
    """`encode_turns` of one question."""
    return encode_turns(tokenizer, user_turn(text), system_prompt)


def encode_turns(
    tokenizer: PreTrainedTokenizerBase, turns: Sequence[Message], system_prompt: str | None
) -> list[int]:
    """Token ids of a conversation up to where the next answer starts.

    With a chat template: the system message (if any), the turns, and the header of the
    assistant's turn, also where the template itself leaves that out. Some templates put in a
    system message of their own where none is given.
    Without a template: the one question and a newline, the system prompt before it with an empty
    line, and the special tokens (BOS) that the tokenizer puts at the start.

    Raises:
        UserError: the template cannot be used, or refuses or leaves out a message (some know no
            system role), or there are several turns and no template.
    """
    if not tokenizer.chat_template:
        if len(turns) > 1:
            advice = "use a model with a template or single questions"
            raise UserError(f"several turns need a chat template; {advice}")
        system = f"{system_prompt}\n\n" if system_prompt else ""
        return list(tokenizer.encode(f"{system}{turns[0]['content']}\n"))
    template = read_template(tokenizer)
    _check_turns(template, turns, system_prompt)
    system_turn = [{"role": "system", "content": system_prompt}] if system_prompt else []
    try:
        text = render(tokenizer, [*system_turn, *turns], True, template.as_parts)
    except TEMPLATE_ERRORS as error:
        advice = "use another model"
        if template.needs_system and not system_prompt:
            advice = "set data.system_prompt"
        raise UserError(f"the chat template refuses the prompt ({error}); {advice}") from error
    return list(tokenizer.encode(text + template.header, add_special_tokens=False))


def _check_turns(template: Template, turns: Sequence[Message], system_prompt: str | None) -> None:
    """Whether all of these messages would stand in the prompt."""
    if system_prompt and template.system_problem:
        advice = "set data.system_prompt to null, and have no system message in the rows"
        raise UserError(f"the chat template {template.system_problem}; {advice}")
    if len(turns) > 1 and not template.keeps_turns:
        raise UserError(
            "the chat template refuses or leaves out earlier turns, or changes their order or "
            "texts; use single questions or another model"
        )


def known_prompt(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids of one prompt, the same whatever the run; kept as it was when first written."""
    if not tokenizer.chat_template:
        return encode_prompt(tokenizer, PROBE, None)
    return tokenizer.encode(read_template(tokenizer).prompt, add_special_tokens=False)


def turn_end_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token that a given answer ends with: the template's, else the tokenizer's EOS.

    A base model's EOS is often another token than its template ends turns with.

    Raises:
        UserError: the template cannot be used.
    """
    found = read_template(tokenizer).end_id if tokenizer.chat_template else None
    return tokenizer.eos_token_id if found is None else found


def chat_notes(
    tokenizer: PreTrainedTokenizerBase, folder: str | Path, system_prompt: str | None
) -> list[str]:
    """What a user should know of how prompts and answers are written, a sentence each.

    Args:
        tokenizer: a model's.
        folder: that it is from.
        system_prompt: of the run, or None.

    Raises:
        UserError: the template cannot be used.
    """
    end, eos = (
        None if token is None else tokenizer.convert_ids_to_tokens(token)
        for token in (turn_end_id(tokenizer), tokenizer.eos_token_id)
    )
    if not tokenizer.chat_template:
        text = "the model has no chat template: a prompt is its text and a newline"
        return [f"{text}, an answer ends with {end!r}"]
    template = read_template(tokenizer)
    notes = [f"the chat template: {note}" for note in template.notes]
    if template.preamble and not system_prompt:
        notes.append(f"the chat template: {template.preamble}")
    if unread := unread_template(Path(folder)):
        notes.append(unread)
    if end != eos:
        notes.append(
            f"the chat template ends turns with {end!r}, the tokenizer's EOS is {eos!r}: an answer "
            f"that is sampled ends with either, a given one with {end!r}"
        )
    return notes


def check_system_prompt(
    tokenizer: PreTrainedTokenizerBase, system_prompt: str | None, folder: str | Path
) -> None:
    """Whether a run's system prompt, if any, would stand in its prompts; before any row is read.

    Raises:
        UserError: the template refuses it, or leaves it out.
    """
    if system_prompt is None:
        return
    try:
        encode_prompt(tokenizer, PROBE, system_prompt)
    except UserError as error:
        raise UserError(f"{folder}: {error}") from error


def end_token_ids(tokenizer: PreTrainedTokenizerBase, folder: str | Path) -> list[int]:
    """Ids that end an answer that is sampled.

    What the chat template ends turns with (or given answers end with) first, then the tokenizer's
    EOS and those of generation_config.json.

    Raises:
        UserError: there is no token to end a given answer with, the template cannot be used, or
            generation_config.json is malformed.
    """
    try:
        ids = [turn_end_id(tokenizer), tokenizer.eos_token_id]
    except UserError as error:
        raise UserError(f"{folder}: {error}") from error
    ids = [token for token in ids if token is not None]
    if not ids:
        raise UserError(f"{folder}: the tokenizer has no end token; set eos_token in its config")
    return list(dict.fromkeys([*ids, *end_tokens_listed(folder)]))


def end_tokens_listed(folder: str | Path) -> list[int]:
    """The end tokens of a folder's generation_config.json; none where it has no such file.

    Raises:
        UserError: the file is malformed.
    """
    path = Path(folder) / "generation_config.json"
    if not path.is_file():
        return []
    try:
        listed = read_object(path, strict=False).get("eos_token_id")
    except Unreadable as error:
        raise UserError(f"{path}: not a JSON object ({error}); restore the file") from None
    listed = listed if isinstance(listed, list) else [] if listed is None else [listed]
    if not all(type(token) is int and token >= 0 for token in listed):
        raise UserError(f"{path}: eos_token_id must be token ids; restore the file")
    return listed


def encode_solution(
    tokenizer: PreTrainedTokenizerBase,
    prompt_ids: list[int],
    steps: Sequence[str],
    *,
    separator: str = "\n",
    marker_id: int | None = None,
    end: End = "whole",
) -> tuple[list[int], list[int]]:
    """Token ids of a prompt with a solution, and the position at which each step is judged.

    Each step is tokenized on its own (the later ones as `encode_continuation` does), with the
    separator after it, and the ids are put one after the other, so that a step's end is known by
    counting tokens; no separator is ever searched for in text or ids. A step is judged at its last
    token, separator included, or at its marker. The last step of a whole solution has no separator
    and is followed by the end-of-turn token (`turn_end_id`), which has no label.

    Args:
        tokenizer: one that has a token to end turns with.
        prompt_ids: from `encode_prompt`.
        steps: texts; newlines at their ends are taken off where there is a separator.
        separator: text between steps; empty if the steps hold it themselves.
        marker_id: a token put after each step, before the separator, at which the step is judged
            (public PRMs have such a token); None: no marker.
        end: where the solution ends (see `End`).

    Returns:
        ``ids`` (prompt, steps, end of turn) and ``step_end_positions`` (indices into ``ids``, one
        a step, increasing).
    """
    end_id = turn_end_id(tokenizer)
    assert end_id is not None, "end_token_ids() refuses such tokenizers"
    ids = list(prompt_ids)
    step_end_positions = []
    for number, step in enumerate(steps, start=1):
        text = step.rstrip("\n") if separator else step
        between = separator if number < len(steps) or end == "after step" else ""
        if marker_id is None:
            text, between = text + between, ""
        if number == 1:  # after the prompt's last token, whose text is the template's
            piece = tokenizer.encode(text, add_special_tokens=False)
        else:
            piece = encode_continuation(tokenizer, text)
        assert piece, f"step {number} has no tokens: {step!r}"
        ids.extend(piece if marker_id is None else [*piece, marker_id])
        step_end_positions.append(len(ids) - 1)
        ids.extend(encode_continuation(tokenizer, between) if between else [])
    if end == "whole":
        ids.append(end_id)
    assert len(step_end_positions) == len(steps)
    return ids, step_end_positions


def marker_token_id(
    tokenizer: PreTrainedTokenizerBase, marker: str | None, key: str = "data.step_marker"
) -> int | None:
    """The one token that a step marker is; None without one. ``key`` names it in messages.

    Raises:
        UserError: the tokenizer cuts it into several tokens, or does not know it.
    """
    if marker is None:
        return None
    ids = tokenizer.encode(marker, add_special_tokens=False)
    if len(ids) != 1 or ids[0] == tokenizer.unk_token_id:
        raise UserError(
            f"{key}: {marker!r} is {len(ids)} tokens of this tokenizer, not one of its "
            "own: choose a text that it keeps as one token"
        )
    return ids[0]
