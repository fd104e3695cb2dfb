"""``mask.kind: none`` is the plain algorithm, bit for bit: loss terms and gradients.

The plain losses are written here once more without any mask, each over the unpadded tokens.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from megatron_amrlhf.config.schema import Config
from megatron_amrlhf.experience.context import Context
from megatron_amrlhf.experience.dense import DenseRewards
from megatron_amrlhf.experience.maker import Experience, ExperienceMaker
from megatron_amrlhf.losses.kto import reference_point
from megatron_amrlhf.types import ScoredBatch
from tests.unit.losses.plainly import (
    dpo_loss,
    grpo_loss,
    kto_loss,
    ppo_actor_loss,
    rejection_sampling_loss,
)

LENGTHS = torch.tensor([5, 1, 9, 3])
WIDTH = 9
VALID = torch.arange(WIDTH)[None] < LENGTHS[:, None]
CLIP_EPS, CLIP_EPS_HIGH, BETA, KL_COEF = 0.2, 0.3, 0.3, 0.05
DESIRABLE, UNDESIRABLE = 1.5, 0.75


def random_tensors(count: int) -> list[torch.Tensor]:
    """``[B, R]`` float32; nobody may read the huge entries past a response's end."""
    random = torch.Generator().manual_seed(11)
    drawn = [torch.randn(len(LENGTHS), WIDTH, generator=random) for _ in range(count)]
    return [torch.where(VALID, x, 1e30) for x in drawn]


def terms_and_gradient(loss, logprobs):
    leaf = logprobs.clone().requires_grad_()
    terms = loss(leaf)
    terms.sum().backward()
    return terms.detach(), leaf.grad


def plain_ppo(logprobs, behaviour, advantages):
    ratio = torch.exp(logprobs - behaviour)
    clipped = torch.clamp(ratio, 1 - CLIP_EPS, 1 + CLIP_EPS)
    return -torch.minimum(ratio * advantages, clipped * advantages)


def plain_rejection_sampling(logprobs, reference):
    return -logprobs + KL_COEF * (0.5 * (logprobs - reference) ** 2)


def test_ppo_on_all_tokens_is_plain_ppo_bit_for_bit():
    behaviour, noise, advantages = random_tensors(3)
    logprobs = behaviour + 0.3 * noise

    def loss(leaf):
        return ppo_actor_loss(leaf, behaviour, advantages, VALID, CLIP_EPS).terms

    found, gradient = terms_and_gradient(loss, logprobs)
    expected, plain_gradient = terms_and_gradient(
        lambda leaf: plain_ppo(leaf, behaviour[VALID], advantages[VALID]), logprobs[VALID]
    )
    assert torch.equal(found[VALID], expected) and torch.equal(gradient[VALID], plain_gradient)
    assert not found[~VALID].any() and not gradient[~VALID].any()


def test_rejection_sampling_on_all_tokens_is_plain_bit_for_bit():
    logprobs, reference = random_tensors(2)

    def loss(leaf):
        return rejection_sampling_loss(leaf, reference, VALID, VALID, KL_COEF, "k2").terms

    found, gradient = terms_and_gradient(loss, logprobs)
    expected, plain_gradient = terms_and_gradient(
        lambda leaf: plain_rejection_sampling(leaf, reference[VALID]), logprobs[VALID]
    )
    assert torch.equal(found[VALID], expected) and torch.equal(gradient[VALID], plain_gradient)
    assert not found[~VALID].any() and not gradient[~VALID].any()


@pytest.mark.parametrize("form", ["inside", "pair"])
def test_both_dpo_forms_on_all_tokens_are_plain_dpo_bit_for_bit(form):
    logprobs, reference = random_tensors(2)
    chosen, rejected = VALID[0::2], VALID[1::2]

    def loss(leaf):
        sides = (leaf[0::2], leaf[1::2], reference[0::2], reference[1::2])
        return dpo_loss(*sides, chosen, rejected, BETA, form, chosen, rejected).terms[:, 0]

    def plain(leaf):
        # padded with zeros, because the bits of a sum depend on how many terms it has
        difference = (leaf - torch.where(VALID, reference, 0.0)).sum(dim=1)
        return -F.logsigmoid(BETA * difference[0::2] - BETA * difference[1::2])

    found, gradient = terms_and_gradient(loss, logprobs)
    expected, plain_gradient = terms_and_gradient(plain, torch.where(VALID, logprobs, 0.0))
    assert torch.equal(found, expected)
    assert torch.equal(gradient[VALID], plain_gradient[VALID]) and not gradient[~VALID].any()


def plain_grpo(logprobs, behaviour, reference, advantages):
    ratio = torch.exp(logprobs - behaviour)
    clipped = torch.clamp(ratio, 1 - CLIP_EPS, 1 + CLIP_EPS_HIGH)
    kl = torch.expm1(reference - logprobs) - (reference - logprobs)
    return -torch.minimum(ratio * advantages, clipped * advantages) + KL_COEF * kl


def test_grpo_on_all_tokens_is_plain_grpo_bit_for_bit():
    behaviour, noise, reference = random_tensors(3)
    logprobs, advantages_B = behaviour + 0.3 * noise, torch.tensor([1.2, -0.7, -0.1, 0.4])
    clip = (CLIP_EPS, CLIP_EPS_HIGH)

    def loss(leaf):
        sides = (leaf, behaviour, reference, advantages_B)
        return grpo_loss(*sides, VALID, VALID, *clip, KL_COEF, "k3").terms

    found, gradient = terms_and_gradient(loss, logprobs)
    advantages = advantages_B[:, None].expand_as(VALID)[VALID]
    expected, plain_gradient = terms_and_gradient(
        lambda leaf: plain_grpo(leaf, behaviour[VALID], reference[VALID], advantages),
        logprobs[VALID],
    )
    assert torch.equal(found[VALID], expected) and torch.equal(gradient[VALID], plain_gradient)
    assert not found[~VALID].any() and not gradient[~VALID].any()


def test_kto_on_all_tokens_is_plain_kto_bit_for_bit():
    logprobs, reference, mismatched = random_tensors(3)
    chosen, mismatched = torch.tensor([True, False, False, True]), mismatched + 1  # z0 above 0
    z0 = reference_point(mismatched, reference, VALID)
    # padded with zeros, because the bits of a sum depend on how many terms it has
    unpadded = [torch.where(VALID, x, 0.0) for x in (reference, mismatched)]
    plain_z0 = (unpadded[1] - unpadded[0]).sum(dim=1).double().mean().float().clamp(min=0)
    assert torch.equal(z0, plain_z0) and z0 > 0

    def loss(leaf):
        weights = (BETA, DESIRABLE, UNDESIRABLE)
        return kto_loss(leaf, reference, chosen, VALID, z0, *weights).terms[:, 0]

    def plain(leaf):
        logratio = (leaf - unpadded[0]).sum(dim=1)
        gain = torch.where(chosen, logratio - z0, z0 - logratio)
        weight = torch.where(chosen, DESIRABLE, UNDESIRABLE)
        return weight * torch.sigmoid(-BETA * gain)

    found, gradient = terms_and_gradient(loss, logprobs)
    expected, plain_gradient = terms_and_gradient(plain, torch.where(VALID, logprobs, 0.0))
    assert torch.equal(found, expected)
    assert torch.equal(gradient[VALID], plain_gradient[VALID]) and not gradient[~VALID].any()


@pytest.mark.parametrize("kind", ["none", "adaptive"])
def test_of_neutral_answers_kind_none_keeps_all_and_adaptive_nothing(kind):
    config = Config.model_validate(
        {
            "run": {"name": "x"},
            "model": {"path": "x"},
            "data": {"train": "x"},
            "algorithm": {"kind": "ppo"},
            "mask": {"kind": kind},
        }
    )
    maker = object.__new__(ExperienceMaker)
    maker.context = Context(config, None, None, None, (), None, None, None)
    zeros, rewards = torch.zeros(VALID.shape), torch.arange(4.0)
    dense = DenseRewards(
        signal=zeros,
        baseline=zeros[:, :1],
        delta=torch.tensor(0.0),
        signs=zeros.to(torch.int8),  # neutral everywhere: eq. 13 would keep nothing
        messages=zeros.long(),
        message_rewards=zeros,
        shaped=zeros,
        sequence_rewards=rewards,
    )
    firsts = zeros[:, 0]
    scored = ScoredBatch(zeros, firsts, zeros, zeros, zeros, firsts, VALID)
    experience = Experience(None, scored, dense)
    rows, chosen = torch.tensor([2, 0, 3]), torch.tensor([True, False, False])
    picked, metrics = maker.mask(experience, rows, chosen)
    kept = VALID[rows] if kind == "none" else torch.zeros_like(VALID[rows])
    assert torch.equal(picked.mask, kept) and torch.equal(picked.rows, rows)
    assert metrics["mask/kept_fraction"] == (kept.sum(), LENGTHS[rows].sum())
    assert metrics["mask/empty_answers"] == (0 if kind == "none" else 3, 3)
