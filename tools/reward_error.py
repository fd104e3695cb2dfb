"""Error of reward segmentations, eq. 9-12: sequence, step, token, message cut and the optimum."""

from __future__ import annotations

if __name__ == "__main__":
    from megatron_amrlhf.interrupts import end_at_once

    end_at_once()

import argparse
import json
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
from rich.table import Table

from megatron_amrlhf.arguments import (
    Parser,
    above_zero,
    at_least_one,
    at_least_zero,
    not_negative,
)
from megatron_amrlhf.data.lines import line_numbers
from megatron_amrlhf.errors import UserError, tells_user_errors
from megatron_amrlhf.files import write_atomic
from megatron_amrlhf.report.console import stdout_console
from megatron_amrlhf.report.samples import SampleRecord, load_samples
from megatron_amrlhf.studies.comparisons import ErrorPicture, plot_errors
from megatron_amrlhf.studies.segmentation import (
    CUTS,
    OPTIMUM,
    PRICES,
    AdaptiveCut,
    CutError,
    DenseAnswer,
    compare_cuts,
    error_frontier,
    estimate_noise,
    found_in_noise,
    message_units,
    total_error,
)
from megatron_amrlhf.studies.synthetic import (
    SyntheticRewards,
    decode_two_levels,
    make_answers,
)

DESCRIPTION = """\
The total error of eq. 12, sum (r_t - r_k)^2 + c^2 K, of the four segmentations of figure 1 and of
the optimum, found exactly by ruptures' PELT with penalty c^2.

Without SAMPLES_OR_RUN on synthetic rewards: a piecewise-constant truth (geometric lengths) plus
white noise of standard deviation c. SNR is an amplitude ratio, the truth's standard deviation
over c; two levels (good and bad) then lie 2 SNR c apart. The message cut sees the noisy rewards
only, r_t of eq. 12 is the truth (--judge true): then eq. 12 is the expected squared error of
rewarding each token with the mean of its unit's noisy rewards. With --judge observed r_t is the
noisy reward itself, as it must be for a run; then --price schwarz charges 2 c^2 ln T a unit in
place of c^2, the usual price in penalised change-point detection: below it the optimum is a cut
that follows the noise.

The optimum knows the truth. Three searches beside it see the noisy rewards only, like the message
cut: PELT with penalty c^2, PELT with Schwarz' penalty 2 c^2 ln T, and for two levels a Viterbi
decoder that knows both levels and c (the best of several costs of a switch).

With SAMPLES_OR_RUN (a run's folder or samples.jsonl) on the logged token rewards; a newline ends
a step. c is --noise, or else estimated from the differences of neighbouring tokens (median
absolute deviation)."""

EXAMPLE = """\
example:
  python tools/reward_error.py --out docs/figures
  python tools/reward_error.py --judge observed --price schwarz
  python tools/reward_error.py --levels many --snr 2 4 8
  python tools/reward_error.py runs/ppo-demo --delta 0.3"""

# Searches that see the noisy rewards, as the message cut does, judged like it.
FOUND, SCHWARZ, DECODER = "PELT c^2", "PELT 2 c^2 ln T", "decoder"
DECODER_PENALTIES = (0.0, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0)
CURVE_DELTAS = (0.0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 1.25)


@tells_user_errors
def main(arguments: list[str] | None = None) -> int:
    """Run the tool; returns the exit code (2: a mistake in the arguments or the file)."""
    options = _parser().parse_args(arguments)
    result, picture = _of_run(options) if options.source else _of_synthetic(options)
    if options.out:
        _write(Path(options.out), options.name, result, picture)
    return 0


def _parser() -> Parser:
    parser = Parser(description=DESCRIPTION, epilog=EXAMPLE)
    add = parser.add_argument
    add("source", nargs="?", metavar="SAMPLES_OR_RUN", help="a run; without: synthetic rewards")
    add("--out", metavar="FOLDER", help="also write NAME.json and NAME.png there")
    add("--name", default="reward_error", help="of these files (default %(default)s)")
    add("--noise", type=above_zero, metavar="C", help="c (synthetic: 1; run: estimated)")
    add(
        "--price",
        choices=tuple(PRICES),
        default="variance",
        help="of a unit: variance c^2 or schwarz 2 c^2 ln T (default %(default)s)",
    )
    cut = parser.add_argument_group("the message cut")
    cut.add_argument(
        "--delta",
        type=not_negative,
        default=0.1,
        help="Schmitt offset in standard deviations (default %(default)s)",
    )
    cut.add_argument("--neutral", choices=("hold", "drop"), default="hold")
    cut.add_argument("--threshold", choices=("batch", "sequence"), default="batch")
    cut.add_argument("--message-reward", choices=("mean", "last"), default="mean", help="r_k")
    synthetic = parser.add_argument_group("synthetic rewards")
    add, count, size = synthetic.add_argument, at_least_one, above_zero
    add("--snr", type=size, nargs="+", default=[1, 1.5, 2, 2.5, 3, 4, 5, 6, 8], metavar="X")
    add("--show-snr", type=size, default=3.0, metavar="X", help="SNR of the plot's left panel")
    add("--deltas", type=not_negative, nargs="+", default=[0, 0.05, 0.1, 0.2, 0.3, 0.5])
    add("--samples", type=count, default=64, metavar="N", help="answers (default %(default)s)")
    add("--length", type=count, default=256, metavar="T", help="tokens each (%(default)s)")
    add("--message-tokens", type=size, default=16, help="mean length of a run (%(default)s)")
    add("--step-tokens", type=size, default=20, help="mean length of a step (%(default)s)")
    add("--levels", choices=("two", "many"), default="two", help="true levels (%(default)s)")
    add("--judge", choices=("true", "observed"), default="true", help="r_t (%(default)s)")
    add("--seed", type=at_least_zero, default=0)
    return parser


def _cut(options: argparse.Namespace) -> AdaptiveCut:
    return AdaptiveCut(options.delta, options.neutral, options.threshold)


def _of_synthetic(options: argparse.Namespace) -> tuple[dict, ErrorPicture]:
    noise, cut, kind = options.noise or 1.0, _cut(options), options.message_reward
    if min(options.message_tokens, options.step_tokens) < 1:
        raise UserError("--message-tokens and --step-tokens must be 1 or more")
    recipe = SyntheticRewards(
        options.samples,
        options.length,
        options.message_tokens,
        options.step_tokens,
        options.levels,
    )

    price = PRICES[options.price](options.length) * noise**2

    def draw(snr: float) -> list[DenseAnswer]:
        return make_answers(recipe, snr, noise, options.seed, options.judge)

    by_snr, ratios, grid = {}, {}, {}
    for snr in options.snr:
        answers = draw(snr)
        errors = compare_cuts(answers, price, cut, kind)
        errors[FOUND] = found_in_noise(answers, noise, "variance", price)
        errors[SCHWARZ] = found_in_noise(answers, noise, "schwarz", price)
        if recipe.levels == "two":
            errors[DECODER] = decode_two_levels(
                answers, snr * noise, noise, DECODER_PENALTIES, price
            )
        best = errors[OPTIMUM].total
        by_snr[f"{snr:g}"] = errors
        for delta in options.deltas:
            units = message_units(answers, replace(cut, delta=delta))
            ratio = total_error(answers, units, price, kind).total / best
            grid.setdefault(f"{delta:g}", {})[f"{snr:g}"] = ratio
            ratios.setdefault(f"delta {delta:g}", []).append((snr, ratio))
        for name in (FOUND, SCHWARZ, DECODER)[: len(errors) - len(CUTS)]:
            ratios.setdefault(name, []).append((snr, errors[name].total / best))
    title = f"{options.judge} rewards, {recipe.levels} levels, SNR {options.show_snr:g}"
    picture = _picture(draw(options.show_snr), price, cut, kind, title=title, ratios=ratios)
    _print_by_snr(by_snr, options.samples, noise)
    _print_grid(grid, list(by_snr), options.judge)
    return {
        "source": "synthetic",
        "options": vars(options),
        "errors": {snr: _as_json(errors) for snr, errors in by_snr.items()},
        "ratio_by_delta_and_snr": grid,
    }, picture


def _of_run(options: argparse.Namespace) -> tuple[dict, ErrorPicture]:
    answers = _logged_answers(load_samples(options.source), options.source)
    noise = options.noise or estimate_noise([answer.observed for answer in answers])
    if noise == 0:
        raise UserError(
            f"{options.source}: the token rewards hardly ever differ from their neighbours, so the "
            "noise c cannot be estimated; give it with --noise"
        )
    cut, kind = _cut(options), options.message_reward
    length = np.mean([len(answer.observed) for answer in answers])
    price = PRICES[options.price](length) * noise**2
    errors = compare_cuts(answers, price, cut, kind)
    picture = _picture(
        answers, price, cut, kind, title=f"{len(answers)} answers, c = {noise:.3g}", ratios={}
    )
    _print_cuts(errors, len(answers), f"{options.source}: {len(answers)} answers, c = {noise:.4g}")
    return {
        "source": str(options.source),
        "options": vars(options),
        "noise": noise,
        "answers": len(answers),
        "errors": _as_json(errors),
    }, picture


def _logged_answers(records: list[SampleRecord], source: str) -> list[DenseAnswer]:
    """Token rewards of the logged answers; empty ones and those without a reward are left out."""
    answers, without = [], sum(not record.has_rewards for record in records)
    if without:
        print(f"{source}: {without} of {len(records)} answers are left out: they have no reward")
    for number, record in enumerate(records, start=1):
        if not (record.has_rewards and record.tokens):
            continue
        rewards = np.array(record.token_rewards, dtype=np.float64)
        if not np.isfinite(rewards).all():
            raise UserError(f"{source}: sample {number}: token_rewards are not all finite")
        answers.append(DenseAnswer(rewards, rewards, np.array(line_numbers(record.tokens))))
    if not answers:
        raise UserError(f"{source}: all answers are empty or without a reward")
    return answers


def _picture(answers, price, cut, kind, *, title, ratios) -> ErrorPicture:
    """Everything as means an answer."""

    def point(error: CutError) -> tuple[float, float]:
        return error.num_units / len(answers), error.total / len(answers)

    def with_delta(delta: float) -> CutError:
        units = message_units(answers, replace(cut, delta=delta))
        return total_error(answers, units, price, kind)

    errors = compare_cuts(answers, price, cut, kind)
    return ErrorPicture(
        title=title,
        cuts={name: point(error) for name, error in errors.items()},
        frontier=[point(error) for error in error_frontier(answers, price)],
        adaptive=[point(with_delta(delta)) for delta in CURVE_DELTAS],
        ratios=ratios,
    )


def _print_cuts(errors: dict[str, CutError], answers: int, title: str) -> None:
    table = Table(title=title)
    headings = ("cut", "K an answer", "sum (r_t - r_k)^2", "price x K", "error", "of the optimum")
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "cut" else "right")
    for name, error in errors.items():
        values = (error.num_units, error.approximation, error.noise, error.total)
        ratio = error.total / errors[OPTIMUM].total
        table.add_row(name, *(f"{value / answers:.4g}" for value in values), f"{ratio:.3f}")
    stdout_console().print(table)


def _print_by_snr(by_snr: dict[str, dict[str, CutError]], answers: int, noise: float) -> None:
    table = Table(title="error (eq. 12) an answer in units of c^2, and units K an answer")
    names = list(next(iter(by_snr.values())))
    for heading in ("SNR", *names, "K message", "K optimum"):
        table.add_column(heading, justify="right")
    for snr, errors in by_snr.items():
        totals = (f"{errors[name].total / answers / noise**2:.1f}" for name in names)
        counts = (f"{errors[name].num_units / answers:.1f}" for name in ("message", OPTIMUM))
        table.add_row(snr, *totals, *counts)
    stdout_console().print(table)


def _print_grid(grid: dict[str, dict[str, float]], snrs: list[str], judge: str) -> None:
    table = Table(title=f"message cut's error over the optimum's, judged on {judge} rewards")
    for heading in ("delta", *(f"SNR {snr}" for snr in snrs)):
        table.add_column(heading, justify="right")
    for delta, row in grid.items():
        table.add_row(delta, *(f"{row[snr]:.2f}" for snr in snrs))
    stdout_console().print(table)


def _write(folder: Path, name: str, result: dict, picture: ErrorPicture) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(folder / f"{name}.json", json.dumps(result, indent=1) + "\n")
        plot_errors(picture, folder / f"{name}.png")
    except OSError as error:
        raise UserError(f"--out {folder}: cannot be written ({error.strerror})") from None
    print(f"written: {folder / name}.json and .png")


def _as_json(errors: dict[str, CutError]) -> dict[str, dict[str, float]]:
    return {name: asdict(error) | {"total": error.total} for name, error in errors.items()}


if __name__ == "__main__":
    sys.exit(main())
