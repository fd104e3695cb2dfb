"""JSON-lines files: strict reading with one-line errors, atomic writing, fingerprints.

What is read may also be a JSON list of objects, or several such lists one after the other, which
is what ``cat a.json b.json`` makes.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from megatron_amrlhf.errors import UserError
from megatron_amrlhf.files import expanded, sha256_of, write_atomic

Requirement = type | tuple[type, ...] | Callable[[Any], str | None]
"""What a key's value must be: a type, several types, or a check.

A check gets the value and returns None if it is right, else what is wrong ("must be ...").
"""

_JSON_NAMES = {str: "a string", int: "an integer", float: "a number", bool: "true or false"}
_JSON_NAMES |= {list: "a list", dict: "an object", type(None): "null"}


def read_jsonl(path: str | Path, required: dict[str, Requirement]) -> list[dict]:
    """Read a file of JSON objects and check the keys that the caller needs.

    Args:
        path: JSON lines or lists of objects, UTF-8; blank lines are passed over, keys not in
            ``required`` are kept.
        required: key -> type, tuple of types, or check function (see `Requirement`). ``float``
            takes integers too; ``true`` and ``false`` are numbers nowhere.

    Returns:
        One dict an object, in the file's order.

    Raises:
        UserError: missing or empty file, malformed line, missing or wrong key; the message starts
            with ``path:line:``, in a list the line that the object starts on.
    """
    return [record for _, record in read_numbered_jsonl(path, required)]


def read_numbered_jsonl(
    path: str | Path, required: dict[str, Requirement]
) -> list[tuple[int, dict]]:
    """As `read_jsonl`, each record with its line number (from 1), for later error messages."""
    text, records = _read_text(path), []
    items = _list_items if text.lstrip()[:1] == "[" else _lines
    for number, record in items(text, path):
        where = f"{path}:{number}"
        for key, requirement in required.items():
            if key not in record:
                found = ", ".join(map(repr, record)) or "none"
                raise UserError(f"{where}: key '{key}' is missing (keys here: {found}); add it")
            problem = _violation(record[key], requirement)
            if problem:
                raise UserError(f"{where}: '{key}' {problem}; correct this line")
        records.append((number, record))
    if not records:
        what = "list" if items is _list_items else "file"
        raise UserError(f"{path}:1: the {what} is empty; put one JSON object on each line")
    return records


def write_jsonl(path: str | Path, records: Iterable[dict]) -> None:
    """Write one JSON object a line (UTF-8) so that the file is there whole or not at all."""
    write_atomic(Path(path), dump_jsonl(records))


def dump_jsonl(records: Iterable[dict]) -> bytes:
    """The bytes that `write_jsonl` writes."""
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()


def fingerprint(path: str | Path) -> str:
    """SHA-256 of a file. A resumed run compares it with the one it was saved with.

    Raises:
        UserError: the file cannot be read.
    """
    try:
        return sha256_of(expanded(path))
    except OSError as error:
        raise UserError(f"{path}: cannot read the data file: {error.strerror}") from error


def _read_text(path: str | Path) -> str:
    try:
        content = expanded(path).read_bytes()
    except FileNotFoundError as error:
        message = f"{path}: no such file; check the path (relative to {os.getcwd()})"
        raise UserError(message) from error
    except OSError as error:
        raise UserError(f"{path}: cannot read the file: {error.strerror}") from error
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        number = content[: error.start].count(b"\n") + 1
        raise UserError(f"{path}:{number}: not UTF-8 text; convert the file to UTF-8") from error


def _lines(text: str, path: str | Path) -> Iterator[tuple[int, dict]]:
    """The object of each line that is not blank, with the line's number."""
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        record, end = _decode(line, len(line) - len(line.lstrip()), where)
        if (rest := _skip_blanks(line, end)) < len(line):
            advice = "write one JSON object a line"
            problem = f"Extra data at column {rest + 1}"
            raise UserError(f"{where}: not valid JSON ({problem}); {advice}")
        yield number, _object(record, line, where)


def _list_items(text: str, path: str | Path) -> Iterator[tuple[int, dict]]:
    """The objects of one JSON list after the other, each with the line that it starts on."""
    place, line, counted = _skip_blanks(text, 0), 1, 0
    while place < len(text):
        if text[place] != "[":
            line += text.count("\n", counted, place)
            problem = f"{text[place : place + 10]!r} stands behind the end of a list"
            raise UserError(f"{path}:{line}: {problem}; give lists alone, or one object a line")
        place = _skip_blanks(text, place + 1)
        is_open = text[place : place + 1] != "]"
        while is_open:
            line, counted = line + text.count("\n", counted, place), place
            where = f"{path}:{line}"
            record, end = _decode(text, place, where)
            yield line, _object(record, text[place:end], where)
            place = _skip_blanks(text, end)
            is_open = text[place : place + 1] == ","
            if not is_open and text[place : place + 1] != "]":
                problem = "no comma or ] behind this object"
                raise UserError(f"{where}: not valid JSON ({problem}); correct this object")
            place = _skip_blanks(text, place + 1) if is_open else place
        place = _skip_blanks(text, place + 1)


def _skip_blanks(text: str, place: int) -> int:
    while text[place : place + 1] and text[place] in " \t\r\n":
        place += 1
    return place


def _decode(text: str, place: int, where: str) -> tuple[Any, int]:
    """The JSON value that starts at ``place``, and where it ends."""
    try:
        return _DECODER.raw_decode(text, place)
    except json.JSONDecodeError as error:
        advice = "write one JSON object a line"
        message = f"{where}: not valid JSON ({error.msg} at column {error.colno}); {advice}"
        raise UserError(message) from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not valid JSON ({error}); correct this line") from error


def _object(record: Any, text: str, where: str) -> dict:
    """A record that is a JSON object of whole characters; ``text`` is what it was read from."""
    if "\\u" in text:
        try:
            json.dumps(record, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            half = f"\\u{ord(error.object[error.start]):04x}"
            problem = f"{half} is half a character (a cut emoji), which no tokenizer takes"
            raise UserError(f"{where}: {problem}; correct this line") from None
        except RecursionError as error:
            raise UserError(f"{where}: not valid JSON ({error}); correct this line") from error
    if not isinstance(record, dict):
        found = _JSON_NAMES[type(record)]
        raise UserError(f"{where}: expected a JSON object, found {found}; write {{...}} a line")
    return record


def _refuse_constant(name: str):
    raise ValueError(f"{name} is no JSON number")


def _finite(digits: str) -> float:
    if not math.isfinite(number := float(digits)):
        raise ValueError(f"{digits[:20]} is too large for a number")
    return number


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict:
    record = dict(pairs)
    if len(record) < len(pairs):
        names = [name for name, _ in pairs]
        repeated = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"key {repeated[:40]!r} is given twice")
    return record


_DECODER = json.JSONDecoder(
    object_pairs_hook=_without_repeats, parse_constant=_refuse_constant, parse_float=_finite
)


def _violation(value: Any, requirement: Requirement) -> str | None:
    """What is wrong with a value, or None."""
    if not isinstance(requirement, type | tuple):
        return requirement(value)
    types = requirement if isinstance(requirement, tuple) else (requirement,)
    accepted = types + (int,) if float in types else types
    if type(value) in accepted:
        return None
    expected = " or ".join(_JSON_NAMES.get(kind, kind.__name__) for kind in types)
    return f"must be {expected}, found {_JSON_NAMES[type(value)]}"
