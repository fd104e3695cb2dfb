"""JSON Lines of the run folder that can be resumed."""

from __future__ import annotations

import json
import math
import shutil
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from megatron_amrlhf.errors import UserError, printable
from megatron_amrlhf.files import appendable, free_name, write_atomic
from megatron_amrlhf.reading import (
    LARGEST_COUNT,
    Record,
    Unreadable,
    checked,
    parse_json,
    read_bytes,
)

SHOWN_LINES = 5  # of the damaged ones


class _Line(Record):
    """What every line has, beside whatever else it says."""

    step: Annotated[int, Field(ge=0, le=LARGEST_COUNT)]


def append_jsonl(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Appends one line of strict JSON a record; NaN and infinities become null."""
    lines = [json.dumps(strict(record), ensure_ascii=False, allow_nan=False) for record in records]
    with appendable(path).open("a", encoding="utf-8") as file:
        file.write("".join(line + "\n" for line in lines))


@dataclass(frozen=True)
class Lines:
    """A JSON Lines file whose records have a ``step``.

    Attributes:
        sound: each sound line with what it says.
        damaged: line number (from 1) and what is wrong, of the others.
    """

    sound: list[tuple[bytes, dict[str, Any]]]
    damaged: list[tuple[int, str]]


def read_lines(path: Path) -> Lines:
    """Reads the complete lines; a last line that a kill cut short is left out.

    Raises:
        UserError: the file cannot be read.
    """
    try:
        content = read_bytes(path, most=None)
    except FileNotFoundError:
        content = b""
    except Unreadable as error:
        raise UserError(f"{path}: {error}; move it away") from None
    found = Lines([], [])
    for number, line in enumerate(content.split(b"\n")[:-1], start=1):
        if not line.strip():
            continue
        try:
            record = parse_json(line)
            checked(_Line, record)
            found.sound.append((line, record))
        except Unreadable as error:
            found.damaged.append((number, str(error)))
    return found


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """What the sound lines say; raises as ``read_lines``."""
    return [record for _, record in read_lines(path).sound]


def truncate_jsonl(path: Path, step: int) -> None:
    """Drops the lines of later steps, and a cut last line, before a resumed run appends.

    A damaged line is left out too, with a warning; the file as it was is then kept beside.

    Args:
        path: a JSON Lines file whose records have a ``step``; it may be missing.
        step: the last step to keep.

    Raises:
        UserError: the file cannot be read.
        OSError: it cannot be written.
    """
    if not path.exists() and not path.is_symlink():
        return
    lines = read_lines(path)
    if lines.damaged:
        kept = free_name(path.with_name(f"{path.name}.damaged"))
        shutil.copyfile(path, kept)
        told = "; ".join(f"line {number}: {why}" for number, why in lines.damaged[:SHOWN_LINES])
        more = len(lines.damaged) - SHOWN_LINES
        told += f"; and {more} more lines" if more > 0 else ""
        line = f"warning: {path}: left out: {told} (the file as it was: {kept.name})"
        print(printable(line), file=sys.stderr, flush=True)
    write_atomic(path, b"".join(x + b"\n" for x, record in lines.sound if record["step"] <= step))


def strict(value: Any) -> Any:
    """The same value with NaN and infinities as None, which strict JSON can hold."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: strict(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [strict(item) for item in value]
    return value
