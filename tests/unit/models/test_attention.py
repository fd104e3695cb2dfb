"""Attention of grouped heads by torch's fused kernel, against the formula in float64."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from megatron_amrlhf.models.attention import _attend_to_cache, _attend_within_rows, causal_attention

HEADS, SIZE = 6, 8


def plainly(query, key, value, sees):
    """Keys and values repeated, softmax written out; ``sees`` broadcasts to ``[B, h, T, S]``."""
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    scores = query @ key.transpose(2, 3) / SIZE**0.5
    return scores.masked_fill(~sees, float("-inf")).softmax(dim=-1) @ value


def random_heads(kv_heads, *lengths, batch=2):
    random = torch.Generator().manual_seed(1)
    heads = (HEADS, kv_heads, kv_heads)
    return [
        torch.randn(batch, h, n, SIZE, generator=random, dtype=torch.float64, requires_grad=True)
        for h, n in zip(heads, lengths, strict=True)
    ]


@pytest.mark.parametrize("kv_heads", [6, 3, 2, 1])
def test_causal_attention_and_its_gradient(kv_heads):
    heads, sees = random_heads(kv_heads, 5, 5, 5), torch.ones(5, 5).tril().bool()
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):  # an error where it would be computed plainly
        found = causal_attention(*heads)
    expected = plainly(*heads, sees)
    torch.testing.assert_close(found, expected)
    weight = torch.randn(found.shape, generator=torch.Generator().manual_seed(2)).double()
    torch.testing.assert_close(
        torch.autograd.grad((found * weight).sum(), heads),
        torch.autograd.grad((expected * weight).sum(), heads),
    )


@pytest.mark.parametrize("kv_heads", [6, 2, 1])
def test_rows_end_to_end_do_not_see_each_other(kv_heads):
    heads = random_heads(kv_heads, 7, 7, 7, batch=1)
    row = torch.tensor([0, 0, 0, 1, 1, 2, 3])  # the last one is padding
    sees = (row[:, None] == row) & torch.ones(7, 7).tril().bool()
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        found = _attend_within_rows(*heads, (3, 2, 1))
    torch.testing.assert_close(found[:, :, :6], plainly(*heads, sees)[:, :, :6])
    assert not found[:, :, 6].any()


def test_a_micro_batch_without_rows_has_every_tensor_in_its_graph():
    heads = random_heads(2, 3, 3, 3, batch=1)
    out = _attend_within_rows(*heads, ())
    assert not out.any() and out.shape == heads[0].shape
    assert all(not x.any() for x in torch.autograd.grad(out.sum(), heads))


@pytest.mark.parametrize("kv_heads", [6, 3, 1])
def test_a_token_sees_what_is_in_its_rows_cache(kv_heads):
    query, key, value = (x.detach() for x in random_heads(kv_heads, 1, 9, 9))
    sees = (torch.arange(9) <= torch.tensor([[4], [8]]))[:, None, None]
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        found = _attend_to_cache(query, key[:, :, :9], value, sees)
    torch.testing.assert_close(found, plainly(query, key, value, sees))
