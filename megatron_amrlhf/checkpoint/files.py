"""Files that several ranks write together: hashes, and one answer for all ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from megatron_amrlhf.errors import UserError
from megatron_amrlhf.files import replacing, sha256_of, write_atomic
from megatron_amrlhf.owned import Kind, delete_ours
from megatron_amrlhf.parallel.collectives import gather_objects

Result = TypeVar("Result")


@dataclass(frozen=True)
class FileRecord:
    """A file that was written: its name in the folder, size in bytes and SHA-256 (hex)."""

    name: str
    size: int
    sha256: str


def on_all_ranks(work: Callable[[], Result], doing: str) -> list[Result]:
    """Does ``work`` on every rank and waits for all of them. Entered by every rank.

    Args:
        work: writes or reads files; must enter no collective. Its result must be picklable.
        doing: what fails if it fails, for the message.

    Returns:
        Every rank's result in rank order, on all ranks.

    Raises:
        UserError: some rank's work failed; the same message on every rank.
    """
    result, problem = None, None
    try:
        result = work()
    except UserError as error:
        problem = str(error)
    except (OSError, SafetensorError) as error:
        problem = f"{doing}: rank {dist.get_rank()}: {error}"
    outcomes = gather_objects((result, problem), dist.group.WORLD)
    problems = list(dict.fromkeys(problem for _, problem in outcomes if problem is not None))
    if problems:
        more = f" (and {len(problems) - 1} more problems)" if len(problems) > 1 else ""
        raise UserError(problems[0] + more)
    return [result for result, _ in outcomes]


def on_main_rank(work: Callable[[], Result], doing: str, is_main: bool) -> Result:
    """As ``on_all_ranks``, but rank 0 alone does ``work``; all ranks get its result."""
    results: list[Any] = on_all_ranks(lambda: work() if is_main else None, doing)
    return results[0]


@contextmanager
def deleted_on_failure(folder: Path, kind: Kind, is_main: bool) -> Iterator[None]:
    """Deletes a half-written folder when all ranks raise the same ``UserError`` inside."""
    try:
        yield
    except UserError:
        if is_main:
            with suppress(OSError, UserError):  # the first mistake is the one to tell
                delete_ours(folder, kind)
        raise


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> FileRecord:
    """Writes CPU tensors as safetensors, a whole file or nothing, and puts them on the disk.

    Raises:
        OSError, SafetensorError: the file cannot be written.
    """
    contiguous = {name: x.contiguous() for name, x in tensors.items()}
    with replacing(path) as temporary:
        save_file(contiguous, temporary, metadata=dict(metadata))
    return FileRecord(path.name, path.stat().st_size, sha256_of(path))


def write_text(path: Path, text: str) -> FileRecord:
    """Writes a whole text file or nothing, and puts it on the disk."""
    write_atomic(path, text)
    return FileRecord(path.name, path.stat().st_size, sha256_of(path))
