"""Answers to a prompt that are all alike are neither desirable nor undesirable."""

import torch

from megatron_amrlhf.algorithms.choices import is_flat
from megatron_amrlhf.algorithms.kto import labelled
from tests.unit.losses.plainly import kto_loss

REWARDS = torch.tensor([[1.0, 1.0], [1.0, 0.0], [torch.nan, 1.0]])


def test_a_flat_group_has_no_label_by_its_mean_and_one_by_that_of_the_batch():
    has_reward, flat = ~REWARDS.isnan().flatten(), is_flat(REWARDS)
    assert flat.tolist() == [True, False, True]
    assert labelled(has_reward, flat, "group").tolist() == [False, False, True, True, False, False]
    assert labelled(has_reward, flat, "batch").equal(has_reward)


def test_right_answers_to_a_solved_prompt_are_not_pushed_down():
    logprobs = torch.full((6, 2), -1.0, requires_grad=True)
    everything = torch.ones(6, 2, dtype=torch.bool)
    has_label = labelled(~REWARDS.isnan().flatten(), is_flat(REWARDS), "group")
    chosen = torch.tensor([0, 0, 1, 0, 0, 0]).bool()
    still = (torch.zeros(()), 0.1, 1.0, 1.0)
    output = kto_loss(logprobs, logprobs.detach(), chosen, everything, *still, has_label)
    output.terms.sum().backward()
    assert (logprobs.grad[~has_label] == 0).all()
    assert (logprobs.grad[2] < 0).all() and (logprobs.grad[3] > 0).all()
