"""An export says what its numbers mean."""

from __future__ import annotations

import pytest

from megatron_amrlhf.rewards.kinds import export_keys, reward_kind
from tests.unit.config.samples import ORM, PPO, PRM, make_config


@pytest.mark.parametrize(("loss", "output"), [("bce", "logit"), ("mse", "score")])
def test_a_prm_says_how_its_steps_are_read(loss, output):
    data = {"step_marker": "<extra_0>", "step_separator": ""}
    found = export_keys("prm", make_config(PRM, algorithm={"loss": loss}, data=data))
    assert found == {"reward_kind": "process", "reward_output": output} | data
    plain = export_keys("prm", make_config(PRM))
    assert plain["step_marker"] is None and plain["step_separator"] == "\n"


def test_others_say_their_kind_or_nothing():
    assert export_keys("orm", make_config(ORM)) == {"reward_kind": "outcome"}
    assert export_keys("actor", make_config(PPO)) == {}
    assert reward_kind({}) == "process"
