"""Rows of a data file that are made when they are asked for.

A run holds where its rows stand, and reads and cuts the few that a step takes.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Generic, TypeVar, overload

import numpy as np
import torch
from torch import Tensor

from megatron_amrlhf.data.jsonl import Place, read_again
from megatron_amrlhf.data.row_keys import Row
from megatron_amrlhf.files import expanded

Item = TypeVar("Item")
KEPT_ROWS = 256  # made ones, as a step asks for its rows more than once


def id_row(ids: Sequence[int]) -> Tensor:
    """Token ids as a 1-D int64 tensor; by way of an array, which takes a fifth of the time."""
    if not ids:
        return torch.zeros(0, dtype=torch.int64)
    return torch.frombuffer(array("q", ids), dtype=torch.int64)


@dataclass(frozen=True)
class Index:
    """Where the items of a file stand, one entry each.

    Attributes:
        places: ``[N, 4]`` int64, the `Place` of the item's record.
        numbers: ``[N]`` uint16, which of the record's items it is.
    """

    places: np.ndarray
    numbers: np.ndarray

    @staticmethod
    def joined(parts: Sequence[Index]) -> Index:
        """All parts of a file, one after the other."""
        places = np.concatenate([part.places for part in parts])
        return Index(places, np.concatenate([part.numbers for part in parts]))

    def __len__(self) -> int:
        return len(self.places)


class IndexMaker:
    """Collects an `Index`."""

    def __init__(self):
        self._places, self._numbers = array("q"), array("H")

    def add(self, place: Place, count: int) -> None:
        """The items of the next record."""
        for number in range(count):
            self._places.extend(place)
            self._numbers.append(number)

    def index(self) -> Index:
        """What was added."""
        places = np.frombuffer(self._places, np.int64).reshape(-1, len(Place._fields))
        return Index(places, np.frombuffer(self._numbers, np.uint16))


@dataclass(frozen=True)
class Contents:
    """What the token ids of a file's rows are, where somebody has asked.

    Attributes:
        num_rows: rows of ids; an item may have several.
        num_tokens: in all of them.
        highest: in the file's order, the rows that have a larger id than all before them.
    """

    num_rows: int = 0
    num_tokens: int = 0
    highest: tuple[Tensor, ...] = ()

    def with_rows(self, rows: Iterable[Tensor]) -> Contents:
        """These and the next rows."""
        num_rows, num_tokens, highest = self.num_rows, self.num_tokens, self.highest
        for row in rows:
            num_rows, num_tokens = num_rows + 1, num_tokens + row.numel()
            if not highest or row.max() > highest[-1].max():
                highest = (*highest, row)
        return Contents(num_rows, num_tokens, highest)


class Rows(Sequence[Item], Generic[Item]):
    """The items of a file that has been checked; each is made anew when it is asked for.

    Args:
        path: the file.
        index: of its items.
        read: (record, ``path:line``) to the record's items.
        contents: of all rows.
    """

    def __init__(
        self,
        path: str | Path,
        index: Index,
        read: Callable[[dict, str], Iterable[Item]],
        contents: Contents,
    ):
        self.path, self.contents = path, contents
        self._index, self._read = index, read
        self._file = expanded(path).open("rb")  # this one, whatever takes its name later
        self._item = lru_cache(KEPT_ROWS)(self._make)

    def __len__(self) -> int:
        return len(self._index)

    @overload
    def __getitem__(self, place: int) -> Item: ...

    @overload
    def __getitem__(self, place: slice) -> list[Item]: ...

    def __getitem__(self, place: int | slice) -> Item | list[Item]:
        """An item, or those of a slice.

        Raises:
            IndexError: there are fewer.
            UserError: its line has changed.
        """
        found = range(len(self))[place]
        return self._item(found) if isinstance(found, int) else [self._item(i) for i in found]

    def _make(self, place: int) -> Item:
        found = Place(*self._index.places[place].tolist())
        where = f"{self.path}:{found.line}"
        row = Row(read_again(self._file, found, where))
        return list(self._read(row, where))[self._index.numbers[place]]


def highest_rows(*files: Sequence) -> list[Tensor]:
    """What `Contents.highest` has of one file after the other.

    The first row of them with an id of some size or more is among these.

    Args:
        files: `Rows`, or nothing, where there is no file.
    """
    return [row for rows in files if isinstance(rows, Rows) for row in rows.contents.highest]
