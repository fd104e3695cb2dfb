"""Adam gets the float32 sum of a bfloat16 model's gradients, whatever the ZeRO stage or place."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron_amrlhf.parallel.mesh import build_mesh
from tests.distributed.processes import run_on
from tests.distributed.small_run import VOCAB, build_engine, take_steps
from tests.helpers_models import make_tiny_model

pytestmark = pytest.mark.distributed

RANKS = 2
SUB_GROUP = 5000  # parameters: other numbers of sub-groups on the two stages
TOLERANCE = 1e-6  # of the largest; a gradient rounded to bfloat16 is off by 2e-3
CHOICES = {
    "zero1": {"zero_stage": 1},
    "zero3": {},
    "zero3-microbatch": {"gather": "microbatch", "reduce": "microbatch"},
    "zero3-cpu": {"roles": {"actor": {"offload_optimizer": "cpu"}}},
}


def first_moments(folder: str, choices: dict[str, dict]) -> dict[str, dict[str, Tensor]]:
    """Adam's first moment after a step, a tenth of the clipped gradient, of this rank's slices."""
    mesh, found = build_mesh(1, 1), {}
    for name, keys in choices.items():
        engine = build_engine(folder, mesh, "bfloat16", **keys)
        take_steps(engine, range(1))
        weights = engine.roles["actor"].weights
        states = weights.read_states()
        found[name] = {key: states[f"{key}.exp_avg"].flatten().clone() for key in weights.slices()}
    return found


def test_a_bfloat16_models_gradients_reach_adam_in_float32(tmp_path):
    make_tiny_model(tmp_path, tied=True, vocab_size=VOCAB, hidden=45, layers=2)
    for rank in run_on(RANKS, first_moments, str(tmp_path), CHOICES):
        expected = rank.pop("zero1")
        assert any(not torch.equal(x, x.bfloat16().float()) for x in expected.values())
        for name, found in rank.items():
            assert found.keys() == expected.keys()
            for key, moment in found.items():
                off = (moment - expected[key]).abs().max() / expected[key].abs().max().clamp(1e-20)
                assert off <= TOLERANCE, (name, key, float(off))


def steps_by_sub_groups(folder: str) -> tuple[list[int], list[dict[str, Tensor]]]:
    """Numbers of sub-groups, and the states after two steps, for one size of them and another."""
    mesh, counts, states = build_mesh(1, 2), [], []
    for size in (0, SUB_GROUP):
        engine = build_engine(folder, mesh, "float32", sub_group=size)
        take_steps(engine, range(2))
        weights = engine.roles["actor"].weights
        counts.append(len(weights.engine.optimizer.fp16_groups))
        states.append({name: x.clone() for name, x in weights.read_states().items()})
    return counts, states


def test_stages_with_other_numbers_of_sub_groups_do_not_wait_for_each_other(tmp_path):
    make_tiny_model(tmp_path, tied=False, vocab_size=VOCAB, hidden=45, layers=2)
    (first, states), (last, _) = run_on(2, steps_by_sub_groups, str(tmp_path))
    assert first[0] == last[0] == 1 < first[1] and first[1] != last[1]
    assert states[0].keys() == states[1].keys()
    for name, expected in states[0].items():  # vector code rounds the ends of a group otherwise
        torch.testing.assert_close(states[1][name], expected, rtol=TOLERANCE, atol=TOLERANCE)
