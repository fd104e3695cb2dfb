"""``python -m megatron_amrlhf.launching.prepare [options] -- train CONFIG.yaml ...``

Checks a run before any of its processes is started, makes its folder ready, and prints what a
launch script needs to know as shell assignments.
"""

from __future__ import annotations

if __name__ == "__main__":
    from megatron_amrlhf.interrupts import end_at_once

    end_at_once()

import argparse
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from megatron_amrlhf.arguments import at_least_one
from megatron_amrlhf.cli_options import read_arguments
from megatron_amrlhf.config.checks import check_files, check_run
from megatron_amrlhf.config.load import load_config
from megatron_amrlhf.doctor.options import HOSTS_VARIABLE, read_config
from megatron_amrlhf.doctor.options import run_folder as doctor_folder
from megatron_amrlhf.errors import UserError, tells_user_errors
from megatron_amrlhf.files import expanded, writable_folder, write_atomic
from megatron_amrlhf.launching.environment import forwarding
from megatron_amrlhf.launching.shell import print_assignments
from megatron_amrlhf.ports import job_port
from megatron_amrlhf.run.folder import PREPARED_VARIABLE, last_attempt, refuse_other_run
from megatron_amrlhf.run.status_file import read_status
from megatron_amrlhf.run.stop_request import STOP_NAME

LOGS_NAME, ENVIRONMENT_NAME = "logs", ".deepspeed_env"
THIS_MACHINE = "localhost"
PLAIN = re.compile(r"[\w@+=:,./~\[\]-]+")  # what a shell, and pdsh, leave as it is


@dataclass(frozen=True)
class Hosts:
    """Where the ranks of a start will be.

    Attributes:
        slots: the ranks of each host, in the order of their numbers.
        node_rank: which host this machine is; None: the only one, or the others are reached by ssh.
        from_file: whether a hostfile names them.
    """

    slots: dict[str, int]
    node_rank: int | None = None
    from_file: bool = False

    @property
    def by_ssh(self) -> bool:
        """Whether the launcher starts ranks on other machines."""
        return len(self.slots) > 1 and self.node_rank is None

    @property
    def has_rank_0(self) -> bool:
        """Whether rank 0 will be on this machine, as far as it starts any."""
        return not self.node_rank

    @property
    def own_slots(self) -> int:
        """The ranks of this machine."""
        return list(self.slots.values())[self.node_rank or 0]

    @property
    def first_rank(self) -> int:
        """The first rank of this machine."""
        return sum(list(self.slots.values())[: self.node_rank or 0])


@dataclass(frozen=True)
class Prepared:
    """What a start needs to know of its run.

    Attributes:
        folder: of the run.
        logs: of the ranks of this start.
        hidden: variables that DeepSpeed's launcher must not see.
        last_attempt: the run's attempt before this one; 0 where there is none.
        last_step: what that one had completed.
    """

    folder: Path
    logs: Path
    hidden: tuple[str, ...]
    last_attempt: int
    last_step: int


@tells_user_errors
def main(argv: list[str] | None = None) -> int:
    """Prints FOLDER, LOGS, LAST_ATTEMPT and LAST_STEP; in a job also JOB_PORT."""
    parser = argparse.ArgumentParser(prog="prepare", description=__doc__)
    parser.add_argument("--processes", type=at_least_one, default=1, help="of all machines")
    parser.add_argument("--logs", type=Path, help="the ranks' logs (default: a new folder)")
    parser.add_argument("run", nargs="+", help="train, score or doctor with its arguments")
    options = parser.parse_args(argv)
    prepared = prepare(options.run, Hosts({THIS_MACHINE: options.processes}), options.logs)
    shell: dict[str, str | int] = {
        "FOLDER": str(prepared.folder),
        "LOGS": str(prepared.logs),
        "LAST_ATTEMPT": prepared.last_attempt,
        "LAST_STEP": prepared.last_step,
    }
    if "SLURM_JOB_ID" in os.environ:
        shell["JOB_PORT"] = job_port(os.environ)  # the same on all nodes
    print_assignments(shell)
    return 0


def prepare(run: list[str], hosts: Hosts, logs: Path | None) -> Prepared:
    """Checks a run, makes its folders ready, and sets what its ranks want of the environment.

    Args:
        run: train, score or doctor with its arguments.
        hosts: where its ranks will be.
        logs: the folder for what they print; None: a new one in the run's.

    Raises:
        UserError: what is wrong with the run or its folders.
    """
    arguments = read_arguments(run)
    is_doctor = arguments.command == "doctor"
    if is_doctor:
        config = read_config(arguments.config, arguments.overrides)
        folder = doctor_folder(config, arguments.folder)
    else:
        folder = check(arguments, sum(hosts.slots.values()))
    cores = len(os.sched_getaffinity(0))
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // hosts.own_slots)))
    os.environ |= {HOSTS_VARIABLE: ",".join(hosts.slots), PREPARED_VARIABLE: "1"}
    key, logs_key = ("--out" if arguments.command == "score" else "run.folder"), "--logs"
    if logs and hosts.node_rank is None and any(logs.glob("*_rank*.log")):
        raise UserError(f"--logs {logs}: has an earlier start's logs: give a new folder")
    if not logs:
        name = "" if is_doctor else new_attempt(folder, hosts.first_rank)
        logs, logs_key = folder / LOGS_NAME / name, key
    if hosts.by_ssh:
        refuse_for_shells([*run, str(Path.cwd()), str(logs.resolve()), sys.executable])
    if not is_doctor:  # which looks at the folder of a run that may be going on
        writable_folder(logs, logs_key)
    if hosts.has_rank_0 and (hosts.from_file or not is_doctor):
        writable_folder(folder, key)
    if hosts.has_rank_0 and not is_doctor:
        (folder / STOP_NAME).unlink(missing_ok=True)  # an earlier attempt's
    hidden = write_environment(folder / ENVIRONMENT_NAME) if hosts.by_ssh else ()
    last = (read_status(folder) if arguments.command == "train" else None) or {}
    last_attempt, last_step = last.get("attempt", 0), last.get("step", 0)
    return Prepared(folder.resolve(), logs.resolve(), hidden, last_attempt, last_step)


def check(arguments: argparse.Namespace, world_size: int) -> Path:
    """The folder that a run writes to, after all checks that need no model.

    Raises:
        UserError: configuration, files or layout are wrong, or the folder is another run's.
    """
    config = load_config(arguments.config, arguments.overrides)
    check_run(config, world_size)
    is_scoring = arguments.command == "score"
    check_files(config, world_size, arguments.answers if is_scoring else None)
    if is_scoring:
        return expanded(arguments.out)
    refuse_other_run(config.run.path, config)
    return config.run.path


def new_attempt(folder: Path, first_rank: int) -> str:
    """Name of a folder for logs into which no earlier start of this node has written.

    Nodes that are started one by one come to the same name, whichever of them is first.

    Args:
        folder: the run's.
        first_rank: of this node.
    """
    logs = (folder / LOGS_NAME).glob(f"attempt-*/*_rank{first_rank}.log")
    names = [log.parent.name.removeprefix("attempt-") for log in logs]
    used = [int(name) for name in names if name.isdecimal()]
    return f"attempt-{max([last_attempt(folder), *used]) + 1:02d}"


def refuse_for_shells(texts: list[str]) -> None:
    """DeepSpeed gives arguments and folders to a shell on each node without quotes.

    Raises:
        UserError: the shell would change one of them, or run what is in it.
    """
    for text in texts:
        if not PLAIN.fullmatch(text):
            raise UserError(
                f"{text!r} does not come through ssh as it is: put the value into the YAML, or "
                "start this on each node with --node-rank"
            )


def write_environment(path: Path) -> tuple[str, ...]:
    """Writes the variables for other nodes; only the user may read them.

    Returns:
        Those to be unset for DeepSpeed's launcher, which would forward them by itself.
    """
    found = forwarding(os.environ)
    left_out = []
    if found.secret:
        left_out.append(f"{', '.join(found.secret)} (secret by name or value: use a file there)")
    if found.unquotable:
        left_out.append(f"{', '.join(found.unquotable)} (a shell would change it)")
    if left_out:
        print(f"not forwarded to other nodes: {'; '.join(left_out)}", file=sys.stderr)
    write_atomic(path, found.text)
    path.chmod(0o600)
    return found.hidden


if __name__ == "__main__":
    sys.exit(main())
