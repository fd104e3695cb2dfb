"""Which pairs of ranks are measured, and when; every rank makes the same plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import TypeVar

MOST_FOR_ALL_PAIRS = 8  # more nodes, or ranks of a node, are measured in a ring
Item = TypeVar("Item")
Pair = tuple[int, int]


def plan_links(hosts: Mapping[str, Sequence[int]]) -> list[list[Pair]]:
    """Rounds of pairs of ranks (lower first); in a round no rank is in two pairs.

    Within hosts all hosts measure at the same time. Between hosts each has one pair in a round,
    so that pairs do not share a network card; the i-th rank of a host meets the i-th of another.

    Args:
        hosts: ranks of each host.
    """
    inside = [rounds_of(list(ranks)) for ranks in hosts.values()]
    rounds = [[pair for part in parts if part for pair in part] for parts in zip_longest(*inside)]
    for matches in rounds_of(list(hosts.values())):
        most = max(min(len(left), len(right)) for left, right in matches)
        for place in range(most):
            pairs = [(x[place], y[place]) for x, y in matches if place < min(len(x), len(y))]
            rounds.append(pairs)
    return [[(min(pair), max(pair)) for pair in pairs] for pairs in rounds]


def rounds_of(items: list[Item]) -> list[list[tuple[Item, Item]]]:
    """Every pair of a few items, or a ring of many, in rounds where each is in one pair at most."""
    if len(items) < 2:
        return []
    if len(items) > MOST_FOR_ALL_PAIRS:
        return _ring(items)
    return _all_pairs(items)


def _all_pairs(items: list[Item]) -> list[list[tuple[Item, Item]]]:
    """The circle method: one stays, the others move on by a place a round."""
    places: list[int | None] = [*range(len(items)), *([None] if len(items) % 2 else [])]
    rounds = []
    for _ in range(len(places) - 1):
        half = len(places) // 2
        pairs = zip(places[:half], reversed(places[half:]), strict=True)
        rounds.append([(items[a], items[b]) for a, b in pairs if a is not None and b is not None])
        places = [places[0], places[-1], *places[1:-1]]
    return rounds


def _ring(items: list[Item]) -> list[list[tuple[Item, Item]]]:
    edges = [(x, items[(i + 1) % len(items)]) for i, x in enumerate(items)]
    closing = [edges.pop()] if len(items) % 2 else []
    return [part for part in (edges[::2], edges[1::2], closing) if part]
