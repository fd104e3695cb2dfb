"""The one exception that means "the user can fix this", and how a tool ends on it."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable

EXIT_USER_ERROR, EXIT_INTERRUPTED = 2, 130


class UserError(Exception):
    """A mistake in the user's input: printed as one line on stderr, exit code 2.

    The message says what is wrong, where, and what to do about it.
    """


def error_line(error: UserError, rank: int = 0) -> str:
    """What a person sees of a mistake: one line, which names a rank other than the first."""
    which = f" (rank {rank})" if rank else ""
    return f"error{which}: {' '.join(str(error).split())}"


def tells_user_errors(main: Callable[..., int]) -> Callable[..., int]:
    """A tool's ``main`` that prints a ``UserError`` as one line and returns 2; 130 on Ctrl-C."""

    @functools.wraps(main)
    def run(*args, **kwargs) -> int:
        try:
            return main(*args, **kwargs)
        except UserError as error:
            print(error_line(error), file=sys.stderr, flush=True)
            return EXIT_USER_ERROR
        except KeyboardInterrupt:
            return EXIT_INTERRUPTED

    return run
