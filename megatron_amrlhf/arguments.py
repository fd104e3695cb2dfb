"""A command line's parser and types of arguments, whose mistakes it tells in one line."""

from __future__ import annotations

import argparse
import math
from typing import NoReturn

from megatron_amrlhf.errors import UserError

LARGEST = 10**9  # of any number on a command line


class Parser(argparse.ArgumentParser):
    """An argument parser whose mistakes are user errors, and whose help keeps its line breaks."""

    def __init__(self, **options):
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see {self.prog} --help)")


def at_least_one(text: str) -> int:
    """A whole number from 1 on."""
    return _whole(text, 1)


def at_least_zero(text: str) -> int:
    """A whole number from 0 on."""
    return _whole(text, 0)


def above_zero(text: str) -> float:
    """A finite number above 0."""
    number = _number(text)
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number above 0, found {text!r}")
    return float(_at_most(text, number))


def not_negative(text: str) -> float:
    """A finite number from 0 on."""
    number = _number(text)
    if not 0 <= number < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number of at least 0, found {text!r}")
    return float(_at_most(text, number))


def _whole(text: str, least: int) -> int:
    if not text.isdecimal() or float(text) < least:
        raise argparse.ArgumentTypeError(
            f"must be a whole number of at least {least}, found {text!r}"
        )
    return int(_at_most(text, float(text)))


def _at_most(text: str, number: float) -> str:
    """The text; a larger number is a slip, and what counts with it would fail far from here."""
    if number > LARGEST:
        raise argparse.ArgumentTypeError(f"must be at most {LARGEST}, found {text[:40]!r}")
    return text


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan
