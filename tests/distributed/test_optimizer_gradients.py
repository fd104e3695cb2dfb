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
