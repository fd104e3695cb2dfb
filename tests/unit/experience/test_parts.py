"""Which rows an optimizer step has does not depend on the number of replicas."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_amrlhf.algorithms import update
from megatron_amrlhf.algorithms.update import split_units


def split_everywhere(counts: list[int], parts: int, seed: int | None) -> list[list[int]]:
    """The parts of all replicas, units numbered over the replicas."""
    joined: list[list[int]] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(update, "gather_objects", lambda count, group: counts)
        for rank, count in enumerate(counts):
            mesh = SimpleNamespace(dp_rank=rank, dp_group=None)
            mine = split_units(count, parts, seed, mesh)
            joined = joined or [[] for _ in mine]
            for part, rows in zip(joined, mine, strict=True):
                assert ((rows >= 0) & (rows < count)).all()
                part += (rows + sum(counts[:rank])).tolist()
    return [sorted(part) for part in joined]


@given(
    st.lists(st.integers(0, 5), min_size=1, max_size=4), st.integers(1, 6), st.none() | st.just(3)
)
def test_parts_are_those_of_one_replica(counts, parts, seed):
    found, total = split_everywhere(counts, parts, seed), sum(counts)
    assert found == split_everywhere([total], parts, seed)
    assert sorted(unit for part in found for unit in part) == list(range(total))
    sizes = [len(part) for part in found]
    assert len(found) == min(parts, total) and max(sizes, default=0) - min(sizes, default=0) <= 1


def test_rows_are_shuffled_by_the_seed():
    splits = [split_everywhere([12], 3, seed) for seed in (None, 1, 2)]
    assert splits[0] == [[0, 3, 6, 9], [1, 4, 7, 10], [2, 5, 8, 11]]
    assert split_everywhere([12], 3, 10**30) not in splits  # of a run.seed such as 202601011200
    assert splits[1] != splits[2] and torch.tensor(splits[1]).shape == (3, 4)
