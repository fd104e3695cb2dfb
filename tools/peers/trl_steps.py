"""``PYTHON tools/peers/trl_steps.py KIND FOLDER RECORD.json STEPS DTYPE``

Trains with TRL on what `megatron_amrlhf/studies/peer_inputs.py` wrote into FOLDER, and records the
seconds between the ends of its steps. ``tools/benchmark_peers.py`` runs it by the Python of an
environment with TRL, where this package need not be, so it imports none of it.
"""

from __future__ import annotations

import importlib.util
import json
import resource
import sys
import time
from pathlib import Path

import torch
import trl
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    TrainerCallback,
)


class Ends(TrainerCallback):
    """When each step ended: by the clock, and in seconds of all cores."""

    def __init__(self):
        self.seconds: list[tuple[float, float]] = []

    def on_step_end(self, args, state, control, **others) -> None:
        self.seconds.append((time.perf_counter(), time.process_time()))


def main(kind: str, folder: Path, record: Path, steps: int, dtype: str) -> None:
    """Writes ``{"ends": [[wall, CPU] seconds], "peak_bytes": ..., "peer": name and version}``."""
    inputs = json.loads((folder / "inputs.json").read_text())
    rows = [json.loads(line) for line in open(folder / f"{kind}.jsonl", encoding="utf-8")]
    arguments = {
        "output_dir": str(record.parent / "trl"),
        "learning_rate": inputs["learning_rate"],
        "lr_scheduler_type": "constant",
        "per_device_train_batch_size": inputs["rows"],
        "gradient_checkpointing": False,
        "bf16": dtype == "bfloat16",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": not torch.cuda.is_available(),
    }
    ends = Ends()
    if kind in EXPERIMENTAL and not importlib.util.find_spec(f"trl.experimental.{kind}"):
        sys.exit(NOT_THERE)
    trainer = TRAINERS[kind](folder, inputs, rows, arguments | steps_of(kind, inputs, steps))
    trainer.add_callback(ends)
    trainer.train()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    found = {"ends": ends.seconds, "peak_bytes": peak, "peer": f"trl {trl.__version__}"}
    record.write_text(json.dumps(found))


def steps_of(kind: str, inputs: dict, steps: int) -> dict:
    """How a trainer is told the number of steps."""
    return {"total_episodes": steps * inputs["rows"]} if kind == "ppo" else {"max_steps": steps}


def dpo(folder: Path, inputs: dict, rows: list[dict], arguments: dict):
    """Its reference is a copy of the policy; a row is a pair, so half as many a step."""
    arguments["per_device_train_batch_size"] //= 2
    config = trl.DPOConfig(beta=inputs["beta"], max_length=None, **arguments)
    policy = folder / inputs["policy"]
    return trl.DPOTrainer(
        model=float32(AutoModelForCausalLM, policy),
        ref_model=float32(AutoModelForCausalLM, policy),
        args=config,
        processing_class=AutoTokenizer.from_pretrained(policy),
        train_dataset=Dataset.from_list(
            [
                {
                    "prompt": [said("user", row["prompt"])],
                    "chosen": [said("assistant", row["chosen"])],
                    "rejected": [said("assistant", row["rejected"])],
                }
                for row in rows
            ]
        ),
    )


def grpo(folder: Path, inputs: dict, rows: list[dict], arguments: dict):
    """The reward is a model's of one output, no reference as beta is 0."""
    config = trl.GRPOConfig(
        num_generations=inputs["samples"],
        max_completion_length=inputs["new_tokens"],
        temperature=1.0,
        top_k=0,
        beta=0.0,
        **arguments,
    )
    policy, reward = folder / inputs["policy"], folder / inputs["reward_model"]
    return trl.GRPOTrainer(
        model=float32(AutoModelForCausalLM, policy),
        reward_funcs=float32(AutoModelForSequenceClassification, reward),
        args=config,
        processing_class=AutoTokenizer.from_pretrained(policy, padding_side="left"),
        train_dataset=Dataset.from_list(
            [{"prompt": [said("user", row["prompt"])]} for row in rows]
        ),
    )


def ppo(folder: Path, inputs: dict, rows: list[dict], arguments: dict):
    """One pass over a rollout in one minibatch; critic and reward model are of one output."""
    from trl.experimental.ppo import PPOConfig, PPOTrainer  # noqa: PLC0415 - newer TRL has none

    config = PPOConfig(
        response_length=inputs["new_tokens"],
        num_ppo_epochs=1,
        num_mini_batches=1,
        local_rollout_forward_batch_size=inputs["rows"],
        num_sample_generations=0,
        temperature=1.0,
        kl_coef=inputs["kl_coef"],
        **arguments,
    )
    policy, reward = folder / inputs["policy"], folder / inputs["reward_model"]
    tokenizer = AutoTokenizer.from_pretrained(policy, padding_side="left")
    prompts = [
        tokenizer.apply_chat_template(
            [said("user", row["prompt"])], add_generation_prompt=True, return_dict=False
        )
        for row in rows
    ]
    return PPOTrainer(
        args=config,
        processing_class=tokenizer,
        model=float32(AutoModelForCausalLM, policy),
        ref_model=float32(AutoModelForCausalLM, policy),
        reward_model=float32(AutoModelForSequenceClassification, reward),
        value_model=float32(AutoModelForSequenceClassification, reward),
        train_dataset=Dataset.from_list([{"input_ids": ids} for ids in prompts]),
    )


def prm(folder: Path, inputs: dict, rows: list[dict], arguments: dict):
    """Two classes at the ends of steps."""
    from trl.experimental.prm import PRMConfig, PRMTrainer  # noqa: PLC0415 - newer TRL has none

    policy = folder / inputs["policy"]
    return PRMTrainer(
        model=float32(AutoModelForTokenClassification, policy, num_labels=2),
        args=PRMConfig(max_length=None, **arguments),
        processing_class=AutoTokenizer.from_pretrained(policy),
        train_dataset=Dataset.from_list(
            [
                {
                    "prompt": row["prompt"],
                    "completions": row["steps"],
                    "labels": [bool(label) for label in row["labels"]],
                }
                for row in rows
            ]
        ),
    )


def float32(kind: type, folder: Path, **settings):
    """A model with float32 weights; bfloat16 is TRL's autocast."""
    return kind.from_pretrained(folder, dtype=torch.float32, **settings)


def said(role: str, text: str) -> dict[str, str]:
    """A message."""
    return {"role": role, "content": text}


EXPERIMENTAL, NOT_THERE = ("ppo", "prm"), 3  # not in every TRL; exit code then
TRAINERS = {"dpo": dpo, "grpo": grpo, "ppo": ppo, "prm": prm}

if __name__ == "__main__":
    kind, folder, record, steps, dtype = sys.argv[1:]
    main(kind, Path(folder), Path(record), int(steps), dtype)
