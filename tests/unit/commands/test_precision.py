"""``auto`` becomes one dtype of all ranks, and what goes on keeps what it began with."""

import json

import pytest
import torch

from megatron_amrlhf.checkpoint.folders import FORMAT
from megatron_amrlhf.commands import precision
from megatron_amrlhf.commands.precision import decide, kept_dtypes
from megatron_amrlhf.config.deepspeed import resolve_deepspeed
from megatron_amrlhf.parallel.dtypes import DtypeChoice
from megatron_amrlhf.planning.weights import WEIGHT_BYTES
from tests.unit.config.samples import PPO, PRM, make_config

FAST, SLOW = DtypeChoice("bfloat16", "has it"), DtypeChoice("float32", "has it not")


@pytest.fixture
def machines(monkeypatch):
    """Sets what the ranks' machines choose and how slow bfloat16 is on each."""

    def set_machines(choices=(SLOW, FAST), factors=(9.0, 0.5)):
        monkeypatch.setattr(precision, "own_choice", lambda: choices)
        monkeypatch.setattr(precision, "bfloat16_factor", lambda: factors)
        monkeypatch.setattr(precision, "gather_objects", lambda value, group: list(value))
        monkeypatch.setattr(precision.dist, "group", type("group", (), {"WORLD": None}))
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    set_machines()
    return set_machines


@pytest.mark.parametrize(
    ("model", "reward", "kept", "decided"),
    [
        ("auto", None, {}, ("float32", "float32")),
        ("auto", "auto", {}, ("float32", "float32")),
        ("auto", "bfloat16", {}, ("float32", "bfloat16")),
        ("float32", "auto", {}, ("float32", "float32")),
        ("bfloat16", None, {}, ("bfloat16", "bfloat16")),
        ("auto", None, {"model.dtype": "bfloat16"}, ("bfloat16", "bfloat16")),
        ("auto", "auto", {"model.dtype": "bfloat16"}, ("bfloat16", "float32")),
        ("float32", None, {"model.dtype": "bfloat16"}, ("float32", "float32")),
    ],
)
def test_what_is_asked_for_comes_before_what_is_kept_and_that_before_the_machine(
    machines, model, reward, kept, decided
):
    config = make_config(PPO, model={"dtype": model}, reward_model={"dtype": reward})
    found, lines = decide(config, kept)
    assert (found.dtype_of("actor"), found.dtype_of("prm")) == decided
    assert found.dtype_of("critic") == found.dtype_of("reference") == decided[0]
    told = [line for line in lines if line.startswith("model.dtype: auto is ")]
    assert len(told) == (model == "auto")
    assert any("with which this began" in line for line in lines) == bool(kept and model == "auto")


def test_fast_machines_take_bfloat16(machines):
    machines((FAST, FAST), (0.5, 0.6))
    found, lines = decide(make_config(PPO), {})
    assert found.model.dtype == "bfloat16" and lines == ["model.dtype: auto is bfloat16: has it"]


def test_slow_bfloat16_that_was_asked_for_is_told_with_its_factor(machines):
    _, (line,) = decide(make_config(PPO, model={"dtype": "bfloat16"}), {})
    assert line.startswith("warning: bfloat16 products take 9 times as long as float32 ones")
    machines((FAST, FAST), (0.5, 1.2))
    assert decide(make_config(PPO, model={"dtype": "bfloat16"}), {})[1] == []


def test_a_reward_model_in_training_is_the_model(machines):
    config = make_config(PRM, model={"dtype": "float32"}, reward_model={"dtype": "bfloat16"})
    assert config.dtype_of("prm") == "float32"


def test_deepspeed_is_told_each_roles_own_dtype():
    config = make_config(PPO, model={"dtype": "float32"}, reward_model={"dtype": "bfloat16"})
    enabled = [resolve_deepspeed(config, 1, x, False)["bf16"]["enabled"] for x in ("actor", "prm")]
    assert enabled == [False, True]
    assert WEIGHT_BYTES["auto"] == WEIGHT_BYTES["bfloat16"]  # amrlhf plan is of GPUs


@pytest.mark.parametrize("resume", [True, False])
def test_a_checkpoint_tells_with_what_its_run_began(tmp_path, resume):
    run = {"name": "r", "folder": str(tmp_path)}
    config = make_config(PPO, run=run, checkpoint={"resume": resume})
    assert kept_dtypes(config) == {}
    folder = tmp_path / "r" / "checkpoints" / "step-2"
    folder.mkdir(parents=True)
    saved = make_config(PPO, model={"dtype": "bfloat16"}).model_dump(mode="json")
    header = dict.fromkeys(("tensor", "pipeline", "data", "virtual_stages"), 1)
    header |= {"first_stage_layers": None, "last_stage_layers": None}
    schedule = {"last_epoch": 2, "step_count": 3, "lr": [0.1]}
    role = {"dtype": "bfloat16", "model": {"head_outputs": None}, "optimizer_step": 2.0}
    data = {"fingerprint": "x", "seed": 0, "consumed_samples": 8, "epoch": 0}
    content = {
        "format": FORMAT,
        "step": 2,
        "layout": header,
        "roles": {"actor": role | {"schedule": schedule}},
        "engine": {"skipped_steps": 0},
        "state": {"step": 2, "algorithm": {}, "data": data, "config": saved},
    }
    (folder / "state.json").write_text(json.dumps(content))
    (folder / "manifest.json").write_text(json.dumps({"files": {}}))
    wanted = {"model.dtype": "bfloat16", "reward_model.dtype": "bfloat16"}
    assert kept_dtypes(config) == (wanted if resume else {})
