"""The one exception that means "the user can fix this", how a tool ends on it, safe text."""

from __future__ import annotations

import contextlib
import functools
import re
import sys
import unicodedata
from collections.abc import Callable, Iterator, Mapping

from megatron_amrlhf.interrupts import EXIT_INTERRUPTED, as_usual

EXIT_USER_ERROR = 2
# Marks that turn the order of the text around them.
DIRECTION_MARKS = frozenset(
    "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
)


class UserError(Exception):
    """A mistake in the user's input: printed as one line on stderr, exit code 2.

    The message says what is wrong, where, and what to do about it.
    """


# What is told in one line; a run's PermissionError only before its work, then by its traceback.
MISTAKES = (UserError, PermissionError)


def error_line(error: Exception, rank: int = 0) -> str:
    """What a person sees of a mistake: one line, which names a rank other than the first."""
    which = f" (rank {rank})" if rank else ""
    return f"error{which}: {printable(' '.join(str(error).split()))}"


def printable(text: str) -> str:
    """Text without what could steer a terminal or a page: such characters become ``\\xNN``.

    Control characters but newline and tab, direction marks and lone surrogates. All that comes
    from files, names or models goes through here before a person sees it.
    """
    return "".join(c if _is_harmless(c) else ascii(c)[1:-1] for c in text)


def _is_harmless(character: str) -> bool:
    if character in "\n\t":
        return True
    category = unicodedata.category(character)
    return category not in ("Cc", "Cs") and character not in DIRECTION_MARKS


@contextlib.contextmanager
def telling(names: Mapping[str, str]) -> Iterator[None]:
    """Inside, a mistake is told in the words of a tool that has no run's configuration.

    Args:
        names: by key of a configuration, as ``model.path``, what its user has given instead.
    """
    try:
        yield
    except UserError as error:
        text = str(error)
        for key, name in names.items():
            text = re.sub(rf"(?<![\w./-]){re.escape(key)}(?![\w/-])", name, text)
        raise UserError(text) from error.__cause__


def tells_user_errors(main: Callable[..., int]) -> Callable[..., int]:
    """A tool's ``main`` that tells ``MISTAKES`` in one line and returns 2; 130 on Ctrl-C."""

    @functools.wraps(main)
    def run(*args, **kwargs) -> int:
        try:
            as_usual()
            return main(*args, **kwargs)
        except MISTAKES as error:
            print(error_line(error), file=sys.stderr, flush=True)
            return EXIT_USER_ERROR
        except KeyboardInterrupt:
            return EXIT_INTERRUPTED

    return run
