"""The commands of ``amrlhf`` with their options, and the help that teaches them."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from megatron_amrlhf.arguments import Parser, at_least_one
from megatron_amrlhf.config.describe import list_keys
from megatron_amrlhf.doctor import options as doctor_options
from megatron_amrlhf.planning import options as plan_options

MAIN_EPILOG = """\
examples:
  amrlhf train configs/prm_demo.yaml --set parallel.pipeline=1 optimizer.lr=2e-5
                                                           one process
  deepspeed --num_gpus 6 --module megatron_amrlhf train configs/ppo_demo.yaml \\
      --set parallel.tensor=3 parallel.pipeline=1          6 processes: TP 3, PP 1, DP 2
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
  amrlhf score configs/ppo_demo.yaml --answers A.jsonl --out scores --set parallel.pipeline=1
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


def read_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command and its options.

    Raises:
        UserError: there is no such command or option.
    """
    return _parser().parse_args(_without_local_rank(argv))


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
    parser = Parser(
        prog="amrlhf",
        description="Adaptive Message-wise RLHF on Megatron stages under DeepSpeed ZeRO-3.",
        epilog=MAIN_EPILOG,
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    train_epilog = TRAIN_EPILOG + "\n" + describe_keys()
    for name, summary, epilog, add_options in (
        ("train", "train a reward model or a policy", train_epilog, _add_config),
        ("score", "score given answers' tokens by the run's PRM", SCORE_EPILOG, _add_score),
        ("plan", plan_options.SUMMARY, plan_options.EPILOG, _add_plan),
        ("config", "check a run's keys and print all, defaults included", None, _add_config),
        ("show-masks", "show answers with token rewards and mask", SHOW_MASKS_EPILOG, _add_masks),
        ("status", "say what each rank does, or why a run ended", STATUS_EPILOG, _add_status),
        ("doctor", doctor_options.SUMMARY, doctor_options.EPILOG, _add_doctor),
    ):
        add_options(commands.add_parser(name, help=summary, description=summary, epilog=epilog))
    return parser


def _add_config(command: argparse.ArgumentParser) -> None:
    command.add_argument("config", metavar="CONFIG.yaml", help="the run's configuration")
    _add_overrides(command)


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


def _add_status(command: argparse.ArgumentParser) -> None:
    command.add_argument("source", metavar="RUN", help="a run's folder or its configuration")
    _add_overrides(command)
    command.add_argument(
        "--ended-since",
        type=float,
        metavar="SECONDS",
        help="no process of the run started at this Unix time is left: print what ended it, one "
        "line, and put that into status.json",
    )


def _add_score(command: argparse.ArgumentParser) -> None:
    _add_config(command)
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


def _add_plan(command: argparse.ArgumentParser) -> None:
    _add_config(command)
    plan_options.add_plan_options(command)


def _add_doctor(command: argparse.ArgumentParser) -> None:
    doctor_options.add_doctor_options(command)
    _add_overrides(command)


def _add_masks(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "source",
        metavar="SAMPLES_OR_RUN",
        help="a run's folder, its samples.jsonl or its configuration",
    )
    _add_overrides(command)
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
