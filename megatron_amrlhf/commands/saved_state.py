"""What a run keeps in its checkpoints beside the roles, looked at before it goes on from it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict, Field, NonNegativeInt

from megatron_amrlhf.checkpoint.folders import STATE_FILE, step_of
from megatron_amrlhf.errors import UserError
from megatron_amrlhf.reading import Count, Record, Unreadable, checked

Metrics = dict[str, int | float | None]


class DataRecord(Record):
    """Where the run stands in its data: `DataPosition.state_dict`."""

    fingerprint: str
    seed: NonNegativeInt
    consumed_samples: Count
    epoch: Count


class BaselineRecord(Record):
    """`RunningBaseline.state_dict`."""

    mean: float
    num_updates: Count


class OfflineRecord(Record):
    """`OfflineScores.state_dict`."""

    mean: float
    std: Annotated[float, Field(ge=0)]


class PolicyRecord(Record):
    """`PolicyAlgorithm.state_dict`."""

    running_baseline: BaselineRecord
    offline: OfflineRecord | None = None


class RunState(Record):
    """What `Loop` saves; metrics may be NaN."""

    model_config = ConfigDict(allow_inf_nan=True)

    step: Count
    algorithm: dict[str, Any]
    data: DataRecord
    config: dict[str, Any] = {}
    pending: Metrics | None = None
    before: Metrics = {}
    after: Metrics = {}


def check_run_state(folder: Path, state: dict[str, Any]) -> dict[str, Any]:
    """The state with every key that may be missing, each value one that a run can have saved.

    Args:
        folder: the checkpoint.
        state: `Loaded.state`.

    Raises:
        UserError: names the first key that is wrong.
    """
    try:
        found = checked(RunState, state)
        if found.algorithm:
            checked(PolicyRecord, found.algorithm)
        if found.step != step_of(folder):
            raise Unreadable(f"step: is {found.step}")
    except Unreadable as error:
        raise UserError(f"{folder / STATE_FILE} is damaged: state.{error}") from None
    return {"pending": None, "before": {}, "after": {}} | state
