"""The order of samples does not know the layout."""

from __future__ import annotations

import pytest

from megatron_amrlhf.data.order import PADDING, DataPosition, epoch_permutation, shard, take
from megatron_amrlhf.errors import UserError


def test_an_epoch_visits_each_sample_once_in_its_own_order():
    orders = [epoch_permutation(50, seed, epoch) for seed in (0, 1) for epoch in (0, 1)]
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert len({tuple(order) for order in orders}) == 4


def test_the_order_is_the_same_in_every_version():
    # A change here breaks the resumption of every run that was saved before it.
    assert epoch_permutation(8, 0, 0) == [6, 4, 3, 1, 7, 0, 2, 5]


@pytest.mark.parametrize("count", [1, 3, 7, 10, 25])
def test_taking_in_any_portions_gives_the_same_samples(count):
    whole = take(7, 3, 0, 100)
    portions = []
    while len(portions) < 100:
        portions += take(7, 3, len(portions), min(count, 100 - len(portions)))
    assert portions == whole
    assert whole[:14] == epoch_permutation(7, 3, 0) + epoch_permutation(7, 3, 1)


@pytest.mark.parametrize("dp_size", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("count", [0, 1, 2, 5, 8, 12])
def test_shards_put_together_are_the_batch_on_every_layout(count, dp_size):
    indices = take(9, 0, 4, count)
    shards = [shard(indices, rank, dp_size) for rank in range(dp_size)]
    assert len({len(share) for share in shards}) == 1
    assert [index for share in shards for index in share if index != PADDING] == indices
    assert max(share.count(PADDING) for share in shards) <= 1


def test_shards_of_an_even_batch_have_no_padding():
    assert [shard([4, 0, 2, 1], rank, 2) for rank in (0, 1)] == [[4, 0], [2, 1]]


def test_a_run_that_ends_with_its_data_keeps_its_samples_a_step(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text("{}\n")
    state = DataPosition(str(path), 100, 0, 10).state_dict(5)
    for per_step, accept in ((5, False), (50, True)):
        position = DataPosition(str(path), 100, 0, per_step)
        with pytest.raises(UserError, match=f"5 steps used 50 samples, not {per_step} each"):
            position.load_state_dict(state, 5, accept, ends_with_data=True)
        position.load_state_dict(state, 5, accept, ends_with_data=False)
        assert position.consumed(7) == 50 + 2 * per_step
    position = DataPosition(str(path), 100, 0, 10)
    position.load_state_dict(state, 5, accept_changed=False, ends_with_data=True)
    assert position.consumed(7) == 70
