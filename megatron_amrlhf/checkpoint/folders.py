"""The folder of checkpoints: which are complete, how one becomes so, which are kept."""

from __future__ import annotations

import re
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from pydantic import NonNegativeInt

from megatron_amrlhf.checkpoint.files import write_text
from megatron_amrlhf.errors import UserError, printable
from megatron_amrlhf.files import clear_temporaries, free_name, fsync, sha256_of
from megatron_amrlhf.owned import claim, delete_ours, is_ours, make_folder, strangers, why_not_ours
from megatron_amrlhf.reading import FileName, Record, Unreadable, read_record
from megatron_amrlhf.sizes import GIB, in_units

FORMAT = 2
MANIFEST_FILE, STATE_FILE, LATEST_FILE = "manifest.json", "state.json", "latest"
STEP_FOLDER = re.compile(r"step-(0|[1-9]\d*)", re.ASCII)
# Of folders that are being written, and of complete ones that are being replaced or deleted.
UNFINISHED = re.compile(rf"tmp-(?P<old>old-)?(?P<step>{STEP_FOLDER.pattern})(\.\d+)?", re.ASCII)
OUR_FILE = re.compile(
    rf"[a-z]+-tp\d{{2,}}-pp\d{{2,}}-dp\d{{4,}}\.safetensors|{STATE_FILE}|{MANIFEST_FILE}", re.ASCII
)
LONGEST_LAG_SECONDS = 60.0  # of a shared file system that caches folders


class ManifestEntry(Record):
    """A file of a checkpoint: bytes and SHA-256 (hex)."""

    size: NonNegativeInt
    sha256: str


class Manifest(Record):
    """The content of ``manifest.json``: each file by its name in the folder."""

    files: dict[FileName, ManifestEntry]


@dataclass(frozen=True)
class Retention:
    """Which checkpoints stay when a new one is complete; the newest always does.

    Attributes:
        count: complete checkpoints to keep, at least 1.
        gib: what they may take together, GiB; None: any.
    """

    count: int
    gib: float | None = None


def find_latest(checkpoints: Path) -> Path | None:
    """The newest checkpoint: it has a manifest, and each file has the size it tells.

    Waits where a shared file system lags behind. An older one is never taken without a word, as
    all that was logged after it would be forgotten.

    Raises:
        UserError: it is not; names the file and the way out.
    """
    folders = [folder for folder in step_folders(checkpoints) if any(folder.iterdir())]
    if not folders:
        return None
    wait_until_seen(newest := folders[-1])
    if (manifest := read_manifest(newest)) is None:
        raise damaged(newest, MANIFEST_FILE, "is missing or unreadable")
    for name in manifest:
        if problem := size_problem(newest, name, manifest):
            raise damaged(newest, name, problem)
    return newest


def damaged(folder: Path, name: str, what: str) -> UserError:
    """The error, with the way out: the newest older checkpoint that is complete."""
    older = [x for x in step_folders(folder.parent) if step_of(x) < step_of(folder)]
    older = [x for x in older if is_complete(x)]
    advice = "there is no older complete checkpoint: restore the file or start a new run"
    if older:
        advice = f"delete {folder} to go on from the older complete checkpoint {older[-1]}"
    return UserError(f"{folder / name} {what}; {advice}")


def wait_until_seen(folder: Path) -> None:
    """Waits a minute at most until a checkpoint that another node sees is complete here too."""
    deadline = time.monotonic() + LONGEST_LAG_SECONDS
    while not is_complete(folder) and time.monotonic() < deadline:
        time.sleep(0.5)


def step_of(path: Path) -> int:
    """Completed steps at a checkpoint, from its folder's name."""
    match = STEP_FOLDER.fullmatch(path.name)
    if match is None:
        raise UserError(f"{path} is no checkpoint: its name must be step-N")
    return int(match[1])


def step_folders(checkpoints: Path) -> list[Path]:
    """Folders named ``step-N``, by step."""
    if not checkpoints.is_dir():
        return []
    folders = [x for x in checkpoints.iterdir() if STEP_FOLDER.fullmatch(x.name) and x.is_dir()]
    return sorted(folders, key=step_of)


def read_manifest(folder: Path) -> dict[str, ManifestEntry] | None:
    """Size and SHA-256 by file name; None if there is no readable manifest."""
    try:
        return read_record(folder / MANIFEST_FILE, Manifest).files
    except (FileNotFoundError, Unreadable):
        return None


def is_complete(folder: Path) -> bool:
    """Whether the manifest is there and each file has the size it tells."""
    manifest = read_manifest(folder)
    if manifest is None:
        return False
    return not any(size_problem(folder, name, manifest) for name in manifest)


def file_problem(folder: Path, name: str, manifest: dict[str, ManifestEntry]) -> str | None:
    """What is wrong with a file of a checkpoint, by its size and its content; None if nothing."""
    if problem := size_problem(folder, name, manifest):
        return problem
    if sha256_of(folder / name) != manifest[name].sha256:
        return "is damaged: its SHA-256 is not the manifest's"
    return None


def size_problem(folder: Path, name: str, manifest: dict[str, ManifestEntry]) -> str | None:
    """What is wrong with a file of a checkpoint, by its size alone; None if nothing."""
    size = size_of(folder / name)
    if name not in manifest or size is None:
        return "is missing"
    wanted = manifest[name].size
    return None if size == wanted else f"has {size} bytes instead of {wanted}"


def size_of(file: Path) -> int | None:
    """Size in bytes; None if there is no such file."""
    return file.stat().st_size if file.is_file() else None


def check_free_space(folder: Path, needed: int) -> None:
    """Raises a ``UserError`` where ``needed`` bytes do not fit."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"no room for a checkpoint in {folder}: it takes {in_units(needed)} and "
            f"{in_units(free)} are free; make room, or lower checkpoint.keep"
        )


def clear_leftovers(checkpoints: Path) -> list[str]:
    """Deletes what a killed save left behind; puts back a checkpoint it was about to replace.

    Returns:
        A line for each folder that has such a name and stays, because it is not known as ours.
    """
    checkpoints.mkdir(parents=True, exist_ok=True)
    clear_temporaries(checkpoints, re.compile(LATEST_FILE))
    left = []
    for folder in sorted(checkpoints.iterdir()):
        match = UNFINISHED.fullmatch(folder.name)
        if match is None:
            continue
        place = checkpoints / match["step"]
        if why := why_not_ours(folder, "checkpoint") or _strangers_in(folder):
            left.append(f"{folder} {why}: it stays as it is")
        elif match["old"] and is_complete(folder) and not place.exists():
            folder.rename(place)
        else:
            delete_ours(folder, "checkpoint")
    return left


def begin(checkpoints: Path, step: int) -> Path:
    """A new folder in which the checkpoint of a step is written; its name is free.

    Raises:
        UserError: what stands in the checkpoint's own place is not ours.
    """
    clear_leftovers(checkpoints)
    _refuse_others(checkpoints / f"step-{step}")
    folder = free_name(checkpoints / f"tmp-step-{step}")
    make_folder(folder, "checkpoint")
    return folder


def publish(temporary: Path, folder: Path) -> None:
    """Gives the complete checkpoint its name, then points ``latest`` to it."""
    aside = _set_aside(folder)
    temporary.rename(folder)
    if aside is not None:
        delete_ours(aside, "checkpoint")
    fsync(folder.parent)
    write_text(folder.parent / LATEST_FILE, folder.name + "\n")


def delete_old(checkpoints: Path, newest: Path, retention: Retention) -> None:
    """Keeps ``newest`` and, as far as ``retention`` lets, the latest other complete ones.

    One that holds files of somebody else stays as well.
    """
    assert retention.count >= 1
    left = None if retention.gib is None else retention.gib * GIB - _bytes_of(newest)
    kept = 1
    others = [x for x in step_folders(checkpoints) if x != newest and is_complete(x)]
    for folder in reversed(others):
        size = _bytes_of(folder)
        if kept < retention.count and (left is None or size <= left):
            kept, left = kept + 1, None if left is None else left - size
        else:
            try:
                if aside := _set_aside(folder):  # so that no half-deleted one is ever found
                    delete_ours(aside, "checkpoint")
            except (OSError, UserError) as error:  # the new one is there
                line = f"warning: {folder} is not deleted: {error}"
                print(printable(line), file=sys.stderr, flush=True)
            left = left and 0  # what is older goes as well


def _set_aside(folder: Path) -> Path | None:
    """Frees a checkpoint's name; where its files are now, if any. Of a link the link goes alone.

    Raises:
        UserError: not all that is there is ours.
    """
    if folder.is_symlink():
        folder.unlink()
    if not folder.exists():
        return None
    _refuse_others(folder)
    if not is_ours(folder, "checkpoint"):
        claim(folder, "checkpoint")  # an earlier version's, of which the manifest tells as much
    aside = free_name(folder.with_name(f"tmp-old-{folder.name}"))
    folder.rename(aside)
    return aside


def _refuse_others(folder: Path) -> None:
    """Raises a ``UserError`` where a folder in a checkpoint's place holds more than that."""
    if folder.is_symlink() or not folder.exists():
        return
    why = "is no folder" if not folder.is_dir() else _strangers_in(folder)
    is_unknown = not is_ours(folder, "checkpoint") and not is_complete(folder)
    if why or is_unknown and any(folder.iterdir()):
        raise UserError(f"{folder} {why or 'is no checkpoint of ours'}: move it away")


def _strangers_in(folder: Path) -> str:
    """Which entries are no files of a checkpoint, for a message; empty: none."""
    known = {path.name for path in folder.iterdir() if OUR_FILE.fullmatch(path.name)}
    found = strangers(folder, known | set(read_manifest(folder) or ()))
    return f"has files of others ({found})" if found else ""


def _bytes_of(folder: Path) -> int:
    manifest = read_manifest(folder)
    return sum(entry.size for entry in manifest.values()) if manifest else 0
