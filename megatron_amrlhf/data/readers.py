"""The ranks that check a data file together, each a part of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any


@contextmanager
def _in_silence(name: str, total: int) -> Iterator[Callable[[int], None]]:
    yield lambda n: None


def _alone(part: Any) -> list:
    return [part]


@dataclass(frozen=True)
class Readers:
    """One of the ranks that check a file together; by default it is alone.

    Attributes:
        rank: its number.
        count: of ranks.
        gather: gives all ranks' picklable objects in their order, on all ranks; entered by every
            rank.
        track: of a phase's name and its units of work, shows what is done of it while its block
            runs, and gives what counts units as done.
        exact: whether the rows' token ids are looked at, and not only how many they may be.
    """

    rank: int = 0
    count: int = 1
    gather: Callable[[Any], list] = _alone
    track: Callable[[str, int], AbstractContextManager[Callable[[int], None]]] = _in_silence
    exact: bool = False


ALONE = Readers()
