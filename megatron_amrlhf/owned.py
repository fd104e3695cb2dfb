"""Folders of ours: a note inside says so. Nothing is deleted or replaced for its name.

The note is written into a folder before anything else and deleted last, so that what a kill leaves
is known at the next start. A complete folder's note lists its files: what somebody has added or
changed makes the folder theirs.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import time
from pathlib import Path
from typing import Final, Literal

from megatron_amrlhf.errors import UserError
from megatron_amrlhf.files import free_name, fsync, sha256_of, started_at, write_atomic
from megatron_amrlhf.reading import Record, Unreadable, read_record

NOTE_NAME = ".amrlhf.json"
MADE_BY: Final = "megatron_amrlhf"
SMALL_FILE = 1 << 20  # bytes; up to here a file's content is compared, not only its size
# What killed writers leave inside: the safetensors library and `files.replacing`.
LEFTOVER = re.compile(r"\.tmp\w{6}|\..+\.\d+\.tmp", re.ASCII)
OUR_NOTE = re.compile(rf"{re.escape(NOTE_NAME)}|\.{re.escape(NOTE_NAME)}\.\d+\.tmp", re.ASCII)
OTHER_HOST_SECONDS = 24 * 3600.0
SHOWN_NAMES = 3

Kind = Literal["run", "heartbeat", "checkpoint", "export", "conversion", "cache", "probe"]


class Mark(Record):
    """A file as it was written: bytes, and the SHA-256 of a small one."""

    size: int
    sha256: str | None


class Note(Record):
    """What the note says.

    Attributes:
        made_by: this package.
        kind: what the folder is.
        host, pid: of the process that made it.
        files: by path in the folder; None: it is being filled, all in it is ours.
    """

    made_by: Literal["megatron_amrlhf"]
    kind: Kind
    host: str
    pid: int
    files: dict[str, Mark] | None


def make_folder(folder: Path, kind: Kind) -> None:
    """Makes a folder of ours, with its parents.

    Raises:
        FileExistsError: something is there.
        OSError: it cannot be made.
    """
    folder.mkdir(parents=True)
    try:
        claim(folder, kind)
    except BaseException:
        delete_ours(folder, kind)  # a full disk: no more than a part of the note is in it
        raise


def claim(folder: Path, kind: Kind) -> None:
    """Writes the note into a folder of which the caller knows that it is ours."""
    _write_note(folder, kind, None)


def seal(folder: Path, kind: Kind) -> None:
    """Lists the files of a complete folder in its note."""
    files = {str(path.relative_to(folder)): _mark(path) for path in _files(folder)}
    _write_note(folder, kind, files)


def is_ours(folder: Path, kind: Kind) -> bool:
    """Whether there is a note of that kind in the folder, whatever else is."""
    return (note := _note(folder)) is not None and note.kind == kind


def why_not_ours(folder: Path, kind: Kind) -> str:
    """What forbids to delete a folder, as `has no note ...`; empty: nothing is lost by it."""
    if folder.is_symlink():
        return "is a link"
    if not folder.is_dir():
        return "is no folder"
    if all(OUR_NOTE.fullmatch(path.name) for path in folder.iterdir()):
        return ""  # also where a kill came before the note was whole
    note = _note(folder)
    if note is None or note.kind != kind:
        return f"was not made by this version of the package (no {NOTE_NAME} in it)"
    if note.files is None:
        return ""
    found = {str(path.relative_to(folder)): path for path in _files(folder)}
    strange = [name for name, path in found.items() if not _is_as_written(path, note.files, name)]
    return f"has files that were added or changed since ({_some(strange)})" if strange else ""


def is_whole(folder: Path, kind: Kind) -> bool:
    """Whether all that a note lists is there, as it was written, and nothing else."""
    note = _note(folder)
    if note is None or note.files is None or note.kind != kind:
        return False
    all_there = all((folder / name).is_file() for name in note.files)
    return all_there and not why_not_ours(folder, kind)


def strangers(folder: Path, known: set[str]) -> str:
    """The names in a folder that are neither known nor ours by their form, for a message."""
    names = (path.name for path in folder.iterdir())
    return _some([x for x in names if x not in known | {NOTE_NAME} and not LEFTOVER.fullmatch(x)])


def is_abandoned(folder: Path) -> bool:
    """Whether the process that made a folder does not run any more.

    Another host's is not seen from here: it has gone where nothing was written for a day.
    """
    note = _note(folder)
    if note is None:
        return True
    if note.host != socket.gethostname():
        newest = max(path.lstat().st_mtime for path in folder.iterdir())
        return time.time() - newest > OTHER_HOST_SECONDS
    written = (folder / NOTE_NAME).stat().st_mtime
    return note.pid == os.getpid() or written < started_at(note.pid)


def delete_ours(folder: Path, kind: Kind) -> None:
    """Deletes a folder of ours, the note last. None may be there.

    Raises:
        UserError: it is not ours, or no longer.
        OSError: it cannot be deleted.
    """
    if not folder.exists() and not folder.is_symlink():
        return
    if why := why_not_ours(folder, kind):
        raise UserError(f"{folder} {why}: move it away")
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != NOTE_NAME:
            path.unlink()
    (folder / NOTE_NAME).unlink(missing_ok=True)
    folder.rmdir()


def refuse_other_folder(target: Path, kind: Kind) -> None:
    """What will be replaced must be as it was written, or empty.

    Raises:
        UserError: it is not.
    """
    if target.exists() and (why := why_not_ours(target.resolve(), kind)):
        raise UserError(f"{target} {why}: it would be replaced; move it away or give another name")


def begin_beside(target: Path, kind: Kind) -> Path:
    """A new folder in which what gets the name ``target`` is written.

    What killed processes have left beside goes; what they were about to replace is put back.

    Raises:
        UserError: what is at ``target`` is not ours.
        OSError: the folder cannot be made.
    """
    temporary, old = _beside(target, "tmp"), _beside(target, "old")
    refuse_other_folder(target, kind)
    if old.is_dir() and is_ours(old, kind) and not target.exists():
        old.rename(target)
    for leftover in (temporary, old):
        if not why_not_ours(leftover, kind) and is_abandoned(leftover):
            delete_ours(leftover, kind)
    new = free_name(temporary)
    make_folder(new, kind)
    return new


def put_in_place(temporary: Path, target: Path, kind: Kind) -> None:
    """Gives the complete folder its name; the one before it is deleted last.

    Raises:
        UserError: what is at ``target`` is not ours.
        OSError: it cannot be replaced.
    """
    seal(temporary, kind)
    for path in temporary.rglob("*"):
        fsync(path)
    fsync(temporary)
    refuse_other_folder(target, kind)
    old = free_name(_beside(target, "old"))
    if target.exists():
        target.rename(old)
    temporary.rename(target)
    fsync(target.parent)
    delete_ours(old, kind)


def _beside(target: Path, end: str) -> Path:
    return target.with_name(f".{target.name}.{end}")


def _write_note(folder: Path, kind: Kind, files: dict[str, Mark] | None) -> None:
    host, pid = socket.gethostname(), os.getpid()
    note = Note(made_by=MADE_BY, kind=kind, files=files, host=host, pid=pid)
    write_atomic(folder / NOTE_NAME, note.model_dump_json(indent=1) + "\n")


def _note(folder: Path) -> Note | None:
    try:
        return read_record(folder / NOTE_NAME, Note)
    except (FileNotFoundError, Unreadable):
        return None


def _files(folder: Path) -> list[Path]:
    """All but folders and the note; what a killed writer left is no file of anybody."""
    paths = (path for path in sorted(folder.rglob("*")) if path.is_symlink() or not path.is_dir())
    return [x for x in paths if x != folder / NOTE_NAME and not LEFTOVER.fullmatch(x.name)]


def _mark(path: Path) -> Mark:
    size = path.stat().st_size
    return Mark(size=size, sha256=sha256_of(path) if size <= SMALL_FILE else None)


def _is_as_written(path: Path, files: dict[str, Mark], name: str) -> bool:
    return name in files and path.is_file() and not path.is_symlink() and _mark(path) == files[name]


def _some(names: list[str]) -> str:
    shown = ", ".join(sorted(names)[:SHOWN_NAMES])
    more = f" and {len(names) - SHOWN_NAMES} more" if len(names) > SHOWN_NAMES else ""
    return shown + more
