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
import shlex
import sys
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
from megatron_amrlhf.launching.hostfile import read_hostfile
from megatron_amrlhf.ports import free_port, job_port
from megatron_amrlhf.run.folder import PREPARED_VARIABLE, last_attempt, refuse_other_run
from megatron_amrlhf.run.stop_request import STOP_NAME

LOGS_NAME, ENVIRONMENT_NAME = "logs", ".deepspeed_env"
PLAIN = re.compile(r"[\w@+=:,./~\[\]-]+")  # what a shell, and pdsh, leave as it is


@tells_user_errors
def main(argv: list[str] | None = None) -> int:
    """Prints FOLDER, LOGS, PORT, HOSTS, HOST_NAMES, MASTER, SLOTS, THREADS and HIDDEN.

    The last is an array: variables that DeepSpeed's launcher must not see. In a job also JOB_PORT.
    """
    options = _parse(argv)
    hosts, node_rank = _hosts(options), options.node_rank or 0
    arguments = read_arguments(options.run)
    is_doctor = arguments.command == "doctor"
    if is_doctor:
        config = read_config(arguments.config, arguments.overrides)
        folder = doctor_folder(config, arguments.folder)
    else:
        folder = check(arguments, sum(hosts.values()))
    slots = list(hosts.values())[node_rank]
    cores = len(os.sched_getaffinity(0))
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // slots)))
    os.environ |= {HOSTS_VARIABLE: ",".join(hosts), PREPARED_VARIABLE: "1"}
    logs = options.logs or folder / LOGS_NAME
    if not options.logs and not is_doctor:
        logs /= new_attempt(folder, sum(list(hosts.values())[:node_rank]))
    by_ssh = len(hosts) > 1 and options.node_rank is None
    if by_ssh:
        refuse_for_shells([*options.run, str(Path.cwd()), str(logs.resolve()), sys.executable])
    key = "--out" if arguments.command == "score" else "run.folder"
    if options.logs and options.node_rank is None and any(options.logs.glob("*_rank*.log")):
        raise UserError(f"--logs {options.logs}: has an earlier start's logs: give a new folder")
    if not is_doctor:  # which looks at the folder of a run that may be going on
        writable_folder(logs, "--logs" if options.logs else key)
    if node_rank == 0 and not (is_doctor and options.hostfile is None):
        writable_folder(folder, key)
        if not is_doctor:
            (folder / STOP_NAME).unlink(missing_ok=True)  # an earlier attempt's
    hidden = write_environment(folder / ENVIRONMENT_NAME) if by_ssh else ()
    shell = {
        "FOLDER": folder.resolve(),
        "LOGS": logs.resolve(),
        "PORT": free_port(),
        "HOSTS": len(hosts),
        "HOST_NAMES": os.environ[HOSTS_VARIABLE],
        "MASTER": next(iter(hosts)),
        "SLOTS": slots,
        "THREADS": os.environ["OMP_NUM_THREADS"],
    }
    if "SLURM_JOB_ID" in os.environ:
        shell["JOB_PORT"] = job_port(os.environ)  # the same on all nodes
    for name, value in shell.items():
        print(f"{name}={shlex.quote(str(value))}")
    print(f"HIDDEN=({shlex.join(hidden)})")
    return 0


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="prepare", description=__doc__)
    parser.add_argument("--processes", type=at_least_one, default=1, help="of one machine")
    parser.add_argument("--hostfile", type=Path, help="instead: hosts with their slots")
    parser.add_argument("--node-rank", type=int, help="the host's line, from 0; none: by ssh")
    parser.add_argument("--logs", type=Path, help="the ranks' logs (default: a new folder)")
    parser.add_argument("run", nargs="+", help="train, score or doctor with its arguments")
    return parser.parse_args(argv)


def _hosts(options: argparse.Namespace) -> dict[str, int]:
    """Processes of each host."""
    if options.hostfile is None:
        return {"localhost": options.processes}
    hosts = read_hostfile(options.hostfile)
    if not 0 <= (options.node_rank or 0) < len(hosts):
        raise UserError(
            f"--node-rank {options.node_rank}: {options.hostfile} has {len(hosts)} hosts, "
            f"use 0 to {len(hosts) - 1}"
        )
    return hosts


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
