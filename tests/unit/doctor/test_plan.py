"""Every pair is measured once, and no rank twice at a time."""

from itertools import combinations

import pytest

from megatron_amrlhf.doctor.links import partner_of
from megatron_amrlhf.doctor.plan import MOST_FOR_ALL_PAIRS, plan_links, rounds_of


@pytest.mark.parametrize("count", range(1, MOST_FOR_ALL_PAIRS + 1))
def test_few_meet_in_all_pairs_once(count):
    pairs = [pair for round_ in rounds_of(list(range(count))) for pair in round_]
    assert sorted(map(sorted, pairs)) == [list(pair) for pair in combinations(range(count), 2)]


@pytest.mark.parametrize("count", [MOST_FOR_ALL_PAIRS + 1, 64, 65])
def test_many_meet_in_a_ring(count):
    rounds = rounds_of(list(range(count)))
    pairs = {frozenset(pair) for round_ in rounds for pair in round_}
    assert pairs == {frozenset((i, (i + 1) % count)) for i in range(count)}
    assert len(rounds) <= 3


@pytest.mark.parametrize("sizes", [(1,), (4,), (2, 2), (8, 8, 8), (3, 1, 2), (8,) * 64])
def test_no_rank_is_in_two_pairs_of_a_round(sizes):
    hosts, first = {}, 0
    for number, size in enumerate(sizes):
        hosts[f"node{number}"] = list(range(first, first + size))
        first += size
    plan = plan_links(hosts)
    for pairs in plan:
        ranks = [rank for pair in pairs for rank in pair]
        assert pairs and len(set(ranks)) == len(ranks)
        assert all(low < high for low, high in pairs)
    pairs = [pair for pairs in plan for pair in pairs]
    assert len(set(pairs)) == len(pairs)
    host_of = {rank: host for host, ranks in hosts.items() for rank in ranks}
    linked = {frozenset((host_of[a], host_of[b])) for a, b in pairs if host_of[a] != host_of[b]}
    assert len(linked) == (len(sizes) * (len(sizes) - 1) // 2 if len(sizes) < 9 else len(sizes))


def test_between_hosts_one_pair_of_a_host_is_measured_at_a_time():
    assert plan_links({"a": [0, 1], "b": [2, 3]}) == [[(0, 1), (2, 3)], [(0, 2)], [(1, 3)]]


def test_partners_find_each_other():
    assert [partner_of(rank, [(0, 2), (3, 5)]) for rank in range(6)] == [2, None, 0, 5, None, 3]
