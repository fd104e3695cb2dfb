"""Rollouts beside those of transformers' generate, and training steps beside TRL's."""

from __future__ import annotations

if __name__ == "__main__":
    from megatron_amrlhf.interrupts import end_at_once

    end_at_once()

import json
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

import torch
from transformers.utils import logging

from megatron_amrlhf.arguments import Parser, at_least_one
from megatron_amrlhf.engine.role import DTYPES
from megatron_amrlhf.errors import UserError, tells_user_errors
from megatron_amrlhf.files import writable_folder, write_atomic
from megatron_amrlhf.interrupts import as_usual
from megatron_amrlhf.report.console import stdout_console
from megatron_amrlhf.studies.peer_inputs import SHAPES
from megatron_amrlhf.studies.peer_rollouts import WORKS, rollout_rounds
from megatron_amrlhf.studies.peer_tables import Rounds, table_of
from megatron_amrlhf.studies.peer_training import KINDS, training_rounds

LEAST_STEPS = 3
DESCRIPTION = """\
Trains the same random Llama on the same data by this package and by TRL, and samples the same
number of tokens by this package's rollout and by transformers' generate. The sides take turns in
each round. For each model, work and peer there is a line with

  ours, peer   median seconds of a step or rollout, and in brackets those of all cores together
  ratio        the peer's seconds over ours: median, least and most of the rounds
  memory       most that the process of each side held

A step has 16 rows of 128 tokens (dpo: 8 pairs; grpo and ppo: 64 of them sampled and judged by a
reward model; prm: labels at the ends of 5 steps). dpo-masked learns from 40 % of the tokens, beside
TRL's plain dpo. Neither side computes activations again. A rollout has top-k and top-p, and no
answer ends early. OMP_NUM_THREADS is the number of cores that both use, and both keep freed memory.
On a machine that does other work too the ratios of CPU seconds are the better ones."""
EPILOG = """\
Example:
  python3 -m venv trl-1.12 && trl-1.12/bin/pip install trl==1.12.0 torch requests
  OMP_NUM_THREADS=2 .venv/bin/python tools/benchmark_peers.py --peers trl-1.12/bin/python"""


@tells_user_errors
def main(arguments: list[str] | None = None) -> int:
    """Run the tool; returns the exit code (2: a mistake in the arguments)."""
    parser = Parser(description=DESCRIPTION, epilog=EPILOG)
    add = parser.add_argument
    works = (*WORKS, *KINDS)
    add("--peers", nargs="+", default=[], metavar="PYTHON", help="of environments with TRL")
    add("--sizes", nargs="+", choices=SHAPES, default=["12m"], help="models (default: 12m)")
    add("--works", nargs="+", choices=works, metavar="WORK", help=", ".join(works))
    add("--rounds", type=at_least_one, default=3, help="of each (default %(default)s)")
    add("--steps", type=at_least_one, default=6, help="of a training run (default %(default)s)")
    add("--dtype", choices=DTYPES, default="float32", help="of the products (default %(default)s)")
    add("--out", metavar="FOLDER", help="also write benchmark_peers.json there")
    options = parser.parse_args(arguments)
    peers = [interpreter(peer) for peer in options.peers]
    chosen = options.works or (works if peers else tuple(WORKS))
    trained = [work for work in chosen if work in KINDS]
    if trained and not peers:
        raise UserError(
            f"--works {trained[0]}: name a Python of an environment with TRL in --peers"
        )
    if options.steps < LEAST_STEPS:
        raise UserError(f"--steps: at least {LEAST_STEPS} (got {options.steps})")
    out = writable_folder(options.out, "--out") if options.out else None
    as_usual()
    logging.disable_progress_bar()
    record: dict[str, dict[str, Rounds]] = {}
    for size in options.sizes:
        for work in chosen:
            with tempfile.TemporaryDirectory() as scratch:
                folder = Path(scratch)
                many = {"rounds": options.rounds, "dtype": options.dtype}
                if work in KINDS:
                    many |= {"steps": options.steps}
                    found = training_rounds(size, work, peers, folder, **many)
                else:
                    found = rollout_rounds(size, work, folder, **many)
            record.setdefault(size, {})[work] = found
    stdout_console().print(table_of(record))
    if out:
        write_atomic(out / "benchmark_peers.json", json.dumps(as_json(record, options.dtype)))
    return 0


def interpreter(path: str) -> Path:
    """A Python to start.

    Raises:
        UserError: there is none.
    """
    # Not resolved: an environment's Python is a link, and is told by its place.
    found = Path(path).absolute()
    if not found.is_file():
        raise UserError(f"--peers: no such file: {path}")
    return found


def as_json(record: dict[str, dict[str, Rounds]], dtype: str) -> dict:
    """What ``--out`` gets: all rounds."""
    seconds = {
        size: {
            work: {side: [asdict(x) for x in found] for side, found in sides.items()}
            for work, sides in works.items()
        }
        for size, works in record.items()
    }
    return {"threads": torch.get_num_threads(), "dtype": dtype, "found": seconds}


if __name__ == "__main__":
    sys.exit(main())
