"""Options of ``amrlhf plan``; nothing heavy is imported, so ``--help`` is quick."""

from __future__ import annotations

import argparse

from megatron_amrlhf.arguments import above_zero, at_least_one

SUMMARY = "tell what a run takes of each GPU, and which layouts fit, without weights or GPUs"
DEFAULT_MEMORY_GIB, DEFAULT_SHARE = 80.0, 0.9
EPILOG = """\
Needs CONFIG.yaml and the model's config.json alone. All rows are taken to be as long as
data.max_prompt_tokens, rollout.max_new_tokens and data.max_row_tokens let them be, and every
answer to be learned from, so a run takes less. It prints

  layout      layers and parameters of every role on the ranks of each pipeline stage
  memory      of a rank in each phase of a step at its fullest moment: weights at rest, masters and
              moments, gathered weights, gradients, keys and values, activations, logits
  bytes       that a rank sends a step over the tensor, pipeline and data axis, and the pipeline's
              bubble, (p - 1) / (v m + p - 1)
  warnings    where the layout is a poor one, and what to change
  layouts     other layouts of as many GPUs that fit the memory, ranked by a rough time of a step

Memory is what tensors take: the CUDA context, NCCL's buffers and fragmentation come on top (a
tenth is left for them, --share).

examples:
  amrlhf plan configs/ppo_qwen2_7b.yaml --model configs/models/qwen2-7b --gpus 8
  amrlhf plan configs/ppo_llama3_70b.yaml --model configs/models/llama-3.1-70b --gpus 64
  amrlhf plan configs/ppo_demo.yaml --gpus 4 --memory 16 --set parallel.pipeline=1

exit codes: 0 the run fits, 1 it does not, 2 a mistake in the input
"""


def add_plan_options(command: argparse.ArgumentParser) -> None:
    """Adds the options behind CONFIG.yaml and ``--set``."""
    add = command.add_argument
    add("--gpus", type=at_least_one, metavar="N", help="ranks (default: TP x PP, one replica)")
    add(
        "--memory",
        type=above_zero,
        default=DEFAULT_MEMORY_GIB,
        metavar="GIB",
        help="of a GPU (default %(default)g)",
    )
    add(
        "--share",
        type=_share,
        default=DEFAULT_SHARE,
        metavar="X",
        help="part of it for tensors (default %(default)g)",
    )
    add(
        "--gpus-a-node", type=at_least_one, default=8, metavar="N", help="joined by a fast link (8)"
    )
    add("--model", metavar="FOLDER", help="holds the config.json to take for model.path's")
    add("--layouts", type=at_least_one, default=8, metavar="N", help="layouts listed at most (8)")
    add("--json", metavar="FILE", help="also write the plan there")


def _share(text: str) -> float:
    share = above_zero(text)
    if share > 1:
        raise argparse.ArgumentTypeError(f"must be at most 1, found {text!r}")
    return share
