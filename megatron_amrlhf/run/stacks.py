"""The Python stack of the main thread, seen from another one, and whether it waits for others."""

from __future__ import annotations

import sys
import threading
import traceback

# Where the innermost frame lies while a collective or a pipeline transfer blocks.
COMMUNICATION_FILES = ("/torch/distributed/", "/deepspeed/comm/")
# Blocking calls into C leave no frame of their own. A device queue is waited for by reading it.
WAITING_CALLS = (".wait(", ".item()", ".tolist()", ".cpu()", ".synchronize(")


def main_stack() -> list[str]:
    """Frames of the main thread, the innermost last, as ``FILE:LINE FUNCTION: SOURCE``."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    if frame is None:
        return []
    return _lines(traceback.extract_stack(frame))


def error_stack(error: BaseException) -> list[str]:
    """Frames from where the exception was caught to where it was raised, in the same form."""
    return _lines(traceback.extract_tb(error.__traceback__))


def is_waiting(stack: list[str]) -> bool:
    """Whether the stack ends inside a collective, a transfer, or a read of a device's result.

    Args:
        stack: as ``main_stack`` gives it.
    """
    if not stack:
        return False
    place, _, source = stack[-1].partition(": ")
    in_library = any(part in place for part in COMMUNICATION_FILES)
    return in_library or any(call in source for call in WAITING_CALLS)


def _lines(frames: traceback.StackSummary) -> list[str]:
    return [f"{frame.filename}:{frame.lineno} {frame.name}: {frame.line}" for frame in frames]
