"""Heads of critics and reward models compute in float32."""

import torch

from megatron_amrlhf.models.layers import ValueHead


def test_neighbouring_values_keep_their_difference_in_bfloat16():
    torch.manual_seed(0)
    head = ValueHead(64, 1, dtype=torch.bfloat16)
    hidden = torch.randn(1, 64).repeat(2, 1).bfloat16()
    hidden[1, 0] += 0.5
    values = head(hidden)
    exact = hidden.double() @ head.weight.double().T + head.bias.double()
    assert values.dtype == torch.float32
    torch.testing.assert_close(values.double(), exact, rtol=1e-6, atol=1e-6)
    values.sum().backward()
    assert head.weight.grad.dtype == torch.bfloat16
