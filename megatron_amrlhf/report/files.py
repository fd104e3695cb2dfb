"""JSON Lines of the run folder that can be resumed."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from megatron_amrlhf.files import write_atomic


def append_jsonl(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Appends one line of strict JSON a record; NaN and infinities become null."""
    lines = [json.dumps(strict(record), ensure_ascii=False, allow_nan=False) for record in records]
    with path.open("a", encoding="utf-8") as file:
        file.write("".join(line + "\n" for line in lines))


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Reads the complete lines; a last line that a kill cut short is left out."""
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8", errors="replace")
    complete = text[: text.rfind("\n") + 1]
    return [json.loads(line) for line in complete.split("\n") if line.strip()]


def truncate_jsonl(path: Path, step: int) -> None:
    """Drops the lines of later steps, and a cut last line, before a resumed run appends.

    Args:
        path: a JSON Lines file whose records have a ``step``; it may be missing.
        step: the last step to keep.
    """
    if path.exists():
        kept = [record for record in read_jsonl(path) if record["step"] <= step]
        text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in kept)
        write_atomic(path, text)


def strict(value: Any) -> Any:
    """The same value with NaN and infinities as None, which strict JSON can hold."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: strict(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [strict(item) for item in value]
    return value
