"""What of a model's folder is read and what is not, in one line."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from megatron_amrlhf.models.expected import FLOATS
from megatron_amrlhf.models.gguf import NOTE_FILE
from megatron_amrlhf.models.source import ShardedWeights, read_hf_config

SHOWN = 3


def contents_line(folder: str | Path, wanted: Collection[str]) -> str:
    """Counts of the tensors and files of a folder that are read, and of those that are not.

    Args:
        folder: a Hugging Face folder that ``check_weights`` has passed.
        wanted: names of the model's tensors.
    """
    weights = ShardedWeights(folder)
    headers, files = weights.headers(), weights.files
    read = [name for name in headers if name in wanted]
    left = [weights.stored_name(name) for name in headers if name not in wanted]
    places = {files.file_of[weights.stored_name(name)] for name in read}
    dtypes = ", ".join(sorted({FLOATS[headers[name][1]] for name in read}))
    where = next(iter(places)) if len(places) == 1 else _count(places, "file")
    unread = [f"{_count(left, 'tensor')} ({_some(left)})"] if left else []
    if files.conflict:
        unread.append(f"{files.conflict}, which names other files")
    if files.unread:
        unread.append(f"{_count(files.unread, 'file')} ({_some(files.unread)})")
    if dropout := read_hf_config(folder).get("attention_dropout"):
        unread.append(f"attention_dropout {dropout}")
    note = weights.folder / NOTE_FILE
    made = [note.read_text(encoding="utf-8").strip()] if note.is_file() else []
    rest = f"not read: {'; '.join(unread)}" if unread else "nothing is left unread"
    return "; ".join([f"{_count(read, 'tensor')} ({dtypes}) from {where} of {folder}", rest, *made])


def _count(things: Collection[str], noun: str) -> str:
    return f"{len(things)} {noun}{'s' * (len(things) != 1)}"


def _some(names: Collection[str]) -> str:
    dots = ", ..." if len(names) > SHOWN else ""
    return ", ".join(sorted(names)[:SHOWN]) + dots
