"""What ``amrlhf plan`` says of a PPO step against what each rank then holds and sends."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_amrlhf.algorithms.ppo import Ppo
from megatron_amrlhf.commands import train
from megatron_amrlhf.config.load import load_config
from megatron_amrlhf.models.source import read_hf_config
from megatron_amrlhf.planning.models import reward_configs
from megatron_amrlhf.planning.plan import Plan, make_plan
from megatron_amrlhf.planning.roles import planned_roles
from megatron_amrlhf.studies.engine_speed import Memory
from megatron_amrlhf.studies.traffic import TrafficCounter
from tests.distributed.processes import run_on
from tests.distributed.runs import write_lines
from tests.helpers_models import make_tiny_model

pytestmark = pytest.mark.distributed

# What a stage has sent stays until the next one has it, so a peak depends a little on the timing.
MEMORY_TOLERANCE, BYTES_TOLERANCE = 0.1, 0.02
MODEL = {
    "vocab_size": 515,
    "hidden": 128,
    "heads": 8,
    "kv_heads": 4,
    "head_dim": 16,
    "intermediate": 352,
    "layers": 4,
}
QUESTION = "Say hi {} times"
PROMPT_TOKENS = 33  # in its template
NEW_TOKENS = 24
LAYOUTS = {  # (TP, PP, DP), what is set
    "one": ((1, 1, 1), []),
    "full": ((1, 1, 1), ["engine.recompute=full", "engine.logit_positions=40"]),
    "dp": ((1, 1, 2), []),
    "dp-microbatch": ((1, 1, 2), ["engine.gather=microbatch", "engine.reduce=microbatch"]),
    "dp-zero1-bf16": ((1, 1, 2), ["engine.zero_stage=1", "model.dtype=bfloat16"]),
    "pp": ((1, 2, 1), ["rollout.reference_samples_per_prompt=1"]),
    "pp-virtual": ((1, 2, 1), ["parallel.virtual_stages=2", "engine.recompute=selective"]),
    "tp": ((2, 1, 1), []),
    "tp-sp": ((2, 1, 1), ["parallel.sequence=true"]),
    "pp-dp": ((1, 2, 2), ["engine.zero_stage=0"]),
    "tp-pp-full": ((2, 2, 1), ["parallel.sequence=true", "engine.recompute=full"]),
    "pp-uneven": ((1, 2, 1), ["parallel.first_stage_layers=3", "parallel.last_stage_layers=1"]),
}


@dataclass(frozen=True)
class Measured:
    """A step on a rank: its pipeline rank, bytes held at most, bytes sent by axis."""

    stage: int
    peak: int
    sent: dict[str, float]


def measure_step(path: str, overrides: list[str]) -> Measured:
    """The second step of a run; the first one makes Adam's moments."""
    memory, found = Memory(), []

    class Watched(Ppo):
        def step(self, step: int) -> dict[str, float]:
            memory.reset()
            mesh = self.context.mesh
            with TrafficCounter(mesh) as counter:
                metrics = super().step(step)
            sent: dict[str, float] = {}
            for (kind, axis), value in counter.counts.sent.items():
                sent[axis] = sent.get(axis, 0.0) + value * (kind != "receive")
            found.append(Measured(mesh.pp_rank, memory.peak, sent))
            return metrics

    train.ALGORITHMS["ppo"] = Watched
    train.end_token_ids = lambda tokenizer, folder: []  # every answer gets as long as it may be
    with memory.following():
        train.run(load_config(path, overrides))
    return found[1]


@pytest.fixture(scope="module")
def config_path(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("plan")
    make_tiny_model(folder / "policy", **MODEL)
    make_tiny_model(folder / "prm", seed=2, **MODEL)
    weights = load_file(folder / "prm" / "model.safetensors")
    head = {"head.weight": torch.zeros(2, MODEL["hidden"]), "head.bias": torch.zeros(2)}
    save_file(weights | head, folder / "prm" / "model.safetensors", metadata={"format": "pt"})
    data = write_lines(folder / "p.jsonl", [{"prompt": QUESTION.format(n)} for n in range(8)])
    config = {
        "run": {"name": "plan", "folder": str(folder / "runs"), "steps": 2, "log_samples": 0},
        "model": {"path": str(folder / "policy"), "dtype": "float32"},
        "reward_model": {"path": str(folder / "prm")},
        "algorithm": {"kind": "ppo", "minibatches": 2},
        "data": {
            "train": str(data),
            "max_prompt_tokens": PROMPT_TOKENS,
            "max_row_tokens": PROMPT_TOKENS + NEW_TOKENS,
        },
        "engine": {"micro_batch_size": 4},
        "rollout": {
            "prompts_per_step": 4,
            "samples_per_prompt": 4,
            "max_new_tokens": NEW_TOKENS,
            "micro_batch_size": 8,
        },
        "mask": {"kind": "none"},
        "evaluation": {"prompts": 0},
        "checkpoint": {"export": False},
    }
    (folder / "plan.yaml").write_text(json.dumps(config))
    return folder / "plan.yaml"


def plan_of(path: Path, data: int, overrides: list[str]) -> Plan:
    config = load_config(path, overrides)
    policy = read_hf_config(config.model.path)
    rewards, notes = reward_configs(config, policy)
    assert not notes
    return make_plan(config, data, planned_roles(config, policy, rewards), on_gpu=False)


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_rank_holds_and_sends_what_the_plan_says(config_path, name):
    (tensor, pipeline, data), keys = LAYOUTS[name]
    axes = [f"parallel.tensor={tensor}", f"parallel.pipeline={pipeline}"]
    overrides = [f"run.name={name}", *axes, *keys]
    plan = plan_of(config_path, data, overrides)
    for rank in run_on(plan.world_size, measure_step, str(config_path), overrides):
        stage = plan.stages[rank.stage]
        off = stage.peak / rank.peak - 1
        print(f"{name} stage {rank.stage}: {rank.peak} {stage.peak} {off:+.1%} {stage.fullest}")
        assert abs(off) < MEMORY_TOLERANCE, stage.memory
        planned, sent = stage.sent, rank.sent
        print({axis: (sent.get(axis), planned[axis]) for axis in planned})
        for axis in planned:
            assert sent[axis] == pytest.approx(planned[axis], rel=BYTES_TOLERANCE), axis
