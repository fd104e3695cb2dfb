"""``amrlhf plan``: what a configuration takes of each rank, and which layouts fit."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

from megatron_amrlhf.config.checks import check_model, check_run
from megatron_amrlhf.config.deepspeed import resolve_deepspeed
from megatron_amrlhf.config.schema import Config
from megatron_amrlhf.errors import UserError, telling
from megatron_amrlhf.files import expanded, write_atomic
from megatron_amrlhf.models.families import complete_config
from megatron_amrlhf.parallel.dtypes import own_choice
from megatron_amrlhf.planning.advice import Machine, Suggestion, suggest, warnings
from megatron_amrlhf.planning.models import model_config, reward_configs
from megatron_amrlhf.planning.plan import Plan, make_plan
from megatron_amrlhf.planning.roles import planned_roles
from megatron_amrlhf.planning.tables import plan_tables, sizes_of, suggestion_table
from megatron_amrlhf.report.console import print_whole, stdout_console
from megatron_amrlhf.sizes import GIB, in_units


def run(config: Config, options: argparse.Namespace) -> bool:
    """Prints the plan; options as ``planning/options.py`` adds them.

    Returns:
        Whether the run fits.

    Raises:
        UserError: the configuration, the model or the number of ranks is wrong.
    """
    parallel = config.parallel
    replica = parallel.tensor * parallel.pipeline
    world_size = options.gpus or replica
    with telling({"model.path": "--model"} if options.model else {}):
        policy = model_config(options.model or config.model.path, config.model.cache_folder)
    rewards, notes = reward_configs(config, policy)
    read = [policy, *(hf_config for hf_config, _ in rewards.values())]
    hf_configs = [complete_config(hf_config) for hf_config in read]
    check_run(config, world_size)
    resolve_deepspeed(config, world_size // replica, "actor", trainable=True)
    for hf_config in hf_configs:
        check_model(config, hf_config)
    roles = planned_roles(config, policy, rewards)
    machine = Machine(int(options.memory * GIB), options.gpus_a_node)
    usable = int(options.share * machine.memory)
    plan = make_plan(config, world_size // replica, roles)
    found = suggest(
        config, roles, hf_configs, world_size=world_size, machine=machine, share=options.share
    )
    _print(plan, found, notes=notes, machine=machine, usable=usable, most=options.layouts)
    if options.json:
        _write(expanded(options.json), plan, found)
    return plan.worst.peak <= usable


def _print(
    plan: Plan,
    found: list[Suggestion],
    *,
    notes: list[str],
    machine: Machine,
    usable: int,
    most: int,
) -> None:
    console = stdout_console(highlight=False)
    phase, memory = plan.worst.fullest
    fits = "fits" if memory.total <= usable else "does not fit"
    lengths = plan.lengths
    console.print(
        f"{plan.config.algorithm.kind} on TP x PP x DP = {sizes_of(plan)}, "
        f"{_dtype_of(plan.config)}, rows of {lengths.prompt} + {lengths.response} tokens"
    )
    for note in notes:
        console.print(f"note: {note}")
    for table in plan_tables(plan):
        print_whole(console, table)
    console.print(
        f"{fits}: the peak is {in_units(memory.total)} of {in_units(usable)} usable bytes, in "
        f"'{phase}' on stage {plan.worst.stage}"
    )
    for warning in warnings(plan, machine):
        console.print(f"warning: {warning}")
    if found:
        print_whole(console, suggestion_table(found, usable, most))
    else:
        console.print(
            f"no layout of {plan.world_size} GPUs fits: more GPUs, shorter rows, or "
            "engine.roles.*.offload_parameters and .offload_optimizer: cpu or nvme"
        )


def _dtype_of(config: Config) -> str:
    """The dtype that is planned for: that of GPUs, whatever this machine would take."""
    if config.model.dtype != "auto":
        return config.model.dtype
    choice = own_choice()
    here = "" if choice.dtype == "bfloat16" else f"; a run here would take float32: {choice.why}"
    return f"bfloat16 (model.dtype: auto{here})"


def _write(path: Path, plan: Plan, found: list[Suggestion]) -> None:
    record = as_json(plan)
    record["layouts"] = [
        {
            "tensor": each.plan.config.parallel.tensor,
            "pipeline": each.plan.config.parallel.pipeline,
            "data": each.plan.data,
            "peak_bytes": each.plan.worst.peak,
            "seconds": each.seconds,
            "set": each.changes,
        }
        for each in found
    ]
    try:
        write_atomic(path, json.dumps(record, indent=1) + "\n")
    except OSError as error:
        raise UserError(f"--json {path}: cannot be written ({error.strerror})") from None


def as_json(plan: Plan) -> dict[str, Any]:
    """Bytes of every stage, by phase."""
    return {
        "ranks": plan.world_size,
        "peak_bytes": plan.worst.peak,
        "stages": [
            {
                "stage": stage.stage,
                "ranks": [plan.ranks(stage.stage)[0], plan.ranks(stage.stage)[-1]],
                "parameters": {spec.name: spec.num_parameters for spec in stage.specs},
                "memory": {
                    phase: dataclasses.asdict(memory) | {"total": memory.total}
                    for phase, memory in stage.memory.items()
                },
                "moved": {
                    phase: {f"{kind} over {axis}": x for (kind, axis), x in volumes.items() if x}
                    for phase, volumes in stage.moved.items()
                },
            }
            for stage in plan.stages
        ],
        "bubbles": plan.bubbles,
    }
