"""Turns pydantic's error list into short sentences that name the dotted key and the fix."""

from __future__ import annotations

import difflib
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from megatron_amrlhf.config.algorithms import algorithm_models
from megatron_amrlhf.config.describe import (
    format_value,
    list_keys,
    section_fields,
)

MAX_SHOWN_CHARACTERS = 60  # of a wrong value in an error line

_MUST_BE = {
    "greater_than": "must be > {gt:g}",
    "greater_than_equal": "must be >= {ge:g}",
    "less_than": "must be < {lt:g}",
    "less_than_equal": "must be <= {le:g}",
    "literal_error": "must be {expected}",
    "enum": "must be {expected}",
    "int_type": "must be a whole number",
    "int_parsing": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_type": "must be a number",
    "float_parsing": "must be a number",
    "finite_number": "must be a finite number",
    "bool_type": "must be true or false",
    "bool_parsing": "must be true or false",
    "string_type": "must be text, in quotes if it looks like a number",
    "string_too_short": "must not be empty",
    "tuple_type": "must be a list such as [A, B]",
    "too_long": "must have at most {max_length} items",
    "model_type": "must be a section of keys",
    "model_attributes_type": "must be a section of keys",
}


def describe_problems(
    error: ValidationError, data: dict[str, Any], from_override: set[str]
) -> list[str]:
    """Describes each problem of a configuration in one sentence.

    Args:
        error: what pydantic raised for ``data``.
        data: the raw configuration, overrides applied.
        from_override: dotted keys that came from ``--set``.
    """
    algorithm = data.get("algorithm")
    kind = algorithm.get("kind") if isinstance(algorithm, dict) else None
    kind = kind if isinstance(kind, str) and kind in algorithm_models() else None
    problems = []
    for item in error.errors(include_url=False):
        path = _dotted(item["loc"])
        origin = " (from --set)" if path in from_override else ""
        problems.append(_describe(item, path, kind) + origin)
    return list(dict.fromkeys(problems))


def _describe(item: ErrorDetails, path: str, kind: str | None) -> str:
    match item["type"]:
        case "extra_forbidden":
            return _unknown_key(path, kind)
        case "missing":
            return f"{path}: is required"
        case "union_tag_not_found":
            return f"algorithm.kind: is required, one of {', '.join(algorithm_models())}"
        case "union_tag_invalid":
            kinds = list(algorithm_models())
            tag = str(item["ctx"]["tag"])
            hint = did_you_mean(tag, kinds)
            return f"algorithm.kind: must be one of {', '.join(kinds)} (got '{tag}'){hint}"
    return wrong_value(item, path)


def wrong_value(item: ErrorDetails, path: str) -> str:
    """What a value must be, and what it is."""
    must_be = _MUST_BE.get(item["type"])
    text = must_be.format(**item.get("ctx", {})) if must_be else " ".join(item["msg"].split())
    return f"{path}: {text} (got {shortened(format_value(item['input']))})"


def shortened(text: str) -> str:
    """The beginning of a long text, for an error line."""
    if len(text) <= MAX_SHOWN_CHARACTERS:
        return text
    return text[: MAX_SHOWN_CHARACTERS - 3] + "..."


def _unknown_key(path: str, kind: str | None) -> str:
    section, _, name = path.rpartition(".")
    siblings = section_fields(section, kind)
    if close := difflib.get_close_matches(name, siblings, n=1):
        return f"{path}: unknown key, did you mean {f'{section}.' if section else ''}{close[0]}?"
    keys = list_keys()
    kinds = [key.kind for key in keys if key.name == path and key.kind]
    if kinds:
        return f"{path}: a key of algorithm.kind {' or '.join(kinds)}, not of {kind}"
    elsewhere = [
        key.name
        for key in keys
        if key.name.endswith(f".{name}") and key.kind in ("", kind) and name != "kind"
    ]
    if elsewhere:
        return f"{path}: unknown key, did you mean {' or '.join(elsewhere)}?"
    where = f"section {section}" if section else "a run"
    return f"{path}: unknown key, {where} has {', '.join(siblings)}"


def did_you_mean(word: str, choices: list[str]) -> str:
    """``, did you mean X?`` with the nearest of the choices, empty where none is near."""
    close = difflib.get_close_matches(word, choices, n=1)
    return f", did you mean {close[0]}?" if close else ""


def _dotted(loc: tuple[int | str, ...]) -> str:
    """``('algorithm', 'ppo', 'clip_eps')`` to ``algorithm.clip_eps``, list places as ``[1]``."""
    if len(loc) > 1 and loc[0] == "algorithm" and loc[1] in algorithm_models():
        loc = (loc[0], *loc[2:])
    text = ""
    for part in loc:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return text
