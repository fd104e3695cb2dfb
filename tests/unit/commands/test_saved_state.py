"""What a run goes on from is what a run can have saved."""

import math
from pathlib import Path

import pytest

from megatron_amrlhf.commands.saved_state import check_run_state
from megatron_amrlhf.errors import UserError

FOLDER = Path("checkpoints/step-4")
STATE = {
    "step": 4,
    "algorithm": {"running_baseline": {"mean": 0.5, "num_updates": 4}, "offline": None},
    "data": {"fingerprint": "f", "seed": 0, "consumed_samples": 8, "epoch": 0},
    "config": {"run": {}},
    "pending": {"loss/policy": math.nan, "engine/skipped_steps": 1, "kl/ref_nats": None},
    "before": {},
    "after": {"eval/reward_mean": 0.5},
}


def test_a_saved_state_is_given_as_it_is():
    assert check_run_state(FOLDER, STATE) is not STATE
    found = check_run_state(FOLDER, STATE)
    assert found == STATE and type(found["pending"]["engine/skipped_steps"]) is int
    old = {key: STATE[key] for key in ("step", "algorithm", "data")} | {"algorithm": {}}
    assert check_run_state(FOLDER, old) == old | {"pending": None, "before": {}, "after": {}}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"step": -5}, "state.step: "),
        ({"step": 5}, "state.step: is 5"),
        ({"step": "4"}, "state.step: "),
        ({"step": 4.0}, "state.step: "),
        ({"step": 10**60}, "state.step: "),
        ({"algorithm": None}, "state.algorithm: "),
        ({"algorithm": {"offline": None}}, "state.running_baseline: "),
        ({"algorithm": {"running_baseline": {"mean": "a", "num_updates": 1}}}, "mean: "),
        ({"algorithm": {"running_baseline": {"mean": math.nan, "num_updates": 1}}}, "mean: "),
        ({"algorithm": {"running_baseline": {"mean": 0.5, "num_updates": -1}}}, "num_updates: "),
        ({"data": None}, "state.data: "),
        ({"data": {}}, "state.data.fingerprint: "),
        ({"data": STATE["data"] | {"consumed_samples": -8}}, "consumed_samples: "),
        ({"data": STATE["data"] | {"consumed_samples": 1 << 60}}, "consumed_samples: "),
        ({"data": STATE["data"] | {"epoch": None}}, "epoch: "),
        ({"data": STATE["data"] | {"seed": [0]}}, "seed: "),
        ({"config": 3}, "state.config: "),
        ({"pending": 3}, "state.pending: "),
        ({"pending": {"loss": "high"}}, "state.pending.loss"),
        ({"before": None}, "state.before: "),
        ({"after": {"a": []}}, "state.after.a"),
    ],
)
def test_a_value_that_no_run_saves_is_named(change, words):
    with pytest.raises(UserError, match=words) as caught:
        check_run_state(FOLDER, STATE | change)
    assert str(caught.value).startswith("checkpoints/step-4/state.json is damaged: ")


@pytest.mark.parametrize("key", ["step", "algorithm", "data"])
def test_a_missing_key_is_named(key):
    with pytest.raises(UserError, match=f"state.{key}: Field required"):
        check_run_state(FOLDER, {name: x for name, x in STATE.items() if name != key})
