"""The command line: ``amrlhf COMMAND CONFIG.yaml [--set section.key=value ...]``.

Configuration mistakes are answered before torch, Megatron or DeepSpeed are imported, so every
rank of a wrong start is gone within a second.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import time
from collections.abc import Sequence
from typing import NoReturn

from megatron_amrlhf.config.checks import check_files, check_run
from megatron_amrlhf.config.describe import list_keys
from megatron_amrlhf.config.load import dump_config, load_config
from megatron_amrlhf.config.schema import Config
from megatron_amrlhf.errors import UserError

EXIT_OK, EXIT_USER_ERROR, EXIT_INTERRUPTED = 0, 2, 130
TRAINER = "megatron_amrlhf.algorithms.train"
# A mistake met while running may be seen by every rank or by one. Rank 0 speaks at once; the
# others wait this long, in which the launcher ends them if rank 0 has already failed.
OTHER_RANK_DELAY_SECONDS = 10.0

MAIN_EPILOG = """\
examples:
  amrlhf train configs/prm_demo.yaml                       one process
  amrlhf train configs/ppo_demo.yaml --set optimizer.lr=1e-6 rollout.top_k=50
  deepspeed --num_gpus 8 --module megatron_amrlhf train configs/ppo_demo.yaml \\
      --set parallel.tensor=2 parallel.pipeline=2          8 processes: TP 2, PP 2, DP 2
  amrlhf config configs/ppo_demo.yaml                      every key with its value
  amrlhf train --help                                      every key with its meaning

exit codes: 0 done, 2 a mistake in the input (one line says which), 130 interrupted, 1 anything
else. A run leaves everything in runs/NAME/; started again, it goes on from its newest checkpoint.
"""

TRAIN_EPILOG = """\
The YAML's algorithm.kind picks what is trained. Processes (WORLD_SIZE) = TP x PP x DP: the sizes
parallel.tensor and parallel.pipeline are given, what is left is data parallel.

keys of CONFIG.yaml, each also for --set:
"""


class _Parser(argparse.ArgumentParser):
    """An argument parser whose mistakes are user errors: one line, on rank 0 only."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see {self.prog} --help)")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: arguments without the program's name; None: those of the process.

    Returns:
        The exit code: 0, 2 for a user's mistake, 130 for Ctrl-C. Other errors are raised.
    """
    try:
        try:
            arguments = _parser().parse_args(_without_local_rank(argv))
            config = load_config(arguments.config, arguments.overrides)
            if arguments.command == "train":
                check_run(config, int(os.environ.get("WORLD_SIZE", "1")))
                check_files(config)
        except UserError as error:  # the same on every rank
            if _rank() == 0:
                _print_error(error)
            return EXIT_USER_ERROR
        COMMANDS[arguments.command](config)
    except UserError as error:
        if _rank() != 0:
            time.sleep(OTHER_RANK_DELAY_SECONDS)
        _print_error(error)
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    return EXIT_OK


def train(config: Config) -> None:
    """Trains what ``algorithm.kind`` says. The only place that loads torch and Megatron."""
    importlib.import_module(TRAINER).run(config)


def show_config(config: Config) -> None:
    """Prints the configuration with every default filled in, as YAML."""
    if _rank() == 0:
        print(dump_config(config), end="")


COMMANDS = {"train": train, "config": show_config}


def describe_keys() -> str:
    """Every configuration key with its type, default and meaning, one section after the other."""
    lines: list[str] = []
    heading = ""
    for key in list_keys():
        section, _, name = key.name.partition(".")
        title = f"{section} (kind: {key.kind})" if key.kind else section
        if title != heading:
            heading = title
            lines += ["", f"{title}:"]
        default = key.default if key.default == "required" else f"default {key.default}"
        lines.append(f"  {name:<29} {key.type}; {default}")
        lines.append(f"  {'':<29}   {key.description}")
    return "\n".join(lines[1:]) + "\n"


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = _Parser(
        prog="amrlhf",
        description="Adaptive Message-wise RLHF on Megatron stages under DeepSpeed ZeRO-3.",
        epilog=MAIN_EPILOG,
        formatter_class=raw,
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    texts = {
        "train": ("train a reward model or a policy", TRAIN_EPILOG + "\n" + describe_keys()),
        "config": ("print the whole configuration, defaults included, as YAML", None),
    }
    for name, (summary, epilog) in texts.items():
        command = commands.add_parser(
            name, help=summary, description=summary, epilog=epilog, formatter_class=raw
        )
        command.add_argument("config", metavar="CONFIG.yaml", help="the run's configuration")
        command.add_argument(
            "--set",
            dest="overrides",
            metavar="KEY=VALUE",
            nargs="+",
            action="extend",
            default=[],
            help="override keys, such as rollout.top_p=0.9 (after CONFIG.yaml; values are YAML)",
        )
    return parser


def _without_local_rank(argv: Sequence[str] | None) -> list[str]:
    """Drops the ``--local_rank=N`` that the deepspeed launcher adds; LOCAL_RANK says the same."""
    kept: list[str] = []
    arguments = iter(sys.argv[1:] if argv is None else argv)
    for argument in arguments:
        if argument in ("--local_rank", "--local-rank"):
            next(arguments, None)
        elif not argument.startswith(("--local_rank=", "--local-rank=")):
            kept.append(argument)
    return kept


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


def _print_error(error: UserError) -> None:
    rank = f" (rank {_rank()})" if _rank() else ""
    print(f"error{rank}: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
