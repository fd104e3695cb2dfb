"""What docs/extending.md adds, tried: ``python -m tests.extended COPY FOLDER``.

It runs on a copy of the package with all recipes, in a process of its own; test_extending.py
starts it.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

import megatron_amrlhf
from megatron_amrlhf.cli import main
from megatron_amrlhf.config.data_section import DataSection
from megatron_amrlhf.data.prm_data import load_prm_examples
from megatron_amrlhf.experience.rewarding import Rewarder
from megatron_amrlhf.losses.dpo import PairTargets, dpo_loss
from megatron_amrlhf.losses.rloo import RlooTargets, leave_one_out, rloo_loss
from megatron_amrlhf.mask.threshold import baseline_and_std
from megatron_amrlhf.models.families import config_object
from megatron_amrlhf.models.loading import load_stage
from megatron_amrlhf.models.shape import read_shape
from megatron_amrlhf.models.source import ShardedWeights, read_hf_config
from megatron_amrlhf.models.stage import StageModel
from megatron_amrlhf.parallel.mesh import build_mesh, start_processes, stop_processes
from megatron_amrlhf.types import RolloutBatch
from tests.distributed.runs import make_models, read_metrics, start, write_config, write_lines
from tests.helpers_models import END_TOKEN_ID, make_tiny_model, tiny_tokenizer

FLOAT32 = 1e-5  # relative, of sums of some hundred products
BETA = 0.2
NAN = math.nan


def try_loss() -> None:
    """IPO of one pair, by its formula in Python's floats."""
    logprobs = torch.tensor([[-1.0, -2.0], [-0.5, -3.0]], requires_grad=True)
    reference = torch.tensor([[-1.5, -2.5], [-1.0, -1.0]])
    mask = torch.tensor([[True, False], [True, True]])
    targets = PairTargets(
        denominator=torch.tensor([[True], [False]]),
        mask=mask,
        valid=torch.ones(2, 2, dtype=torch.bool),
        reference_logprobs=reference,
    )
    found = dpo_loss(logprobs, targets, beta=BETA, form="ipo").terms
    difference = (-1.0 + 1.5) - (-0.5 + 1.0 - 3.0 + 1.0)
    assert found.tolist() == [[pytest.approx((difference - 1 / (2 * BETA)) ** 2, rel=FLOAT32)]]
    found.sum().backward()
    slope = 2 * (difference - 1 / (2 * BETA))
    expected = [[slope, 0.0], [-slope, -slope]]
    assert logprobs.grad is not None
    torch.testing.assert_close(logprobs.grad, torch.tensor(expected), rtol=FLOAT32, atol=0)


def try_threshold() -> None:
    """Rows of three tokens, two and none."""
    signal = torch.tensor([[1.0, 4.0, -2.0], [3.0, 5.0, 99.0], [7.0, 7.0, 7.0]])
    valid = torch.tensor([[True] * 3, [True, True, False], [False] * 3])
    assert baseline_and_std(signal, valid, "midrange")[0].tolist() == [[1.0], [4.0], [0.0]]


def try_format(folder: Path) -> None:
    """A right solution, and one whose second step is the first wrong one; told and by itself."""
    steps = ["1 + 1 = 2", "2 + 2 = 5", "5 + 1 = 6"]
    rows = [{"problem": "Add.", "steps": steps, "label": label} for label in (-1, 1)]
    path = write_lines(folder / "first_error.jsonl", rows)
    for kind in ("first_error", "auto"):
        section = DataSection(train=str(path), format=kind)
        examples, _ = load_prm_examples(path, tiny_tokenizer(), section, 1)
        assert [x.labels.flatten().tolist() for x in examples] == [[1.0] * 3, [1.0, 0.0]], kind
        is_whole = [int(x.row[-1]) == END_TOKEN_ID for x in examples]
        assert is_whole == [True, False]  # what follows a mistake is not read, so nothing ends


def try_reward() -> None:
    tokenizer = tiny_tokenizer()
    answers = [tokenizer.encode(text) for text in ("so \\boxed{4}", "so 4")]
    rollout = RolloutBatch(
        rows=tuple(torch.tensor([5, 6, *ids]) for ids in answers),
        prompt_lengths=torch.tensor([2, 2]),
        group_ids=torch.zeros(2, dtype=torch.int64),
        sample_ids=torch.arange(2),
        from_reference=torch.zeros(2, dtype=torch.bool),
        ended=torch.zeros(2, dtype=torch.bool),
    )
    rewarder = object.__new__(Rewarder)
    mesh = SimpleNamespace(device=torch.device("cpu"))
    rewarder.context = SimpleNamespace(tokenizer=tokenizer, mesh=mesh)
    assert rewarder.boxed(rollout).tolist() == [1.0, 0.0]


@torch.no_grad()
def try_family(folder: Path) -> None:
    """The logits of transformers."""
    make_tiny_model(folder, "seed_oss", layers=2)
    ids = torch.arange(20)[None] * 5 % 131
    start_processes()
    hf_config, mesh = read_hf_config(folder), build_mesh(1, 1)
    shape = read_shape(hf_config)
    model = StageModel(shape, config_object(hf_config), mesh, torch.float32)
    load_stage(model.eval(), None, ShardedWeights(folder), mesh)
    expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(ids).logits[0]
    assert expected.abs().max() > 1
    found = model(0, ids)[:, : shape.vocab_size]
    torch.testing.assert_close(found, expected, rtol=FLOAT32, atol=FLOAT32 * 10)
    stop_processes()


def try_algorithm(folder: Path) -> None:
    """By hand; then as a user would: config, plan, doctor, two steps of training."""
    rewards = torch.tensor([1.0, 2.0, 6.0, NAN, 4.0])
    has_reward, groups = ~rewards.isnan(), torch.tensor([3, 3, 3, 3, 8])
    advantages = leave_one_out(rewards, groups, has_reward)
    torch.testing.assert_close(advantages, torch.tensor([-3.0, -1.5, 4.5, 0.0, 0.0]))
    mask = torch.tensor([[True, False]] * 5)
    targets = RlooTargets(
        denominator=mask, mask=mask, valid=mask, reference_logprobs=-rewards, advantages=advantages
    )
    logprobs = torch.full((5, 2), -0.5)
    assert rloo_loss(logprobs, targets).terms[:3].tolist() == [[-1.5, 0], [-0.75, 0], [2.25, 0]]

    make_models(folder)
    config = write_config(folder, "rloo", run={"steps": 2}, reward={"boxed_weight": 0.5})
    for command in ("config", "plan"):
        assert main([command, str(config)]) == 0, command
    said = folder / "doctor.json"
    main(["doctor", str(config), "--json", str(said)])  # about this machine it may have to warn
    about_run = [x for x in json.loads(said.read_text())["findings"] if x["check"] == "run"]
    assert about_run and all(x["level"] == "ok" for x in about_run), about_run
    first, second = read_metrics(start(folder, config, 1, 1, 1))
    for line in (first, second):
        assert line["rloo/advantage"] > 0 and line["engine/grad_norm"] > 0, line
    assert first["loss/policy"] != second["loss/policy"]


def run(copy: str, work: str) -> None:
    """Tries all recipes."""
    assert Path(megatron_amrlhf.__file__).parent == Path(copy) / "megatron_amrlhf"
    folder = Path(work)
    try_loss()
    try_threshold()
    try_format(folder)
    try_reward()
    try_family(folder / "seed_oss")
    try_algorithm(folder)
    print("all recipes work")


if __name__ == "__main__":
    run(*sys.argv[1:])
