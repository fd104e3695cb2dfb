"""Files that are there whole or not at all, what they hold, and folders for them."""

from __future__ import annotations

import errno
import hashlib
import math
import os
import re
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from megatron_amrlhf.errors import UserError

TEMPORARY_NAME = re.compile(r"\.(?P<name>.+)\.(?P<pid>[1-9]\d{0,9})\.tmp", re.ASCII)


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
    Raises as ``replacing``.
    """
    data = content.encode("utf-8") if isinstance(content, str) else content
    with replacing(path) as temporary, temporary.open("wb") as file:
        file.write(data)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name to write a file under, which takes the place of ``path`` when it is on the disk.

    Every file that is written goes through here, so that one rule holds. Its mode is what the
    user's umask leaves of 666. A link in its place is replaced and what it leads to stays as it is
    (links to folders are followed); a folder, device or pipe is never replaced.

    Raises:
        OSError: it cannot be written; what was there stays.
    """
    if path.exists() and not path.is_file():
        code = errno.EISDIR if path.is_dir() else errno.EINVAL
        raise OSError(code, "it is a folder" if path.is_dir() else "it is no regular file")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.unlink(missing_ok=True)  # a link, or of a process that had this number before
        yield temporary
        _allow(temporary, 0o666 & ~umask())
        fsync(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def appendable(path: Path) -> Path:
    """The path, as a file of its own: lines are never added to what a link leads to.

    A hard link of a backup is such a name too. What is there is copied.

    Raises:
        OSError: as ``replacing``.
    """
    if path.is_symlink() or path.exists() and path.stat().st_nlink > 1:
        write_atomic(path, path.read_bytes() if path.is_file() else b"")
    return path


def _allow(path: Path, mode: int) -> None:
    """Adds to a file's mode: some libraries write what only the user could read.

    What a folder's access list gives beyond that stays; some disks know no modes.
    """
    found = stat.S_IMODE(path.stat().st_mode)
    if mode & ~found:
        with suppress(PermissionError):
            path.chmod(found | mode)


def umask() -> int:
    """The process's mask of permissions; asked for without changing it."""
    status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    found = re.search(r"^Umask:\s*([0-7]+)$", status, re.MULTILINE)
    assert found is not None, "a kernel before 4.7"
    return int(found[1], 8)


def fsync(path: Path) -> None:
    """Puts a file, or a folder's list of names, on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def clear_temporaries(folder: Path, names: re.Pattern[str]) -> None:
    """Deletes what ``replacing`` has left in killed processes of this user.

    Args:
        folder: whose own files these would have become.
        names: what such files are called. Others stay, whoever made them.
    """
    for entry in os.scandir(folder) if folder.is_dir() else ():
        match = TEMPORARY_NAME.fullmatch(entry.name)
        if match is None or not names.fullmatch(match["name"]):
            continue
        status = entry.stat(follow_symlinks=False)
        is_ours = stat.S_ISREG(status.st_mode) and status.st_uid == os.getuid()
        # Of another host's process only the time is known; its run has ended, or none would start.
        before = status.st_mtime < min(started_at(os.getpid()), started_at(int(match["pid"])))
        if is_ours and before:
            with suppress(FileNotFoundError):
                os.unlink(entry.path)


def started_at(pid: int) -> float:
    """When a process of this host was started, Unix time; infinite: there is none."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return math.inf
    ticks = int(text.rpartition(")")[2].split()[19])  # field 22 of proc(5), since boot
    age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    return time.time() - age


def free_name(path: Path) -> Path:
    """The path, or the first of ``path.1``, ``path.2`` ... that nothing has."""
    found, number = path, 0
    while found.exists() or found.is_symlink():
        number += 1
        found = path.with_name(f"{path.name}.{number}")
    return found


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
