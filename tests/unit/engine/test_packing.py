"""Rows in micro-batches: every row once, limits kept, pairs together, nearly equal tokens."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_amrlhf.engine.packing import pack_rows, spread_rows

LENGTHS = st.lists(st.integers(0, 60), max_size=40)


@given(LENGTHS, st.sampled_from([1, 2]), st.integers(1, 9), st.booleans(), st.integers(60, 300))
def test_every_row_is_in_one_micro_batch_within_the_limits(
    lengths, together, max_rows, by_rows, max_tokens
):
    lengths = lengths[: len(lengths) // together * together]
    max_rows *= together
    limits = (max_rows, None) if by_rows else (None, max_tokens)
    blocks = pack_rows(lengths, together, *limits)
    assert sorted(row for block in blocks for row in block) == list(range(len(lengths)))
    for block in blocks:
        assert block == sorted(block)
        starts = [row for row in block if row % together == 0]
        assert block == [start + i for start in starts for i in range(together)]
        if len(block) > together:
            assert not by_rows or len(block) <= max_rows
            assert by_rows or sum(lengths[row] for row in block) <= max_tokens
    if by_rows:
        assert len(blocks) == max(-(-len(lengths) // max_rows), 1)


def test_tokens_are_nearly_equal():
    lengths = [90, 10, 20, 30, 40, 50, 60]
    loads = [sum(lengths[i] for i in block) for block in spread_rows(lengths, 1, 3)]
    assert sorted(loads) == [90, 100, 110]  # best is 100 each


def test_rows_without_tokens_and_more_micro_batches_than_rows():
    assert spread_rows([], 1, 2) == [[], []]
    assert sorted(map(len, spread_rows([5, 0], 1, 3))) == [0, 1, 1]
    assert pack_rows([], 2, 4, None) == [[]]


def test_the_same_rows_are_packed_the_same_way():
    assert (
        pack_rows([7] * 6, 1, 4, None) == pack_rows([7] * 6, 1, 4, None) == [[0, 2, 4], [1, 3, 5]]
    )


@pytest.mark.parametrize("tokens", [10, 24])
def test_what_stays_together_may_exceed_the_budget(tokens):
    assert pack_rows([20, 20], 2, None, tokens) == [[0, 1]]
