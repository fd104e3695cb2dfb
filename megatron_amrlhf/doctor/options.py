"""The arguments of ``amrlhf doctor``; light, as every command reads them."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from megatron_amrlhf.arguments import above_zero
from megatron_amrlhf.config.load import load_config
from megatron_amrlhf.config.schema import Config
from megatron_amrlhf.errors import UserError
from megatron_amrlhf.files import expanded

NO_RUN_FOLDER = "runs/doctor"
HOSTS_VARIABLE = "AMRLHF_HOSTS"  # hosts of launch/train.sh's hostfile, with commas between
TIMEOUT_SECONDS = 60.0
SUMMARY = "check machines, network and folders before a run"
EPILOG = """\
What is checked, each with ok, warning or error and what to do about it:

  arrival       every rank of the job comes; those that do not are named
  run           with CONFIG.yaml: its keys go together, the files that it names are there; as ranks
                of a job also its layout
  versions      Python and libraries are those of requirements.txt, the same on all ranks
  devices       GPUs, driver and NCCL, one GPU a rank; or CPU cores, threads and memory
  limits        ulimit -n, -l, -u and the size of /dev/shm
  disk          room in the run's, the temporary and the cache folder; with CONFIG.yaml against
                the checkpoints of that run
  locks         files that a killed compiler has left, on which others wait; nothing is deleted
  shared files  what one node writes into the run's folder, the others see, and the reverse
  clocks        clocks of the nodes against rank 0's
  network       all-reduce of all ranks; every pair of ranks of a host and of nodes (a ring where
                they are many); links that take more than 3 times the median are named
  start         with CONFIG.yaml: model, tokenizer, template, data and reward models, by what the
                start of the run itself calls: what it refuses is an error here, in the same words

One process looks at its own machine. Started as the ranks of a job, in the same way as the run is
to be started, it also looks between them:

  amrlhf doctor                                            this machine
  amrlhf doctor configs/ppo_demo.yaml --json doctor.json   for a run; all values as JSON
  bash launch/train.sh --processes 4 doctor                four ranks here
  bash launch/train.sh --hostfile hosts doctor CONFIG.yaml on several machines
  srun --nodes=2 --ntasks-per-node=8 --gpus-per-node=8 .venv/bin/amrlhf doctor CONFIG.yaml
  torchrun --nproc-per-node 8 -m megatron_amrlhf doctor

Rank 0 prints. Exit code: 0 no error (there may be warnings), 1 an error was found, 2 wrong usage.
"""


def add_doctor_options(command: argparse.ArgumentParser) -> None:
    """Adds what ``doctor`` takes beside ``--set``."""
    command.add_argument(
        "config", metavar="CONFIG.yaml", nargs="?", help="the run that is to be started"
    )
    command.add_argument(
        "--folder",
        metavar="FOLDER",
        help=f"run folder to look at (default: CONFIG.yaml's, else {NO_RUN_FOLDER}); left as it "
        "was found",
    )
    command.add_argument(
        "--timeout",
        type=above_zero,
        default=TIMEOUT_SECONDS,
        metavar="SECONDS",
        help="longest wait for ranks to arrive, and for the network's measurements (default "
        f"{TIMEOUT_SECONDS:g})",
    )
    command.add_argument("--json", metavar="FILE", help="also write all findings and values there")


def read_config(config: str | None, overrides: Sequence[str]) -> Config | None:
    """The run that is to be started, if one is given.

    Raises:
        UserError: the configuration is wrong.
    """
    if config is not None:
        return load_config(config, tuple(overrides))
    if overrides:
        raise UserError("--set changes keys of a CONFIG.yaml: give one (see amrlhf doctor --help)")
    return None


def run_folder(config: Config | None, folder: str | None) -> Path:
    """The folder to look at."""
    if folder is not None:
        return expanded(folder)
    if config is not None:
        return config.run.path
    return Path(NO_RUN_FOLDER)
