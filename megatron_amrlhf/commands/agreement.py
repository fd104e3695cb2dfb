"""Checks that all ranks make together: a mistake that one of them finds is told by all."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch.distributed as dist

from megatron_amrlhf.data.readers import Readers
from megatron_amrlhf.errors import UserError
from megatron_amrlhf.parallel.collectives import gather_objects
from megatron_amrlhf.report.console import RunConsole

Result = TypeVar("Result")


class ToldToAll(UserError):
    """A mistake that every rank has heard of."""


def agreed(work: Callable[[Readers], Result], console: RunConsole) -> Result:
    """Does ``work`` on every rank. Entered by every rank.

    A rank that finds a mistake enters one more exchange, which is the one that the others are in
    or come to, and so nobody waits for it.

    Args:
        work: gets all ranks as readers, and enters no other collectives than theirs.
        console: shows how far it is.

    Raises:
        UserError: on every rank, where ``work`` has raised one on some rank.
    """
    try:
        result = work(_all_ranks(console))
    except ToldToAll:
        raise
    except UserError as error:
        _exchange(None, str(error))
        raise  # not reached: the exchange raises what the first rank has found
    _exchange(None)
    return result


def _all_ranks(console: RunConsole) -> Readers:
    @contextmanager
    def track(name: str, total: int) -> Iterator[Callable[[int], None]]:
        with console.track(name, total):
            yield console.tick
        console.progress.enter("start")  # goes on

    return Readers(dist.get_rank(), dist.get_world_size(), _exchange, track)


def _exchange(value: object, problem: str | None = None) -> list:
    """Every rank's picklable value in rank order, on all ranks.

    Raises:
        ToldToAll: on every rank, where one has a problem.
    """
    found = gather_objects((value, problem), dist.group.WORLD)
    for _, each in found:
        if each is not None:
            raise ToldToAll(each)
    return [each for each, _ in found]
