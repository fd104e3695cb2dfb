"""Before the first optimizer step nothing has moved: ratio 1, KL 0, DPO loss ln 2.

Scoring runs in a gather window on plain modules, training through DeepSpeed's hooks on other
micro-batches, so this compares two code paths on the same weights.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_amrlhf.algorithms.dpo import Dpo
from megatron_amrlhf.algorithms.ppo import Ppo
from megatron_amrlhf.experience.maker import ExperienceMaker
from megatron_amrlhf.experience.scoring import read_logprobs, score_tokens
from megatron_amrlhf.losses.dpo import PairTargets
from megatron_amrlhf.losses.ppo import PpoTargets
from megatron_amrlhf.parallel.mesh import build_mesh
from megatron_amrlhf.types import TrainBatch
from tests import reference
from tests.distributed.contexts import (
    FROZEN_LEARNING_RATE,
    NO_PROMPTS,
    make_config,
    make_context,
    prm_rewarder,
    random_rollout,
    shard_rollout,
)
from tests.distributed.processes import run_on
from tests.helpers_models import make_tiny_model

pytestmark = pytest.mark.distributed

LAYOUTS = [(1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 1, 2), (2, 2, 2)]  # (TP, PP, DP)
DTYPES = ["float32", "bfloat16"]
VOCAB_SIZE, HIDDEN = 131, 48
# (prompt, response) lengths of 12 answers: 6 pairs, very ragged
LENGTHS = [(3, 9), (3, 2), (7, 1), (7, 5), (2, 8), (2, 8), (4, 3), (4, 12), (9, 6), (9, 7)]
LENGTHS += [(5, 40), (6, 90)]
TEMPERATURE, BETA = 0.7, 0.3
MICRO_BATCH_SIZE = 4
# How the rows of the update are padded against the rows that were scored.
SAME, NARROWER = "same rows", "other micro-batches, padded less"
# The same rows make the same matrix products, so nothing at all may differ. Other shapes are
# summed in another order: float32 to 1e-6 a log-prob; a bfloat16 activation has 8 bits, so a
# log-prob of 5 nats moves by some 0.02 and approx_kl, which is of second order, by its square.
RATIO_TOLERANCE = {("float32", NARROWER): 1e-5, ("bfloat16", NARROWER): 2e-2}
KL_TOLERANCE = {("float32", NARROWER): 1e-10, ("bfloat16", NARROWER): 2e-3}
DPO_TOLERANCE = {("float32", NARROWER): 1e-5, ("bfloat16", NARROWER): 2e-2}


def ppo_metrics(context, rollout, paddings):
    """Metrics of an update on the answers whose log-probs the same weights have just scored."""
    algorithm = object.__new__(Ppo)
    algorithm.context, algorithm.section = context, context.config.algorithm
    read = read_logprobs(context, algorithm.logprob_temperature())
    logprobs = score_tokens(context, "actor", rollout, "before", read)
    return {
        name: _update(algorithm, context, rollout, index, logprobs)
        for name, index in paddings.items()
    }


def dpo_metrics(context, rollout, paddings):
    """As ``ppo_metrics``, the reference being the policy itself."""
    algorithm = object.__new__(Dpo)
    algorithm.context, algorithm.section = context, context.config.algorithm
    read = read_logprobs(context, algorithm.logprob_temperature())
    logprobs = score_tokens(context, "reference", rollout, "before", read)
    return {
        name: _update(algorithm, context, rollout, index, logprobs)
        for name, index in paddings.items()
    }


def _update(algorithm, context, rollout, index, logprobs):
    part = rollout.select(index)
    targets = None
    if logprobs is not None:
        valid = rollout.response_mask
        random = torch.Generator().manual_seed(8)
        mask = valid & (torch.rand(valid.shape, generator=random) < 0.6)
        advantages = torch.randn(valid.shape, generator=random)
        common = {"mask": mask, "valid": valid, "reference_logprobs": logprobs}
        if isinstance(algorithm, Dpo):
            first = torch.tensor([[True], [False]]).repeat(len(rollout.rows) // 2, 1)
            targets = PairTargets(denominator=first, **common)
        else:
            targets = PpoTargets(
                denominator=valid,
                behaviour_logprobs=logprobs,
                advantages=advantages,
                returns=advantages,
                old_values=advantages,
                kl_scale=torch.ones(len(valid), 1),
                **common,
            )
        targets = targets.select(index)
    result, metrics = algorithm.actor_step(
        TrainBatch.whole(part.rows, part.prompt_lengths, targets)
    )
    return context.publish(metrics) | {"norm": result.grad_norm}


def kl_to_itself(context, rollout) -> float:
    rewarder = prm_rewarder(context)
    maker = ExperienceMaker(context, temperature=TEMPERATURE, rewarder=rewarder, offline=None)
    _, metrics = maker.score(rollout, NO_PROMPTS, 1)
    return context.publish(metrics)["kl/ref_nats"]


def step_0(folder: str, tensor: int, pipeline: int) -> dict:
    """Published metrics by (dtype, what, padding)."""
    mesh, found = build_mesh(tensor, pipeline), {}
    rollout = shard_rollout(random_rollout(LENGTHS, VOCAB_SIZE, seed=6), mesh)
    pairs = torch.arange(len(rollout.rows)).reshape(-1, 2)
    lengths = torch.tensor([row.numel() for row in rollout.rows])
    # without the longest row, so that all others are padded less, and in other micro-batches
    shorter = pairs[(pairs != lengths.argmax()).all(dim=1)].flip(0)
    paddings = {SAME: pairs.flatten(), NARROWER: shorter.flatten()}
    for dtype in DTYPES:
        sections = {
            "rollout": {"temperature": TEMPERATURE},
            "engine": {"micro_batch_size": MICRO_BATCH_SIZE},
        }
        ppo = make_config(folder, mesh, {"kind": "ppo"}, dtype, **sections)
        context = make_context(ppo, mesh)
        rate = FROZEN_LEARNING_RATE
        context.role("actor", Path(folder), learning_rate=rate, total_steps=10)
        context.role("reference", Path(folder))
        context.role("prm", Path(folder), 1)
        found[dtype, "ppo"] = ppo_metrics(context, rollout, paddings)
        found[dtype, "kl"] = kl_to_itself(context, rollout)
        for form in ("inside", "pair"):
            algorithm = {"kind": "dpo", "form": form, "beta": BETA}
            changed = make_config(folder, mesh, algorithm, dtype, **sections)
            found[dtype, form] = dpo_metrics(replace(context, config=changed), rollout, paddings)
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """layout -> metrics, the same on every rank."""
    folder, made = tmp_path_factory.mktemp("model") / "tiny", {}
    make_tiny_model(folder, "qwen2", vocab_size=VOCAB_SIZE, hidden=HIDDEN, weight_std=0.1)
    reference.add_head(folder, HIDDEN, 1, seed=1)

    def of(layout: tuple[int, int, int]) -> dict:
        if layout not in made:
            tensor, pipeline, data = layout
            made[layout] = run_on(tensor * pipeline * data, step_0, str(folder), tensor, pipeline)
            assert all(str(rank) == str(made[layout][0]) for rank in made[layout])
        return made[layout][0]

    return of


@pytest.mark.parametrize("padding", [SAME, NARROWER])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_ppo_ratio_is_1_and_approx_kl_0(found, layout, dtype, padding):
    metrics = found(layout)[dtype, "ppo"][padding]
    assert abs(metrics["policy/ratio"] - 1) <= RATIO_TOLERANCE.get((dtype, padding), 0)
    assert abs(metrics["policy/approx_kl"]) <= KL_TOLERANCE.get((dtype, padding), 0)
    assert metrics["policy/clipfrac"] == 0
    assert metrics["norm"] > 0


@pytest.mark.parametrize("padding", [SAME, NARROWER])
@pytest.mark.parametrize("form", ["inside", "pair"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_dpo_loss_is_ln_2_and_margins_are_0(found, layout, dtype, form, padding):
    metrics = found(layout)[dtype, form][padding]
    tolerance = DPO_TOLERANCE.get((dtype, padding), 0)
    assert abs(metrics["dpo/margin"]) <= tolerance
    assert abs(metrics["reward/implicit_chosen"]) <= tolerance
    assert abs(metrics["reward/implicit_rejected"]) <= tolerance
    assert metrics["norm"] > 0
    if form == "inside":  # the printed form weighs each pair by its kept share
        float32_rounding = 1e-7
        assert abs(metrics["loss/policy"] - math.log(2)) <= tolerance + float32_rounding
    else:
        assert 0 < metrics["loss/policy"] < math.log(2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_kl_to_itself_is_0(found, layout, dtype):
    assert found(layout)[dtype, "kl"] == 0
