"""What a tokenizer's chat template makes of a known conversation: looked at, not believed."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase

from megatron_amrlhf.errors import UserError

Message = dict[str, str]
"""``{"role": "system" | "user" | "assistant", "content": str}``"""

# A template is a program: what its expressions raise comes through beside Jinja's own errors.
TEMPLATE_ERRORS = (
    TemplateError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    ArithmeticError,
    RuntimeError,
)

# The known conversation: texts that no template holds, with what a careless one would change.
SYSTEM = {"role": "system", "content": "Speak of quinces,\n\nand of nothing else."}
QUESTION = {"role": "user", "content": 'Is 3  x 4 = 12?\n\nZoe, Ann & "Bo" <all> ask {it}.'}
ANSWER = {"role": "assistant", "content": "Yes: 12 quinces.\n\nAll agree."}
SECOND = {"role": "user", "content": "And 5 - 2 quinces?"}

MOST_SHOWN = 160  # characters of a template's own text in a message


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
    """

    header: str
    prompt: str
    as_parts: bool
    needs_system: bool
    system_problem: str
    keeps_turns: bool
    end_id: int | None
    notes: tuple[str, ...]


def render(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    generate: bool,
    as_parts: bool = False,
    **variables: str,
) -> str:
    """The template's text of a conversation.

    Args:
        tokenizer: has a template.
        messages: the turns.
        generate: with the header of the answer that comes next.
        as_parts: give each content as a list of one part.
        variables: what the template may read beside the messages.

    Raises:
        TEMPLATE_ERRORS: as the template does.
    """
    if as_parts:
        messages = [x | {"content": [{"type": "text", "text": x["content"]}]} for x in messages]
    return tokenizer.apply_chat_template(
        list(messages), add_generation_prompt=generate, tokenize=False, **variables
    )


@lru_cache(maxsize=8)
def read_template(tokenizer: PreTrainedTokenizerBase) -> Template:
    """Renders the known conversation and looks: header, question, end of turn, what else is there.

    Raises:
        UserError: no prompt can be made with this template.
    """
    templates = tokenizer.chat_template
    if isinstance(templates, dict) and "default" not in templates:
        raise UserError(
            f"it has several chat templates ({', '.join(sorted(templates))}) and none of the name "
            "'default': give one of them that name"
        )
    view = _first_look(tokenizer)
    header, missing = _header(view)
    asked = _try(view, [QUESTION], generate=True, strftime_now="no clock")
    notes = [
        missing,
        _opening_note(view, header),
        _preamble_note(view),
        *_bos_notes(view),
        ""
        if asked == view.prompt
        else "it writes the present date or time into prompts: those of "
        "another day are others; put a fixed date into the template to keep them",
    ]
    end_id, problem = _end(view)
    return Template(
        header=header,
        prompt=view.prompt + header,
        as_parts=view.as_parts,
        needs_system=bool(view.before),
        system_problem=_system_problem(view),
        keeps_turns=_in_order(view.longer, (QUESTION, ANSWER, SECOND)),
        end_id=end_id,
        notes=tuple(note for note in [*notes, problem] if note),
    )


@dataclass(frozen=True)
class _View:
    """The known conversation in a template's writing.

    Attributes:
        tokenizer: whose template.
        as_parts: see `Template`.
        before: a system message, where the template wants one.
        prompt: the question, up to the answer.
        whole: question and answer; empty where the template refuses that.
        longer: question, answer, and a second question up to its answer; empty as this.
    """

    tokenizer: PreTrainedTokenizerBase
    as_parts: bool
    before: tuple[Message, ...]
    prompt: str
    whole: str
    longer: str


def _first_look(tokenizer: PreTrainedTokenizerBase) -> _View:
    """In the form of contents that makes the question appear.

    Raises:
        UserError: none does.
    """
    problems = []
    for before in ((), (SYSTEM,)):
        for as_parts in (False, True):
            try:
                prompt = render(tokenizer, [*before, QUESTION], True, as_parts)
            except TEMPLATE_ERRORS as error:
                problems.append(f"it fails: {error}")
                continue
            if QUESTION["content"] in prompt:
                view = _View(tokenizer, as_parts, before, prompt, "", "")
                whole = _try(view, [QUESTION, ANSWER], generate=False)
                longer = _try(view, [QUESTION, ANSWER, SECOND], generate=True)
                return _View(tokenizer, as_parts, before, prompt, whole, longer)
            asked = repr(QUESTION["content"])
            problems.append(f"the question {asked} does not stand in the prompt {_short(prompt)}")
    advice = "correct the template (chat_template.jinja, or chat_template in tokenizer_config.json)"
    raise UserError(f"the chat template cannot be used: {problems[0]}; {advice}")


def _try(view: _View, messages: Sequence[Message], generate: bool, **variables: str) -> str:
    """What the template makes of these messages; nothing where it refuses them."""
    try:
        messages = [*view.before, *messages]
        return render(view.tokenizer, messages, generate, view.as_parts, **variables)
    except TEMPLATE_ERRORS:
        return ""


def _header(view: _View) -> tuple[str, str]:
    """The header that the template leaves out of prompts, from the whole conversation; and a note.

    Blanks at its end are left out: the first token of an answer often holds the one before it.

    Raises:
        UserError: a prompt is not how the conversation begins.
    """
    if view.prompt != _try(view, [QUESTION], generate=False):
        return "", ""
    start, found, _ = view.whole.rpartition(ANSWER["content"])
    if not found:
        return "", "it writes nothing to begin the assistant's turn, in prompts or else"
    if not start.startswith(view.prompt):
        raise UserError(
            "the chat template has no add_generation_prompt, and a prompt is not how a "
            f"conversation begins: {_short(view.prompt)} against {_short(start)}; add the header "
            "of the assistant's turn to it"
        )
    header = start[len(view.prompt) :].rstrip(" ")
    note = f"it has no add_generation_prompt: {header!r} is put behind each prompt"
    return header, note if header else ""


def _opening_note(view: _View, header: str) -> str:
    """How a given answer begins otherwise than a sampled one, if it does."""
    prompt, encode = view.prompt + header, view.tokenizer.encode
    start, found, _ = view.whole.rpartition(ANSWER["content"])
    if not found or start == prompt:
        return ""
    row = [encode(text, add_special_tokens=False) for text in (prompt, ANSWER["content"])]
    given = encode(start + ANSWER["content"], add_special_tokens=False)
    if [*row[0], *row[1]] == given:
        return ""
    common = len(os.path.commonprefix([prompt, start]))
    return (
        f"it opens the assistant's turn with {_short(prompt[common:])} in prompts, and with "
        f"{_short(start[common:])} where the answer is given: all answers stand behind the former"
    )


def _end(view: _View) -> tuple[int | None, str]:
    """The token that ends the assistant's turn, and a note where there is none."""
    tokenizer, between = view.tokenizer, _between_turns(view)
    _, found, tail = view.whole.rpartition(ANSWER["content"])
    ids = tokenizer.encode(tail, add_special_tokens=False)
    ids += _without_common_end(view, between, _before_question(view))
    own = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    for token in ids:  # some tokenizers have special tokens for single bytes
        if token in own and tokenizer.convert_ids_to_tokens(token) in tail + between:
            return token, ""
    if not found:
        return None, "it refuses, or leaves out, a last turn of the assistant"
    if tail.strip():
        return None, f"it ends turns with {_short(tail)}, which is no token of this tokenizer"
    return None, "it writes nothing to end the assistant's turn"


def _before_question(view: _View) -> str:
    return view.prompt.partition(QUESTION["content"])[0]


def _between_turns(view: _View) -> str:
    """What stands between an answer and the next question."""
    behind = view.longer.rpartition(ANSWER["content"])[2]
    return behind.partition(SECOND["content"])[0]


def _without_common_end(view: _View, text: str, other: str) -> list[int]:
    """Tokens of a text up to where it goes on like the other: the header of a question."""
    ids, others = (view.tokenizer.encode(x, add_special_tokens=False) for x in (text, other))
    while ids and others and ids[-1] == others[-1]:
        ids, others = ids[:-1], others[:-1]
    return ids


def _preamble_note(view: _View) -> str:
    """A text of the template's own before the first question."""
    if view.before or not view.longer:
        return ""
    own = _without_common_end(view, _before_question(view), _between_turns(view))
    words = [token for token in own if token not in view.tokenizer.added_tokens_decoder]
    if not any(character.isalnum() for character in view.tokenizer.decode(words)):
        return ""
    text = _short(view.tokenizer.decode(own))
    return f"it puts a text of its own before a prompt without a system message: {text}"


def _bos_notes(view: _View) -> list[str]:
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


def _system_problem(view: _View) -> str:
    if view.before:
        return ""
    try:
        text = render(view.tokenizer, [SYSTEM, QUESTION], True, view.as_parts)
    except TEMPLATE_ERRORS as error:
        return f"refuses a system message ({error})"
    return "" if SYSTEM["content"] in text else "leaves out, or changes, a system message"


def _in_order(text: str, turns: Sequence[Message]) -> bool:
    place = 0
    for turn in turns:
        place = text.find(turn["content"], place) + 1
        if not place:
            return False
    return True


def _short(text: str) -> str:
    shown = text if len(text) <= MOST_SHOWN else f"{text[:MOST_SHOWN]} ..."
    return repr(shown)
