"""The command line: ``amrlhf COMMAND CONFIG.yaml [--set section.key=value ...]``.

``show-masks`` and ``status`` take a run or its configuration, ``doctor`` needs none.

Configuration mistakes are answered before torch, Megatron or DeepSpeed are imported, so every
rank of a wrong start is gone within a second.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from megatron_amrlhf.cli_options import read_arguments
from megatron_amrlhf.config.checks import check_files, check_run
from megatron_amrlhf.config.load import dump_config, load_config
from megatron_amrlhf.config.schema import Config
from megatron_amrlhf.errors import (
    EXIT_USER_ERROR,
    MISTAKES,
    UserError,
    error_line,
    printable,
)
from megatron_amrlhf.files import expanded, write_atomic
from megatron_amrlhf.interrupts import EXIT_INTERRUPTED, loading
from megatron_amrlhf.report.console import stdout_console
from megatron_amrlhf.report.masks import print_records, select
from megatron_amrlhf.report.masks_html import page
from megatron_amrlhf.report.samples import load_samples
from megatron_amrlhf.run.launcher import ends_with_launcher
from megatron_amrlhf.run.postmortem import find_cause, status_lines
from megatron_amrlhf.run.status_file import note_failure
from megatron_amrlhf.run.stop_request import EXIT_AGAIN
from megatron_amrlhf.slurm import check_ranks, set_ranks

EXIT_OK, EXIT_NOT_SO = 0, 1
# Rank 0 speaks at once. The others wait this long, in which the launcher ends them if rank 0 has
# failed too; it would end rank 0 before it speaks, were another one first.
OTHER_RANK_DELAY_SECONDS = 10.0


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: arguments without the program's name; None: those of the process.

    Returns:
        The exit code: 0, 2 for a user's mistake, 75 for a run that was asked to stop and goes on
        when started again, 130 for Ctrl-C. Other errors are raised.
    """
    try:
        try:
            arguments = read_arguments(argv)
            if arguments.command in LAUNCHED:
                set_ranks(os.environ)
                check_ranks(os.environ)
            if arguments.command in VIEWERS:
                VIEWERS[arguments.command](arguments)
                return EXIT_OK
            if arguments.command == "doctor":
                return doctor(arguments)
            config = load_config(arguments.config, arguments.overrides)
            if arguments.command in LAUNCHED:
                world_size = int(os.environ.get("WORLD_SIZE", "1"))
                check_run(config, world_size)
                answers = arguments.answers if arguments.command == "score" else None
                check_files(config, world_size, answers)
        except MISTAKES as error:
            return _refuse(error, same_on_all_ranks=isinstance(error, UserError))
        return COMMANDS[arguments.command](config, arguments)
    except UserError as error:
        return _refuse(error, same_on_all_ranks=False)
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED


def train(config: Config, arguments: argparse.Namespace) -> int:
    """Trains what ``algorithm.kind`` says. Here and in `score` torch and Megatron are loaded."""
    with ends_with_launcher(config.run.path):
        with loading():
            from megatron_amrlhf.commands.train import run  # noqa: PLC0415 - heavy
        is_done = run(config)
    return EXIT_OK if is_done else EXIT_AGAIN


def score(config: Config, arguments: argparse.Namespace) -> int:
    """Scores the tokens of given answers by the run's reward models."""
    with ends_with_launcher(None):
        with loading():
            from megatron_amrlhf.commands.score import run  # noqa: PLC0415 - heavy
        run(config, arguments.answers, arguments.out, arguments.part)
    return EXIT_OK


def plan(config: Config, arguments: argparse.Namespace) -> int:
    """Tells what the run takes of each rank."""
    with loading():
        from megatron_amrlhf.commands.plan import run  # noqa: PLC0415 - heavy
    return EXIT_OK if run(config, arguments) else EXIT_NOT_SO


def doctor(arguments: argparse.Namespace) -> int:
    """Checks machines, network and folders before a run."""
    with ends_with_launcher(None):
        with loading():
            from megatron_amrlhf.doctor.command import run  # noqa: PLC0415 - heavy
        return run(arguments)


def show_config(config: Config, arguments: argparse.Namespace) -> int:
    """Prints the configuration with every default filled in, as YAML.

    Raises:
        UserError: its keys do not go together on one replica.
    """
    check_run(config, config.parallel.tensor * config.parallel.pipeline)
    if _rank() == 0:
        print(dump_config(config), end="")
    return EXIT_OK


def show_masks(arguments: argparse.Namespace) -> None:
    """Prints logged answers with their messages and masks, or writes them as an HTML page."""
    source = _run_folder(arguments.source, arguments.overrides)
    records = select(load_samples(source), arguments.step, arguments.limit)
    if arguments.html is None:
        print_records(stdout_console(), records)
        return
    target = expanded(arguments.html)
    try:
        write_atomic(target, page(records, f"{arguments.source}, step {records[0].step}"))
    except OSError as error:
        raise UserError(f"--html {target}: cannot be written ({error.strerror})") from None
    print(printable(f"{target}: {len(records)} answers of step {records[0].step}"))


def show_status(arguments: argparse.Namespace) -> None:
    """Prints each rank's last heartbeat, or why a run has ended."""
    folder = _run_folder(arguments.source, arguments.overrides)
    if arguments.ended_since is None:
        for line in status_lines(folder):
            print(line)
    elif cause := find_cause(folder, arguments.ended_since):
        note_failure(folder, cause)
        print(f"cause: {cause}")


COMMANDS = {"train": train, "score": score, "plan": plan, "config": show_config}
LAUNCHED = ("train", "score", "doctor")  # by the deepspeed launcher, on several processes
VIEWERS = {"show-masks": show_masks, "status": show_status}


def _run_folder(source: str, overrides: list[str]) -> Path:
    """The path itself, or the folder of the run that a configuration describes."""
    path = expanded(source)
    if path.suffix not in (".yaml", ".yml"):
        return path
    return load_config(path, overrides).run.path


def _rank() -> int:
    rank = os.environ.get("RANK", "0")
    return int(rank) if rank.isdecimal() else 0  # which `check_ranks` refuses


def _refuse(error: Exception, same_on_all_ranks: bool) -> int:
    """Tells the mistake once: the exit code for it."""
    if _rank() != 0:
        time.sleep(OTHER_RANK_DELAY_SECONDS)
    if _rank() == 0 or not same_on_all_ranks:
        print(error_line(error, _rank()), file=sys.stderr, flush=True)
    return EXIT_USER_ERROR
