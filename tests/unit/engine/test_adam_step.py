"""Adam's restored step count lies where torch's fused AdamW looks for it."""

import torch

from megatron_amrlhf.engine.weights import adam_step


def test_the_step_count_is_beside_its_parameter():
    step = adam_step(3, torch.empty(4, device="meta"))
    assert step.device.type == "meta" and step.dtype == torch.float32 and step.shape == ()
    assert adam_step(3, torch.empty(4)) == 3
