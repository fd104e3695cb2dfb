"""Torch files of others, of which nothing but tensors and plain values is ever unpickled."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_amrlhf.errors import UserError


def load_plain(path: Path, allowed: Sequence[type] = ()) -> dict[str, Any]:
    """The dictionary in a ``torch.save`` file; its tensors are mapped, not read.

    Args:
        path: the file.
        allowed: classes that may be in it beside tensors, numbers, strings and containers.

    Raises:
        UserError: it holds something else (which is not unpickled), or it is damaged.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    mapped = zipfile.is_zipfile(path)
    # The context would take back what others (megatron-core) have allowed for good.
    new: list = [kind for kind in allowed if kind not in torch.serialization.get_safe_globals()]
    try:
        with torch.serialization.safe_globals(new):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path}: holds pickled objects that are not tensors or plain values, which are never "
            f"loaded: {_reason(error)}"
        ) from None
    except (RuntimeError, OSError, EOFError, ValueError, KeyError) as error:
        raise UserError(f"{path}: not a readable torch file: {_reason(error)}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: must hold a dictionary, holds a {type(content).__name__}")
    return content


def _reason(error: Exception) -> str:
    """The line of torch's long message that says what was found."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    told = [line for line in lines if "GLOBAL" in line or "Unsupported" in line]
    return (told or lines or [type(error).__name__])[0][:200]
