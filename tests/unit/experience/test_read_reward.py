"""An outcome model's last number is the reward of the whole answer."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from megatron_amrlhf.experience.scoring import last_output_of_row, read_reward

ROWS = torch.tensor([0, 0, 0, 2, 3, 3])
OUTPUTS = torch.tensor([[1.0], [2.0], [5.0], [-1.0], [0.0], [4.0]])


def context(hf_config: dict, weights=None):
    """The three things that read_reward looks at."""
    role = SimpleNamespace(hf_config=SimpleNamespace(to_dict=lambda: hf_config))
    return SimpleNamespace(
        config=SimpleNamespace(reward_model=SimpleNamespace(attribute_weights=weights)),
        engine=SimpleNamespace(roles={"prm": role}),
    )


@pytest.mark.parametrize(
    ("hf_config", "expected"),
    [
        ({}, [1.0, 2.0, 5.0, -1.0, 0.0, 4.0]),
        ({"reward_kind": "process"}, [1.0, 2.0, 5.0, -1.0, 0.0, 4.0]),
        ({"reward_kind": "outcome"}, [5.0, 5.0, 5.0, -1.0, 4.0, 4.0]),
    ],
)
def test_kinds(hf_config, expected):
    block = SimpleNamespace(output_rows=ROWS)
    assert read_reward(context(hf_config), "prm").outputs(OUTPUTS, block).tolist() == expected
    doubled = read_reward(context(hf_config, (2.0,)), "prm").outputs(OUTPUTS, block)
    assert doubled.tolist() == [2 * x for x in expected]


def test_last_outputs():
    assert last_output_of_row(ROWS).tolist() == [2, 2, 2, 3, 5, 5]
    assert last_output_of_row(ROWS[:0]).tolist() == []
