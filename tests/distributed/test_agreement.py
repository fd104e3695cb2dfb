"""A mistake that one rank finds ends all of them with its words, wherever the others are."""

from __future__ import annotations

import pytest
import torch.distributed as dist

from megatron_amrlhf.commands.agreement import agreed
from megatron_amrlhf.errors import UserError
from megatron_amrlhf.report.console import RunConsole
from tests.distributed.processes import run_on

pytestmark = pytest.mark.distributed

PLACES = ("before", "between", "after", "nowhere")


def work_with_a_mistake(place: str, wrong: tuple[int, ...]) -> tuple[str, list]:
    """What a rank hears, and whether the ranks still meet afterwards."""
    rank = dist.get_rank()

    def check(readers):
        found = []
        for now in PLACES[:-1]:
            if now == place and rank in wrong:
                raise UserError(f"{place} on {rank}")
            with readers.track("data", 1) as advance:
                advance(1)
            if now != "after":
                found.append(readers.gather(readers.rank))
        return found

    try:
        heard = str(agreed(check, RunConsole(rank)))
    except UserError as error:
        heard = str(error)
    met = [None] * dist.get_world_size()
    dist.all_gather_object(met, rank)
    return heard, met


@pytest.mark.parametrize("wrong", [(0,), (2,), (1, 2)])
@pytest.mark.parametrize("place", PLACES)
def test_all_ranks_hear_of_a_mistake(place, wrong):
    heard = f"{place} on {wrong[0]}" if place != "nowhere" else str([[0, 1, 2]] * 2)
    assert run_on(3, work_with_a_mistake, place, wrong) == [(heard, [0, 1, 2])] * 3
