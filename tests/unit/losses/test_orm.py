"""Bradley-Terry, eq. 1: values by hand, gradients, and what a tie counts."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_amrlhf.losses.orm import larger_size, pair_accuracy
from megatron_amrlhf.losses.reduce import finish_metrics
from tests.unit.losses.plainly import orm_loss

TOLERANCE = 1e-6


def test_values_and_gradient_by_hand():
    chosen = torch.tensor([1.0, 0.0, 2.0], requires_grad=True)
    rejected = torch.tensor([0.0, 3.0, 2.0], requires_grad=True)
    output = orm_loss(chosen, rejected)
    expected = [math.log(1 + math.exp(-1)), math.log(1 + math.exp(3)), math.log(2)]
    assert output.terms.flatten().tolist() == pytest.approx(expected, rel=TOLERANCE)
    output.terms.sum().backward()
    # -(1 - sigmoid(margin)) for the chosen, its opposite for the rejected
    slope = [-1 / (1 + math.e), -1 / (1 + math.exp(-3)), -0.5]
    assert chosen.grad.tolist() == pytest.approx(slope, rel=TOLERANCE)
    assert torch.equal(rejected.grad, -chosen.grad)
    metrics = finish_metrics(output.metrics)
    assert metrics == {"orm/accuracy": 0.5, "orm/margin": pytest.approx(-2 / 3)}


def test_a_tie_is_a_coin_flip():
    sizes = torch.ones(3)
    assert pair_accuracy(torch.tensor([0.1, -0.1, 0.0]), sizes).tolist() == [1.0, 0.0, 0.5]
    nothing = torch.zeros(1)
    assert pair_accuracy(nothing, nothing).tolist() == [0.5]


@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e8])
def test_a_tie_is_one_up_to_the_rounding_of_its_terms(scale):
    chosen = scale * torch.tensor([3.0, 3.0, 3.0, 3.0])
    rejected = chosen * (1 + torch.tensor([2e-7, -2e-7, 1e-5, -1e-5]))
    sizes = larger_size(chosen, rejected)
    assert pair_accuracy(chosen - rejected, sizes).tolist() == [0.5, 0.5, 0.0, 1.0]
    accuracy = finish_metrics(orm_loss(chosen, rejected).metrics)["orm/accuracy"]
    assert accuracy == 0.5


def test_only_the_difference_counts():
    chosen, rejected = torch.randn(2, 5, generator=torch.Generator().manual_seed(0)).double()
    shifted = orm_loss(chosen + 7, rejected + 7).terms
    torch.testing.assert_close(orm_loss(chosen, rejected).terms, shifted)


def test_gradients_equal_finite_differences():
    pairs = torch.randn(2, 5, generator=torch.Generator().manual_seed(1)).double()
    chosen, rejected = (x.clone().requires_grad_() for x in pairs)
    assert torch.autograd.gradcheck(lambda *x: orm_loss(*x).terms, (chosen, rejected))


def test_no_pairs():
    empty = torch.zeros(0, requires_grad=True)
    output = orm_loss(empty, empty)
    output.terms.sum().backward()
    assert output.terms.shape == (0, 1) and all(n == 0 for _, n in output.metrics.values())
