"""Values of a record's keys, checked."""

from __future__ import annotations

from typing import Any

from megatron_amrlhf.errors import UserError


def is_text(value: Any) -> bool:
    """Whether it is a string that is not blank."""
    return isinstance(value, str) and bool(value.strip())


def need(record: dict, key: str, where: str) -> Any:
    """The value of a key.

    Raises:
        UserError: there is no such key.
    """
    if key not in record:
        found = ", ".join(map(repr, record)) or "none"
        raise UserError(f"{where}: key '{key}' is missing (keys here: {found}); add it")
    return record[key]


def need_text(record: dict, key: str, where: str) -> str:
    """The value of a key that must be a text that is not blank.

    Raises:
        UserError: it is not.
    """
    value = need(record, key, where)
    if not is_text(value):
        raise UserError(f"{where}: '{key}' must be a string that is not blank; correct this line")
    return value


def need_steps(record: dict, key: str, where: str) -> tuple[str, ...]:
    """The value of a key that must be a list of texts, none of them blank.

    Raises:
        UserError: it is not.
    """
    value = need(record, key, where)
    if not isinstance(value, list) or not value:
        problem = "must be a list with at least one step"
    elif not all(map(is_text, value)):
        problem = "must be a list of strings that are not blank"
    else:
        return tuple(value)
    raise UserError(f"{where}: '{key}' {problem}; correct this line")


def number(item: Any, low: int, high: int, key: str, where: str) -> float:
    """A number in [low, high]; ``true`` and ``false`` are numbers only where that is [0, 1].

    Raises:
        UserError: something else.
    """
    types = (bool, int, float) if (low, high) == (0, 1) else (int, float)
    if type(item) not in types or not low <= item <= high:
        message = f"{where}: '{key}' has {repr(item)[:40]}, must be numbers from {low} to {high}"
        raise UserError(f"{message}; correct this line")
    return float(item)
