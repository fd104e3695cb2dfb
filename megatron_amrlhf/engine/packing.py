"""Which rows go into one micro-batch."""

from __future__ import annotations


def pack_rows(
    lengths: list[int], together: int, max_rows: int | None, max_tokens: int | None
) -> list[list[int]]:
    """Row indices of each micro-batch: as few as the limits allow, with nearly equal tokens.

    Longest first into the emptiest (https://en.wikipedia.org/wiki/Longest-processing-time-first),
    with one more micro-batch until all limits hold.

    Args:
        lengths: tokens of each row.
        together: this many consecutive rows (a pair) stay in one micro-batch, in order.
        max_rows: rows a micro-batch; None: any number.
        max_tokens: tokens a micro-batch; None: any number. What stays together may exceed it.

    Returns:
        The micro-batches; rows in ascending order in each.
    """
    by_rows = -(-len(lengths) // max_rows) if max_rows else 1
    by_tokens = -(-sum(lengths) // max_tokens) if max_tokens else 1
    count = max(min(max(by_rows, by_tokens), len(lengths) // together), 1)
    # Ends at the latest where there are as many of them as units: a unit alone always fits.
    while True:
        micro_batches = spread_rows(lengths, together, count, max_rows)
        if all(
            _fits(micro_batch, lengths, together, max_rows, max_tokens)
            for micro_batch in micro_batches
        ):
            return micro_batches
        count += 1


def spread_rows(
    lengths: list[int], together: int, count: int, max_rows: int | None = None
) -> list[list[int]]:
    """Row indices of ``count`` micro-batches of nearly equal tokens; some may be empty.

    A micro-batch of ``max_rows`` gets more rows only if all have as many.
    """
    assert len(lengths) % together == 0, (len(lengths), together)
    units = [
        (sum(lengths[start : start + together]), start)
        for start in range(0, len(lengths), together)
    ]
    micro_batches: list[list[int]] = [[] for _ in range(count)]
    loads = [0] * count
    # Ties go by index: every rank makes the same cut by itself.
    for tokens, start in sorted(units, key=lambda unit: (-unit[0], unit[1])):
        limit = max_rows or len(lengths)
        place = min(
            range(count), key=lambda i: (len(micro_batches[i]) + together > limit, loads[i], i)
        )
        micro_batches[place] += range(start, start + together)
        loads[place] += tokens
    return [sorted(micro_batch) for micro_batch in micro_batches]


def even_blocks(
    lengths: list[int], together: int, packed: list[list[int]], at_least: int, multiple: int
) -> list[list[int]]:
    """``packed``, or spread anew over more micro-batches.

    Args:
        lengths: tokens of each row.
        together: this many consecutive rows stay in one micro-batch.
        packed: row indices of each micro-batch.
        at_least: micro-batches that there must be.
        multiple: their number must be a multiple of this.
    """
    count = -(-max(len(packed), at_least) // multiple) * multiple
    return packed if count == len(packed) else spread_rows(lengths, together, count)


def block_positions(lengths: list[int], packed: list[list[int]], unit: int) -> int:
    """Positions of every micro-batch: the longest one's tokens, up to a multiple of ``unit``."""
    longest = max(sum(lengths[i] for i in micro_batch) for micro_batch in packed)
    return max(-(-longest // unit) * unit, unit)


def _fits(
    micro_batch: list[int],
    lengths: list[int],
    together: int,
    max_rows: int | None,
    max_tokens: int | None,
) -> bool:
    if len(micro_batch) <= together:
        return True
    rows_fit = max_rows is None or len(micro_batch) <= max_rows
    return rows_fit and (max_tokens is None or sum(lengths[i] for i in micro_batch) <= max_tokens)
