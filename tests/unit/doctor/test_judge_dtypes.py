"""The doctor says what a run's start says of its dtype."""

from megatron_amrlhf.doctor.judge_dtypes import judge_dtypes
from tests.unit.config.samples import make_config
from tests.unit.doctor.samples import facts, only

FAST = {"dtype": "bfloat16", "dtype_why": "the CPU has AMX", "bfloat16_factor": 0.5}


def test_one_slow_machine_decides_for_all():
    fast = facts(0, **FAST)
    assert only(judge_dtypes([fast], None), "ok").message.startswith(
        "model.dtype: auto is bfloat16"
    )
    message = only(judge_dtypes([fast, facts(1, "node2")], make_config()), "ok").message
    assert message.startswith("model.dtype: auto is float32 (node2): this CPU has no bfloat16")


def test_bfloat16_that_was_asked_for_is_a_warning_where_it_is_slow():
    asked = make_config(model={"dtype": "bfloat16"})
    found = only(judge_dtypes([facts(0, **FAST), facts(1)], asked), "warning")
    assert found.message.startswith("bfloat16 products take 9 times as long as float32 ones")
    only(judge_dtypes([facts(0, **FAST)], asked), "ok")
    reward = make_config(reward_model={"dtype": "bfloat16"})
    assert "reward_model.dtype: auto" in only(judge_dtypes([facts(0)], reward), "warning").message
