"""The conversation that a row's answer answers: its own turns, its system message and history."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megatron_amrlhf.config.data_section import DataSection
from megatron_amrlhf.data.keys import is_text, need_text
from megatron_amrlhf.data.known_chat import Message
from megatron_amrlhf.errors import UserError

SYSTEM_KEYS = ("system", "system_prompt", "system_message")
HISTORY_KEY = "history"
ROLES = {
    "from": {"system": "system", "human": "user", "gpt": "assistant"},
    "role": {"system": "system", "user": "user", "assistant": "assistant"},
}
TEXTS = {"from": "value", "role": "content"}


def conversation(
    record: dict, turns: Sequence[Message], section: DataSection, where: str
) -> tuple[Message, ...]:
    """A row's turns with what the row says beside them.

    ``system`` (or ``system_prompt``, ``system_message``) is the system message, above
    ``data.system_prompt``; blank or null says nothing. ``history`` are earlier turns: a list of
    ``[question, answer]``, of ``{"role", "content"}`` or of ``{"from", "value"}``.

    Args:
        record: the row.
        turns: those that its format has.
        section: keys to ignore.
        where: ``path:line``.

    Raises:
        UserError: two system messages, one that is no text, or a history of another kind.
    """
    parts = [_history(record, section, where), list(turns)]
    systems = [part.pop(0)["content"] for part in parts if part and part[0]["role"] == "system"]
    for key in SYSTEM_KEYS:
        value = None if key in section.ignored_keys else record.get(key)
        if value is None or (isinstance(value, str) and not value.strip()):
            continue
        if not isinstance(value, str):
            raise UserError(f"{where}: '{key}' must be a string; correct this line")
        systems.append(value)
    if len(set(systems)) > 1:
        raise UserError(f"{where}: the row has two system messages; leave one of them")
    system = ({"role": "system", "content": systems[0]},) if systems else ()
    return (*system, *parts[0], *parts[1])


def split_system(turns: Sequence[Message], default: str | None) -> tuple[list[Message], str | None]:
    """The turns without the system message that they begin with, and that or the default."""
    turns = list(turns)
    if turns[0]["role"] == "system":
        default = turns.pop(0)["content"]
    return turns, default


def read_turn(turn: Any, where: str) -> Message:
    """A turn as ``{"role", "content"}`` or ``{"from", "value"}``.

    Raises:
        UserError: it is something else, or its text is blank.
    """
    key = "role" if isinstance(turn, dict) and "role" in turn else "from"
    who = turn.get(key) if isinstance(turn, dict) else None
    if not isinstance(who, str) or who not in ROLES[key]:
        known = ", ".join(ROLES[key])
        raise UserError(f"{where}: each turn must be '{key}' one of {known}; correct this line")
    return {"role": ROLES[key][who], "content": need_text(turn, TEXTS[key], where)}


def _history(record: dict, section: DataSection, where: str) -> list[Message]:
    value = None if HISTORY_KEY in section.ignored_keys else record.get(HISTORY_KEY)
    if not value:
        return []
    turns = []
    for item in value if isinstance(value, list) else [None]:
        if isinstance(item, dict):
            turns.append(read_turn(item, where))
        elif isinstance(item, list) and len(item) == 2 and all(map(is_text, item)):
            question, answer = item
            turns.append({"role": "user", "content": question})
            turns.append({"role": "assistant", "content": answer})
        else:
            raise UserError(
                f"{where}: '{HISTORY_KEY}' must be a list of [question, answer] or of turns; "
                "correct it, drop it, or name it in data.ignored_keys"
            )
    return turns
