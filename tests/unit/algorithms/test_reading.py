"""What a step computes of the policy first: what loss and mask read, else a share to log."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from megatron_amrlhf.algorithms.grpo import Grpo
from megatron_amrlhf.algorithms.selection import SelectionAlgorithm
from megatron_amrlhf.commands.train import ALGORITHMS
from megatron_amrlhf.config.algorithms import algorithm_models
from megatron_amrlhf.config.schema import Config
from megatron_amrlhf.experience.maker import ExperienceMaker
from megatron_amrlhf.losses.grpo import GrpoTargets, grpo_loss
from tests.distributed.contexts import random_rollout

NEEDED = {"run": {"name": "x"}, "model": {"path": "x"}, "data": {"train": "x"}}


def config(kind, algorithm=None, **sections):
    algorithm = {"algorithm": {"kind": kind} | (algorithm or {})}
    return Config.model_validate(NEEDED | algorithm | sections)


@pytest.mark.parametrize(
    ("kind", "algorithm", "sections", "is_read"),
    [
        ("ppo", {}, {}, True),  # the KL is in the reward
        ("ppo", {"kl_coef": 0.0}, {}, False),
        ("ppo", {"kl_in": "loss", "kl_estimator": "k2"}, {}, False),
        ("ppo", {"kl_coef": 0.0, "epochs": 2}, {}, True),
        ("grpo", {}, {}, False),
        ("grpo", {"minibatches": 2}, {}, True),
        ("grpo", {}, {"rollout": {"reference_samples_per_prompt": 1}}, True),
        ("grpo", {}, {"mask": {"signal": "implicit"}}, True),
        ("grpo", {}, {"mask": {"signal": "implicit", "kind": "none"}}, False),
        ("dpo", {}, {}, False),
        ("dpo", {"minibatches": 2}, {}, False),
        ("dpo", {}, {"mask": {"signal": "implicit"}}, True),
        ("kto", {}, {}, False),
        ("rejection_sampling", {}, {}, False),
    ],
)
def test_the_policy_is_scored_where_something_reads_it(kind, algorithm, sections, is_read):
    run = config(kind, algorithm, **sections)
    assert run.algorithm.reads_policy(run) is is_read
    scored = [x for x in run.algorithm.passes(run, 1) if x.phase == "score"]
    planned = next(x.rows for x in scored if x.role == "actor")
    answers = run.rollout.prompts_per_step * run.rollout.samples_per_prompt
    assert planned == (answers if is_read else answers // 4)


def test_no_pass_is_planned_where_nothing_is_measured():
    run = config("grpo", run={"name": "x", "policy_metrics": 0.0})
    assert "actor" not in [x.role for x in run.algorithm.passes(run, 1) if x.phase == "score"]


def measured(rollout, share, step, reads_policy=False):
    maker = object.__new__(ExperienceMaker)
    maker.reads_policy = reads_policy
    run = SimpleNamespace(policy_metrics=share)
    maker.context = SimpleNamespace(config=SimpleNamespace(run=run))
    return rollout.sample_ids[maker.measured(rollout, step)].tolist()


def test_a_share_of_the_answers_is_measured_whatever_the_layout():
    whole = random_rollout([(3, 4)] * 64, 50, seed=1)
    whole = replace(whole, from_reference=whole.sample_ids % 4 == 3)
    halves = [whole.select(torch.arange(x, x + 32)) for x in (0, 32)]
    seen = set()
    for step in range(40):
        of_all = measured(whole, 0.25, step)
        assert of_all == [x for half in halves for x in measured(half, 0.25, step)]
        by_policy = int((~whole.from_reference).sum())
        assert 0.15 * by_policy <= len(of_all) <= 0.35 * by_policy
        seen |= set(of_all)
    assert seen == set(whole.sample_ids[~whole.from_reference].tolist())
    assert measured(whole, 0.0, 1) == []
    assert measured(whole, 0.0, 1, reads_policy=True) == whole.sample_ids.tolist()


@pytest.mark.parametrize(("minibatches", "is_own"), [(1, True), (2, False)])
def test_the_ratio_of_an_only_step_is_that_of_the_policy_to_itself(minibatches, is_own):
    algorithm, run = object.__new__(Grpo), config("grpo", {"minibatches": minibatches})
    algorithm.section, algorithm.context = run.algorithm, SimpleNamespace(config=run)
    loss = partial(grpo_loss, clip_eps=0.2, clip_eps_high=None, kl_coef=0.1, estimator="k3")
    random = torch.Generator().manual_seed(3)
    logprobs, reference = -torch.rand(2, 3, 5, generator=random, dtype=torch.float64)
    valid = torch.rand(3, 5, generator=random) < 0.8
    targets = GrpoTargets(
        denominator=valid,
        mask=valid,
        valid=valid,
        reference_logprobs=reference,
        kl_scale=torch.ones(3, 1),
        behaviour_logprobs=torch.full((3, 5), torch.nan),
        advantages=torch.tensor([1.0, -2.0, 0.5]),
        weight=torch.ones(3, 1),
    )
    found = []
    for read, given in (
        (algorithm.on_policy(loss), targets),
        (loss, replace(targets, behaviour_logprobs=logprobs.clone())),
    ):
        leaf = logprobs.clone().requires_grad_()
        total = read(leaf, given).terms.sum()
        found.append((total.detach(), torch.autograd.grad(total, leaf)[0]))
    (own, own_gradient), (told, told_gradient) = found
    assert torch.equal(own, told) is is_own
    assert torch.equal(own_gradient, told_gradient) is is_own and told_gradient.any()


@pytest.mark.parametrize("kind", ALGORITHMS)
def test_who_reads_pairs_takes_its_labels_from_them(kind):
    section = algorithm_models()[kind]
    if "pairs" in section.data_formats and not section.trains_reward_model:
        assert issubclass(ALGORITHMS[kind], SelectionAlgorithm)
