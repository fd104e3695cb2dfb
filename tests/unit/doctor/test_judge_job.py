"""Each planted fault between machines becomes a finding that names hosts and ranks."""

from dataclasses import replace

import pytest

from megatron_amrlhf.doctor.judge_job import (
    judge_absent,
    judge_clocks,
    judge_network,
    judge_shared_files,
    links_of,
)
from megatron_amrlhf.doctor.meeting import Absent
from megatron_amrlhf.doctor.plan import plan_links
from megatron_amrlhf.doctor.records import Clock, Sight, Traffic
from tests.unit.doctor.samples import only

MIB = 2**20
HOSTS = ["node1", "node1", "node2", "node2"]
FAST_SECONDS, SLOW_SECONDS = 0.001, 0.5


def sight(rank: int, **changes) -> Sight:
    seen = Sight(rank, HOSTS[rank], "/data/runs/x", 0.1, True, True, "")
    return replace(seen, **changes)


def traffic(hosts: list[str], slow=lambda pair: False, fast: float = FAST_SECONDS):
    """What the ranks of these hosts measure, one end of a pair a little faster."""
    by_host: dict[str, list[int]] = {}
    for rank, host in enumerate(hosts):
        by_host.setdefault(host, []).append(rank)
    exchanges: list[dict[int, float]] = [{} for _ in hosts]
    for pair in (pair for pairs in plan_links(by_host) for pair in pairs):
        seconds = SLOW_SECONDS if slow(pair) else fast
        exchanges[pair[0]][pair[1]], exchanges[pair[1]][pair[0]] = seconds, seconds / 2
    return [
        Traffic(rank, 9, "the barrier at the end", True, "", {MIB: 0.01}, exchanges[rank])
        for rank in range(len(hosts))
    ]


def judged(hosts: list[str], **options) -> list:
    """Findings apart from the all-reduce's, which come first."""
    measured = traffic(hosts, **options)
    findings = judge_network(measured, links_of(measured, MIB), hosts, "cpu")
    assert findings[0].message.startswith(f"all-reduce over {len(hosts)} ranks: 1 MiB in 10.00 ms")
    return findings[1:]


def test_like_links_are_fine():
    assert [finding.level for finding in judged(HOSTS)] == ["ok", "ok"]


def test_a_slow_link_is_named_with_hosts_and_ranks():
    hosts = [f"node{i}" for i in range(8)]
    found = only(judged(hosts, slow=lambda pair: pair == (2, 5)), "warning")
    assert "1 of 28 links between hosts take more than 3 times the median" in found.message
    assert "node2 rank 2 - node5 rank 5 0.0021 GB/s" in found.message


@pytest.mark.parametrize("count", [3, 4, 8, 40])
def test_a_slow_node_is_what_its_links_have_in_common(count):
    hosts = [f"node{i}" for i in range(count)]
    found = only(judged(hosts, slow=lambda pair: 2 in pair), "warning")
    assert found.message.endswith("all of them end at rank 2 (node2)")


def test_a_slow_rank_of_a_node_is_found_beside_its_neighbour():
    findings = judged(HOSTS, slow=lambda pair: pair == (1, 3))
    assert [finding.level for finding in findings] == ["ok", "warning"]
    assert "node1 rank 1 - node2 rank 3" in findings[1].message


def test_small_differences_are_no_finding():
    found = judged(["a"] * 4, slow=lambda pair: False, fast=FAST_SECONDS)
    only(found, "ok")
    measured = traffic(["a"] * 4)
    measured[0].exchanges[1] = 5 * FAST_SECONDS  # above the factor, below what a busy core costs
    only(judge_network(measured, links_of(measured, MIB), ["a"] * 4, "cpu")[1:], "ok")


def test_a_slow_network_as_a_whole_is_a_warning():
    findings = judged(["node1", "node2"], fast=0.1)
    assert "GLOO_SOCKET_IFNAME" in only(findings, "warning").fix


def test_the_rank_that_others_wait_for_is_named():
    measured = [replace(x, done=False, entered=3, name="the barrier") for x in traffic(HOSTS)]
    measured[2] = replace(measured[2], entered=2, name="the all-reduce of 4096 bytes")
    found = only(judge_network(measured, [], HOSTS, "cpu"), "error")
    assert found.message.startswith(
        "node2 (rank 2) came no further than the all-reduce of 4096 bytes, and the others wait"
    )
    measured[2] = measured[1]
    found = only(judge_network(measured, [], HOSTS, "cpu"), "error")
    assert found.message == "all ranks have entered the barrier, which does not end"


def test_an_error_in_a_collective_is_named():
    measured = traffic(HOSTS)
    measured[3] = replace(measured[3], done=False, error="connection refused", name="the start")
    found = only(judge_network(measured, [], HOSTS, "cpu"), "error")
    assert found.message == "node2 (rank 3) failed in the start: connection refused"


def test_a_host_that_does_not_see_the_folder_is_named():
    only(judge_shared_files([sight(rank) for rank in range(4)]), "ok")
    blind = [sight(rank, seconds=None, written=False, returned=False) for rank in (2, 3)]
    found = only(judge_shared_files([sight(0), sight(1), *blind]), "error")
    assert found.message.startswith("node2 (ranks 2-3) does not see what rank 0 writes")
    assert found.message.endswith("/data/runs/x")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"written": False, "returned": False, "error": "Permission denied"}, "cannot write into"),
        ({"returned": False}, "writes files that node1 (rank 0) does not see"),
    ],
)
def test_the_way_back_is_judged_too(changes, words):
    found = only(judge_shared_files([sight(0), sight(3, **changes)]), "error")
    assert "node2 (rank 3)" in found.message and words in found.message


def test_a_folder_that_rank_0_cannot_write_is_an_error():
    denied = sight(0, seconds=None, written=False, returned=False, error="Permission denied")
    assert "Permission denied" in only(judge_shared_files([denied]), "error").message


@pytest.mark.parametrize(
    ("offset", "uncertainty", "level"),
    [
        (0.2, 0.001, "ok"),
        (-5.0, 0.001, "warning"),
        (100.0, 0.001, "error"),
        (5.0, 4.5, "ok"),  # it may be right
    ],
)
def test_a_skewed_clock_is_named_with_its_uncertainty(offset, uncertainty, level):
    clocks = [Clock("node2", 0.0, 0.001), Clock("node3", offset, uncertainty)]
    message = only(judge_clocks(clocks), level).message
    if level != "ok":
        way = "ahead of" if offset > 0 else "behind"
        assert message == f"node3 is {abs(offset):.3f} s {way} rank 0's host (+- 0.001 s)"


def test_ranks_that_did_not_come_are_named():
    absent = Absent("arrival", [2, 3], 60.0, [])
    found = judge_absent(absent, ["node1", "node1", None, None], ["node1.site", "node2.site"])
    message = only(found, "error").message
    assert message.startswith(
        "2 of 4 ranks did not come within 60 s: ranks 2-3 (nobody came from node2.site); "
    )
    other_names = judge_absent(absent, ["a", "a", None, None], ["10.0.0.1", "10.0.0.2"])
    assert " within 60 s: ranks 2-3; " in only(other_names, "error").message


def test_a_rank_that_is_lost_later_is_named_with_its_host():
    found = judge_absent(Absent("clocks", [2], 60.0, []), HOSTS, [])
    message = only(found, "error").message
    assert "did not answer any more within 60 s: node2 (rank 2)" in message
    assert found[0].check == "clocks"
