"""A context on a tiny model for tests that run one part of a step on several processes."""

from __future__ import annotations

from pathlib import Path

import torch

from megatron_amrlhf.config.schema import Config
from megatron_amrlhf.engine.zero3 import Zero3Engine
from megatron_amrlhf.experience.context import Context
from megatron_amrlhf.experience.reward_models import RewardModel
from megatron_amrlhf.experience.rewarding import Rewarder
from megatron_amrlhf.parallel.mesh import Mesh
from megatron_amrlhf.report.console import RunConsole
from megatron_amrlhf.types import PromptBatch, RolloutBatch

# So small that no weight changes: a float32 or bfloat16 weight plus 1e-30 is the weight.
FROZEN_LEARNING_RATE = 1e-30
SILENT_RANK = 1
NO_PROMPTS = PromptBatch((), torch.zeros(0, dtype=torch.int64), (), ())


def make_config(
    folder: str, mesh: Mesh, algorithm: dict, dtype: str = "float32", **sections: dict
) -> Config:
    """A config of this mesh with micro-batches of 2 rows; ``sections`` replace whole sections."""
    return Config.model_validate(
        {
            "run": {"name": "test"},
            "model": {"path": folder, "dtype": dtype},
            "data": {"train": "unused"},
            "algorithm": algorithm,
            "parallel": {"tensor": mesh.tp_size, "pipeline": mesh.pp_size},
            "engine": {"micro_batch_size": 2},
            **sections,
        }
    )


def make_context(config: Config, mesh: Mesh) -> Context:
    """A context with an engine that has no roles yet; no tokenizer, no run folder."""
    engine = Zero3Engine(config, mesh)
    console = RunConsole(SILENT_RANK)
    return Context(config, mesh, engine, None, (), Path(config.model.path), console, None)


def prm_rewarder(context: Context) -> Rewarder:
    """Rewards of the role ``prm`` in the context, which has the policy's tokenizer."""
    return Rewarder(context, (RewardModel("prm", Path(context.config.model.path), 1, None),))


def shard_rollout(rollout: RolloutBatch, mesh: Mesh) -> RolloutBatch:
    """This replica's consecutive part of the answers."""
    parts = torch.arange(len(rollout.rows)).tensor_split(mesh.dp_size)
    return rollout.select(parts[mesh.dp_rank])


def random_rollout(lengths: list[tuple[int, int]], vocab_size: int, seed: int) -> RolloutBatch:
    """Answers of random tokens with the given (prompt, response) lengths."""
    random = torch.Generator().manual_seed(seed)
    count = len(lengths)
    return RolloutBatch(
        rows=tuple(torch.randint(0, vocab_size, (p + r,), generator=random) for p, r in lengths),
        prompt_lengths=torch.tensor([prompt for prompt, _ in lengths]),
        group_ids=torch.arange(count) // 2,
        sample_ids=torch.arange(count),
        from_reference=torch.zeros(count, dtype=torch.bool),
        ended=torch.ones(count, dtype=torch.bool),
    )
