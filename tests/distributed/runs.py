"""Whole runs of the package on tiny models: configurations, data and what they leave."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from megatron_amrlhf.checkpoint.folders import find_latest, read_manifest
from megatron_amrlhf.commands.train import run
from megatron_amrlhf.config.load import load_config
from megatron_amrlhf.report.files import read_jsonl
from tests.distributed.processes import run_on
from tests.helpers_models import make_tiny_model

TOLERANCE = 2e-4  # relative and absolute; the text itself is the same
CLOCK = ("time", "throughput/", "memory/")
PROMPT_LINES = [
    {"prompt": f"Say {word} {n} times, please", "answer": str(n)}
    for word in ("hi", "yes", "good morning")
    for n in (1, 2, 30)
]


def step_lines() -> list[dict]:
    """Three solutions of each of six sums: right, wrong at the end, wrong from the start."""
    lines = []
    for a in (1, 2, 3):
        for b in (4, 5):
            right = a + b
            for first, second, labels in (
                (right, right + 1, [1, 1]),
                (right, right + 2, [1, 0]),
                (right + 3, 9, [0, 0]),
            ):
                steps = [f"{a}+{b}={first}", f"{first}+1={second}"]
                question = f"What is {a} plus {b} plus 1?"
                lines.append({"prompt": question, "steps": steps, "labels": labels})
    return lines


def pair_lines() -> list[dict]:
    """A right and a wrong answer to each of nine sums, in both shapes that are read."""
    lines = []
    for a in (1, 2, 3):
        for b in (4, 5, 30):
            question, right, wrong = f"What is {a} plus {b}?", f"It is {a + b}.", "I say 7!"
            if b == 5:
                turns = [{"from": "human", "value": question}]
                answers = {"chosen": right, "rejected": wrong}
                answers = {key: {"from": "gpt", "value": text} for key, text in answers.items()}
                lines.append({"conversations": turns, **answers})
            else:
                lines.append({"prompt": question, "chosen": right, "rejected": wrong})
    return lines


def write_lines(path: Path, lines: list[dict]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def make_models(folder: Path, family: str = "qwen2", tied: bool = True) -> tuple[Path, Path]:
    """A policy folder and a PRM folder (another random backbone with a random head of 2)."""
    policy, prm = folder / "policy", folder / "prm"
    make_tiny_model(policy, family, tied, seed=1)
    make_tiny_model(prm, family, tied, seed=2)
    generator = torch.Generator().manual_seed(3)
    weights = load_file(prm / "model.safetensors")
    hidden = weights["model.norm.weight"].shape[0]
    weights["head.weight"] = torch.randn(2, hidden, generator=generator) * 0.3
    weights["head.bias"] = torch.randn(2, generator=generator)
    save_file(weights, prm / "model.safetensors", metadata={"format": "pt"})
    return policy, prm


BASE = {
    "run": {"seed": 7, "steps": 2, "log_samples": 4},
    "model": {"dtype": "float32"},
    "data": {"max_prompt_tokens": 100, "max_row_tokens": 160},
    "engine": {"micro_batch_size": 4},
    "optimizer": {"lr": 1e-3, "eps": 1e-4, "max_grad_norm": 0.5},
    "rollout": {
        "prompts_per_step": 4,
        "samples_per_prompt": 3,
        "reference_samples_per_prompt": 1,
        "max_new_tokens": 12,
        "micro_batch_size": 4,
        "top_k": 40,
    },
    "mask": {"delta": 0.1},
    "evaluation": {"prompts": 4},
}


def write_config(folder: Path, kind: str, **sections: dict) -> Path:
    """A YAML (as JSON) for a run of ``kind`` in ``folder`` with its data and models."""
    config = copy.deepcopy(BASE)
    config["algorithm"] = {"kind": kind}
    config["run"] |= {"name": kind, "folder": str(folder / "runs")}
    policy = folder / "policy"
    config["model"]["path"] = str(policy)
    if kind == "prm":
        data = write_lines(folder / "steps.jsonl", step_lines())
        config["data"] |= {"format": "steps"}
        config["algorithm"] |= {"batch_size": 4}
    elif kind == "orm":
        data = write_lines(folder / "pairs.jsonl", pair_lines())
        config["data"] |= {"format": "pairs"}
        config["algorithm"] |= {"batch_size": 4}
    else:
        data = write_lines(folder / "prompts.jsonl", PROMPT_LINES)
        config["data"] |= {"format": "prompts"}
        config["reward_model"] = {"path": str(folder / "prm")}
    config["data"] |= {"train": str(data), "heldout": str(data)}
    for section, keys in sections.items():
        config.setdefault(section, {}).update(keys)
    path = folder / f"{config['run']['name']}.yaml"
    path.write_text(json.dumps(config))
    return path


def run_config(path: str, overrides: list[str]) -> None:
    """What every rank of a test run calls."""
    run(load_config(path, overrides))


def read_metrics(folder: Path) -> list[dict]:
    """The steps' lines of metrics.jsonl."""
    return [line for line in read_jsonl(folder / "metrics.jsonl") if line["step"] > 0]


def read_start(folder: Path) -> list[dict]:
    """The lines of the evaluation before training; there should be one at most."""
    return [line for line in read_jsonl(folder / "metrics.jsonl") if line["step"] == 0]


def numbers(folder: Path) -> list[dict]:
    """Its metrics without those that a clock or the machine decides."""
    return [
        {key: value for key, value in line.items() if not key.startswith(CLOCK)}
        for line in read_metrics(folder)
    ]


def saved_parts(run: Path) -> dict[str, dict]:
    """Size and hash of each part of the newest checkpoint: masters and moments, bit for bit."""
    latest = find_latest(run / "checkpoints")
    return {
        name: entry
        for name, entry in read_manifest(latest).items()
        if name.endswith(".safetensors")
    }


def start(folder: Path, config: Path, tp: int, pp: int, dp: int, *overrides: str) -> Path:
    """Runs a config on a layout; its run folder."""
    name = f"run.name={config.stem}-{tp}{pp}{dp}"
    layout = [f"parallel.tensor={tp}", f"parallel.pipeline={pp}"]
    run_on(tp * pp * dp, run_config, str(config), [name, *layout, *overrides])
    return folder / "runs" / f"{config.stem}-{tp}{pp}{dp}"


def assert_same_numbers(one: Path, other: Path, ignored: tuple[str, ...] = ()) -> None:
    """Both run folders have the same metrics up to rounding, but for ``ignored`` ones."""
    expected, found = numbers(one), numbers(other)
    assert len(found) == len(expected) > 0
    for before, after in zip(expected, found, strict=True):
        assert_same_line(before, after, ignored)


def assert_same_line(before: dict, after: dict, ignored: tuple[str, ...] = ()) -> None:
    """A step's metrics are the same up to rounding, but for ``ignored`` ones."""
    assert before.keys() == after.keys()
    for key in before.keys() - set(ignored):
        value = before[key]
        if value is None:
            assert after[key] is None, key
        else:
            close = math.isclose(value, after[key], rel_tol=TOLERANCE, abs_tol=TOLERANCE)
            assert close, (key, value, after[key])
