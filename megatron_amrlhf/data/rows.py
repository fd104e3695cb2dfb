"""Rows of a data file that are used, left out by rule, or wrong: nothing goes uncounted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from megatron_amrlhf.errors import UserError

Item = TypeVar("Item")
WRONG = "wrong"


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
    """

    path: str
    num_rows: int
    left_out: dict[str, int]
    first_wrong: str | None

    def summary(self) -> str | None:
        """One line for a person, or None if every row is used."""
        if not self.left_out:
            return None
        reasons = ", ".join(f"{count} {reason}" for reason, count in self.left_out.items())
        total = sum(self.left_out.values())
        first = f"; first wrong row: {self.first_wrong}" if self.first_wrong else ""
        return f"{self.path}: {total} of {self.num_rows} rows left out ({reasons}){first}"


def select_rows(
    path: str | Path,
    records: Iterable[tuple[int, dict]],
    read: Callable[[dict, str], Iterable[Item]],
    skip_wrong: bool,
) -> tuple[list[Item], Selection]:
    """Reads every record of a file.

    Args:
        path: the file, for messages.
        records: line numbers and records.
        read: (record, ``path:line``) to items.
        skip_wrong: leave wrong rows out, counted, instead of stopping at the first one.

    Raises:
        UserError: a wrong row (unless ``skip_wrong``), or no row is left.
    """
    items: list[Item] = []
    left_out: Counter[str] = Counter()
    first_wrong, num_rows = None, 0
    for number, record in records:
        num_rows += 1
        try:
            items.extend(read(record, f"{path}:{number}"))
        except RowLeftOut as reason:
            left_out[str(reason)] += 1
        except UserError as error:
            if not skip_wrong:
                raise
            left_out[WRONG] += 1
            first_wrong = first_wrong or str(error)
    selection = Selection(str(path), num_rows, dict(left_out), first_wrong)
    if not items:
        raise UserError(f"{selection.summary()}; no row is left to use")
    return items, selection
