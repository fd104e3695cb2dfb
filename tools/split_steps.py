"""Splits step-labelled solutions by problem, and makes answers and pairs of them."""

from __future__ import annotations

if __name__ == "__main__":
    from megatron_amrlhf.interrupts import end_at_once

    end_at_once()

import hashlib
import json
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from megatron_amrlhf.arguments import Parser, at_least_zero
from megatron_amrlhf.config.data_section import STEP_FORMATS, DataSection
from megatron_amrlhf.data.jsonl import read_numbered_jsonl, write_jsonl
from megatron_amrlhf.data.known_chat import Message
from megatron_amrlhf.data.rows import select_rows
from megatron_amrlhf.data.step_formats import step_reader
from megatron_amrlhf.data.step_record import StepRecord
from megatron_amrlhf.data.turns import conversation
from megatron_amrlhf.errors import UserError, telling, tells_user_errors
from megatron_amrlhf.files import expanded
from megatron_amrlhf.rewards.outcome import RIGHT_STEP

DESCRIPTION = """\
Splits a file of step-labelled solutions (any format with one label a step that data.format knows)
so that all solutions of a problem are on one side. Writes into FOLDER

  train.jsonl, heldout.jsonl              the lines as they are, for algorithm.kind prm
  pairs_train.jsonl, pairs_heldout.jsonl  a right and a wrong beginning of a solution, for orm
  answers.jsonl                           held-out beginnings with problem_id and correct, to be
                                          scored by tools/score_tokens.py

Annotators stop at the first wrong step, so wrong solutions are cut and whole ones are right. Pairs
and answers therefore are beginnings: a wrong one, and a right one of the same problem cut to as
many steps. A beginning is wrong if a step is labelled 0, right if all steps have 0.5 or more."""

EXAMPLE = """\
example:
  python tools/split_steps.py prm800k_human_steps.jsonl --heldout 0.2 --out data/prm800k"""


@dataclass(frozen=True)
class Task:
    """A problem, and what stands before it: a system message, earlier turns."""

    prompt: str
    before: str

    def row(self) -> dict:
        """Its keys of a row."""
        turns = json.loads(self.before)
        system = turns.pop(0)["content"] if turns and turns[0]["role"] == "system" else None
        keys = {"prompt": self.prompt, "system": system, "history": turns}
        return {key: value for key, value in keys.items() if value}


@dataclass(frozen=True)
class Solution:
    """A line with what it says; ``right`` is None where it says neither."""

    line: dict
    task: Task
    steps: tuple[str, ...]
    right: bool | None
    whole: bool


Side = dict[Task, list[Solution]]


@tells_user_errors
def main(arguments: list[str] | None = None) -> int:
    """Run the tool; returns the exit code (2: a mistake in the arguments or the file)."""
    options = _parser().parse_args(arguments)
    if not 0 < options.heldout < 1:
        raise UserError(f"--heldout {options.heldout}: must be between 0 and 1")
    with telling({"data.format": "--format"}):
        solutions = _read(options.source, options.format)
    train, heldout = _split(solutions, options.heldout)
    _write(expanded(options.out), options.source, train, heldout, options.pairs)
    return 0


def _parser() -> Parser:
    parser = Parser(description=DESCRIPTION, epilog=EXAMPLE)
    parser.add_argument("source", metavar="FILE.jsonl", help="step-labelled solutions")
    parser.add_argument("--out", metavar="FOLDER", required=True, help="where the files go")
    parser.add_argument(
        "--format", choices=STEP_FORMATS, default="auto", help="as data.format (default: auto)"
    )
    parser.add_argument(
        "--heldout", type=float, default=0.2, metavar="SHARE", help="of problems (default 0.2)"
    )
    parser.add_argument(
        "--pairs",
        type=at_least_zero,
        default=8,
        metavar="N",
        help="pairs a problem at most (default 8)",
    )
    return parser


def _read(path: str, kind: str) -> list[Solution]:
    section = DataSection(train=path, format=kind)
    records = read_numbered_jsonl(path, {})
    read = step_reader(path, records[0], section, 1)

    def solutions(line: dict, where: str) -> Iterable[Solution]:
        return [
            _solution(line, record, conversation(line, record.turns, section, where))
            for record in read(line, where)
        ]

    found, selection = select_rows(path, records, solutions, section)
    print(selection.summary() or f"{path}: {selection.num_rows} rows")
    return found


def _solution(line: dict, record: StepRecord, turns: tuple[Message, ...]) -> Solution:
    labels = [label[0] for label in record.labels if label is not None]
    right = None
    if 0.0 in labels:
        right = False
    elif len(labels) == len(record.labels) and min(labels) >= RIGHT_STEP:
        right = True
    whole = record.end == "whole"
    task = Task(turns[-1]["content"], json.dumps(turns[:-1]))
    return Solution(line, task, record.steps, right, whole)


def _split(solutions: list[Solution], heldout: float) -> tuple[Side, Side]:
    """Solutions by task, on each side; the side depends on the problem's text alone."""
    tasks: Side = {}
    for solution in solutions:
        tasks.setdefault(solution.task, []).append(solution)
    texts = {task.prompt for task in tasks}
    order = sorted(texts, key=lambda text: hashlib.sha256(text.encode()).hexdigest())
    count = round(heldout * len(order))
    if not 0 < count < len(order):
        raise UserError(f"--heldout {heldout}: {len(order)} problems do not split that way")
    in_order = sorted(tasks, key=lambda task: (task.prompt, task.before))
    heldout_texts = set(order[:count])
    return tuple(
        {task: tasks[task] for task in in_order if (task.prompt in heldout_texts) is is_heldout}
        for is_heldout in (False, True)
    )


def _write(folder: Path, source: str, train: dict, heldout: dict, limit: int) -> None:
    sides = {"train": train, "heldout": heldout}
    files = {f"{name}.jsonl": _lines(side) for name, side in sides.items()}
    files |= {f"pairs_{name}.jsonl": _pairs(side, limit) for name, side in sides.items()}
    files["answers.jsonl"] = _answers(heldout)
    if expanded(source).resolve() in [(folder / name).resolve() for name in files]:
        raise UserError(f"--out {folder}: {source} itself would be replaced: give another folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, lines in files.items():
            write_jsonl(folder / name, lines)
            print(f"{folder / name}: {len(lines)} lines")
    except OSError as error:
        raise UserError(f"--out {folder}: cannot be written ({error.strerror})") from None
    counts = [len({task.prompt for task in side}) for side in (train, heldout)]
    print(f"{counts[0]} problems to train on, {counts[1]} held out")


def _lines(problems: Side) -> list[dict]:
    lines = [solution.line for solutions in problems.values() for solution in solutions]
    return list({id(line): line for line in lines}.values())  # a line may give several solutions


def _pairs(problems: Side, limit: int) -> list[dict]:
    """Each wrong beginning against a right one of as many steps, where there is one."""
    return [
        task.row() | {"chosen": _text(right), "rejected": _text(wrong)}
        for task, solutions in problems.items()
        for right, wrong in _matched(solutions)[:limit]
    ]


def _answers(problems: Side) -> list[dict]:
    """As many right as wrong beginnings of each problem, matched in their number of steps."""
    return [
        {
            "problem_id": name,
            **task.row(),
            "steps": list(steps),
            "finished": False,
            "correct": is_right,
        }
        for name, (task, solutions) in enumerate(problems.items())
        for pair in _matched(solutions)
        for steps, is_right in zip(pair, (True, False), strict=True)
    ]


def _matched(solutions: list[Solution]) -> list[tuple[tuple[str, ...], tuple[str, ...]]]:
    """(right, wrong) beginnings of equal length: whatever differs but the steps is taken away.

    Annotators stop at the first wrong step, so whole solutions are right ones; a model that sees
    the end of a solution has learned only that. A right solution without its last step is right
    up to each of its steps. Each beginning is used once.
    """
    wrong = [s.steps for s in solutions if s.right is False and not s.whole]
    right = [s.steps[:-1] if s.whole else s.steps for s in solutions if s.right is True]
    pairs, used = [], set()
    for steps in wrong:
        for other in right:
            cut = other[: len(steps)]
            if len(cut) == len(steps) and cut not in used:
                used.add(cut)
                pairs.append((cut, steps))
                break
    return pairs


def _text(steps: tuple[str, ...]) -> str:
    return "\n".join(steps) + "\n"


if __name__ == "__main__":
    sys.exit(main())
