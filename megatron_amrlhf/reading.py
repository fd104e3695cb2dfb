"""What is read back is looked at first: files of the right kind, sound JSON, values in range.

Whatever a file, a disk or a person has made of it, the answer is the content or ``Unreadable``
with one line on what is wrong; the caller knows the name and what to do about it.
"""

from __future__ import annotations

import json
import math
import os
import stat
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

LARGEST_NOTE = 1 << 28  # bytes; of files that hold a record, not rows
LARGEST_COUNT = 1 << 53  # what a float holds exactly
INT_BITS = 64
Count = Annotated[int, Field(ge=0, le=LARGEST_COUNT)]


class Unreadable(ValueError):
    """What is wrong with a file or a text, without its name."""


class Record(BaseModel):
    """What a file of ours holds: wrong types, NaN and missing keys are refused, others ignored."""

    model_config = ConfigDict(strict=True, frozen=True, extra="ignore", allow_inf_nan=False)


def _refuse_path(name: str) -> str:
    if name in ("", ".", "..") or "/" in name or "\0" in name:
        raise ValueError(f"{name!r} is no name of a file in the folder")
    return name


FileName = Annotated[str, AfterValidator(_refuse_path)]
"""The name of a file in a folder; one that leads elsewhere is refused."""

AnyRecord = TypeVar("AnyRecord", bound=Record)


def read_bytes(path: Path, most: int | None = LARGEST_NOTE) -> bytes:
    """The content of a regular file; nothing else is waited for or read.

    Args:
        path: the file, or a link to it.
        most: largest size, bytes; None: any.

    Raises:
        FileNotFoundError: nothing is there.
        Unreadable: it is no regular file, too large, or the system refuses it.
    """
    try:
        # Without waiting: a pipe that nobody writes to would hold the reader for ever.
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            status = os.fstat(handle)
            if not stat.S_ISREG(status.st_mode):
                is_folder = stat.S_ISDIR(status.st_mode)
                raise Unreadable("is a folder" if is_folder else "is no regular file")
            if most is not None and status.st_size > most:
                raise Unreadable(f"is too large ({status.st_size} bytes)")
            with open(handle, "rb", closefd=False) as file:
                return file.read()
        finally:
            os.close(handle)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise FileNotFoundError(error.errno, error.strerror, str(path)) from None
    except OSError as error:
        raise Unreadable(f"cannot be read ({error.strerror})") from None


def read_text(path: Path) -> str:
    """The text of a file, what is no UTF-8 replaced; raises as ``read_bytes``."""
    return read_bytes(path).decode("utf-8", errors="replace")


def read_json(path: Path, strict: bool = True) -> Any:
    """What a JSON file holds; raises as ``read_bytes`` and ``parse_json``."""
    return parse_json(read_bytes(path), strict)


def read_object(path: Path, strict: bool = True) -> dict[str, Any]:
    """The object that a JSON file holds; raises as ``read_json``."""
    content = read_json(path, strict)
    if not isinstance(content, dict):
        raise Unreadable("must hold a JSON object")
    return content


def read_record(path: Path, kind: type[AnyRecord]) -> AnyRecord:
    """The record that a JSON file holds; raises as ``read_bytes``, ``parse_json``, ``checked``."""
    return checked(kind, read_json(path))


def parse_json(text: str | bytes, strict: bool = True) -> Any:
    """What a JSON text says.

    Args:
        text: UTF-8 where it is bytes.
        strict: also refuse NaN and infinities, a key given twice, and integers of more than 64
            bits, none of which a file of ours has; others' files may.

    Raises:
        Unreadable: it is no JSON, or nested too deeply.
    """
    hooks: dict[str, Any] = {}
    if strict:
        hooks = {
            "parse_constant": _refuse_constant,
            "parse_float": _finite,
            "parse_int": _integer,
            "object_pairs_hook": _without_twins,
        }
    try:
        return json.loads(text if isinstance(text, str) else text.decode("utf-8"), **hooks)
    except Unreadable:
        raise
    except UnicodeDecodeError:
        raise Unreadable("bytes that are no UTF-8 text") from None
    except RecursionError:
        raise Unreadable("not valid JSON (nested too deeply)") from None
    except ValueError as error:
        raise Unreadable(f"not valid JSON ({error})") from None


def checked(kind: type[AnyRecord], content: Any) -> AnyRecord:
    """The content as a record.

    Raises:
        Unreadable: names the first key that is wrong or missing.
    """
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"]))
        what = first["msg"].removeprefix("Value error, ")
        raise Unreadable(f"{where}: {what}" if where else what) from None


def _refuse_constant(name: str):
    raise Unreadable(f"{name} is no JSON number")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise Unreadable(f"{text} is out of range")
    return value


def _integer(text: str) -> int:
    # Very long ones are refused before they are computed.
    if len(text) > INT_BITS or (value := int(text)).bit_length() > INT_BITS:
        raise Unreadable(f"an integer of {len(text)} digits is out of range")
    return value


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        names = [name for name, _ in pairs]
        twin = next(name for name in names if names.count(name) > 1)
        raise Unreadable(f"key {twin!r} is given twice")
    return content
