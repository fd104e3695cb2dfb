"""Records of targets keep their rows together."""

import torch

from megatron_amrlhf.losses.grpo import GrpoTargets


def record(rows: int, width: int) -> GrpoTargets:
    """Every tensor says which row and column it is."""
    numbers = torch.arange(rows)[:, None] * 100.0 + torch.arange(width)
    flags = torch.ones(rows, width, dtype=torch.bool)
    one = numbers[:, :1]
    return GrpoTargets(
        denominator=flags,
        mask=flags,
        valid=flags,
        reference_logprobs=numbers,
        kl_scale=one,
        behaviour_logprobs=numbers,
        advantages=one[:, 0],
        weight=one,
    )


def test_rows_are_selected_in_every_tensor():
    part = record(4, 3).select(torch.tensor([2, 0]))
    assert part.reference_logprobs.tolist() == [[200, 201, 202], [0, 1, 2]]
    assert part.advantages.tolist() == [200, 0] and part.weight.tolist() == [[200], [0]]
    assert part.mask.shape == (2, 3) and part.mask.dtype == torch.bool


def test_records_of_other_widths_are_joined_and_padded():
    joined = GrpoTargets.join([record(1, 2), record(2, 3)])
    assert joined.reference_logprobs.tolist() == [[0, 1, 0], [0, 1, 2], [100, 101, 102]]
    assert joined.valid.tolist() == [[True, True, False], [True] * 3, [True] * 3]
    assert joined.advantages.tolist() == [0, 0, 100] and joined.kl_scale.shape == (3, 1)
    assert joined.each(torch.Tensor.double).weight.dtype == torch.float64
