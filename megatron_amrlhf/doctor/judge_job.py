"""What is wrong between the machines of a job."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from megatron_amrlhf.doctor.meeting import Absent
from megatron_amrlhf.doctor.records import (
    Clock,
    Finding,
    Link,
    Sight,
    Traffic,
    listed,
    places_text,
    ranks_text,
)
from megatron_amrlhf.sizes import in_units

SLOW_FACTOR = 3.0  # times the median of the links of its kind
FEW_LINKS = 3  # of which one slow host makes most slow: then times the fastest
# Less than that above the median may be the processes' turns on busy cores.
SLOW_EXCESS_SECONDS = {"cpu": 0.01, "cuda": 0.001}
LOW_GIGABYTES_PER_SECOND = 0.1  # between hosts: a 1 Gbit/s network has 0.12
SKEW_SECONDS, LARGE_SKEW_SECONDS = 1.0, 60.0
INSIDE, BETWEEN = "within hosts", "between hosts"


def judge_absent(
    absent: Absent, hosts: Sequence[str | None], expected: Sequence[str]
) -> list[Finding]:
    """Ranks that did not come, or did not go on.

    Args:
        absent: who, and at which step.
        hosts: host of each rank; None: it has not said.
        expected: hosts of the job, as far as the launcher tells.
    """
    known = [(host, rank) for rank in absent.ranks if (host := hosts[rank]) is not None]
    unknown = [rank for rank in absent.ranks if hosts[rank] is None]
    parts = [places_text(known)] if known else []
    if unknown:
        came = {_short(host) for host in hosts if host is not None}
        named = {_short(host): host for host in expected}
        # Where no name fits, the launcher has other names for the same hosts.
        missing = [named[x] for x in named if x not in came] if came & set(named) else []
        nobody = f" (nobody came from {listed(missing)})" if missing else ""
        parts.append(ranks_text(unknown) + nobody)
    failed = "did not come" if absent.step == "arrival" else "came, but did not answer any more"
    message = (
        f"{len(absent.ranks)} of {len(hosts)} ranks {failed} within {absent.seconds:g} s: "
        f"{', '.join(parts)}; the checks that follow are left out"
    )
    fix = "look at what these ranks have printed, and whether their hosts reach MASTER_ADDR"
    return [Finding(absent.step, "error", message, fix)]


def _short(host: str) -> str:
    return host.partition(".")[0]


def judge_shared_files(sights: Sequence[Sight]) -> list[Finding]:
    """Who does not see what another rank has written into the run's folder."""
    first = sights[0]
    if first.rank == 0 and not first.written:
        return [
            Finding(
                "shared files",
                "error",
                f"{first.host} (rank 0) cannot write into {first.path}: {first.error}",
                "choose another run.folder",
            )
        ]
    findings = []
    for what, chosen, fix in (
        (
            "does not see what rank 0 writes into",
            [x for x in sights if x.seconds is None],
            "start it on a file system and in a folder that all nodes share (run.folder)",
        ),
        (
            "sees rank 0's file but cannot write into",
            [x for x in sights if x.seconds is not None and not x.written],
            "give this user the right to write there, on every node",
        ),
        (
            f"writes files that {first.host} (rank 0) does not see in",
            [x for x in sights if x.written and not x.returned],
            "mount the folder read-write from one server on all nodes",
        ),
    ):
        for path in dict.fromkeys((x.path, x.error) for x in chosen):
            there = [(x.host, x.rank) for x in chosen if (x.path, x.error) == path]
            reason = f" ({path[1]})" if path[1] else ""
            message = f"{places_text(there)} {what} {path[0]}{reason}"
            findings.append(Finding("shared files", "error", message, fix))
    if findings:
        return findings
    longest = max(x.seconds for x in sights if x.seconds is not None)
    many = f"seen by all {len(sights)} ranks within {longest:.1f} s, and the reverse"
    text = many if len(sights) > 1 else "can be written; one rank alone, so nobody else looked"
    return [Finding("shared files", "ok", f"{first.path}: {text}")]


def judge_clocks(clocks: Sequence[Clock]) -> list[Finding]:
    """Hosts whose clock is surely off, their uncertainty deducted."""
    findings = []
    for clock in clocks:
        sure = abs(clock.offset_seconds) - clock.uncertainty_seconds
        if sure > SKEW_SECONDS:
            way = "ahead of" if clock.offset_seconds > 0 else "behind"
            findings.append(
                Finding(
                    "clocks",
                    "error" if sure > LARGE_SKEW_SECONDS else "warning",
                    f"{clock.host} is {abs(clock.offset_seconds):.3f} s {way} rank 0's host "
                    f"(+- {clock.uncertainty_seconds:.3f} s)",
                    "run an NTP client there (chronyc tracking tells its state)",
                )
            )
    if findings:
        return findings
    if not clocks:
        return [Finding("clocks", "ok", "one host")]
    worst = max(clocks, key=lambda clock: abs(clock.offset_seconds))
    text = f"{worst.offset_seconds:+.4f} s (+- {worst.uncertainty_seconds:.4f} s) on {worst.host}"
    return [Finding("clocks", "ok", f"largest difference to rank 0's host {text}")]


def links_of(traffic: Sequence[Traffic], num_bytes: int) -> list[Link]:
    """Every measured pair; the slower of its two ends counts."""
    seconds: dict[tuple[int, int], float] = {}
    for each in traffic:
        for partner, time in each.exchanges.items():
            pair = min(each.rank, partner), max(each.rank, partner)
            seconds[pair] = max(time, seconds.get(pair, 0.0))
    return [Link(low, high, num_bytes, time) for (low, high), time in sorted(seconds.items())]


def judge_network(
    traffic: Sequence[Traffic], links: Sequence[Link], hosts: Sequence[str], device: str
) -> list[Finding]:
    """Failed and slow parts of the network.

    Args:
        traffic: of each rank.
        links: as ``links_of`` gives them.
        hosts: of each rank.
        device: ``cpu`` (gloo) or ``cuda`` (NCCL).
    """
    if not all(each.done for each in traffic):
        return _unfinished(traffic, hosts)
    findings = [_all_reduce_text(traffic)]
    kinds: dict[str, list[Link]] = {}
    for link in links:
        kinds.setdefault(INSIDE if hosts[link.low] == hosts[link.high] else BETWEEN, []).append(
            link
        )
    for kind, group in kinds.items():
        findings += _judge_links(kind, group, hosts, SLOW_EXCESS_SECONDS[device])
    return findings


def _unfinished(traffic: Sequence[Traffic], hosts: Sequence[str]) -> list[Finding]:
    """Errors first; else the ranks that are furthest behind are those that the others wait for."""
    failed: dict[tuple[str, str], list] = {}
    for each in traffic:
        if each.error:
            failed.setdefault((each.name, each.error), []).append((hosts[each.rank], each.rank))
    fix = (
        "do all nodes reach each other at all ports? Set GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME "
        "to the interface between them; NCCL_DEBUG=INFO tells more"
    )
    if failed:
        return [
            Finding("network", "error", f"{places_text(places)} failed in {name}: {error}", fix)
            for (name, error), places in failed.items()
        ]
    behind = min(each.entered for each in traffic if not each.done)
    last = [each for each in traffic if not each.done and each.entered == behind]
    where = listed(each.name for each in last)
    if len(last) == len(traffic):
        message = f"all ranks have entered {where}, which does not end"
    else:
        places = places_text((hosts[each.rank], each.rank) for each in last)
        message = f"{places} came no further than {where}, and the others wait for them"
    return [Finding("network", "error", message, fix)]


def _all_reduce_text(traffic: Sequence[Traffic]) -> Finding:
    count = len(traffic)
    parts = []
    for size in traffic[0].all_reduce:
        seconds = max(each.all_reduce[size] for each in traffic)
        rate = 2 * (count - 1) / count * size / seconds / 1e9
        parts.append(f"{in_units(size)} in {seconds * 1e3:.2f} ms ({rate:.3g} GB/s)")
    return Finding("network", "ok", f"all-reduce over {count} ranks: {', '.join(parts)}")


def _judge_links(
    kind: str, links: Sequence[Link], hosts: Sequence[str], excess: float
) -> list[Finding]:
    times = [link.seconds for link in links]
    median = statistics.median_low(times) if len(links) > FEW_LINKS else min(times)
    slow = [
        link
        for link in links
        if link.seconds > SLOW_FACTOR * median and link.seconds - median > excess
    ]
    middle = Link(0, 0, links[0].num_bytes, median).gigabytes_per_second
    usual = "median" if len(links) > FEW_LINKS else "fastest" if len(links) > 1 else "at"
    count = f"{len(links)} link{'s' * (len(links) > 1)} {kind}"
    if slow:
        slow.sort(key=lambda link: -link.seconds)
        texts = [f"{link_text(link, hosts)} {link.gigabytes_per_second:.3g} GB/s" for link in slow]
        return [
            Finding(
                "network",
                "warning",
                f"{len(slow)} of {count} take more than {SLOW_FACTOR:g} times the "
                f"{usual} ({middle:.3g} GB/s): {listed(texts)}{_common_end(slow, hosts)}",
                "look at cable, card and load there, or leave the node out (sbatch --exclude)",
            )
        ]
    if kind == BETWEEN and middle < LOW_GIGABYTES_PER_SECOND:
        return [
            Finding(
                "network",
                "warning",
                f"{count}: {usual} {middle:.3g} GB/s",
                "is that the fast network? NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME choose it",
            )
        ]
    text = f"{count}: {usual} {middle:.3g} GB/s"
    if len(links) > 1:
        worst = max(links, key=lambda link: link.seconds)
        rate = f"{worst.gigabytes_per_second:.3g} GB/s"
        text += f", slowest {rate} ({link_text(worst, hosts)})"
    return [Finding("network", "ok", text)]


def _common_end(slow: Sequence[Link], hosts: Sequence[str]) -> str:
    """The rank, else the host, that all of several slow links have in common."""
    if len(slow) == 1:
        return ""
    ranks = set.intersection(*({link.low, link.high} for link in slow))
    if ranks:
        rank = min(ranks)
        return f"; all of them end at rank {rank} ({hosts[rank]})"
    common = set.intersection(*({hosts[link.low], hosts[link.high]} for link in slow))
    return f"; all of them end at {listed(sorted(common))}" if common else ""


def link_text(link: Link, hosts: Sequence[str]) -> str:
    """``node1 rank 0 - node2 rank 2``."""
    return f"{hosts[link.low]} rank {link.low} - {hosts[link.high]} rank {link.high}"
