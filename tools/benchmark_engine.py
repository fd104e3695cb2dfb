"""Time, communication and memory of the engine in several layouts, counted beside calculated."""

from __future__ import annotations

if __name__ == "__main__":
    from megatron_amrlhf.interrupts import end_at_once

    end_at_once()

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM
from transformers.utils import logging

from megatron_amrlhf.arguments import Parser, at_least_one
from megatron_amrlhf.config.checks import check_run
from megatron_amrlhf.config.load import load_config
from megatron_amrlhf.config.schema import Config
from megatron_amrlhf.errors import UserError, telling, tells_user_errors
from megatron_amrlhf.files import writable_folder, write_atomic
from megatron_amrlhf.models.shape import check_shape
from megatron_amrlhf.models.source import read_hf_config, resolve_model_folder
from megatron_amrlhf.planning.bytes_moved import bubble_fraction
from megatron_amrlhf.report.console import stdout_console
from megatron_amrlhf.studies.engine_speed import PHASES, Workload
from megatron_amrlhf.studies.engine_tables import engine_tables
from megatron_amrlhf.studies.start_ranks import start_ranks

WORKER = "megatron_amrlhf.studies.engine_speed"
SIZES = {
    "layers": 8,
    "hidden": 256,
    "heads": 8,
    "kv_heads": 4,
    "ffn": 704,
    "vocab": 4096,
    "tied": 0,
}
SUFFIXES = {
    "sp": "parallel.sequence=true",
    "zero0": "engine.zero_stage=0",
    "zero1": "engine.zero_stage=1",
    "zero3": "engine.zero_stage=3",
    "mbgather": "engine.gather=microbatch",
    "mbreduce": "engine.reduce=microbatch",
    "selective": "engine.recompute=selective",
    "full": "engine.recompute=full",
    "bf16": "model.dtype=bfloat16",
}

DESCRIPTION = """\
Runs rollout, score and update of an actor and its reference in each layout on real processes of
this machine, layouts taking turns, and prints for each

  time       median seconds of each phase, tokens/s, and the pipeline's bubble, (p-1)/(v m + p-1)
  bytes      what a rank sends, by kind of operation and axis of the mesh: counted from
             torch.distributed's operators beside calculated (planning/bytes_moved.py)
  memory     peak bytes of tensors on a rank, beside what amrlhf plan says, and what of it are
             weights, gradients, masters and moments; the rest are activations and the KV cache

A layout is tpT-ppP-dpD with T x P x D processes, and any of these behind it:

  -vN        N chunks a pipeline rank (interleaved 1F1B)     -sp          sequence parallelism
  -zero0, -zero1, -zero3   what replicas partition           -bf16        bfloat16 weights
  -mbgather  weights gathered in every micro-batch           -full, -selective   recomputation
  -mbreduce  gradients reduced in every micro-batch          without: once a step

All ranks count one repetition after a warm-up; times are of others, uncounted. Times on a machine
that does other work too are only good for ratios within one run: raise --rounds."""

EXAMPLE = """\
examples:
  python tools/benchmark_engine.py --layouts tp1-pp2-dp2 tp2-pp1-dp2 tp2-pp1-dp2-sp --out bench
  python tools/benchmark_engine.py --layouts tp1-pp1-dp2 tp1-pp1-dp2-mbgather-mbreduce
  python tools/benchmark_engine.py --model runs/ppo-demo/export --layouts tp1-pp2-dp1-bf16 \\
      --answers 16 --new-tokens 64 --set engine.micro_batch_tokens=2048"""


@dataclass(frozen=True)
class Layout:
    """A layout to measure."""

    name: str
    config: Config
    data: int

    @property
    def processes(self) -> int:
        """How many it needs."""
        return self.data * self.config.parallel.tensor * self.config.parallel.pipeline


@tells_user_errors
def main(arguments: list[str] | None = None) -> int:
    """Run the tool; returns the exit code (2: a mistake in the arguments)."""
    options = _parser().parse_args(arguments)
    try:
        with tempfile.TemporaryDirectory() as scratch:
            folder = _model(options, Path(scratch))
            layouts = [_layout(name, options, folder, Path(scratch)) for name in options.layouts]
            out = writable_folder(options.out, "--out") if options.out else None
            result = _measure(layouts, options, folder, Path(scratch))
        _print(result)
        if out:
            _write(out, result)
    except subprocess.CalledProcessError as error:
        print(f"error: {error.cmd} failed:\n{error.output}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def _parser() -> Parser:
    parser = Parser(description=DESCRIPTION, epilog=EXAMPLE)
    add, count = parser.add_argument, at_least_one
    add("--layouts", nargs="+", required=True, metavar="LAYOUT", help="such as tp2-pp2-dp1-sp")
    model = parser.add_mutually_exclusive_group()
    model.add_argument("--model", metavar="PATH", help="Hugging Face folder, .gguf or pip:PACKAGE")
    sizes = " ".join(f"{key}={value}" for key, value in SIZES.items())
    model.add_argument(
        "--size", nargs="+", default=[], metavar="KEY=N", help=f"a random Qwen2 (default: {sizes})"
    )
    add("--answers", type=count, default=16, help="over all replicas (default %(default)s)")
    add("--prompt-tokens", type=count, default=64, help="of each (default %(default)s)")
    add("--new-tokens", type=count, default=32, help="of each answer (default %(default)s)")
    add("--repeats", type=count, default=3, help="timed repetitions a start (default %(default)s)")
    add("--rounds", type=count, default=2, help="starts of each layout (default %(default)s)")
    add("--set", nargs="+", default=[], metavar="KEY=VALUE", help="run keys, for every layout")
    add("--out", metavar="FOLDER", help="also write benchmark_engine.json there")
    return parser


def _model(options: argparse.Namespace, scratch: Path) -> Path:
    """The Hugging Face folder of both roles."""
    if options.model:
        with telling({"model.path": "--model", "model.cache_folder": "the cache folder"}):
            return resolve_model_folder(options.model, "~/.cache/megatron_amrlhf")
    sizes = dict(SIZES)
    for text in options.size:
        key, _, value = text.partition("=")
        if key not in sizes or not value.isdecimal() or (key != "tied" and int(value) < 1):
            raise UserError(f"--size {text}: must be KEY=N with one of {', '.join(SIZES)}")
        sizes[key] = int(value)
    if sizes["hidden"] % (2 * sizes["heads"]) or sizes["heads"] % sizes["kv_heads"]:
        raise UserError("--size: heads must divide hidden (twice), and kv_heads heads")
    config = Qwen2Config(
        vocab_size=sizes["vocab"],
        hidden_size=sizes["hidden"],
        num_attention_heads=sizes["heads"],
        num_key_value_heads=sizes["kv_heads"],
        intermediate_size=sizes["ffn"],
        num_hidden_layers=sizes["layers"],
        tie_word_embeddings=bool(sizes["tied"]),
        max_position_embeddings=32768,
    )
    logging.disable_progress_bar()
    torch.manual_seed(0)
    Qwen2ForCausalLM(config).save_pretrained(scratch / "model")
    return scratch / "model"


def _layout(name: str, options: argparse.Namespace, folder: Path, scratch: Path) -> Layout:
    """Reads a layout's name and checks it against the model and the machine."""
    match = re.fullmatch(r"tp([1-9]\d*)-pp([1-9]\d*)-dp([1-9]\d*)((?:-[a-z0-9]+)*)", name)
    if not match:
        raise UserError(f"--layouts {name}: must look like tp2-pp2-dp1, see --help for suffixes")
    tensor, pipeline, data = (int(match[i]) for i in (1, 2, 3))
    overrides = [f"parallel.tensor={tensor}", f"parallel.pipeline={pipeline}"]
    for suffix in filter(None, match[4].split("-")):
        if virtual := re.fullmatch(r"v([1-9]\d*)", suffix):
            overrides.append(f"parallel.virtual_stages={virtual[1]}")
        elif suffix in SUFFIXES:
            overrides.append(SUFFIXES[suffix])
        else:
            raise UserError(f"--layouts {name}: -{suffix} is none of vN, {', '.join(SUFFIXES)}")
    if options.answers % data:
        raise UserError(f"--layouts {name}: --answers {options.answers} do not divide by {data}")
    path = scratch / name
    path.write_text(json.dumps(_base(options, folder)))
    try:
        config = load_config(path, [*overrides, *options.set])
        layout = Layout(name, config, data)
        check_run(config, layout.processes)
        check_shape(config, folder)
    except UserError as error:
        raise UserError(f"--layouts {name}: {str(error).removeprefix(f'{path}: ')}") from None
    gpus = torch.cuda.device_count()
    if gpus and layout.processes > gpus:
        raise UserError(f"--layouts {name}: needs {layout.processes} GPUs, {gpus} are visible")
    return layout


def _base(options: argparse.Namespace, folder: Path) -> dict:
    longest = options.prompt_tokens + options.new_tokens
    return {
        "run": {"name": "benchmark", "steps": 2},
        "model": {"path": str(folder), "dtype": "float32"},
        "algorithm": {"kind": "ppo"},
        "reward_model": {"path": str(folder)},
        "data": {
            "train": "none",
            "max_prompt_tokens": options.prompt_tokens,
            "max_row_tokens": longest,
        },
        "rollout": {
            "prompts_per_step": options.answers,
            "samples_per_prompt": 2,
            "max_new_tokens": options.new_tokens,
        },
        "mask": {"kind": "none"},
        "evaluation": {"prompts": 0},
    }


def _measure(
    layouts: list[Layout], options: argparse.Namespace, folder: Path, scratch: Path
) -> dict:
    """Starts every layout in every round; the record that is printed and written."""
    starts = [(number, layout) for number in range(options.rounds) for layout in layouts]
    reports: dict[str, list[list[dict]]] = {layout.name: [] for layout in layouts}
    begin = time.monotonic()
    for done, (number, layout) in enumerate(starts):
        left = (time.monotonic() - begin) / done * (len(starts) - done) if done else None
        rest = f", about {left:.0f} s left" if left is not None else ""
        print(f"{done + 1}/{len(starts)}: {layout.name}{rest}", file=sys.stderr, flush=True)
        sizes = (options.answers, options.prompt_tokens, options.new_tokens, options.repeats)
        work = Workload(*sizes, counts=number == 0)
        reports[layout.name].append(_start(layout, work, folder, scratch))
    record = {"model": read_hf_config(folder), "work": asdict(work), "layouts": {}}
    record["device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    record["work"] |= {"rounds": options.rounds, "set": options.set}
    for layout in layouts:
        record["layouts"][layout.name] = _summary(layout, work, reports[layout.name])
    return record


def _start(layout: Layout, work: Workload, folder: Path, scratch: Path) -> list[dict]:
    """One start of a layout; the reports of its ranks."""
    out, job = scratch / "reports.json", scratch / "job.json"
    config = layout.config.model_dump(mode="json")
    record = {"config": config, "folder": str(folder), "work": asdict(work), "out": str(out)}
    job.write_text(json.dumps(record))
    start_ranks(layout.processes, WORKER, [str(job)], layout.name, scratch / "log.txt")
    return json.loads(out.read_text())


def _summary(layout: Layout, work: Workload, rounds: list[list[dict]]) -> dict:
    ranks, row = rounds[0], work.prompt_tokens + work.new_tokens
    tokens = {
        "rollout": work.answers * work.new_tokens,
        "score": 2 * work.answers * row,  # by two models
        "update": work.answers * row,
    }
    seconds = {
        phase: statistics.median(x for reports in rounds for x in reports[0]["seconds"][phase])
        for phase in PHASES
    }
    parallel = layout.config.parallel
    blocks = ranks[0]["num_blocks"]
    return {
        "processes": layout.processes,
        "config": layout.config.model_dump(mode="json"),
        "micro_batches": blocks,
        "bubble": bubble_fraction(parallel.pipeline, blocks, parallel.virtual_stages),
        "seconds": seconds,
        "tokens_per_second": {phase: tokens[phase] / seconds[phase] for phase in PHASES},
        "ranks": ranks,
    }


def _print(record: dict) -> None:
    console = stdout_console()
    for table in engine_tables(record):
        console.print(table)


def _write(folder: Path, record: dict) -> None:
    path = folder / "benchmark_engine.json"
    try:
        write_atomic(path, json.dumps(record, indent=1) + "\n")
    except OSError as error:
        raise UserError(f"--out {folder}: cannot be written ({error.strerror})") from None
    print(f"written: {path}")


if __name__ == "__main__":
    sys.exit(main())
