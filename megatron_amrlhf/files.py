"""Files that are there whole or not at all, what they hold, and folders for them."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from pathlib import Path

from megatron_amrlhf.errors import UserError


def expanded(path: str | Path) -> Path:
    """The path with ``~`` or ``~user`` in its place.

    Raises:
        UserError: there is no such user.
    """
    found = os.path.expanduser(path)
    if found.startswith("~"):
        user = found[1:].split("/", 1)[0]
        raise UserError(f"{path}: there is no user {user!r} here (a file of that name: ./{path})")
    return Path(found)


def writable_folder(path: str | Path, option: str) -> Path:
    """A folder for results, made and tried before the work that they take.

    Raises:
        UserError: it cannot be made or written; ``option``, or the key, is what names it.
    """
    folder = expanded(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        raise UserError(f"{option} {folder}: cannot be written ({error.strerror})") from None


def write_atomic(path: Path, content: str | bytes) -> None:
    """Writes a whole file, text as UTF-8, and puts it on the disk.

    A reader never sees half of it, not even after a kill; where it fails nothing has changed.
    """
    data = content.encode("utf-8") if isinstance(content, str) else content
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def remove(path: Path) -> None:
    """Deletes a folder with all that is in it; of a link the link alone. None may be there."""
    if path.is_symlink():
        path.unlink()
    elif path.exists():
        shutil.rmtree(path)


def why_no_file(name: str | Path) -> str:
    """What keeps a path from being a file, such as ``no such file``; empty where it is one."""
    path = expanded(name)
    if path.is_file():
        return ""
    return "is a folder, give the file itself" if path.is_dir() and str(name) else "no such file"


def hash_ends(digest: hashlib._Hash, path: Path, num_bytes: int) -> None:
    """Adds the first and then the last ``num_bytes`` of a file; of a small one all, twice.

    A large file is then known by little reading.
    """
    with path.open("rb") as file:
        digest.update(file.read(num_bytes))
        file.seek(max(0, path.stat().st_size - num_bytes))
        digest.update(file.read(num_bytes))


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's content, hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
