"""JSON-lines files: strict reading with one-line errors, atomic writing, fingerprints.

What is read may also be a JSON list of objects, or several such lists one after the other, which
is what ``cat a.json b.json`` makes. Lines are read one by one, lists as a whole.
"""

from __future__ import annotations

import json
import math
import os
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from megatron_amrlhf.errors import UserError
from megatron_amrlhf.files import expanded, sha256_of, write_atomic

Requirement = type | tuple[type, ...] | Callable[[Any], str | None]
"""What a key's value must be: a type, several types, or a check.

A check gets the value and returns None if it is right, else what is wrong ("must be ...").
"""

_JSON_NAMES = {str: "a string", int: "an integer", float: "a number", bool: "true or false"}
_JSON_NAMES |= {list: "a list", dict: "an object", type(None): "null"}
_MARK = b"\xef\xbb\xbf"  # of byte order, which some editors begin UTF-8 with
_BLOCK = 1 << 20  # bytes


class Place(NamedTuple):
    """Where an object stands in its file: its first byte, its bytes, their CRC-32, its line."""

    start: int
    size: int
    checksum: int
    line: int


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
    records = []
    for place, record in iterate_jsonl(path):
        where = f"{path}:{place.line}"
        for key, requirement in required.items():
            if key not in record:
                found = ", ".join(map(repr, record)) or "none"
                raise UserError(f"{where}: key '{key}' is missing (keys here: {found}); add it")
            problem = _violation(record[key], requirement)
            if problem:
                raise UserError(f"{where}: '{key}' {problem}; correct this line")
        records.append((place.line, record))
    return records or [first_record(path)]


def iterate_jsonl(path: str | Path, part: int = 0, parts: int = 1) -> Iterator[tuple[Place, dict]]:
    """The objects of a file in its order, read while they are asked for.

    Args:
        path: as `read_jsonl` takes it.
        part: number of the part that is wanted. The parts have about the same number of bytes, a
            line is in the part that it starts in; a list is in the first.
        parts: one after the other they are the file.

    Raises:
        UserError: missing file, malformed line; the message starts with ``path:line:``.
    """
    with _opened(path) as file:
        begin = len(_MARK) if file.read(len(_MARK)) == _MARK else 0
        if _is_list(file, begin):
            if part == 0:
                file.seek(begin)
                yield from _list_items(_decoded(file.read(), path, 1), begin, path)
        else:
            size = os.fstat(file.fileno()).st_size
            stop = size if part == parts - 1 else size * (part + 1) // parts
            yield from _lines(file, max(begin, size * part // parts), stop, begin, path)


def first_record(path: str | Path) -> tuple[int, dict]:
    """The first object of a file and its line.

    Raises:
        UserError: as `iterate_jsonl`, or there is none.
    """
    for place, record in iterate_jsonl(path):
        return place.line, record
    with _opened(path) as file:
        what = "list" if _is_list(file, 0) else "file"
    raise UserError(f"{path}:1: the {what} is empty; put one JSON object on each line")


def read_again(file: BinaryIO, place: Place, where: str) -> dict:
    """The object that stands at a place of an open file; the file's position stays.

    Raises:
        UserError: another one stands there.
    """
    content = os.pread(file.fileno(), place.size, place.start)
    if zlib.crc32(content) != place.checksum:
        raise UserError(f"{where}: the line has changed since the run began; start the run again")
    text = content.decode()
    return _object(_decode(text, len(text) - len(text.lstrip()), where)[0], text, where)


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


@contextmanager
def _opened(path: str | Path) -> Iterator[BinaryIO]:
    try:
        with expanded(path).open("rb") as file:
            yield file
    except FileNotFoundError as error:
        message = f"{path}: no such file; check the path (relative to {os.getcwd()})"
        raise UserError(message) from error
    except OSError as error:
        raise UserError(f"{path}: cannot read the file: {error.strerror}") from error


def _decoded(content: bytes, path: str | Path, line: int) -> str:
    """Text that starts on a line."""
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        line += content[: error.start].count(b"\n")
        raise UserError(f"{path}:{line}: not UTF-8 text; convert the file to UTF-8") from error


def _is_list(file: BinaryIO, begin: int) -> bool:
    """Whether the first character from a byte on that is no blank opens a list."""
    file.seek(begin)
    texts = (line.decode("utf-8-sig", "replace").strip() for line in file)
    return next(filter(None, texts), "")[:1] == "["


def _lines(
    file: BinaryIO, start: int, stop: int, begin: int, path: str | Path
) -> Iterator[tuple[Place, dict]]:
    """The object of each line that is not blank and starts in ``[start, stop)``.

    Args:
        file: open.
        start: byte of the file.
        stop: as this.
        begin: byte that the file's first line starts at.
        path: of the file, for messages.
    """
    file.seek(begin)
    number = _line_from(file, start) if start > begin else 1
    start = file.tell()
    for content in file:
        if start >= stop:
            return
        line = _decoded(content, path, number).removesuffix("\n")
        if line.strip():
            where = f"{path}:{number}"
            record, end = _decode(line, len(line) - len(line.lstrip()), where)
            if (rest := _skip_blanks(line, end)) < len(line):
                advice = "write one JSON object a line"
                problem = f"Extra data at column {rest + 1}"
                raise UserError(f"{where}: not valid JSON ({problem}); {advice}")
            yield _place(start, content, number), _object(record, line, where)
        start, number = start + len(content), number + 1


def _line_from(file: BinaryIO, start: int) -> int:
    """Goes to the first line that starts at a byte (not 0) or behind it; its number."""
    file.seek(0)
    number, left, block = 1, start, b""
    while left and (block := file.read(min(left, _BLOCK))):
        number, left = number + block.count(b"\n"), left - len(block)
    if not block.endswith(b"\n"):
        file.readline()
        number += 1
    return number


def _list_items(text: str, begin: int, path: str | Path) -> Iterator[tuple[Place, dict]]:
    """The objects of one JSON list after the other; the text starts at the byte ``begin``."""
    place, line, counted = _skip_blanks(text, 0), 1, 0
    while place < len(text):
        if text[place] != "[":
            line += text.count("\n", counted, place)
            problem = f"{text[place : place + 10]!r} stands behind the end of a list"
            raise UserError(f"{path}:{line}: {problem}; give lists alone, or one object a line")
        place = _skip_blanks(text, place + 1)
        is_open = text[place : place + 1] != "]"
        while is_open:
            line += text.count("\n", counted, place)
            begin, counted = begin + len(text[counted:place].encode()), place
            where = f"{path}:{line}"
            record, end = _decode(text, place, where)
            own = text[place:end]
            yield _place(begin, own.encode(), line), _object(record, own, where)
            place = _skip_blanks(text, end)
            is_open = text[place : place + 1] == ","
            if not is_open and text[place : place + 1] != "]":
                problem = "no comma or ] behind this object"
                raise UserError(f"{where}: not valid JSON ({problem}); correct this object")
            place = _skip_blanks(text, place + 1) if is_open else place
        place = _skip_blanks(text, place + 1)


def _place(start: int, content: bytes, line: int) -> Place:
    return Place(start, len(content), zlib.crc32(content), line)


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
