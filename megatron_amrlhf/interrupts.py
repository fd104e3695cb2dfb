"""Ctrl-C while a program loads: it ends at once with 130, as there is nothing to save yet.

An exception in the middle of an import is no way out. Libraries catch it and go on half loaded, to
fail later by something else (numpy, transformers), or it is a long traceback.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager

EXIT_INTERRUPTED = 130


def end_at_once() -> None:
    """From here on Ctrl-C ends the process, unless it is ignored or something else is done on it.

    The first thing that a program does; `as_usual` follows when it begins its work.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end)


def as_usual() -> None:
    """Ctrl-C raises ``KeyboardInterrupt`` again."""
    if signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@contextmanager
def loading() -> Iterator[None]:
    """Ctrl-C ends the process at once while its block imports what takes seconds."""
    end_at_once()
    try:
        yield
    finally:
        as_usual()


def _end(number: int, frame: object) -> None:
    os._exit(EXIT_INTERRUPTED)
