"""Bytes that a rank sends in each kind of communication, by arithmetic alone."""

from __future__ import annotations

from collections import Counter

ALL_GATHER, REDUCE_SCATTER, ALL_REDUCE = "all-gather", "reduce-scatter", "all-reduce"
BROADCAST, SEND, RECEIVE = "broadcast", "send", "receive"

# (kind, axis) -> bytes; a Counter, so that volumes add up
Volumes = Counter


def sent_bytes(kind: str, whole_bytes: float, num_ranks: int) -> float:
    """Bytes that each rank of a group sends, in a ring.

    Rings are what NCCL uses for large tensors, and no algorithm sends less in a gather or a
    reduction (https://github.com/NVIDIA/nccl-tests/blob/master/doc/PERFORMANCE.md).

    Args:
        kind: of communication.
        whole_bytes: of the whole tensor: what a gather gives, what a reduction is given.
        num_ranks: of the group.

    Returns:
        The same for every rank; for a broadcast the mean over the ranks, of which all but one
        pass the tensor on; for a send and a receive the tensor.
    """
    share = (num_ranks - 1) / num_ranks
    factor = {
        ALL_GATHER: share,
        REDUCE_SCATTER: share,
        ALL_REDUCE: 2 * share,
        BROADCAST: share,
        SEND: 1.0,
        RECEIVE: 1.0,
    }[kind]
    return factor * whole_bytes
