"""KL estimators: their exact mean value and mean gradient under a 5-token policy."""

from __future__ import annotations

import pytest
import torch

from megatron_amrlhf.config.schema import Config
from megatron_amrlhf.losses.kl import KL_ESTIMATORS, absolute, k1, k2, k3, reward_penalty
from megatron_amrlhf.losses.reduce import LossOutput
from tests.unit.losses.plainly import with_kl

LOGITS = torch.tensor([0.3, -1.2, 0.7, 0.1, -0.4], dtype=torch.float64)
REFERENCE = torch.tensor([1.0, -0.5, 0.2, -0.9, 0.0], dtype=torch.float64).log_softmax(0)


def exact_kl(logp, logq):
    return (logp.exp() * (logp - logq)).sum()


def mean_gradient(estimator):
    """E_{x ~ pi} of the estimator's gradient at x: what a loss on sampled tokens follows."""
    logits = LOGITS.clone().requires_grad_()
    logprobs = logits.log_softmax(0)
    weights = logprobs.detach().exp()  # sampling itself is not differentiated
    return torch.autograd.grad((weights * estimator(logprobs, REFERENCE)).sum(), logits)[0]


def kl_gradient(forward):
    logits = LOGITS.clone().requires_grad_()
    logp = logits.log_softmax(0)
    kl = exact_kl(REFERENCE, logp) if forward else exact_kl(logp, REFERENCE)
    return torch.autograd.grad(kl, logits)[0]


@pytest.mark.parametrize("estimator", [k1, k3])
def test_k1_and_k3_have_the_kl_as_their_mean(estimator):
    logp = LOGITS.log_softmax(0)
    mean = (logp.exp() * estimator(logp, REFERENCE)).sum()
    torch.testing.assert_close(mean, exact_kl(logp, REFERENCE))


def test_k2_and_k3_approach_the_kl_of_close_policies():
    logp = (REFERENCE + 1e-3 * LOGITS).log_softmax(0)
    for estimator in (k2, k3):
        mean = (logp.exp() * estimator(logp, REFERENCE)).sum()
        torch.testing.assert_close(mean, exact_kl(logp, REFERENCE), rtol=1e-2, atol=0)


def test_in_a_loss_k1_is_useless_k2_follows_the_reverse_kl_and_k3_the_forward_one():
    reverse, forward = kl_gradient(forward=False), kl_gradient(forward=True)
    assert not torch.allclose(reverse, forward, rtol=0.1)
    torch.testing.assert_close(mean_gradient(k1), torch.zeros(5).double(), rtol=0, atol=1e-15)
    torch.testing.assert_close(mean_gradient(k2), reverse)
    torch.testing.assert_close(mean_gradient(k3), forward)


def test_in_the_reward_only_k1_follows_the_reverse_kl():
    """Policy gradient of a penalty: E_{x ~ pi} of estimator(x) times grad log pi(x)."""

    def penalty_gradient(estimator):
        logits = LOGITS.clone().requires_grad_()
        logprobs = logits.log_softmax(0)
        weights = (logprobs.exp() * estimator(logprobs, REFERENCE)).detach()
        return torch.autograd.grad((weights * logprobs).sum(), logits)[0]

    reverse, forward = kl_gradient(forward=False), kl_gradient(forward=True)
    torch.testing.assert_close(penalty_gradient(k1), reverse)
    torch.testing.assert_close(penalty_gradient(k3), reverse - forward)
    for estimator in (k2, k3, absolute):
        assert not torch.allclose(penalty_gradient(estimator), reverse, rtol=0.1)


ONE_TOKEN = torch.zeros(1, 1)


@pytest.mark.parametrize("estimator", KL_ESTIMATORS)
def test_an_estimator_is_refused_where_it_is_not_meant_for(estimator):
    """By the losses and, before any process starts, by the configuration: the same ones."""
    loss = LossOutput(ONE_TOKEN, {})
    valid = ONE_TOKEN.bool()
    uses = {
        "reward": lambda: reward_penalty(ONE_TOKEN, ONE_TOKEN, estimator),
        "loss": lambda: with_kl(loss, ONE_TOKEN, ONE_TOKEN, valid, 0.1, estimator),
    }
    meant = {"k1": "reward", "abs": "reward", "k2": "loss", "k3": "loss"}[estimator]
    for place, use in uses.items():
        settings = {
            "run": {"name": "x"},
            "model": {"path": "x"},
            "data": {"train": "x"},
            "algorithm": {"kind": "ppo", "kl_in": place, "kl_estimator": estimator},
        }
        config = Config.model_validate(settings)
        problems = list(config.algorithm.problems(config))
        if place == meant:
            use()
            assert not problems
        else:
            with pytest.raises(ValueError, match=estimator):
                use()
            (problem,) = problems
            assert problem.startswith(f"algorithm.kl_estimator: {estimator} in the {place}")


def test_with_kl_by_hand_on_three_tokens():
    logprobs = torch.tensor([[-1.0, -2.0, float("nan")]], requires_grad=True)
    reference = torch.tensor([[-2.0, -1.5, float("nan")]])
    valid = torch.tensor([[True, True, False]])
    given = LossOutput(torch.tensor([[10.0, 0.0, 0.0]]), {"other": (1, 1)})
    found = with_kl(given, logprobs, reference, valid, 0.4, "k2")
    torch.testing.assert_close(found.terms.detach(), torch.tensor([[10.2, 0.05, 0.0]]))
    found.terms.sum().backward()
    torch.testing.assert_close(logprobs.grad, torch.tensor([[0.4, -0.2, 0.0]]))
    assert found.metrics["loss/kl"] == (0.625, 2) and found.metrics["other"] == (1, 1)
    assert with_kl(given, logprobs, reference, valid, 0.0, "k2").terms is given.terms


def test_values_by_hand():
    logprobs, reference = torch.tensor([-1.0, -2.0, -3.0]), torch.tensor([-2.0, -2.0, -1.0])
    assert k1(logprobs, reference).tolist() == [1.0, 0.0, -2.0]
    assert k2(logprobs, reference).tolist() == [0.5, 0.0, 2.0]
    assert absolute(logprobs, reference).tolist() == [1.0, 0.0, 2.0]
    expected = torch.tensor([1 / torch.e, 0.0, torch.e**2 - 3])
    torch.testing.assert_close(k3(logprobs, reference), expected)
    assert set(KL_ESTIMATORS) == {"k1", "k2", "k3", "abs"}


def test_k3_keeps_its_precision_at_small_logratios():
    small = torch.tensor([1e-3])
    torch.testing.assert_close(k3(small, torch.zeros(1)), small**2 / 2, rtol=1e-3, atol=0)


@pytest.mark.parametrize("estimator", [k2, k3])
def test_gradients_equal_finite_differences(estimator):
    logprobs = LOGITS.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: estimator(x, REFERENCE), (logprobs,))
