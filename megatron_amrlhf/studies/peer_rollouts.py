"""Rollouts by this package and by transformers' generate, in one process."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import LlamaForCausalLM

from megatron_amrlhf.config.schema import Config
from megatron_amrlhf.engine.role import DTYPES, RoleSpec
from megatron_amrlhf.engine.zero3 import Zero3Engine
from megatron_amrlhf.parallel.compat import compute_device
from megatron_amrlhf.parallel.mesh import build_mesh, start_processes, stop_processes
from megatron_amrlhf.rollout.generator import EngineGenerator
from megatron_amrlhf.rollout.sampling import SamplingSettings
from megatron_amrlhf.studies.peer_inputs import POLICY, SHAPES, write_models
from megatron_amrlhf.studies.peer_tables import OURS, Found, Rounds
from megatron_amrlhf.types import PromptBatch

TOP_K, TOP_P = 50, 0.95  # on both sides


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


def rollout_rounds(size: str, name: str, folder: Path, *, rounds: int, dtype: str) -> Rounds:
    """Both sides in each round, after a round that does not count.

    Args:
        size: of ``SHAPES``.
        name: of `WORKS`.
        folder: gets the model.
        rounds: that count.
        dtype: of the weights.
    """
    write_models(size, folder)
    work = WORKS[name]
    start_processes()
    try:
        sides = {
            OURS: ours(size, work, dtype, folder),
            "generate": generate(size, work, dtype, folder),
        }
        found: Rounds = {name: [] for name in sides}
        for number in range(rounds + 1):
            print(f"{size}, {name}: round {number} of {rounds}", file=sys.stderr, flush=True)
            for side, run in sides.items():
                seconds = timed(run)
                if number:
                    found[side].append(seconds)
    finally:
        stop_processes()
    return found


def timed(run: Callable[[], None]) -> Found:
    """Runs it once."""
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return Found(time.perf_counter() - wall, time.process_time() - cpu, None)


def prompt_rows(size: str, work: Work) -> list[torch.Tensor]:
    """Random token ids, the same on both sides."""
    random = torch.Generator().manual_seed(1)
    shape, vocab = (work.prompts, work.prompt_tokens), SHAPES[size]["vocab"]
    return list(torch.randint(0, vocab, shape, generator=random))


def ours(size: str, work: Work, dtype: str, folder: Path) -> Callable[[], None]:
    """A rollout by this package."""
    config = Config.model_validate(
        {
            "run": {"name": "benchmark"},
            "model": {"path": str(folder / POLICY), "dtype": dtype},
            "algorithm": {"kind": "grpo"},
            "data": {"train": "none"},
        }
    )
    engine = Zero3Engine(config, build_mesh(1, 1))
    engine.add_role(RoleSpec("actor", folder / POLICY, DTYPES[dtype]))
    settings = SamplingSettings(
        max_new_tokens=work.new_tokens,
        max_row_tokens=work.prompt_tokens + work.new_tokens,
        temperature=1.0,
        top_k=TOP_K,
        top_p=TOP_P,
        end_ids=(),
    )
    rows, count = prompt_rows(size, work), work.prompts
    prompts = PromptBatch(tuple(rows), torch.arange(count), ("",) * count, (None,) * count)
    generator = EngineGenerator(engine, settings, seed=1, micro_batch_size=count * work.samples)
    return lambda: void(generator.generate(prompts, 1, work.samples))


def generate(size: str, work: Work, dtype: str, folder: Path) -> Callable[[], None]:
    """The same by transformers."""
    model = LlamaForCausalLM.from_pretrained(folder / POLICY, dtype=DTYPES[dtype]).eval()
    model.to(compute_device())
    model.generation_config.eos_token_id = None
    rows = prompt_rows(size, work)
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
