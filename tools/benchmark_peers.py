"""Rollouts beside those of generate of transformers: same model, prompts and lengths, in turns."""

from __future__ import annotations

if __name__ == "__main__":
    from megatron_amrlhf.interrupts import end_at_once

    end_at_once()

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

from megatron_amrlhf.arguments import Parser, at_least_one
from megatron_amrlhf.config.schema import Config
from megatron_amrlhf.engine.role import DTYPES, RoleSpec
from megatron_amrlhf.engine.zero3 import Zero3Engine
from megatron_amrlhf.errors import tells_user_errors
from megatron_amrlhf.files import writable_folder, write_atomic
from megatron_amrlhf.interrupts import as_usual
from megatron_amrlhf.parallel.compat import compute_device
from megatron_amrlhf.parallel.mesh import build_mesh, start_processes, stop_processes
from megatron_amrlhf.report.console import stdout_console
from megatron_amrlhf.rollout.generator import EngineGenerator
from megatron_amrlhf.rollout.sampling import SamplingSettings
from megatron_amrlhf.types import PromptBatch

TOP_K, TOP_P = 50, 0.95  # on both sides
SHAPES = {  # random Llama shapes with tied embeddings
    "12m": {"hidden": 288, "layers": 8, "heads": 8, "kv": 4, "ffn": 768, "vocab": 16384},
    "125m": {"hidden": 768, "layers": 12, "heads": 12, "kv": 4, "ffn": 2048, "vocab": 49152},
}
DESCRIPTION = """\
Samples the same number of tokens from the same random Llama by this package's rollout and by
transformers' generate, taking turns in one process, and prints for each kind of work

  ours, generate   median seconds of a rollout, and in brackets those of all cores together
  ratio            generate's seconds over ours: median, least and most of the rounds

Both decode with a KV cache, top-k and top-p; no answer ends early. OMP_NUM_THREADS is the number
of cores that both use. On a machine that does other work too the ratios alone are good."""


@dataclass(frozen=True)
class Work:
    """What a rollout samples.

    Attributes:
        prompts: how many.
        prompt_tokens: of each.
        samples: answers a prompt.
        new_tokens: of each answer.
    """

    prompts: int
    prompt_tokens: int
    samples: int
    new_tokens: int


WORKS = {"16 prompts": Work(16, 16, 1, 128), "8 answers a prompt": Work(2, 512, 8, 128)}


@dataclass(frozen=True)
class Seconds:
    """Of one rollout: by the clock, and of all cores."""

    wall: float
    cpu: float


@tells_user_errors
def main(arguments: list[str] | None = None) -> int:
    """Run the tool; returns the exit code (2: a mistake in the arguments)."""
    parser = Parser(description=DESCRIPTION)
    add = parser.add_argument
    add("--sizes", nargs="+", choices=SHAPES, default=["12m"], help="models (default: 12m)")
    add("--rounds", type=at_least_one, default=5, help="rollouts of each (default %(default)s)")
    add("--dtype", choices=DTYPES, default="float32", help="of the weights (default %(default)s)")
    add("--out", metavar="FOLDER", help="also write benchmark_peers.json there")
    options = parser.parse_args(arguments)
    out = writable_folder(options.out, "--out") if options.out else None
    as_usual()
    logging.disable_progress_bar()
    start_processes()
    try:
        record = {
            size: {
                name: rounds_of(size, work, options.rounds, options.dtype)
                for name, work in WORKS.items()
            }
            for size in options.sizes
        }
    finally:
        stop_processes()
    stdout_console().print(table_of(record))
    if out:
        found = {"threads": torch.get_num_threads(), "dtype": options.dtype, "seconds": record}
        write_atomic(out / "benchmark_peers.json", json.dumps(found, indent=1) + "\n")
    return 0


def rounds_of(size: str, work: Work, rounds: int, dtype: str) -> dict[str, list[dict]]:
    """Seconds of both sides in each round, after a round that does not count."""
    with tempfile.TemporaryDirectory() as scratch:
        sides = {"ours": ours(size, work, dtype, Path(scratch))}
        sides["generate"] = generate(work, dtype, Path(scratch))
        found: dict[str, list[dict]] = {name: [] for name in sides}
        for number in range(rounds + 1):
            print(f"{size}, {work}: round {number} of {rounds}", file=sys.stderr, flush=True)
            for name, run in sides.items():
                seconds = timed(run)
                if number:
                    found[name].append(asdict(seconds))
    return found


def timed(run: Callable[[], None]) -> Seconds:
    """Runs it once."""
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return Seconds(time.perf_counter() - wall, time.process_time() - cpu)


def prompt_rows(work: Work, vocab: int) -> list[torch.Tensor]:
    """Random token ids, the same on both sides."""
    random = torch.Generator().manual_seed(1)
    return list(torch.randint(0, vocab, (work.prompts, work.prompt_tokens), generator=random))


def ours(size: str, work: Work, dtype: str, folder: Path) -> Callable[[], None]:
    """A rollout by this package, of a model that it writes into ``folder``."""
    shape = SHAPES[size]
    torch.manual_seed(0)
    LlamaForCausalLM(
        LlamaConfig(
            hidden_size=shape["hidden"],
            num_hidden_layers=shape["layers"],
            num_attention_heads=shape["heads"],
            num_key_value_heads=shape["kv"],
            intermediate_size=shape["ffn"],
            vocab_size=shape["vocab"],
            tie_word_embeddings=True,
        )
    ).save_pretrained(folder)
    config = Config.model_validate(
        {
            "run": {"name": "benchmark"},
            "model": {"path": str(folder), "dtype": dtype},
            "algorithm": {"kind": "grpo"},
            "data": {"train": "none"},
        }
    )
    engine = Zero3Engine(config, build_mesh(1, 1))
    engine.add_role(RoleSpec("actor", folder, DTYPES[dtype]))
    settings = SamplingSettings(
        max_new_tokens=work.new_tokens,
        max_row_tokens=work.prompt_tokens + work.new_tokens,
        temperature=1.0,
        top_k=TOP_K,
        top_p=TOP_P,
        end_ids=(),
    )
    rows, count = prompt_rows(work, shape["vocab"]), work.prompts
    prompts = PromptBatch(tuple(rows), torch.arange(count), ("",) * count, (None,) * count)
    generator = EngineGenerator(engine, settings, seed=1, micro_batch_size=count * work.samples)
    return lambda: void(generator.generate(prompts, 1, work.samples))


def generate(work: Work, dtype: str, folder: Path) -> Callable[[], None]:
    """The same by transformers, of the model in ``folder``."""
    model = LlamaForCausalLM.from_pretrained(folder, dtype=DTYPES[dtype]).eval()
    model.to(compute_device())
    rows = prompt_rows(work, model.config.vocab_size)
    ids = torch.stack([row for row in rows for _ in range(work.samples)]).to(model.device)

    def run() -> None:
        with torch.inference_mode():
            model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=work.new_tokens,
                min_new_tokens=work.new_tokens,
                do_sample=True,
                top_k=TOP_K,
                top_p=TOP_P,
                pad_token_id=0,
            )

    return run


def void(found: object) -> None:
    """Drops what was found."""


def table_of(record: dict[str, dict[str, dict[str, list[dict]]]]) -> Table:
    """A row a model and kind of work."""
    table = Table("model", "work", "ours, s (CPU)", "generate, s (CPU)", "ratio (least to most)")
    for size, works in record.items():
        for name, sides in works.items():
            pairs = zip(sides["ours"], sides["generate"], strict=True)
            ratios = [theirs["wall"] / own["wall"] for own, theirs in pairs]
            shown = [f"{middle(x, 'wall'):.2f} ({middle(x, 'cpu'):.2f})" for x in sides.values()]
            spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
            table.add_row(size, name, *shown, spread)
    return table


def middle(found: list[dict], key: str) -> float:
    """The median of a figure over the rounds."""
    return statistics.median(x[key] for x in found)


if __name__ == "__main__":
    sys.exit(main())
