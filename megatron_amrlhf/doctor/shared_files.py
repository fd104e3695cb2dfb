"""Whether all ranks see the same run folder: rank 0 writes a file, all read it, and the reverse."""

from __future__ import annotations

import contextlib
import os
import secrets
import time
from dataclasses import asdict
from pathlib import Path

from megatron_amrlhf.doctor.meeting import Meeting
from megatron_amrlhf.doctor.records import Sight
from megatron_amrlhf.errors import UserError
from megatron_amrlhf.owned import delete_ours, is_abandoned, is_ours, make_folder

TOKEN_NAME, PREFIX = "token", ".doctor-"
PATIENCE_SECONDS = 5.0  # caches of attributes on network file systems
POLL_SECONDS = 0.1


def look_from_everywhere(meeting: Meeting, folder: Path) -> list[Sight]:
    """What every rank sees of rank 0's file in the run's folder. Nothing is left behind.

    Returns:
        On rank 0 one for each rank, its own first; an empty list elsewhere.
    """
    folder = folder.absolute()
    if not meeting.is_main:
        name = meeting.answer()
        if name is not None:
            meeting.gather("shared files", asdict(_look(meeting, folder / name, name)))
        return []
    made = next((each for each in reversed((folder, *folder.parents)) if not each.exists()), None)
    name = f"{PREFIX}{secrets.token_hex(8)}"
    place = folder / name
    try:
        try:
            _clear_abandoned(folder)
            make_folder(place, "probe")
            (place / TOKEN_NAME).write_text(name)
        except OSError as error:
            meeting.answer(None)
            reason = error.strerror or str(error)
            return [Sight(0, meeting.host, str(folder), None, False, False, reason)]
        meeting.answer(name)
        own = asdict(_look(meeting, place, name))
        sights = [Sight(**x) for x in meeting.gather("shared files", own)]
        # Not looked for before they are written: a name that is missing is cached too.
        return [_returned(sight, place, name) for sight in sights]
    finally:
        _clear(place, folder, made)


def _look(meeting: Meeting, place: Path, name: str) -> Sight:
    start = time.monotonic()
    seen = _reads(place / TOKEN_NAME, name)
    seconds = time.monotonic() - start if seen else None
    error = ""
    if seen:  # else the file would stay where rank 0 does not delete it
        try:
            (place / str(meeting.rank)).write_text(name)
        except OSError as problem:
            error = problem.strerror or str(problem)
    written = seen and not error
    return Sight(meeting.rank, meeting.host, str(place.parent), seconds, written, False, error)


def _returned(sight: Sight, place: Path, name: str) -> Sight:
    returned = sight.written and _reads(place / str(sight.rank), name)
    return Sight(**asdict(sight) | {"returned": returned})


def _reads(file: Path, text: str) -> bool:
    """Whether the file has that text, now or within ``PATIENCE_SECONDS``."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while True:
        with contextlib.suppress(OSError):
            if file.read_text() == text:
                return True
        if time.monotonic() > deadline:
            return False
        time.sleep(POLL_SECONDS)
        with contextlib.suppress(OSError):
            os.listdir(file.parent.parent)  # a network file system asks its server for it


def _clear_abandoned(folder: Path) -> None:
    """Deletes what killed doctors have left."""
    for place in folder.glob(f"{PREFIX}*"):
        if is_ours(place, "probe") and is_abandoned(place):
            with contextlib.suppress(OSError, UserError):
                delete_ours(place, "probe")


def _clear(place: Path, folder: Path, made: Path | None) -> None:
    """Deletes what was written, and the folders made for it unless somebody has used them."""
    with contextlib.suppress(OSError, UserError):
        delete_ours(place, "probe")
    with contextlib.suppress(OSError):
        while made is not None and folder.is_relative_to(made):
            folder.rmdir()
            folder = folder.parent
