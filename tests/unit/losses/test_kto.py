"""AKTO: values by hand, against the paper's formula, gradients, and the mask."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_amrlhf.losses.kto import reference_point
from megatron_amrlhf.losses.reduce import finish_metrics
from tests.unit.losses.plainly import kto_loss

# float32 rounding of short sums
TOLERANCE = 1e-6
VALID = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0], [1, 0, 0, 0]]).bool()
MASK = torch.tensor([[1, 0, 1, 1], [0, 1, 0, 0], [0, 1, 1, 0], [1, 0, 0, 0]]).bool()
CHOSEN = torch.tensor([True, False, False, True])
BETA, DESIRABLE, UNDESIRABLE = 0.3, 1.0, 1.33


def randn(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


LOGPROBS, REFERENCE, Z0 = randn(1, 4, 4), randn(2, 4, 4), torch.tensor(0.7).double()


def loss(x, mask=MASK, z0=Z0):
    return kto_loss(x, REFERENCE, CHOSEN, mask, z0, BETA, DESIRABLE, UNDESIRABLE)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def paper_loss(logprobs, kept, z0):
    """Eq. 8 of the KTO paper: the mean of lambda_y - v(x, y), written answer by answer."""
    total = 0.0
    for i, chosen in enumerate(CHOSEN.tolist()):
        tokens = kept[i].nonzero().flatten().tolist()
        policy = sum(logprobs[i, t] for t in tokens)
        reference = sum(REFERENCE[i, t] for t in tokens)
        reward = policy - reference
        if chosen:
            total = total + DESIRABLE - DESIRABLE * torch.sigmoid(BETA * (reward - z0))
        else:
            total = total + UNDESIRABLE - UNDESIRABLE * torch.sigmoid(BETA * (z0 - reward))
    return total / len(CHOSEN)


def test_values_by_hand_on_three_tokens():
    logprobs = torch.tensor([[-1.0, -2.0, -3.0], [-4.0, -1.0, -0.5]])
    reference = torch.tensor([[-2.0, -2.5, -1.0], [-2.0, -2.0, -9.0]])
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]]).bool()
    chosen = torch.tensor([True, False])
    output = kto_loss(logprobs, reference, chosen, mask, torch.tensor(0.5), 0.5, 1.0, 2.0)
    # kept log-ratios: 1 + 0.5 and -2
    expected = [1 - sigmoid(0.5 * (1.5 - 0.5)), 2 * (1 - sigmoid(0.5 * (0.5 + 2.0)))]
    assert output.terms.shape == (2, 1)
    assert output.terms.flatten().tolist() == pytest.approx(expected, rel=TOLERANCE)
    metrics = finish_metrics(output.metrics)
    assert metrics["reward/implicit_chosen"] == pytest.approx(0.75)
    assert metrics["reward/implicit_rejected"] == pytest.approx(-1.0)
    assert metrics["kto/z0"] == pytest.approx(0.5)
    slopes = [4 * sigmoid(x) * (1 - sigmoid(x)) for x in (0.5, 1.25)]
    assert metrics["kto/slope"] == pytest.approx(sum(slopes) / 2, rel=TOLERANCE)


def test_where_policy_and_reference_agree_the_loss_is_half_the_weight():
    output = kto_loss(
        REFERENCE, REFERENCE, CHOSEN, VALID, torch.tensor(0.0), BETA, DESIRABLE, UNDESIRABLE
    )
    expected = [0.5, 0.5 * 1.33, 0.5 * 1.33, 0.5]
    assert output.terms.flatten().tolist() == pytest.approx(expected, abs=1e-12)
    assert finish_metrics(output.metrics)["kto/slope"] == 1.0


@pytest.mark.parametrize("kept", [VALID, MASK], ids=["plain", "masked"])
def test_loss_is_the_papers_in_value_and_gradient(kept):
    results = []
    for objective in (
        lambda x: loss(x, kept).terms.mean(),
        lambda x: paper_loss(x, kept, Z0),
    ):
        x = LOGPROBS.clone().requires_grad_()
        value = objective(x)
        value.backward()
        results.append((value.detach(), x.grad))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-15)


def test_the_gradient_raises_chosen_and_lowers_rejected_answers():
    x = LOGPROBS.clone().requires_grad_()
    loss(x).terms.sum().backward()
    direction = torch.where(CHOSEN, -1.0, 1.0)[:, None].expand_as(MASK)
    assert torch.equal(torch.sign(x.grad[MASK]), direction[MASK].double())


def test_reference_point_is_the_mean_of_sums_and_never_negative():
    logprobs, reference = torch.zeros(2, 3), torch.tensor([[-1.0, -2.0, -3.0], [1.0, 0.5, 9.0]])
    mask = torch.tensor([[1, 1, 0], [1, 1, 0]]).bool()
    assert reference_point(logprobs, reference, mask).item() == pytest.approx((3.0 - 1.5) / 2)
    assert reference_point(logprobs, -reference, mask).item() == 0.0
    assert reference_point(logprobs[:0], reference[:0], mask[:0]).item() == 0.0
    bad = torch.where(mask, logprobs, math.nan).requires_grad_()
    z0 = reference_point(bad, reference, mask)
    assert z0.item() == pytest.approx(0.75) and not z0.requires_grad


@pytest.mark.parametrize("mask", [MASK, VALID], ids=["masked", "plain"])
def test_gradients_equal_finite_differences(mask):
    x = LOGPROBS.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: loss(x, mask).terms, (x,))


@pytest.mark.parametrize("garbage", [math.inf, -math.inf, math.nan, 1e30])
def test_masked_tokens_give_exactly_nothing_whatever_stands_there(garbage):
    results = []
    for filler in (0.0, garbage):
        x = torch.where(MASK, LOGPROBS, filler).requires_grad_()
        output = loss(x)
        output.terms.sum().backward()
        results.append((output.terms.detach(), x.grad, finish_metrics(output.metrics)))
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])
    assert results[0][2] == results[1][2]
    gradient = results[1][1]
    assert (gradient[~MASK] == 0).all() and (gradient[MASK] != 0).all()


def test_an_answer_without_kept_tokens_is_a_constant():
    mask = MASK.clone()
    mask[0] = False
    x = torch.where(mask, LOGPROBS, math.nan).requires_grad_()
    output = loss(x, mask)
    assert output.terms[0].item() == pytest.approx(1 - sigmoid(-BETA * 0.7))
    output.terms.sum().backward()
    assert (x.grad[0] == 0).all() and x.grad.isfinite().all()


def test_far_answers_have_a_finite_loss_that_stops_growing():
    x = torch.tensor([[-1e4], [1e4]], requires_grad=True)
    zeros, ones = torch.zeros(2, 1), torch.ones(2, 1, dtype=torch.bool)
    chosen = torch.tensor([True, False])
    output = kto_loss(x, zeros, chosen, ones, torch.tensor(0.0), 0.1, 1.0, 2.0)
    assert output.terms.flatten().tolist() == [1.0, 2.0]
    output.terms.sum().backward()
    assert x.grad.isfinite().all()


def test_a_batch_without_rows_has_all_metrics_at_zero():
    empty, mask = torch.zeros(0, 3, requires_grad=True), torch.zeros(0, 3, dtype=torch.bool)
    chosen = torch.zeros(0, dtype=torch.bool)
    output = kto_loss(empty, empty, chosen, mask, torch.tensor(0.5), 0.1, 1.0, 1.0)
    output.terms.sum().backward()
    assert output.metrics and all(n == 0 for _, n in output.metrics.values())


def test_a_failed_answer_counts_nowhere():
    torch.manual_seed(1)
    x, reference = torch.randn(3, 4), torch.randn(3, 4)
    mask, has_reward = torch.ones(3, 4, dtype=torch.bool), torch.tensor([True, False, True])
    chosen, z0 = torch.tensor([True, False, False]), torch.tensor(0.1)
    kept = mask & has_reward[:, None]
    output = kto_loss(x, reference, chosen, kept, z0, 0.5, 1.0, 2.0, has_reward)
    alone = kto_loss(
        x[has_reward],
        reference[has_reward],
        chosen[has_reward],
        mask[has_reward],
        z0,
        0.5,
        1.0,
        2.0,
    )
    assert output.terms[1] == 0 and torch.equal(output.terms[has_reward], alone.terms)
    assert finish_metrics(output.metrics) == pytest.approx(finish_metrics(alone.metrics))
    point = reference_point(x, x - 1.0, kept, has_reward=has_reward)
    assert point.item() == pytest.approx(4.0)
