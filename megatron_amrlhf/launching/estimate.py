"""``python -m megatron_amrlhf.launching.estimate --processes N --run CONFIG.yaml [key=value ...]``

Tells how long runs will take on this machine, from a training step of two of the model's layers
that it measures, before any of their processes is started. Prints the seconds of each ``--run``,
one a line, and to stderr a line for a person.
"""

from __future__ import annotations

if __name__ == "__main__":
    from megatron_amrlhf.interrupts import end_at_once

    end_at_once()

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_amrlhf.algorithms.reward_training import RewardTraining
from megatron_amrlhf.commands.train import ALGORITHMS
from megatron_amrlhf.config.algorithm_section import Pass
from megatron_amrlhf.config.checks import check_run, check_total_steps
from megatron_amrlhf.config.load import load_config
from megatron_amrlhf.config.schema import Config
from megatron_amrlhf.data.prompts import load_prompts
from megatron_amrlhf.data.readers import Readers
from megatron_amrlhf.data.tokenizer import load_tokenizer
from megatron_amrlhf.engine.role import DTYPES
from megatron_amrlhf.errors import tells_user_errors
from megatron_amrlhf.models.source import read_hf_config, resolve_model_folder
from megatron_amrlhf.parallel.dtypes import own_choice
from megatron_amrlhf.planning.advice import Machine, step_seconds
from megatron_amrlhf.planning.plan import Plan, make_plan
from megatron_amrlhf.planning.roles import planned_roles
from megatron_amrlhf.report.progress import in_minutes

LAYERS, ROWS, TOKENS, REPEATS = 2, 4, 96, 3
START_SECONDS = 25.0  # of processes, models and the export at the end


@tells_user_errors
def main(argv: list[str] | None = None) -> int:
    """Prints the seconds of each run."""
    parser = argparse.ArgumentParser(prog="estimate", description=__doc__)
    parser.add_argument("--processes", type=int, required=True)
    parser.add_argument("--run", nargs="+", action="append", required=True)
    options = parser.parse_args(argv)
    configs = [load_config(path, overrides) for path, *overrides in options.run]
    for config in configs:  # a mistake in the second run is told before the first one
        check_run(config, options.processes)
    amounts = [amounts_of(config) for config in configs]
    print("measuring how fast this machine is ...", file=sys.stderr, flush=True)
    speeds = measure(configs[0])
    seconds = [
        run_seconds(config, each, options.processes, speeds)
        for config, each in zip(configs, amounts, strict=True)
    ]
    parts = [
        f"{config.algorithm.kind} {in_minutes(each)}"
        for config, each in zip(configs, seconds, strict=True)
    ]
    print(
        f"estimated time on this machine: {in_minutes(sum(seconds))} ({', '.join(parts)}), from a "
        f"measured step of {LAYERS} layers in {speeds.dtype}",
        file=sys.stderr,
    )
    for each in seconds:
        print(round(each))
    return 0


@dataclass(frozen=True)
class Speeds:
    """What the machine does with all its cores, or one GPU.

    Attributes:
        dtype: that it was measured in.
        flops: operations a second of a training step.
        reads: bytes of weights a second in decoding.
    """

    dtype: str
    flops: float
    reads: float


def measure(config: Config) -> Speeds:
    """Times a training step and a decoded token of the model's first layers, random weights."""
    folder = resolve_model_folder(config.model.path, config.model.cache_folder)
    dtype = own_choice().dtype if config.model.dtype == "auto" else config.model.dtype
    hf_config = AutoConfig.from_pretrained(folder)
    hf_config.num_hidden_layers = LAYERS
    hf_config.layer_types = None
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_config(hf_config, dtype=DTYPES[dtype]).to(device)
    tokens = torch.zeros(ROWS, TOKENS, dtype=torch.int64, device=device)
    size = sum(parameter.numel() for parameter in model.parameters())

    def train() -> None:
        model(tokens, labels=tokens).loss.backward()
        float(next(model.parameters()).grad.flatten()[0])  # waits for a GPU

    def decode() -> None:
        with torch.no_grad():
            float(model(tokens[:, :1]).logits.flatten()[0])

    return Speeds(
        dtype,
        6 * size * tokens.numel() / _fastest(train),
        size * next(model.parameters()).element_size() / _fastest(decode),
    )


def _fastest(work: Callable[[], None]) -> float:
    """Seconds of the fastest of some repetitions; the first one sets things up."""
    times = []
    for _ in range(REPEATS + 1):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times[1:])


@dataclass(frozen=True)
class Amounts:
    """What a run works on.

    Attributes:
        steps: of the run.
        tokens: mean of a row or prompt.
        evaluated: rows, in all evaluations.
    """

    steps: int
    tokens: int
    evaluated: int


def amounts_of(config: Config) -> Amounts:
    """Reads a run's data.

    Raises:
        UserError: what is wrong with them, or with the number of steps.
    """
    tokenizer = load_tokenizer(resolve_model_folder(config.model.path, config.model.cache_folder))
    exact = Readers(exact=True)
    if config.algorithm.trains_reward_model:
        algorithm = ALGORITHMS[config.algorithm.kind](config, tokenizer, exact)
        assert isinstance(algorithm, RewardTraining)
        files = [algorithm.examples.contents, *(x.contents for x in [algorithm.heldout] if x)]
        steps, evaluated = algorithm.total_steps, len(algorithm.heldout)
    else:
        prompts, _ = load_prompts(config.data.train, tokenizer, config.data, exact)
        files = [prompts.contents]
        steps = config.run.steps or len(prompts) // config.rollout.prompts_per_step
        evaluated = 2 * config.evaluation.prompts if config.data.heldout else 0
    check_total_steps(config, steps)
    tokens, rows = sum(x.num_tokens for x in files), sum(x.num_rows for x in files)
    return Amounts(steps, round(tokens / rows), evaluated)


def run_seconds(config: Config, amounts: Amounts, processes: int, speeds: Speeds) -> float:
    """A run's expected time, seconds.

    The engine's own work is not in it.

    Args:
        config: the run; its reward model need not be there.
        amounts: what it works on.
        processes: of the run, which share what was measured, but for GPUs.
        speeds: as measured.
    """
    folder = resolve_model_folder(config.model.path, config.model.cache_folder)
    policy, parallel = read_hf_config(folder), config.parallel
    tokens, evaluated = amounts.tokens, amounts.evaluated
    data = config.data.model_copy(
        update={
            "max_prompt_tokens": tokens,
            "max_row_tokens": tokens + config.rollout.max_new_tokens,
        }
    )
    if config.algorithm.trains_reward_model:
        data = data.model_copy(update={"max_row_tokens": tokens})
    config = config.model_copy(update={"data": data})
    roles = planned_roles(config, policy, {"prm": (policy, 1)})
    plan = make_plan(config, processes // (parallel.tensor * parallel.pipeline), roles)
    shared = 1 if torch.cuda.is_available() else processes
    machine = Machine(
        memory=1,
        flops=speeds.flops / shared,
        reads=speeds.reads / shared,
    )
    evaluation = step_seconds(_evaluation_of(plan, evaluated), machine) if evaluated else 0.0
    return START_SECONDS + amounts.steps * step_seconds(plan, machine) + evaluation


def _evaluation_of(plan: Plan, rows: int) -> Plan:
    """What answering, if there are answers, and scoring by the reward model take."""
    if plan.config.algorithm.trains_reward_model:
        passes = [Pass("score", plan.roles[0].name, rows)]
    else:
        passes = [Pass("rollout", "actor", rows), Pass("score", "prm", rows)]
    return replace(plan, passes=passes)


if __name__ == "__main__":
    sys.exit(main())
