"""The content of ``state.json``: every number is in its range before anything is done with it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, NonNegativeInt, PositiveInt, field_validator

from megatron_amrlhf.checkpoint.folders import FORMAT, STATE_FILE, STEP_FOLDER, step_of
from megatron_amrlhf.checkpoint.parts import SavedLayout
from megatron_amrlhf.engine.partitioned import DeepspeedCounter
from megatron_amrlhf.engine.role import DTYPES
from megatron_amrlhf.errors import UserError
from megatron_amrlhf.reading import (
    LARGEST_COUNT,
    Count,
    Record,
    Unreadable,
    checked,
    parse_json,
    read_bytes,
)

MOST_RANKS = 1 << 20
Size = Annotated[int, Field(ge=1, le=MOST_RANKS)]


class LayoutRecord(Record):
    """``SavedLayout`` as it is written."""

    tensor: Size
    pipeline: Size
    data: Size
    virtual_stages: Size
    first_stage_layers: Size | None
    last_stage_layers: Size | None


class CourseRecord(Record):
    """``engine.rates.Course`` as it is written."""

    warmup: Count
    start: Count
    behind: Annotated[float, Field(ge=0, le=1)]
    end: Count


class ScheduleRecord(Record):
    """The learning rate's position; older ones have no course."""

    last_epoch: Count
    step_count: Count
    lr: list[Annotated[float, Field(ge=0)]]
    planned: tuple[Count, Count] | None = Field(None, strict=False)
    course: CourseRecord | None = None


class RoleRecord(Record):
    """A trained role: its dtype, its model's sizes, and its optimizer's counters."""

    dtype: str
    model: dict[str, Any]
    optimizer_step: Annotated[float, Field(ge=0, le=LARGEST_COUNT)] | None
    schedule: ScheduleRecord
    deepspeed: dict[DeepspeedCounter, Count] = {}

    @field_validator("dtype")
    @classmethod
    def _is_known(cls, dtype: str) -> str:
        if dtype not in DTYPES:
            raise ValueError(f"must be one of {', '.join(DTYPES)}")
        return dtype

    @field_validator("optimizer_step")
    @classmethod
    def _is_whole(cls, step: float | None) -> float | None:
        if step is not None and step != math.floor(step):
            raise ValueError("must be a whole number")
        return step

    @field_validator("model")
    @classmethod
    def _has_outputs(cls, model: dict[str, Any]) -> dict[str, Any]:
        outputs = model.get("head_outputs", 0)
        if outputs is not None and (type(outputs) is not int or outputs < 1):
            raise ValueError("head_outputs must be null or a number of at least 1")
        return model

    @property
    def head_outputs(self) -> int | None:
        """None for a language model, else outputs of its linear head."""
        return self.model["head_outputs"]

    def counters(self) -> dict[str, Any]:
        """What `Weights.write_states` puts back."""
        counters = self.model_dump(mode="json", include={"optimizer_step", "deepspeed"})
        return counters | {"schedule": self.schedule.model_dump(mode="json", exclude_none=True)}


class EngineRecord(Record):
    """Skipped optimizer steps: of the run, and the last ones in a row by role."""

    skipped_steps: Count
    in_a_row: dict[str, Count] = {}


class Header(Record):
    """The content of ``state.json``.

    Attributes:
        step: completed steps.
        layout: that it was saved at.
        roles: the trained ones.
        engine: counters.
        state: the run's own; whoever wrote it checks it.
    """

    format: PositiveInt
    step: Count
    layout: LayoutRecord
    roles: Annotated[dict[str, RoleRecord], Field(min_length=1)]
    engine: EngineRecord
    state: dict[str, Any]

    @property
    def saved_layout(self) -> SavedLayout:
        return SavedLayout(**self.layout.model_dump())


class _Format(Record):
    format: NonNegativeInt


def read_header(folder: Path) -> Header:
    """The content of ``state.json``, checked.

    Raises:
        UserError: it is missing, malformed, of another format, or a value cannot be.
    """
    file = folder / STATE_FILE
    try:
        content = parse_json(read_bytes(file), strict=False)  # metrics in it may be NaN
        version = checked(_Format, content).format
        if version != FORMAT:
            raise UserError(f"{folder} has format {version}, this version reads {FORMAT}")
        header = checked(Header, content)
    except FileNotFoundError:
        raise UserError(f"{folder} is no complete checkpoint: {STATE_FILE} is missing") from None
    except Unreadable as error:
        raise UserError(f"{file} is damaged: {error}") from None
    if STEP_FOLDER.fullmatch(folder.name) and step_of(folder) != header.step:
        raise UserError(f"{file} is of step {header.step}: rename its folder or delete it")
    return header


def check_layout(folder: Path, header: Header, num_layers: int, files: set[str]) -> None:
    """Whether the layout is one that the checkpoint's files can be of.

    Args:
        folder: the checkpoint.
        header: of it.
        num_layers: of the model.
        files: names in its manifest.

    Raises:
        UserError: there are more or fewer parts, or the layers cannot lie so.
    """
    layout, damaged = header.layout, f"{folder / STATE_FILE} is damaged: its layout"
    wanted = layout.tensor * layout.pipeline * layout.data * len(header.roles)
    found = len(files - {STATE_FILE})
    if wanted != found:
        raise UserError(f"{damaged} has {wanted} parts, the manifest {found}")
    try:
        for stage in range(layout.pipeline):
            header.saved_layout.cut.chunks(num_layers, stage)
    except ValueError as error:
        raise UserError(f"{damaged} is none of {num_layers} layers ({error})") from None
