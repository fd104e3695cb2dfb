"""The mask leaves the last stage with the same bits for every rank of a replica."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from megatron_amrlhf.experience.masking import Picked, broadcast_mask, broadcast_rows
from megatron_amrlhf.parallel.mesh import build_mesh
from tests.distributed.contexts import make_config, make_context, random_rollout
from tests.distributed.processes import run_on

pytestmark = pytest.mark.distributed

ROWS = 5
WIDTHS = [1, 7, 8, 9, 17, 64]
KINDS = ["random", "zeros", "ones"]
TENSOR, PIPELINE, DATA = 2, 2, 2
LONGER = 20  # tokens, more than two bytes of bits


def last_stage_mask(kind: str, width: int, dp_rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The mask and labels that a replica's last stage makes."""
    random = torch.Generator().manual_seed(100 * width + dp_rank)
    mask = torch.rand(ROWS, width, generator=random) < 0.5
    chosen = torch.rand(ROWS, generator=random) < 0.5
    if kind == "zeros":
        mask, chosen = torch.zeros_like(mask), torch.zeros_like(chosen)
    if kind == "ones":
        mask, chosen = torch.ones_like(mask), torch.ones_like(chosen)
    return mask, chosen


def picked_rows(kind: str, width: int, dp_rank: int) -> torch.Tensor:
    """Which answers a replica's last stage picks: replica 0 some more than replica 1."""
    count = 0 if kind == "zeros" else ROWS - 2 * dp_rank
    return torch.arange(count * dp_rank if kind == "ones" else count) * width


def share() -> tuple[int, dict]:
    mesh = build_mesh(TENSOR, PIPELINE)
    context = make_context(make_config("unused", mesh, {"kind": "ppo"}), mesh)
    found = {}
    for width in WIDTHS:
        lengths = [(3, 1 + (width - 1) * row // (ROWS - 1)) for row in range(ROWS)]
        rollout = random_rollout(lengths, vocab_size=9, seed=width)
        for kind in KINDS:
            picked = None
            if mesh.is_last_stage:
                mask, chosen = last_stage_mask(kind, width, mesh.dp_rank)
                index = picked_rows(kind, width, mesh.dp_rank)
                if mesh.tp_rank > 0:  # as if its sums had been rounded otherwise
                    mask, chosen, index = ~mask, ~chosen, index + 1
                # as if these rows had been selected from longer ones
                picked = Picked(index, F.pad(mask, (0, LONGER)), chosen, has_reward=~chosen)
            batch = broadcast_mask(context, rollout, picked)
            rows = broadcast_rows(context, picked)
            assert batch.rollout is rollout and torch.equal(batch.has_reward, ~batch.chosen)
            found[width, kind] = (batch.mask, batch.chosen, rows)
    return mesh.dp_rank, found


@pytest.fixture(scope="module")
def shared():
    return run_on(TENSOR * PIPELINE * DATA, share)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("width", WIDTHS)
def test_every_rank_holds_the_bits_of_the_last_stages_first_tensor_rank(shared, width, kind):
    for dp_rank, found in shared:
        mask, chosen, rows = found[width, kind]
        expected, labels = last_stage_mask(kind, width, dp_rank)
        assert mask.dtype == chosen.dtype == torch.bool
        assert torch.equal(mask, expected) and torch.equal(chosen, labels)
        assert torch.equal(rows, picked_rows(kind, width, dp_rank)) and rows.device.type == "cpu"


def test_replicas_keep_masks_of_their_own(shared):
    first, other = (dict(shared)[rank][17, "random"][0] for rank in (0, 1))
    assert not torch.equal(first, other)
