"""The folder of checkpoints: which are complete, how one becomes so, which are kept."""

from __future__ import annotations

import json
import re
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from megatron_amrlhf.checkpoint.files import fsync, write_text
from megatron_amrlhf.errors import UserError
from megatron_amrlhf.files import remove, sha256_of
from megatron_amrlhf.sizes import GIB, in_units

FORMAT = 2
MANIFEST_FILE, STATE_FILE, LATEST_FILE = "manifest.json", "state.json", "latest"
STEP_FOLDER = re.compile(r"step-(\d+)", re.ASCII)
TEMPORARY = "tmp-"  # prefix of folders that are being written or deleted
ASIDE = f"{TEMPORARY}old-"  # of complete ones that are being replaced or deleted
LONGEST_LAG_SECONDS = 60.0  # of a shared file system that caches folders


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


def read_manifest(folder: Path) -> dict[str, dict] | None:
    """Size and SHA-256 by file name; None if there is no readable manifest."""
    try:
        manifest = json.loads((folder / MANIFEST_FILE).read_text(encoding="utf-8"))
        return {
            name: {"size": x["size"], "sha256": x["sha256"]}
            for name, x in manifest["files"].items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def read_header(folder: Path) -> dict:
    """The parsed ``state.json``.

    Raises:
        UserError: it is missing, malformed, or of another format.
    """
    file = folder / STATE_FILE
    try:
        header = json.loads(file.read_text(encoding="utf-8"))
    except OSError:
        raise UserError(f"{folder} is no complete checkpoint: {STATE_FILE} is missing") from None
    except ValueError as error:
        raise UserError(f"{file}: malformed JSON: {error}") from None
    if header.get("format") != FORMAT:
        raise UserError(f"{folder} has format {header.get('format')}, this version reads {FORMAT}")
    return header


def is_complete(folder: Path) -> bool:
    """Whether the manifest is there and each file has the size it tells."""
    manifest = read_manifest(folder)
    if manifest is None:
        return False
    return not any(size_problem(folder, name, manifest) for name in manifest)


def file_problem(folder: Path, name: str, manifest: dict[str, dict]) -> str | None:
    """What is wrong with a file of a checkpoint, by its size and its content; None if nothing."""
    if problem := size_problem(folder, name, manifest):
        return problem
    if sha256_of(folder / name) != manifest[name]["sha256"]:
        return "is damaged: its SHA-256 is not the manifest's"
    return None


def size_problem(folder: Path, name: str, manifest: dict[str, dict]) -> str | None:
    """What is wrong with a file of a checkpoint, by its size alone; None if nothing."""
    size = size_of(folder / name)
    if name not in manifest or size is None:
        return "is missing"
    wanted = manifest[name]["size"]
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


def clear_leftovers(checkpoints: Path) -> None:
    """Deletes what a killed save left behind; puts back a checkpoint it was about to replace."""
    checkpoints.mkdir(parents=True, exist_ok=True)
    for folder in checkpoints.glob(f"{ASIDE}*"):
        place = folder.with_name(folder.name.removeprefix(ASIDE))
        if is_complete(folder) and not place.exists():
            folder.rename(place)
    for folder in checkpoints.glob(f"{TEMPORARY}*"):
        remove(folder)


def publish(temporary: Path, folder: Path) -> None:
    """Gives the complete checkpoint its name, then points ``latest`` to it."""
    if folder.exists():
        aside = _set_aside(folder)
        temporary.rename(folder)
        remove(aside)
    else:
        temporary.rename(folder)
    fsync(folder.parent)
    write_text(folder.parent / LATEST_FILE, folder.name + "\n")


def delete_old(checkpoints: Path, newest: Path, retention: Retention) -> None:
    """Keeps ``newest`` and, as far as ``retention`` lets, the latest other complete ones."""
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
                remove(_set_aside(folder))  # so that no half-deleted one is ever found
            except OSError as error:  # the new one is there
                print(f"warning: {folder} is not deleted: {error}", file=sys.stderr, flush=True)
            left = left and 0  # what is older goes as well


def _set_aside(folder: Path) -> Path:
    aside = folder.with_name(f"{ASIDE}{folder.name}")
    folder.rename(aside)
    return aside


def _bytes_of(folder: Path) -> int:
    manifest = read_manifest(folder)
    return sum(entry["size"] for entry in manifest.values()) if manifest else 0
