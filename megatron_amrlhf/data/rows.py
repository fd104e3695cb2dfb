"""Rows of a data file that are used, left out by rule, or wrong: nothing goes uncounted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

from megatron_amrlhf.config.data_section import DataSection
from megatron_amrlhf.data.row_keys import Row, unread_paths
from megatron_amrlhf.errors import UserError

Item = TypeVar("Item")
WRONG = "wrong"
SHOWN_KEYS = 20  # of a file, each of those that are read and of those that are not


class RowLeftOut(Exception):
    """A row that is right but not used; its text is the reason that is counted."""


@dataclass(frozen=True)
class Selection:
    """What became of a file's rows.

    Attributes:
        path: the file.
        num_rows: rows in the file.
        left_out: reason to number of rows; ``wrong`` counts rows that a check refused.
        first_wrong: the message of the first wrong row, or None.
        read: path of a key that is read to the number of used rows that have it.
        unread: the same of keys that are not read.
    """

    path: str
    num_rows: int
    left_out: dict[str, int]
    first_wrong: str | None
    read: dict[str, int]
    unread: dict[str, int]

    def keys(self) -> str:
        """One line for a person: which keys of the used rows were read, and which not."""
        num_used = self.num_rows - sum(self.left_out.values())
        rest = f"not read {_counted(self.unread)}" if self.unread else "nothing is left unread"
        return f"{self.path}: keys of {num_used} rows: read {_counted(self.read)}; {rest}"

    def need_items(self, count: int) -> None:
        """Refuses a file of which nothing is used.

        Raises:
            UserError: ``count`` is 0.
        """
        if not count:
            raise UserError(f"{self.summary()}; no row is left to use")

    def summary(self) -> str | None:
        """One line for a person, or None if every row is used."""
        if not self.left_out:
            return None
        reasons = ", ".join(f"{count} {reason}" for reason, count in self.left_out.items())
        total = sum(self.left_out.values())
        first = f"; first wrong row: {self.first_wrong}" if self.first_wrong else ""
        return f"{self.path}: {total} of {self.num_rows} rows left out ({reasons}){first}"


def _counted(counts: dict[str, int]) -> str:
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    names = [f"{name} ({count})" for name, count in ordered]
    more = [f"{len(names) - SHOWN_KEYS} more"] if len(names) > SHOWN_KEYS else []
    return ", ".join([*names[:SHOWN_KEYS], *more]) or "none"


class Tally:
    """Counts what becomes of rows.

    Args:
        path: their file.
        section: whether wrong rows are left out, counted, instead of stopping at the first one,
            and which keys may be unread whatever they mean.
    """

    def __init__(self, path: str | Path, section: DataSection):
        self.path, self.section = str(path), section
        self.num_rows = 0
        self.left_out: Counter[str] = Counter()
        self.first_wrong: str | None = None
        self.keys: Counter[tuple[frozenset[str], frozenset[str]]] = Counter()

    def take(self, row: Row, where: str, read: Callable[[], Iterable[Item]]) -> list[Item]:
        """What is read of a row; nothing where it is left out.

        Args:
            row: the record that is read.
            where: ``path:line``.
            read: reads it. A key that it does not read is counted, or makes the row a wrong one
                where it can change what the row means.

        Raises:
            UserError: a wrong row, unless it may be left out.
        """
        self.num_rows += 1
        try:
            found = list(read())
            unread = unread_paths(row, self.section.ignored_keys, where)
        except RowLeftOut as reason:
            self.left_out[str(reason)] += 1
        except UserError as error:
            if not self.section.skips_wrong_rows:
                raise
            self.left_out[WRONG] += 1
            self.first_wrong = self.first_wrong or str(error)
        else:
            self.keys[frozenset(row.read), frozenset(unread)] += 1
            return found
        return []

    def selection(self) -> Selection:
        """The counts so far."""
        counts: tuple[Counter[str], Counter[str]] = (Counter(), Counter())
        for both, number in self.keys.items():
            for count, names in zip(counts, both, strict=True):
                count.update(dict.fromkeys(names, number))
        left_out, (read, unread) = dict(self.left_out), map(dict, counts)
        return Selection(self.path, self.num_rows, left_out, self.first_wrong, read, unread)


def select_rows(
    path: str | Path,
    records: Iterable[tuple[int, dict]],
    read: Callable[[dict, str], Iterable[Item]],
    section: DataSection,
) -> tuple[list[Item], Selection]:
    """Reads every record of a file.

    Args:
        path: the file, for messages.
        records: line numbers and records.
        read: (record, ``path:line``) to items, as `Tally.take` wants it.
        section: as of `Tally`.

    Raises:
        UserError: a wrong row (unless it may be left out), or no row is left.
    """
    items: list[Item] = []
    tally = Tally(path, section)
    for number, record in records:
        row, where = Row(record), f"{path}:{number}"
        items.extend(tally.take(row, where, partial(read, row, where)))
    selection = tally.selection()
    selection.need_items(len(items))
    return items, selection


def joined(parts: Sequence[Selection]) -> Selection:
    """The counts of all parts of a file."""
    first = (part.first_wrong for part in parts if part.first_wrong)
    counts = [
        dict(sum((Counter(getattr(part, name)) for part in parts), Counter()))
        for name in ("left_out", "read", "unread")
    ]
    num_rows = sum(part.num_rows for part in parts)
    return Selection(parts[0].path, num_rows, counts[0], next(first, None), *counts[1:])
