"""What a cluster wants to be told of every job: one YAML a site."""

from __future__ import annotations

import difflib
import shlex
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError

from megatron_amrlhf.config.load import read_yaml
from megatron_amrlhf.config.problems import describe_problems
from megatron_amrlhf.config.section import NonNegative, Positive, Section
from megatron_amrlhf.errors import UserError


class Site(Section):
    """Keys of a site's YAML; launch/slurm/site_example.yaml shows them."""

    partition: str | None = Field(None, description="partition; null: Slurm's default")
    account: str | None = Field(None, description="account to charge")
    qos: str | None = Field(None, description="quality of service")
    constraint: str | None = Field(None, description="features that the nodes must have")
    nodes: Positive = Field(1, description="nodes of a job")
    processes_per_node: Positive = Field(description="ranks a node, one a GPU")
    gpus_per_node: NonNegative = Field(0, description="GPUs to ask for on each node")
    cpus_per_node: Positive | None = Field(None, description="CPUs to ask for on each node")
    memory: str | None = Field(None, description="memory of a node, such as 500G")
    exclusive: bool = Field(False, description="no other job on the nodes")
    time: str = Field("04:00:00", description="time limit of a job, [days-]hours:minutes:seconds")
    signal_lead_seconds: Positive = Field(
        300, description="how long before the limit to save and leave; more than update and saving"
    )
    ranks_by: Literal["launcher", "srun"] = Field(
        "launcher", description="a deepspeed launcher on each node, or an srun task for each rank"
    )
    container: str | None = Field(
        None, description='what a command is put behind, such as "apptainer exec --nv image.sif"'
    )
    srun_options: tuple[str, ...] = Field((), strict=False, description="more options of srun")
    sbatch_options: tuple[str, ...] = Field((), strict=False, description="more options of sbatch")
    modules: tuple[str, ...] = Field((), strict=False, description="modules to load")
    setup: tuple[str, ...] = Field((), strict=False, description="shell lines before the run")
    environment: dict[str, str] = Field({}, description="variables to export")
    max_restarts: NonNegative = Field(100, description="requeues of a job at most")

    @property
    def options(self) -> list[str]:
        """Options of sbatch."""
        pairs = {
            "partition": self.partition,
            "account": self.account,
            "qos": self.qos,
            "constraint": self.constraint,
            "nodes": self.nodes,
            "ntasks-per-node": 1,
            "gpus-per-node": self.gpus_per_node or None,
            "cpus-per-task": self.cpus_per_node,
            "mem": self.memory,
            "time": self.time,
            "signal": f"B:USR1@{self.signal_lead_seconds}",
            "open-mode": "append",
        }
        given = [quoted(name, str(value)) for name, value in pairs.items() if value is not None]
        flags = ["--requeue", *(["--exclusive"] if self.exclusive else [])]
        return [*given, *flags, *self.sbatch_options]

    @property
    def variables(self) -> dict[str, str]:
        """What train.sbatch reads, and the site's own."""
        own = {
            "PROCESSES": str(self.processes_per_node),
            "RANKS_BY": self.ranks_by,
            "MAX_RESTARTS": str(self.max_restarts),
            "CONTAINER": self.container or "",
            "SRUN_OPTIONS": " ".join(self.srun_options),
        }
        return self.environment | {name: value for name, value in own.items() if value}


def load_site(path: Path) -> Site:
    """Reads and checks a site's YAML.

    Raises:
        UserError: the file is missing or malformed, or a key or value is wrong; one line.
    """
    data = read_yaml(path, "site", "launch/slurm/site_example.yaml")
    for key in data:
        if key not in Site.model_fields:
            close = difflib.get_close_matches(str(key), Site.model_fields, n=1)
            hint = f"did you mean {close[0]}?" if close else ", ".join(Site.model_fields)
            raise UserError(f"{path}: {key}: unknown key, {hint}")
    try:
        site = Site.model_validate(data)
    except ValidationError as error:
        raise UserError(f"{path}: {'; '.join(describe_problems(error, data, set()))}") from None
    for name in site.environment:
        if not (name.isascii() and name.isidentifier()):
            raise UserError(f"{path}: environment: '{name}' is no name of a shell variable")
    limit = _seconds(site.time)
    if limit is not None and site.signal_lead_seconds >= limit:
        raise UserError(
            f"{path}: signal_lead_seconds: {site.signal_lead_seconds} leaves the job no time, it "
            f"must be less than time ({site.time}, {limit} s)"
        )
    return site


def quoted(name: str, value: str) -> str:
    """An option of sbatch as a line ``#SBATCH`` takes it, spaces in the value or not."""
    return f"--{name}={shlex.quote(value)}"


def _seconds(time: str) -> int | None:
    """What Slurm makes of a time limit; None where that is for Slurm to say (``UNLIMITED``)."""
    days, dash, clock = time.rpartition("-")
    parts = clock.split(":")
    units = (3600, 60, 1) if dash or len(parts) == 3 else (60, 1)
    if len(parts) > 3 or not all(part.isdecimal() for part in [days or "0", *parts]):
        return None
    return int(days or 0) * 86400 + sum(
        int(part) * unit for part, unit in zip(parts, units, strict=False)
    )
