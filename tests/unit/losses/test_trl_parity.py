"""Plain DPO, KTO, GRPO and PPO give the values and gradients of TRL's trainers on the same input.

TRL's loss methods are called without their trainers: on a stand-in for ``self`` that hands them
the log-probs. TRL 1.16 has no PPO trainer any more; its GRPO loss with an advantage for each token
is PPO's (so the critic's loss and GAE have nothing there to compare with). TRL is a dependency of
the tests only.
"""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from trl.trainer import dpo_trainer, grpo_trainer, kto_trainer

from megatron_amrlhf.losses.grpo import group_advantages
from megatron_amrlhf.losses.kto import reference_point
from megatron_amrlhf.losses.reduce import row_weights
from tests.unit.losses.plainly import dpo_loss, grpo_loss, kto_loss, ppo_actor_loss, with_kl

TOLERANCE = 1e-6
BETA = 0.3
VALID = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0], [1, 0, 0, 0]]).bool()
ACCELERATOR = SimpleNamespace(
    device=torch.device("cpu"),
    num_processes=1,
    gather=lambda x: x,
    gather_for_metrics=lambda x: x,
    reduce=lambda x, reduction: x,
    unwrap_model=lambda x: x,
)


def randn(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def value_and_gradient(objective, logprobs):
    x = logprobs.clone().requires_grad_()
    value = objective(x)
    value.backward()
    return value.detach(), x.grad


def compare(ours, theirs, logprobs):
    found, expected = (value_and_gradient(f, logprobs) for f in (ours, theirs))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=TOLERANCE, atol=TOLERANCE)


BEHAVIOUR, REFERENCE = randn(1, 4, 4), randn(2, 4, 4)
LOGPROBS = BEHAVIOUR + 0.3 * randn(3, 4, 4)


def trl_grpo(logprobs, advantages, loss_type, kl_coef=0.04, clip_eps_high=0.28):
    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *a, **k: (logprobs, torch.zeros(4, 4), None),
        _metrics=defaultdict(lambda: defaultdict(list)),
        _entropy_bonus_enabled=False,
        accelerator=ACCELERATOR,
        args=SimpleNamespace(delta=None, use_bias_correction_kl=False, steps_per_generation=1),
        aux_loss_enabled=False,
        beta=kl_coef,
        current_gradient_accumulation_steps=1,
        epsilon_high=clip_eps_high,
        epsilon_low=0.2,
        importance_sampling_level="token",
        loss_type=loss_type,
        model=SimpleNamespace(training=True),
        off_policy_mask_threshold=None,
        top_entropy_quantile=1.0,
        use_vllm=False,
    )
    ids = torch.zeros(4, 4, dtype=torch.int64)
    inputs = {
        "prompt_ids": ids,
        "prompt_mask": torch.ones_like(ids),
        "completion_ids": ids,
        "completion_mask": VALID.long(),
        "advantages": advantages,
        "old_per_token_logps": BEHAVIOUR,
        "ref_per_token_logps": REFERENCE,
        "num_items_in_batch": VALID.sum(),
    }
    return grpo_trainer.GRPOTrainer._compute_loss(trainer, None, inputs)


@pytest.mark.parametrize(("loss_type", "by_row"), [("grpo", True), ("dapo", False)])
def test_grpo(loss_type, by_row):
    rewards, groups = randn(4, 4), torch.tensor([0, 0, 1, 1])
    advantages, std = group_advantages(rewards, groups, scale_rewards=True)
    torch.testing.assert_close(
        std, grpo_trainer.nanstd(rewards.view(2, 2), dim=1).repeat_interleave(2)
    )

    def ours(x):
        args = (BEHAVIOUR, REFERENCE, advantages, VALID, VALID, 0.2, 0.28, 0.04, "k3")
        terms = grpo_loss(x, *args).terms
        return (terms * row_weights(VALID)).sum() / 4 if by_row else terms.sum() / VALID.sum()

    compare(ours, lambda x: trl_grpo(x, advantages, loss_type), LOGPROBS)


@pytest.mark.parametrize("kl_coef", [0.0, 0.3])
def test_ppo(kl_coef):
    advantages = randn(7, 4, 4)

    def ours(x):
        out = ppo_actor_loss(x, BEHAVIOUR, advantages, VALID, 0.2)
        return with_kl(out, x, REFERENCE, VALID, kl_coef, "k3").terms.sum() / VALID.sum()

    def theirs(x):
        return trl_grpo(x, advantages, "dapo", kl_coef, clip_eps_high=0.2)

    compare(ours, theirs, LOGPROBS)


def trl_dpo(logprobs):
    """TRL lays the chosen answers first; rows 0 and 2 are chosen here."""
    order = [0, 2, 1, 3]
    valid = VALID[order]
    zeros = torch.zeros(4, 4)
    trainer = SimpleNamespace(
        _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0,
        _tp_size=1,
        accelerator=ACCELERATOR,
        aux_loss_enabled=False,
        beta=BETA,
        f_divergence_type="reverse_kl",
        ld_alpha=None,
        loss_types=["sigmoid"],
        loss_weights=[1.0],
        model=SimpleNamespace(training=True),
        precompute_ref_logps=True,
        use_weighting=False,
    )
    outputs = SimpleNamespace(
        log_probs=logprobs[order] * valid,
        entropy=zeros,
        mean_logits=zeros,
        is_top1=zeros.bool(),
    )
    reference = (REFERENCE[order] * valid).sum(-1)
    ids = torch.zeros(4, 5, dtype=torch.int64)
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "completion_mask": torch.cat([torch.zeros(4, 1), valid.long()], dim=1).long(),
        "ref_chosen_logps": reference[:2],
        "ref_rejected_logps": reference[2:],
    }
    call = dpo_trainer.DPOTrainer._compute_loss
    return call(trainer, lambda **kwargs: outputs, inputs, False)


@pytest.mark.parametrize("form", ["inside", "pair"])
def test_dpo(form):
    masks = (VALID[0::2], VALID[1::2])

    def ours(x):
        sides = (x[0::2], x[1::2], REFERENCE[0::2], REFERENCE[1::2])
        return dpo_loss(*sides, *masks, BETA, form, *masks).terms.sum() / 2

    compare(ours, trl_dpo, LOGPROBS)


def trl_kto(logprobs, mismatched, mismatched_reference, chosen, weights):
    def outputs(x):
        zeros = torch.zeros(4, 4)
        return SimpleNamespace(log_probs=x * VALID, entropy=zeros, mean_logits=zeros)

    trainer = SimpleNamespace(
        _compute_kl_logps=lambda model, batch: mismatched.sum(-1),
        _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0,
        _tp_size=1,
        accelerator=ACCELERATOR,
        args=SimpleNamespace(gradient_checkpointing_kwargs=None, gradient_checkpointing=False),
        aux_loss_enabled=False,
        beta=BETA,
        calculate_KL=True,
        desirable_weight=weights[0],
        loss_type="kto",
        precompute_ref_logps=True,
        undesirable_weight=weights[1],
        model=SimpleNamespace(training=True),
    )
    ids = torch.zeros(4, 5, dtype=torch.int64)
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "completion_mask": torch.cat([torch.zeros(4, 1), VALID.long()], dim=1).long(),
        "label": chosen,
        "ref_logps": (REFERENCE * VALID).sum(-1),
        "ref_KL_logps": mismatched_reference.sum(-1),
    }
    call = kto_trainer.KTOTrainer._compute_loss
    return call(trainer, lambda **kwargs: outputs(logprobs), inputs, False)


@pytest.mark.parametrize("shift", [0.5, -0.5], ids=["positive z0", "z0 clamped"])
def test_kto(shift):
    chosen, weights = torch.tensor([True, False, False, True]), (1.0, 1.33)
    reference = randn(5, 4, 4)
    mismatched = reference + shift + 0.1 * randn(6, 4, 4)
    z0 = reference_point(mismatched, reference, torch.ones_like(VALID))
    assert (z0 > 0) == (shift > 0)

    def ours(x):
        return kto_loss(x, REFERENCE, chosen, VALID, z0, BETA, *weights).terms.sum() / 4

    compare(ours, lambda x: trl_kto(x, mismatched, reference, chosen, weights), LOGPROBS)
