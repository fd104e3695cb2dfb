"""What a tokenizer's chat template makes of a known conversation: looked at, not believed."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import lru_cache

from transformers import PreTrainedTokenizerBase

from megatron_amrlhf.data.known_chat import (
    ANSWER,
    QUESTION,
    SECOND,
    SYSTEM,
    TEMPLATE_ERRORS,
    View,
    first_look,
    short,
)
from megatron_amrlhf.data.stand_in import StandIn, itself
from megatron_amrlhf.errors import UserError

CLOCK_NOTE = (
    "it writes the present date or time into prompts: those of another day are others; put a fixed "
    "date into the template to keep them"
)


@dataclass(frozen=True)
class Template:
    """How a tokenizer's chat template writes conversations.

    Attributes:
        header: what opens the assistant's turn, where the template itself leaves it out of prompts.
        prompt: the question of the known conversation, up to the answer.
        as_parts: it reads contents as lists of parts, not as texts.
        needs_system: it refuses conversations without a system message.
        system_problem: what becomes of a system message; empty: it stands in the prompt.
        keeps_turns: all turns of a longer conversation stand in the prompt, in their order.
        end_id: the token that it ends the assistant's turn with; None: none of its own.
        notes: what a user should know, a sentence each.
        preamble: a sentence on a text of its own in prompts without a system message; or empty.
    """

    header: str
    prompt: str
    as_parts: bool
    needs_system: bool
    system_problem: str
    keeps_turns: bool
    end_id: int | None
    notes: tuple[str, ...]
    preamble: str


def read_template(tokenizer: PreTrainedTokenizerBase | StandIn) -> Template:
    """Renders the known conversation and looks: header, question, end of turn, what else is there.

    Raises:
        UserError: no prompt can be made with this template.
    """
    return _look_at(itself(tokenizer))


@lru_cache(maxsize=8)
def _look_at(tokenizer: PreTrainedTokenizerBase) -> Template:
    templates = tokenizer.chat_template
    if isinstance(templates, dict) and "default" not in templates:
        raise UserError(
            f"it has several chat templates ({', '.join(sorted(templates))}) and none of the name "
            "'default': give one of them that name"
        )
    view = first_look(tokenizer)
    header, missing = _header(view)
    asked = view.attempt(QUESTION, generate=True, strftime_now="no clock")
    notes = [
        "it changes white space within texts" if view.plain else "",
        missing,
        _opening_note(view, header),
        *_bos_notes(view),
        "" if asked == view.prompt else CLOCK_NOTE,
    ]
    end_id, problem = _end(view)
    return Template(
        header=header,
        prompt=view.prompt + header,
        as_parts=view.as_parts,
        needs_system=bool(view.before),
        system_problem=_system_problem(view),
        keeps_turns=_keeps_turns(view),
        end_id=end_id,
        notes=tuple(note for note in [*notes, problem] if note),
        preamble=_preamble_note(view),
    )


def _header(view: View) -> tuple[str, str]:
    """The header that the template leaves out of prompts, from the whole conversation; and a note.

    Blanks at its end are left out: the first token of an answer often holds the one before it.

    Raises:
        UserError: a prompt is not how the conversation begins.
    """
    if view.prompt != view.attempt(QUESTION, generate=False):
        return "", ""
    start, found, _ = view.whole.rpartition(view.text(ANSWER))
    if not found:
        return "", "it writes nothing to begin the assistant's turn, in prompts or else"
    if not start.startswith(view.prompt):
        raise UserError(
            "the chat template has no add_generation_prompt, and a prompt is not how a "
            f"conversation begins: {short(view.prompt)} against {short(start)}; add the header "
            "of the assistant's turn to it"
        )
    header = start[len(view.prompt) :].rstrip(" ")
    note = f"it has no add_generation_prompt: {header!r} is put behind each prompt"
    return header, note if header else ""


def _opening_note(view: View, header: str) -> str:
    """How a given answer begins otherwise than a sampled one, if it does."""
    prompt, encode = view.prompt + header, view.tokenizer.encode
    start, found, _ = view.whole.rpartition(view.text(ANSWER))
    if not found or start == prompt:
        return ""
    row = [encode(text, add_special_tokens=False) for text in (prompt, view.text(ANSWER))]
    given = encode(start + view.text(ANSWER), add_special_tokens=False)
    if [*row[0], *row[1]] == given:
        return ""
    common = len(os.path.commonprefix([prompt, start]))
    return (
        f"it opens the assistant's turn with {short(prompt[common:])} in prompts, and with "
        f"{short(start[common:])} where the answer is given: all answers stand behind the former"
    )


def _end(view: View) -> tuple[int | None, str]:
    """The token that ends the assistant's turn, and a note where there is none."""
    tokenizer, between = view.tokenizer, _between_turns(view)
    _, found, tail = view.whole.rpartition(view.text(ANSWER))
    ids = tokenizer.encode(tail, add_special_tokens=False)
    ids += _without_common_end(view, between, _before_question(view))
    own = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    for token in ids:  # some tokenizers have special tokens for single bytes
        if token in own and tokenizer.convert_ids_to_tokens(token) in tail + between:
            return token, ""
    if not found:
        return None, "it refuses, or leaves out, a last turn of the assistant"
    if tail.strip():
        return None, f"it ends turns with {short(tail)}, which is no token of this tokenizer"
    return None, "it writes nothing to end the assistant's turn"


def _before_question(view: View) -> str:
    return view.prompt.partition(view.text(QUESTION))[0]


def _between_turns(view: View) -> str:
    """What stands between an answer and the next question."""
    behind = view.longer.rpartition(view.text(ANSWER))[2]
    return behind.partition(view.text(SECOND))[0]


def _without_common_end(view: View, text: str, other: str) -> list[int]:
    """Tokens of a text up to where it goes on like the other: the header of a question."""
    ids, others = (view.tokenizer.encode(x, add_special_tokens=False) for x in (text, other))
    while ids and others and ids[-1] == others[-1]:
        ids, others = ids[:-1], others[:-1]
    return ids


def _preamble_note(view: View) -> str:
    """A text of the template's own before the first question."""
    if view.before or not view.longer:
        return ""
    own = _without_common_end(view, _before_question(view), _between_turns(view))
    words = [token for token in own if token not in view.tokenizer.added_tokens_decoder]
    if not any(character.isalnum() for character in view.tokenizer.decode(words)):
        return ""
    text = short(view.tokenizer.decode(own))
    return f"it puts a text of its own before a prompt without a system message: {text}"


def _bos_notes(view: View) -> list[str]:
    """A beginning-of-text token that is missing, or there twice."""
    tokenizer, bos = view.tokenizer, view.tokenizer.bos_token_id
    ids = tokenizer.encode(view.prompt, add_special_tokens=False)
    if bos is None or not ids:
        return []
    if ids[:2] == [bos, bos]:
        return [f"it begins a prompt with {tokenizer.bos_token!r} twice"]
    if ids[0] != bos and tokenizer.encode("12")[:1] == [bos]:
        return [f"it begins prompts without the {tokenizer.bos_token!r} that texts begin with"]
    return []


def _system_problem(view: View) -> str:
    if view.before:
        return ""
    try:
        text = view.write(SYSTEM, QUESTION, generate=True)
    except TEMPLATE_ERRORS as error:
        return f"refuses a system message ({error})"
    return "" if view.text(SYSTEM) in text else "leaves out, or changes, a system message"


def _keeps_turns(view: View) -> bool:
    place = 0
    for turn in (QUESTION, ANSWER, SECOND):
        place = view.longer.find(view.text(turn), place) + 1
        if not place:
            return False
    return True
