"""Which checkpoints a folder holds, and which of them are complete."""

from __future__ import annotations

import json
import re
from pathlib import Path

from megatron_amrlhf.errors import UserError

MANIFEST_FILE, STATE_FILE, LATEST_FILE = "manifest.json", "state.json", "latest"
STEP_FOLDER = re.compile(r"step-(\d+)", re.ASCII)
TEMPORARY = "tmp-"  # prefix of folders that are being written or deleted


def find_latest(checkpoints: Path) -> Path | None:
    """The newest complete checkpoint: it has a manifest, and each file has the size it tells."""
    complete = [folder for folder in step_folders(checkpoints) if is_complete(folder)]
    return complete[-1] if complete else None


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


def is_complete(folder: Path) -> bool:
    """Whether the manifest is there and each file has the size it tells."""
    manifest = read_manifest(folder)
    if manifest is None:
        return False
    return all(size_of(folder / name) == entry["size"] for name, entry in manifest.items())


def size_of(file: Path) -> int | None:
    """Size in bytes; None if there is no such file."""
    return file.stat().st_size if file.is_file() else None
