"""What ``model.dtype: auto`` is on these machines, and whether bfloat16 would be slow there."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_amrlhf.config.schema import Config
from megatron_amrlhf.doctor.records import Finding, RankFacts
from megatron_amrlhf.parallel.dtypes import SLOW_FACTOR, DtypeChoice, slow_line, slowest


def judge_dtypes(facts: Sequence[RankFacts], config: Config | None) -> list[Finding]:
    """The dtype that a run takes, as its start would say.

    Args:
        facts: of every rank.
        config: the run; None: any.
    """
    asked = {} if config is None else {"model.dtype": config.model.dtype}
    if config is not None and config.reward_model.dtype is not None:
        asked["reward_model.dtype"] = config.reward_model.dtype
    slow = [each.bfloat16_factor for each in facts if each.bfloat16_factor is not None]
    findings = [
        Finding("dtype", "warning", slow_line(key, max(slow)).removeprefix("warning: "), _fix(key))
        for key, dtype in asked.items()
        if dtype == "bfloat16" and slow and max(slow) > SLOW_FACTOR
    ]
    choices = [DtypeChoice(each.dtype, each.dtype_why) for each in facts]
    taken = slowest(choices)
    host = facts[choices.index(taken)].host
    where = f" ({host})" if len({choice.dtype for choice in choices}) > 1 else ""
    text = f"model.dtype: auto is {taken.dtype}{where}: {taken.why}"
    return findings or [Finding("dtype", "ok", text)]


def _fix(key: str) -> str:
    return f"{key}: auto, or float32"
