"""What ``auto`` becomes in ``model.dtype``: one answer of all ranks, which a run then keeps."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_amrlhf.checkpoint.folders import find_latest
from megatron_amrlhf.checkpoint.header import read_header
from megatron_amrlhf.commands.saved_state import check_run_state
from megatron_amrlhf.config.schema import Config
from megatron_amrlhf.engine.role import DTYPES
from megatron_amrlhf.parallel.collectives import gather_objects
from megatron_amrlhf.parallel.dtypes import (
    SLOW_FACTOR,
    bfloat16_factor,
    own_choice,
    slow_line,
    slowest,
)
from megatron_amrlhf.reading import read_text
from megatron_amrlhf.run.way import CHECKPOINTS_NAME, FROM_START_NAME
from megatron_amrlhf.slurm import is_requeued, job_id

MODEL_KEY, REWARD_KEY = "model.dtype", "reward_model.dtype"


def decide(config: Config, kept: Mapping[str, str]) -> tuple[Config, list[str]]:
    """The run with its dtypes decided. Entered by every rank with the same arguments.

    Args:
        config: as the user gave it.
        kept: the dtype by key with which the work began that this start goes on with; empty: it
            begins now.

    Returns:
        A configuration without ``auto``, the same on every rank, and lines that say why.
    """
    asked = {MODEL_KEY: config.model.dtype, REWARD_KEY: config.reward_model.dtype}
    decided: dict[str, str | None] = {**asked}
    lines = []
    auto = [key for key, dtype in asked.items() if dtype == "auto"]
    if open_keys := [key for key in auto if key not in kept]:
        choice = slowest(gather_objects(own_choice(), dist.group.WORLD))
        decided |= dict.fromkeys(open_keys, choice.dtype)
        lines += [f"{key}: auto is {choice.dtype}: {choice.why}" for key in open_keys]
    for key in auto:
        if key in kept:
            decided[key] = kept[key]
            lines.append(f"{key}: auto is {kept[key]}, with which this began")
    if "bfloat16" in asked.values():
        own = 1.0 if torch.cuda.is_available() else bfloat16_factor()
        factor = max(gather_objects(own, dist.group.WORLD))
        if factor > SLOW_FACTOR:
            key = next(key for key, dtype in asked.items() if dtype == "bfloat16")
            lines.append(slow_line(key, factor))
    model = decided[MODEL_KEY]
    assert model is not None
    return config.with_dtypes(model, decided[REWARD_KEY]), lines


def goes_on(config: Config) -> bool:
    """Whether a start of the run goes on from its newest checkpoint, if there is one."""
    return config.checkpoint.resume or went_anew(config.run.path / FROM_START_NAME)


def went_anew(note: Path) -> bool:
    """Whether this job, which Slurm has started again, has begun the run from the start."""
    return is_requeued(os.environ) and note.is_file() and read_text(note) == job_id(os.environ)


def kept_dtypes(config: Config) -> dict[str, str]:
    """The dtypes of the checkpoint from which a start of the run goes on; empty: of none.

    Raises:
        UserError: the newest checkpoint is damaged.
    """
    latest = find_latest(config.run.path / CHECKPOINTS_NAME) if goes_on(config) else None
    if latest is None:
        return {}
    state = check_run_state(latest, read_header(latest).state)
    model, reward = (
        section.get("dtype") if isinstance(section, dict) else None
        for section in map(state.get("config", {}).get, ("model", "reward_model"))
    )
    found = {MODEL_KEY: model, REWARD_KEY: reward or model}
    return {key: dtype for key, dtype in found.items() if dtype in DTYPES}
