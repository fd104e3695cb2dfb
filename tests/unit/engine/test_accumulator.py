"""The gradient sum on one replica; over several it is checked with whole layouts."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from megatron_amrlhf.engine.accumulator import GradientAccumulator, partition_spans

ALONE = SimpleNamespace(dp_size=1, dp_rank=0, dp_group=None, device=torch.device("cpu"))


def accumulator(parameter: nn.Parameter, reduce: str = "step") -> GradientAccumulator:
    gradients = GradientAccumulator({"w": parameter.numel()}, ALONE, reduce, whole=False)
    gradients.watch([("w", parameter)])
    return gradients


@pytest.mark.parametrize("reduce", ["step", "microbatch"])
def test_bfloat16_gradients_are_summed_in_float32(reduce):
    """In bfloat16 256 + 1 is 256: a sum in the model's dtype would lose every small gradient."""
    parameter = nn.Parameter(torch.zeros(3, dtype=torch.bfloat16))
    gradients = accumulator(parameter, reduce)
    gradients.begin()
    for factor in (256.0, *[1.0] * 16):
        (parameter * factor).sum().backward()
    gradients.finish()
    assert gradients.own("w").tolist() == [272.0] * 3 and gradients.own("w").dtype == torch.float32
    assert parameter.grad is None


def test_a_step_starts_from_zero_and_scales():
    parameter = nn.Parameter(torch.ones(2))
    gradients = accumulator(parameter)
    for _ in range(2):
        gradients.begin()
        parameter.square().sum().backward()
        gradients.finish()
        gradients.scale(0.5)
        assert gradients.own("w").tolist() == [1.0, 1.0]
        gradients.drop()


def test_a_gradient_outside_of_a_step_is_an_error():
    parameter = nn.Parameter(torch.ones(2))
    accumulator(parameter)
    with pytest.raises(AssertionError, match="gradient of w outside of a step"):
        parameter.sum().backward()


def test_partitions_are_those_of_zero():
    spans = partition_spans({"a": 10, "b": 3}, 4)
    assert [(span.start, span.size) for span in spans.values()] == [(0, 3), (3, 1)]
    rows = spans["a"].rows(torch.arange(10.0), 4)
    assert rows.tolist() == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 0, 0]]
