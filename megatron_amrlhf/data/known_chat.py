"""A known conversation as a tokenizer's chat template writes it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product

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
    turns: list[dict] = list(messages)
    if as_parts:
        turns = [x | {"content": [{"type": "text", "text": x["content"]}]} for x in turns]
    return tokenizer.apply_chat_template(
        turns, add_generation_prompt=generate, tokenize=False, **variables
    )


@dataclass(frozen=True)
class View:
    """The known conversation in a template's writing.

    Attributes:
        tokenizer: whose template.
        as_parts: see `Template`.
        before: a system message, where the template wants one.
        plain: the texts have no runs of blanks and no line breaks, which this template changes.
        prompt: the question, up to the answer.
        whole: question and answer; empty where the template refuses that.
        longer: question, answer, and a second question up to its answer; empty as this.
    """

    tokenizer: PreTrainedTokenizerBase
    as_parts: bool
    before: tuple[Message, ...]
    plain: bool = False
    prompt: str = ""
    whole: str = ""
    longer: str = ""

    def text(self, message: Message) -> str:
        """A message of the known conversation as this template is asked."""
        return " ".join(message["content"].split()) if self.plain else message["content"]

    def write(self, *messages: Message, generate: bool, **variables: str) -> str:
        """What the template makes of these messages.

        Raises:
            TEMPLATE_ERRORS: as the template does.
        """
        asked = [x | {"content": self.text(x)} for x in (*self.before, *messages)]
        return render(self.tokenizer, asked, generate, self.as_parts, **variables)

    def attempt(self, *messages: Message, generate: bool, **variables: str) -> str:
        """As `write`; nothing where the template refuses the messages."""
        try:
            return self.write(*messages, generate=generate, **variables)
        except TEMPLATE_ERRORS:
            return ""


def first_look(tokenizer: PreTrainedTokenizerBase) -> View:
    """In the form of contents that makes the question appear.

    Raises:
        UserError: none does.
    """
    problems = []
    for plain, before, as_parts in product((False, True), ((), (SYSTEM,)), (False, True)):
        view = View(tokenizer, as_parts, before, plain)
        try:
            prompt = view.write(QUESTION, generate=True)
        except TEMPLATE_ERRORS as error:
            problems.append(f"it fails: {error}")
            continue
        if (text := view.text(QUESTION)) in prompt:
            return replace(
                view,
                prompt=prompt,
                whole=view.attempt(QUESTION, ANSWER, generate=False),
                longer=view.attempt(QUESTION, ANSWER, SECOND, generate=True),
            )
        problems.append(f"the question {text!r} does not stand in the prompt {short(prompt)}")
    advice = "correct the template (chat_template.jinja, or chat_template in tokenizer_config.json)"
    raise UserError(f"the chat template cannot be used: {problems[0]}; {advice}")


def short(text: str) -> str:
    shown = text if len(text) <= MOST_SHOWN else f"{text[:MOST_SHOWN]} ..."
    return repr(shown)
