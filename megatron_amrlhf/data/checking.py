"""The check of a data file before a run: each rank reads a part, and all hear what came of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

from transformers import PreTrainedTokenizerBase

from megatron_amrlhf.config.data_section import DataSection
from megatron_amrlhf.data.jsonl import Place, first_record, iterate_jsonl
from megatron_amrlhf.data.lazy_rows import Contents, Index, IndexMaker, Rows
from megatron_amrlhf.data.readers import ALONE, Readers
from megatron_amrlhf.data.row_keys import Row
from megatron_amrlhf.data.rows import RowLeftOut, Selection, Tally, joined
from megatron_amrlhf.data.stand_in import BatchCutter, ByteCounter, NeedsIds, is_bounded
from megatron_amrlhf.errors import UserError
from megatron_amrlhf.files import expanded

Item = TypeVar("Item")
Read = Callable[[dict, str, Any], Iterable[Item]]
"""(record, ``path:line``, tokenizer or `StandIn`) to items. It must depend on nothing else."""
Accept = Callable[[Item], None]
"""Refuses an item by a `UserError`, which no setting leaves out."""
ROWS_AT_ONCE = 1024
BYTES_A_UNIT = 1 << 20  # of the progress that is shown


@dataclass(frozen=True)
class Part:
    """What a rank has found in its part of a file.

    Attributes:
        size: bytes of the file, as this rank sees it.
        problem: the first mistake in the part, or None.
        selection: what became of its rows.
        index: of its items.
        contents: of their rows.
    """

    size: int
    problem: str | None
    selection: Selection
    index: Index
    contents: Contents


def load_rows(
    path: str | Path,
    read: Read,
    tokenizer: PreTrainedTokenizerBase,
    section: DataSection,
    *,
    readers: Readers = ALONE,
    accept: Accept | None = None,
) -> tuple[Rows[Item], Selection]:
    """Checks a file's rows, which are made later. Entered by all ``readers``.

    Args:
        path: the file.
        read: makes items of a record.
        tokenizer: that ``read`` gets in the end.
        section: of the run.
        readers: who checks it.
        accept: what else an item has to be.

    Raises:
        UserError: on all ranks the first mistake in the file, or that no row is left.
    """
    parts = readers.gather(
        _check_part(path, read, tokenizer, section, readers=readers, accept=accept)
    )
    for part in parts:
        if part.problem is not None:
            raise UserError(part.problem)
    if len({part.size for part in parts}) > 1:
        raise UserError(f"{path}: it has not the same size on all ranks; give all the same file")
    selection = joined([part.selection for part in parts])
    if not selection.num_rows:
        first_record(path)  # says that there is none
    index = Index.joined([part.index for part in parts])
    selection.need_items(len(index))
    contents = Contents(
        sum(part.contents.num_rows for part in parts),
        sum(part.contents.num_tokens for part in parts),
        tuple(row for part in parts for row in part.contents.highest),
    )

    def make(record: dict, where: str) -> Iterable[Item]:
        return read(record, where, tokenizer)

    return Rows(path, index, make, contents), selection


def _check_part(
    path: str | Path,
    read: Read,
    tokenizer: PreTrainedTokenizerBase,
    section: DataSection,
    *,
    readers: Readers,
    accept: Accept | None,
) -> Part:
    checker: _Checker[Any] = _Checker(
        path, read, tokenizer, section, exact=readers.exact, accept=accept
    )
    problem, size = None, 0
    try:
        records = iterate_jsonl(path, readers.rank, readers.count)
        chunk = list(islice(records, ROWS_AT_ONCE))
        size = expanded(path).stat().st_size
        units, shown = size // readers.count // BYTES_A_UNIT, 0
        with readers.track("data, MiB", units) as advance:
            begin = chunk[0][0].start if chunk else 0
            while chunk:
                checker.take(chunk)
                done = (chunk[-1][0].start - begin) // BYTES_A_UNIT
                advance(done - shown)
                shown, chunk = done, list(islice(records, ROWS_AT_ONCE))
    except UserError as error:
        problem = str(error)
    selection = checker.tally.selection()
    return Part(size, problem, selection, checker.index.index(), checker.contents)


class _Checker(Generic[Item]):
    """Takes the records of a part, many at once, and keeps what `Part` tells of them."""

    def __init__(
        self,
        path: str | Path,
        read: Read,
        tokenizer: PreTrainedTokenizerBase,
        section: DataSection,
        *,
        exact: bool,
        accept: Accept | None,
    ):
        self.path, self.read, self.accept, self.exact = path, read, accept, exact
        self.tally, self.index, self.contents = Tally(path, section), IndexMaker(), Contents()
        self.counter, self.cutter = ByteCounter(tokenizer), BatchCutter(tokenizer)
        self.bytes_tell = not exact and is_bounded(tokenizer)

    def take(self, records: list[tuple[Place, dict]]) -> None:
        """The next records.

        Raises:
            UserError: one of them is wrong and may not be left out.
        """
        lines = [f"{self.path}:{place.line}" for place, _ in records]
        tries = [self._by_bytes(x, where) for (_, x), where in zip(records, lines, strict=True)]
        self.cutter.prepare(text for known in tries if known.items is None for text in known.asked)
        for (place, record), where, known in zip(records, lines, tries, strict=True):
            if known.items is None:
                row = Row(record)
                found = self.tally.take(row, where, partial(self.read, row, where, self.cutter))
            else:
                found = self.tally.take(known.row, where, partial(list, known.items))
            for item in found:
                if self.accept is not None:
                    self.accept(item)
                if self.exact:
                    self.contents = self.contents.with_rows(item.rows)
            self.index.add(place, len(found))

    def _by_bytes(self, record: dict, where: str) -> _Try:
        row, self.counter.asked = Row(record), []
        try:
            items = list(self.read(row, where, self.counter))
        except (UserError, RowLeftOut, NeedsIds):
            items = None
        return _Try(row, items if self.bytes_tell else None, self.counter.asked)


class _Try(NamedTuple):
    """A row that was read by its texts' bytes.

    Attributes:
        row: the record.
        items: what it holds, with ids that are none; None: its bytes do not tell that it is right.
        asked: its texts, each with or without special tokens.
    """

    row: Row
    items: list | None
    asked: list[tuple[str, bool]]
