"""Bytes of living tensors, against sizes known by hand."""

import torch

from megatron_amrlhf.studies.live_bytes import LiveBytes


def test_storages_count_once_and_until_they_are_freed():
    with LiveBytes() as live:
        whole = torch.zeros(1000)
        part = whole.view(10, 100)[3]
        assert live.now == 4000
        del whole
        assert live.now == 4000  # the view keeps it
        del part
        assert (live.now, live.peak) == (0, 4000)
        live.reset_peak()
        kept = torch.zeros(10, dtype=torch.bfloat16)
        assert live.peak == live.now == 20
        assert kept.numel() == 10


def test_training_state_is_weights_gradients_and_two_moments():
    with LiveBytes() as live:
        parameter = torch.nn.Parameter(torch.ones(500))
        optimizer = torch.optim.AdamW([parameter], fused=True)
        parameter.square().sum().backward()
        optimizer.step()
        state = 4 * 500 * 4
        assert state <= live.now < state + 100  # and Adam's counter
        optimizer.zero_grad()
        assert live.now < 0.75 * state + 100
