"""What the configuration offers, the mask takes: every choice of every key, and no other."""

from typing import get_args

import pytest
import torch

from megatron_amrlhf.config.schema import LossSection, MaskSection
from megatron_amrlhf.losses.reduce import denominator_mask
from megatron_amrlhf.mask.adaptive import chosen_labels
from megatron_amrlhf.mask.messages import unit_rewards
from megatron_amrlhf.mask.schmitt import signs
from megatron_amrlhf.mask.threshold import (
    RunningBaseline,
    baseline_and_std,
    delta_in_signal_units,
)

ROW = torch.tensor([[1.0, 3.0]])
VALID = torch.ones_like(ROW, dtype=torch.bool)
IDS = torch.zeros(1, 2, dtype=torch.int64)
STATE = {"running": RunningBaseline(0.9), "group_ids": IDS[:, 0]}
READERS = {
    (MaskSection, "threshold"): lambda kind: baseline_and_std(ROW, VALID, kind, **STATE),
    (MaskSection, "delta_unit"): lambda unit: delta_in_signal_units(0.5, unit, ROW.mean()),
    (MaskSection, "neutral"): lambda kind: signs(ROW, VALID, ROW[:, :1], 0.5, kind),
    (MaskSection, "label"): lambda kind: chosen_labels(
        ROW[:, 0], kind, group_ids=IDS[:, 0], values=ROW[:, 1]
    ),
    (MaskSection, "message_reward"): lambda kind: unit_rewards(ROW, IDS, VALID, kind),
    (LossSection, "denominator"): lambda kind: denominator_mask(VALID, VALID, kind),
}


@pytest.mark.parametrize(("section", "key"), READERS, ids=lambda x: getattr(x, "__name__", x))
def test_each_choice_is_taken(section, key):
    read = READERS[section, key]
    for choice in get_args(section.model_fields[key].annotation):
        read(choice)
    with pytest.raises(ValueError, match="nothing_of_these"):
        read("nothing_of_these")
