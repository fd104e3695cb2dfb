"""Best-of-n accuracy by outcome and process supervision: ORM, PRM_O, PRM_P of figure 2."""

from __future__ import annotations

if __name__ == "__main__":
    from megatron_amrlhf.interrupts import end_at_once

    end_at_once()

import json
import sys
from pathlib import Path

from rich.table import Table

from megatron_amrlhf.arguments import Parser
from megatron_amrlhf.errors import UserError, tells_user_errors
from megatron_amrlhf.files import write_atomic
from megatron_amrlhf.report.console import stdout_console
from megatron_amrlhf.studies.best_of_n import compare_supervision, read_solutions
from megatron_amrlhf.studies.comparisons import plot_best_of_n

DESCRIPTION = """\
How often the answer that a reward model likes best of n is right, on answers that are scored
already. ANSWERS.jsonl has one answer a line, the answers to a problem share their problem_id:

  {"problem_id": "gsm8k-17", "correct": true, "step_scores": [0.9, 0.8], "orm": 1.3}

step_scores are a PRM's probabilities that each step is right (with --logits its raw outputs), orm
is an outcome reward model's score, on all lines or on none.

  ORM      the outcome reward model's score
  PRM_O    one outcome score made from the PRM's: last, min, mean or product over the steps
  PRM_P    each step judged on its own: the share of the steps before the first one below 0.5
  random, oracle   any answer; at least one right answer among the n (pass@n)

Accuracies are exact expectations over all ways to draw n of a problem's answers, ties shared
evenly: nothing is sampled. The mean, the minimum and the product depend on how many steps an
answer has; compare them with that in mind."""

EXAMPLE = """\
example:
  python tools/compare_supervision.py answers.jsonl --n 1 2 4 8 --out comparison"""


@tells_user_errors
def main(arguments: list[str] | None = None) -> int:
    """Run the tool; returns the exit code (2: a mistake in the arguments or the file)."""
    options = _parser().parse_args(arguments)
    problems = _with_answers(read_solutions(options.answers, options.logits), options.at_least)
    sizes = _sizes(options.n, problems)
    table = compare_supervision(problems, sizes)
    _print(table, sizes, len(problems))
    if options.out:
        _write(Path(options.out), table, sizes, len(problems))
    return 0


def _parser() -> Parser:
    parser = Parser(description=DESCRIPTION, epilog=EXAMPLE)
    parser.add_argument("answers", metavar="ANSWERS.jsonl", help="scored answers")
    parser.add_argument(
        "--n",
        type=int,
        nargs="+",
        metavar="N",
        help="answers to choose from (default: 1, 2, 4, ... as far as every problem has them)",
    )
    parser.add_argument(
        "--at-least",
        type=int,
        default=1,
        metavar="N",
        help="leave out problems with fewer answers, so that a larger n can be compared",
    )
    parser.add_argument("--logits", action="store_true", help="step_scores are raw outputs")
    parser.add_argument(
        "--out", metavar="FOLDER", help="also write compare_supervision.json and .png there"
    )
    return parser


def _with_answers(problems: dict[str, list], at_least: int) -> dict[str, list]:
    kept = {name: answers for name, answers in problems.items() if len(answers) >= at_least}
    if not kept:
        most = max(len(answers) for answers in problems.values())
        raise UserError(f"--at-least {at_least}: no problem has more than {most} answers")
    if len(kept) < len(problems):
        print(f"{len(problems) - len(kept)} of {len(problems)} problems left out: fewer answers")
    return kept


def _sizes(wanted: list[int] | None, problems: dict[str, list]) -> list[int]:
    scarcest = min(problems, key=lambda name: len(problems[name]))
    fewest = len(problems[scarcest])
    if wanted is None:
        return [2**power for power in range(fewest.bit_length()) if 2**power <= fewest]
    for n in wanted:
        if not 1 <= n <= fewest:
            raise UserError(
                f"--n {n}: must be from 1 to {fewest}, the number of answers to problem "
                f"{scarcest!r}; drop that problem or choose a smaller n"
            )
    return sorted(set(wanted))


def _print(table: dict[str, list[float]], sizes: list[int], problems: int) -> None:
    shown = Table(title=f"best-of-n accuracy, problems: {problems}")
    shown.add_column("chosen by")
    for n in sizes:
        shown.add_column(f"n = {n}", justify="right")
    for name, accuracies in table.items():
        shown.add_row(name, *(f"{accuracy:.4f}" for accuracy in accuracies))
    stdout_console().print(shown)


def _write(folder: Path, table: dict, sizes: list[int], problems: int) -> None:
    record = {"n": sizes, "problems": problems, "accuracy": table}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(folder / "compare_supervision.json", json.dumps(record, indent=1) + "\n")
        plot_best_of_n(
            table, sizes, folder / "compare_supervision.png", f"best of n, {problems} problems"
        )
    except OSError as error:
        raise UserError(f"--out {folder}: cannot be written ({error.strerror})") from None
    print(f"written: {folder / 'compare_supervision.json'} and .png")


if __name__ == "__main__":
    sys.exit(main())
