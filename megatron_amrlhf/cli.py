"""The command line: ``amrlhf COMMAND CONFIG.yaml [--set section.key=value ...]``.

``show-masks`` and ``status`` take a run or its configuration, ``doctor`` needs none.

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
from pathlib import Path
from typing import NoReturn

from rich.console import Console

from megatron_amrlhf.arguments import at_least_one
from megatron_amrlhf.config.checks import check_files, check_run
from megatron_amrlhf.config.describe import list_keys
from megatron_amrlhf.config.load import dump_config, load_config
from megatron_amrlhf.config.schema import Config
from megatron_amrlhf.doctor.options import add_doctor
from megatron_amrlhf.errors import EXIT_USER_ERROR, UserError
from megatron_amrlhf.planning import options as plan_options
from megatron_amrlhf.report.console import PLAIN_WIDTH
from megatron_amrlhf.report.files import write_atomic
from megatron_amrlhf.report.masks import print_records, select
from megatron_amrlhf.report.masks_html import page
from megatron_amrlhf.report.postmortem import find_cause, status_lines
from megatron_amrlhf.report.run_folder import note_failure
from megatron_amrlhf.report.samples import load_samples
from megatron_amrlhf.report.stop_request import EXIT_AGAIN
from megatron_amrlhf.slurm import set_ranks

EXIT_OK, EXIT_NOT_SO, EXIT_INTERRUPTED = 0, 1, 130
TRAINER = "megatron_amrlhf.algorithms.train"
SCORER = "megatron_amrlhf.algorithms.score_file"
PLANNER = "megatron_amrlhf.algorithms.planner"
DOCTOR = "megatron_amrlhf.doctor.command"
# A mistake met while running may be seen by every rank or by one. Rank 0 speaks at once; the
# others wait this long, in which the launcher ends them if rank 0 has already failed.
OTHER_RANK_DELAY_SECONDS = 10.0

MAIN_EPILOG = """\
examples:
  amrlhf train configs/prm_demo.yaml                       one process
  amrlhf train configs/ppo_demo.yaml --set optimizer.lr=1e-6 rollout.top_k=50
  deepspeed --num_gpus 8 --module megatron_amrlhf train configs/ppo_demo.yaml \\
      --set parallel.tensor=2 parallel.pipeline=2          8 processes: TP 2, PP 2, DP 2
  amrlhf plan configs/ppo_qwen2_7b.yaml --gpus 8           memory of each GPU, layouts that fit
  amrlhf config configs/ppo_demo.yaml                      every key with its value
  amrlhf show-masks runs/ppo-demo --html masks.html        answers, their messages and masks
  amrlhf status runs/ppo-demo                              what each rank does, or why it ended
  amrlhf doctor configs/ppo_demo.yaml                      is everything here that the run needs?
  amrlhf train --help                                      every key with its meaning

exit codes: 0 done, 2 a mistake in the input (one line says which), 3 stopped by the watchdog
(engine.watchdog_seconds), 75 asked to stop (start it again), 130 interrupted, 247 a process was
killed, 1 anything else. A run leaves everything in runs/NAME/; started again, it goes on from its
newest checkpoint.
"""

TRAIN_EPILOG = """\
The YAML's algorithm.kind picks what is trained. Processes (WORLD_SIZE) = TP x PP x DP: the sizes
parallel.tensor and parallel.pipeline are given, what is left is data parallel.

keys of CONFIG.yaml, each also for --set:
"""


SCORE_EPILOG = """\
FILE.jsonl has one answer a line: {"prompt", "response" or "answer" or "steps": [...]}, and
"truncated": true where it was cut off. FOLDER gets

  scores.safetensors   the PRM's reward of every response token, the end token included
  statistics.json      count, mean, std, median, quantiles and the PRM's fingerprint, for
                       mask.threshold: offline and reward.normalise: offline
  answers.jsonl        with "steps": the score of each step (and the ORM's with reward.orm_weight
                       above 0) beside problem_id and correct, for tools/compare_supervision.py

The reward model, the tokenizer, the limits and the layout are CONFIG.yaml's. Started again, it
goes on where it was stopped.

examples:
  amrlhf score configs/ppo_demo.yaml --answers answers.jsonl --out runs/scores
  bash launch/train.sh --processes 4 score configs/ppo_demo.yaml --answers A.jsonl --out scores
"""

SHOW_MASKS_EPILOG = """\
examples:
  amrlhf show-masks runs/ppo-demo                          answers of the newest logged step
  amrlhf show-masks runs/ppo-demo --step 4 --limit 1
  amrlhf show-masks runs/ppo-demo/samples.jsonl --html masks.html
  amrlhf show-masks configs/ppo_demo.yaml                  the run that this file describes

Colours: orange above the threshold, green below, stronger the farther away. Bars stand between
messages; what the mask keeps is bold and underlined. How many answers a step are logged is
run.log_samples.
"""

STATUS_EPILOG = """\
examples:
  amrlhf status runs/ppo-demo                              what each rank does, since when
  amrlhf status configs/ppo_demo.yaml --ended-since 1700000000
                                                           after the launcher has ended: the cause

Ages are by this machine's clock and those of the ranks' nodes.
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
        The exit code: 0, 2 for a user's mistake, 75 for a run that was asked to stop and goes on
        when started again, 130 for Ctrl-C. Other errors are raised.
    """
    try:
        try:
            arguments = read_arguments(argv)
            if arguments.command in LAUNCHED:
                set_ranks(os.environ)
            if arguments.command in VIEWERS:
                VIEWERS[arguments.command](arguments)
                return EXIT_OK
            if arguments.command == "doctor":
                return importlib.import_module(DOCTOR).run(arguments)
            config = load_config(arguments.config, arguments.overrides)
            if arguments.command in LAUNCHED:
                check_run(config, int(os.environ.get("WORLD_SIZE", "1")))
                check_files(config)
        except UserError as error:  # the same on every rank
            if _rank() == 0:
                _print_error(error)
            return EXIT_USER_ERROR
        return COMMANDS[arguments.command](config, arguments)
    except UserError as error:
        if _rank() != 0:
            time.sleep(OTHER_RANK_DELAY_SECONDS)
        _print_error(error)
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED


def read_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command and its options.

    Raises:
        UserError: there is no such command or option.
    """
    return _parser().parse_args(_without_local_rank(argv))


def train(config: Config, arguments: argparse.Namespace) -> int:
    """Trains what ``algorithm.kind`` says. Here and in `score` torch and Megatron are loaded."""
    is_done = importlib.import_module(TRAINER).run(config)
    return EXIT_OK if is_done else EXIT_AGAIN


def score(config: Config, arguments: argparse.Namespace) -> int:
    """Scores the tokens of given answers by the run's reward models."""
    scorer = importlib.import_module(SCORER)
    scorer.run(config, arguments.answers, arguments.out, arguments.part)
    return EXIT_OK


def plan(config: Config, arguments: argparse.Namespace) -> int:
    """Tells what the run takes of each rank."""
    fits = importlib.import_module(PLANNER).run(config, arguments)
    return EXIT_OK if fits else EXIT_NOT_SO


def show_config(config: Config, arguments: argparse.Namespace) -> int:
    """Prints the configuration with every default filled in, as YAML."""
    if _rank() == 0:
        print(dump_config(config), end="")
    return EXIT_OK


def show_masks(arguments: argparse.Namespace) -> None:
    """Prints logged answers with their messages and masks, or writes them as an HTML page."""
    source = _run_folder(arguments.source, [])
    records = select(load_samples(source), arguments.step, arguments.limit)
    if arguments.html is None:
        width = None if sys.stdout.isatty() else PLAIN_WIDTH
        print_records(Console(width=width), records)
        return
    target = Path(arguments.html).expanduser()
    try:
        write_atomic(target, page(records, f"{arguments.source}, step {records[0].step}"))
    except OSError as error:
        raise UserError(f"--html {target}: cannot be written ({error.strerror})") from None
    print(f"{target}: {len(records)} answers of step {records[0].step}")


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
        "score": ("score the tokens of given answers by the run's PRM", SCORE_EPILOG),
        "plan": (plan_options.SUMMARY, plan_options.EPILOG),
        "config": ("print the whole configuration, defaults included, as YAML", None),
    }
    for name, (summary, epilog) in texts.items():
        command = commands.add_parser(
            name, help=summary, description=summary, epilog=epilog, formatter_class=raw
        )
        command.add_argument("config", metavar="CONFIG.yaml", help="the run's configuration")
        _add_overrides(command)
        if name == "score":
            _add_score_options(command)
        elif name == "plan":
            plan_options.add_plan_options(command)
    _add_show_masks(commands)
    _add_status(commands)
    _add_overrides(add_doctor(commands))
    return parser


def _add_overrides(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--set",
        dest="overrides",
        metavar="KEY=VALUE",
        nargs="+",
        action="extend",
        default=[],
        help="override keys, such as rollout.top_p=0.9 (after CONFIG.yaml; values are YAML)",
    )


def _add_status(commands: argparse._SubParsersAction) -> None:
    summary = "say what each rank of a run does, or why it ended"
    command = commands.add_parser(
        "status",
        help=summary,
        description=summary,
        epilog=STATUS_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("source", metavar="RUN", help="a run's folder or its configuration")
    _add_overrides(command)
    command.add_argument(
        "--ended-since",
        type=float,
        metavar="SECONDS",
        help="no process of the run started at this Unix time is left: print what ended it, one "
        "line, and put that into status.json",
    )


def _run_folder(source: str, overrides: list[str]) -> Path:
    """The path itself, or the folder of the run that a configuration describes."""
    path = Path(source).expanduser()
    if path.suffix not in (".yaml", ".yml"):
        return path
    run = load_config(path, overrides).run
    return Path(run.folder).expanduser() / run.name


def _add_score_options(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--answers", required=True, metavar="FILE.jsonl", help="prompts with answers"
    )
    command.add_argument("--out", required=True, metavar="FOLDER", help="where the scores go")
    command.add_argument(
        "--part",
        type=at_least_one,
        default=64,
        metavar="N",
        help="answers scored between two saves (default 64)",
    )


def _add_show_masks(commands: argparse._SubParsersAction) -> None:
    summary = "show a run's answers with token rewards, messages and mask"
    command = commands.add_parser(
        "show-masks",
        help=summary,
        description=summary,
        epilog=SHOW_MASKS_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument(
        "source",
        metavar="SAMPLES_OR_RUN",
        help="a run's folder, its samples.jsonl or its configuration",
    )
    command.add_argument(
        "--step", type=int, metavar="N", help="step of the rollout; else the newest"
    )
    command.add_argument(
        "--limit", type=at_least_one, default=4, metavar="N", help="answers at most (default 4)"
    )
    command.add_argument("--html", metavar="FILE", help="write a page instead, in one file")


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
