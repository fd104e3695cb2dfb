"""What a program tells a launch script: assignments that the script evaluates."""

from __future__ import annotations

import io
import shlex
import sys
from collections.abc import Mapping, Sequence


def assignment(name: str, value: str | int | Sequence[str]) -> str:
    """``NAME=value``, or ``NAME=(value ...)`` for a list, quoted for a shell."""
    if isinstance(value, str | int):
        return f"{name}={shlex.quote(str(value))}"
    return f"{name}=({shlex.join(value)})"


def print_assignments(values: Mapping[str, str | int | Sequence[str]]) -> None:
    """Prints all of them at once, so that a script gets all or none.

    Names of files that are no text come out as they are.
    """
    lines = [assignment(name, value) for name, value in values.items()]
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="surrogateescape")
    print("\n".join(lines), flush=True)
