"""``python -m megatron_amrlhf.launching.start --from FOLDER --gpus N -- ARGUMENTS``

Reads what launch/train.sh was asked for by its arguments, prepares the run, and prints as shell
assignments how the script starts the `deepspeed` launcher.
"""

from __future__ import annotations

if __name__ == "__main__":
    from megatron_amrlhf.interrupts import end_at_once

    end_at_once()

import argparse
import os
import re
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from megatron_amrlhf.arguments import Parser, at_least_one, at_least_zero
from megatron_amrlhf.errors import EXIT_USER_ERROR, UserError, printable, tells_user_errors
from megatron_amrlhf.launching.hostfile import read_hostfile
from megatron_amrlhf.launching.prepare import (
    ENVIRONMENT_NAME,
    THIS_MACHINE,
    Hosts,
    Prepared,
    prepare,
)
from megatron_amrlhf.launching.shell import print_assignments
from megatron_amrlhf.ports import free_port

HELP = Path(__file__).resolve().parents[2] / "launch" / "help" / "train.txt"
LAUNCHED = ("train", "score", "doctor")
NOT_LAUNCHED = ("plan", "config", "show-masks", "status")
PROCESSES_WITHOUT_GPU = 2
MASTER_PORT_BY_HAND = 29500  # each node is started by itself and has to come to the same one
MEETING_POINT = re.compile(r"[^:]+:[0-9]+")
OWN_OPTION = re.compile(r"--(processes|hostfile|node-rank|master|logs)(=|$)")
WITH_PATH = re.compile(r"(--(?:answers|out|folder|json))=(.*)", re.DOTALL)
NEW_PATHS = ("--out", "--folder", "--json")  # options whose file or folder need not be there
DEVICES = re.compile(r"[0-9]+(,[0-9]+)*")


@dataclass(frozen=True)
class Request:
    """What launch/train.sh was asked for.

    Attributes:
        command: ``train``, ``score`` or ``doctor``.
        words: the command's arguments, with whole paths.
        hosts: where the ranks will be.
        hostfile: that names them; None: this machine alone.
        master: host and port that the ranks meet at; empty: the usual ones.
        logs: the folder for the ranks' logs; None: a new one.
        gpus: that are visible on this machine.
    """

    command: str
    words: tuple[str, ...]
    hosts: Hosts
    hostfile: Path | None
    master: str
    logs: Path | None
    gpus: int


def main(argv: list[str] | None = None) -> int:
    """Prints the assignments, or a help and none of them."""
    parser = argparse.ArgumentParser(prog="start", description=__doc__)
    parser.add_argument("--from", dest="caller", type=Path, required=True, help="for paths")
    parser.add_argument("--gpus", type=at_least_zero, required=True, help="visible here")
    parser.add_argument("words", nargs="*", help="of launch/train.sh")
    options = parser.parse_args(argv)
    try:
        request = read_request(options.words, options.caller, options.gpus, os.environ)
    except UserError as error:
        print(printable(f"train.sh: {error}"), file=sys.stderr, flush=True)
        return EXIT_USER_ERROR
    return start(request)


@tells_user_errors
def start(request: Request) -> int:
    """Prepares the run and prints what the script needs for it."""
    prepared = prepare([request.command, *request.words], request.hosts, request.logs)
    options, variables, unset = launcher(request, prepared, os.environ)
    if sys.stderr.isatty():  # rank 0 writes into its log, its progress bars to the terminal
        variables["AMRLHF_TERMINAL"] = os.readlink(f"/proc/self/fd/{sys.stderr.fileno()}")
    hosts = request.hosts
    print_assignments(
        {
            "FOLDER": str(prepared.folder),
            "LOGS": str(prepared.logs),
            "COMMAND": request.command,
            "NODE_RANK": hosts.node_rank or 0,
            "NUM_HOSTS": len(hosts.slots),
            "BY_SSH": "1" if hosts.by_ssh else "",
            "LAST_ATTEMPT": prepared.last_attempt,
            "ENVIRONMENT": [
                *(f"--unset={name}" for name in unset),
                *(f"{name}={value}" for name, value in variables.items()),
            ],
            "LAUNCHER": [*options, "--module", "megatron_amrlhf", request.command, *request.words],
        }
    )
    return 0


def read_request(
    words: list[str], caller: Path, gpus: int, environment: Mapping[str, str]
) -> Request:
    """What the arguments of launch/train.sh ask for.

    Args:
        words: the arguments.
        caller: the folder from which the script was called.
        gpus: that are visible on this machine.
        environment: of the script.

    Raises:
        UserError: what is wrong with them.
    """
    options = _parse(words)
    command, *run = options.run if options.run[:1] else [""]
    if command in NOT_LAUNCHED:
        program = f"{environment.get('VENV') or '.venv'}/bin/amrlhf"
        raise UserError(
            f"only train, score and doctor are launched, call {program} {' '.join(options.run)}"
        )
    if command not in LAUNCHED:
        command, run = "train", options.run
    if not run and command != "doctor":
        raise UserError("give the CONFIG.yaml of a run, see configs/ (and --help)")
    hostfile = None
    if options.hostfile is not None:
        hostfile = (caller / options.hostfile).resolve()
        if not hostfile.is_file():
            raise UserError(f"--hostfile needs a file (got '{options.hostfile}')")
    return Request(
        command=command,
        words=tuple(with_whole_paths(run, caller)),
        hosts=_hosts(options, hostfile, gpus),
        hostfile=hostfile,
        master=options.master,
        logs=options.logs and Path(os.path.abspath(caller / options.logs)),
        gpus=gpus,
    )


class _ScriptParser(Parser):
    """The parser of the script's own options, which shows the help that the script has."""

    def format_help(self) -> str:
        return HELP.read_text(encoding="utf-8")


def _parse(words: list[str]) -> argparse.Namespace:
    """The script's own options; what follows them is ``run``."""
    parser = _ScriptParser(prog="train.sh", allow_abbrev=False)
    parser.add_argument("--processes", type=at_least_one)
    parser.add_argument("--hostfile")
    parser.add_argument("--node-rank", type=at_least_zero)
    parser.add_argument("--master", default="")
    parser.add_argument("--logs")
    parser.add_argument("run", nargs=argparse.REMAINDER)
    options = parser.parse_args(words)
    if options.logs == "":
        raise UserError("--logs needs a folder (see --help)")
    if options.master and not MEETING_POINT.fullmatch(options.master):
        raise UserError("--master needs HOST:PORT (see --help)")
    if options.hostfile is None and (options.master or options.node_rank is not None):
        raise UserError("--node-rank and --master need a --hostfile")
    if options.hostfile is not None and options.processes:
        raise UserError("--processes is for one machine: the hostfile has slots=N")
    return options


def _hosts(options: argparse.Namespace, hostfile: Path | None, gpus: int) -> Hosts:
    if hostfile is None:
        processes = options.processes or gpus or PROCESSES_WITHOUT_GPU
        if 0 < gpus < processes:
            raise UserError(
                f"--processes {processes}, but {gpus} GPUs are visible: one process needs one GPU"
            )
        return Hosts({THIS_MACHINE: processes})
    if options.node_rank is None and shutil.which("pdsh") is None:
        raise UserError(
            "pdsh is not installed: install it, or start this script on each machine with "
            "--node-rank"
        )
    slots = read_hostfile(hostfile)
    if (options.node_rank or 0) >= len(slots):
        raise UserError(
            f"--node-rank {options.node_rank}: {hostfile} has {len(slots)} hosts, "
            f"use 0 to {len(slots) - 1}"
        )
    return Hosts(slots, options.node_rank, from_file=True)


def with_whole_paths(words: list[str], folder: Path) -> list[str]:
    """A command's arguments for ranks that run in another folder.

    Args:
        words: the arguments.
        folder: that their paths count from, where there is such a file; else they are left.

    Raises:
        UserError: an option of the launcher is among them.
    """
    found: list[str] = []
    for word in words:
        if own := OWN_OPTION.match(word):
            raise UserError(
                f"--{own[1]} is the launcher's: it goes before CONFIG.yaml (see --help)"
            )
        if with_path := WITH_PATH.fullmatch(word):
            found.append(with_path[1])
            word = with_path[2]
        is_new = found[-1:] and found[-1] in NEW_PATHS and word and not word.startswith("~")
        if is_new or (folder / word).is_file():
            word = os.path.abspath(folder / word)
        found.append(word)
    return found


def launcher(
    request: Request, prepared: Prepared, environment: Mapping[str, str]
) -> tuple[list[str], dict[str, str], list[str]]:
    """How the `deepspeed` launcher is called.

    Args:
        request: what was asked for.
        prepared: the run.
        environment: of the script.

    Returns:
        Its options, the variables that it gets, and those that it must not see.

    Raises:
        UserError: it cannot take the devices of CUDA_VISIBLE_DEVICES.
    """
    hosts, gpus = request.hosts, request.gpus
    options = ["--log_level", "critical", "--no_local_rank"]
    # The doctor's rank 0 speaks for all, also where the folder for logs is what is wrong.
    if request.command != "doctor":
        options += ["--enable_each_rank_log", str(prepared.logs)]
    names = ("OMP_NUM_THREADS", "AMRLHF_HOSTS", "AMRLHF_PREPARED")
    variables = {name: environment[name] for name in names}
    unset = list(prepared.hidden)
    by_hand = hosts.node_rank is not None
    port = environment.get("MASTER_PORT") or str(MASTER_PORT_BY_HAND if by_hand else free_port())
    if request.hostfile is not None:
        options += ["--no_ssh", "--node_rank", str(hosts.node_rank)] if by_hand else []
        address = next(iter(hosts.slots))
        if request.master:
            address, _, port = request.master.rpartition(":")
        options += ["--hostfile", str(request.hostfile), "--master_addr", address]
        variables["DS_ENV_FILE"] = str(prepared.folder / ENVIRONMENT_NAME)
    elif gpus > 0:
        options += ["--include", f"localhost:{_devices(environment, gpus, hosts.own_slots)}"]
        unset.append("CUDA_VISIBLE_DEVICES")
    else:
        # This spares the launcher its count of NUMA nodes, which needs numactl.
        variables["LOCAL_SIZE"] = str(hosts.own_slots)
        options += ["--num_gpus", str(hosts.own_slots)]
    return [*options, "--master_port", port], variables, unset


def _devices(environment: Mapping[str, str], gpus: int, processes: int) -> str:
    """The GPUs of the ranks; given their number alone the launcher would take the first ones."""
    visible = environment.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(gpus)))
    if not DEVICES.fullmatch(visible):
        raise UserError(
            f"CUDA_VISIBLE_DEVICES={visible}: the deepspeed launcher takes numbers only, such as "
            "0,1 (nvidia-smi -L)"
        )
    return ",".join(visible.split(",")[:processes])


if __name__ == "__main__":
    sys.exit(main())
