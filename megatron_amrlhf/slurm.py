"""Ranks as a launcher sets them in the environment, and those of ``srun`` without a launcher."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping, MutableMapping

from megatron_amrlhf.errors import UserError
from megatron_amrlhf.ports import job_port

BY_A_LAUNCHER = "start the ranks by launch/train.sh, srun or torchrun"


def set_ranks(environment: MutableMapping[str, str]) -> None:
    """Sets RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT from Slurm's variables.

    Nothing changes where another launcher has set RANK, or outside of a job step, such as in a
    batch script. What is already set, such as MASTER_PORT, stays.

    Raises:
        UserError: the first host's name cannot be asked for.
    """
    if "RANK" in environment or "SLURM_STEP_ID" not in environment:
        return
    if environment.get("SLURM_STEP_NUM_TASKS", "1") == "1":
        return
    environment["RANK"] = environment["SLURM_PROCID"]
    environment["LOCAL_RANK"] = environment["SLURM_LOCALID"]
    environment["WORLD_SIZE"] = environment["SLURM_STEP_NUM_TASKS"]
    if "MASTER_ADDR" not in environment:
        environment["MASTER_ADDR"] = host_names(environment["SLURM_STEP_NODELIST"])[0]
    environment.setdefault("MASTER_PORT", str(job_port(environment)))


def job_id(environment: Mapping[str, str]) -> str:
    """The id of the Slurm job, the same after a requeue; empty outside of one."""
    return environment.get("SLURM_JOB_ID", "")


def is_requeued(environment: Mapping[str, str]) -> bool:
    """Whether Slurm has started this job anew, with the same command."""
    return environment.get("SLURM_RESTART_COUNT", "0") != "0"


def check_ranks(environment: Mapping[str, str]) -> None:
    """Checks RANK, WORLD_SIZE and the meeting place of several ranks.

    Raises:
        UserError: one is missing or no number.
    """
    for name, least in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1), ("MASTER_PORT", 0)):
        value = environment.get(name, "1")
        if not value.isdecimal() or int(value) < least:
            raise UserError(f"{name} is '{value}', no number from {least} on: {BY_A_LAUNCHER}")
    world_size = int(environment.get("WORLD_SIZE", "1"))
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        if world_size > 1 and name not in environment:
            raise UserError(f"WORLD_SIZE is {world_size}, but {name} is not set: {BY_A_LAUNCHER}")


def host_names(nodes: str) -> list[str]:
    """Names in a list such as ``node[1-3]``.

    Raises:
        UserError: Slurm cannot be asked.
    """
    command = ["scontrol", "show", "hostnames", nodes]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise UserError(
            f"scontrol cannot tell the hosts of {nodes} ({error}): set MASTER_ADDR"
        ) from None
    return answer.stdout.split()
