"""Every algorithm at every layout against plain torch on Hugging Face's model in float64.

Loss, gradient norm and every gradient at each of three optimizer steps with clipping on, and the
weights after them. All cases of a layout run in one launch; a test names layout, model, reduce
mode, loss and masking.
"""

from __future__ import annotations

import itertools

import pytest

from tests.distributed.parity import LOSSES, Case
from tests.distributed.parity_world import TOLERANCES, World, assert_close

pytestmark = pytest.mark.distributed

# At DP 2 three pairs give one rank two full micro-batches, the other a full and an empty one.
ROWS_A_STEP = [12, 6, 6]
FIRST_ROW_OF_RANK_1 = 4  # in the second step at DP 2

MODELS = {
    "qwen2-bias-untied": {"family": "qwen2", "tied": False, "layers": 2},
    "llama-tied": {"family": "llama", "tied": True, "layers": 4},
}
VARIANTS = {  # at one layout and by one mode only, for time
    "prm_mse": "tp2",
    "rejection_sampling_k3": "tp2",
    "ppo_actor_kl": "tp2-pp2-dp2",
    "grpo_token": "tp2-pp2-dp2",
    "grpo_sequence": "tp2-pp2-dp2",
    "kto": "tp2-pp2-dp2",
    "orm": "tp2-pp2-dp2",
}
LAYOUTS = {  # (TP, PP, DP)
    "tp2-pp2-dp2": (2, 2, 2),
    "tp2": (2, 1, 1),
    "pp2": (1, 2, 1),
    "dp2": (1, 1, 2),
    "single": (1, 1, 1),
}


def cases(layout: str) -> list[Case]:
    """All losses, masked and unmasked, on both models.

    Every layout of several processes runs each of them by both reduce modes; a single process,
    where nothing is reduced, by one, as the variants are: the mode alternates.
    """
    found = []
    for model, loss, masked in itertools.product(MODELS, LOSSES, (True, False)):
        alternating = ("step", "microbatch")[masked ^ (model == "llama-tied")]
        modes = (alternating,) if layout == "single" or loss in VARIANTS else ("step", "microbatch")
        if VARIANTS.get(loss, layout) != layout:
            continue
        for reduce in modes:
            kept = masked and model == "llama-tied"
            found.append(Case(model, reduce, loss, masked, "kept" if kept else "response"))
    return found


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    return World(
        tmp_path_factory.mktemp("parity"), MODELS, ROWS_A_STEP, FIRST_ROW_OF_RANK_1, LAYOUTS, cases
    )


ALL = [
    pytest.param(layout, case, id=f"{layout}/{case.name}")
    for layout in LAYOUTS
    for case in cases(layout)
]


@pytest.mark.parametrize(("layout", "case"), ALL)
def test_loss_norm_gradients_and_weights_equal_the_reference(world, layout, case, record_property):
    checks = world.differences(layout, case)
    for kind in TOLERANCES:
        record_property(kind, max(off for its, _, off in checks if its == kind))
    assert_close(checks)
