"""The doctor and a start judge a run by one function: the same line of each."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from megatron_amrlhf.checkpoint import folders
from megatron_amrlhf.commands.train import prepare
from megatron_amrlhf.config.load import load_config
from megatron_amrlhf.doctor.judge_run import judge_run
from megatron_amrlhf.doctor.start import judge_start
from megatron_amrlhf.errors import UserError
from megatron_amrlhf.owned import claim
from tests.distributed.runs import make_models, write_config
from tests.unit.doctor.samples import only


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    make_models(folder)
    write_config(folder, "ppo")
    return folder


@pytest.fixture
def folder(made, tmp_path) -> Path:
    return shutil.copytree(made, tmp_path / "here")


def change_json(file: Path, **keys) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | keys))


def drop_tensor(model: Path, name: str) -> None:
    tensors = load_file(model / "model.safetensors")
    del tensors[name]
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})


def write_zero(folder: Path) -> None:
    zero = {"zero_optimization": {"stage": 3}, "tensorboard": {"fast": True}}
    (folder / "zero.json").write_text(json.dumps(zero))


# What is done to a sound folder, what is set, and words of the line.
REFUSED = {
    "family": (lambda x: change_json(x / "policy/config.json", model_type="gpt2"), [], "gpt2"),
    "size": (
        lambda x: change_json(x / "policy/config.json", intermediate_size=96),
        [],
        "has shape",
    ),
    "tensor": (lambda x: drop_tensor(x / "policy", "model.norm.weight"), [], "no tensor"),
    "truncated": (
        lambda x: (x / "policy/model.safetensors").write_bytes(b"short"),
        [],
        "not a readable safetensors file",
    ),
    "tokenizer": (lambda x: (x / "policy/tokenizer.json").unlink(), [], "tokenizer"),
    "template": (
        lambda x: (x / "policy/chat_template.jinja").write_text("{{ raise_exception('no') }}"),
        [],
        "template",
    ),
    "vocabulary": (lambda x: change_json(x / "policy/config.json", vocab_size=90), [], "90"),
    "end token": (
        lambda x: (x / "policy/generation_config.json").write_text("[]"),
        [],
        "generation_config.json",
    ),
    "rows": (lambda x: (x / "prompts.jsonl").write_text('{"promt": "a"}'), [], "prompts.jsonl:1"),
    "length": (None, ["data.max_prompt_tokens=20"], "prompts.jsonl:1"),
    "answers": (
        lambda x: (x / "prompts.jsonl").write_text('{"prompt": "a"}'),
        ["reward.verifiable_weight=1.0"],
        "'answer' is missing",
    ),
    "tensor size": (None, ["parallel.tensor=4"], "does not divide the model's"),
    "no head": (None, ["reward_model.path=HERE/policy"], "no reward head"),
    "reward model": (lambda x: drop_tensor(x / "prm", "model.norm.weight"), [], "no tensor"),
    "attributes": (None, ["reward_model.attribute_weights=[1.0]"], "1 weights, but the PRM has 2"),
    "output": (
        lambda x: change_json(x / "prm/config.json", reward_output="score"),
        ["reward_model.output=logit"],
        "gives a score",
    ),
    "offline": (
        lambda x: (x / "scores.json").write_text("{}"),
        [
            "mask.threshold=offline",
            "mask.offline_file=HERE/scores.json",
        ],
        "scores.json",
    ),
    "warm-up": (
        None,
        ["run.steps=null", "optimizer.warmup_steps=100"],
        "optimizer.warmup_steps = 100 leaves nothing",
    ),
    "deepspeed": (write_zero, ["engine.deepspeed=HERE/zero.json"], "fast"),
}


def test_a_sound_run_is_found_so(folder):
    config = load_config(folder / "ppo.yaml", overrides(folder, []))
    assert only(judge_run(config, 1), "ok") and only(judge_start(config), "ok")
    assert not (folder / "runs").exists()


def overrides(folder: Path, given: list[str]) -> list[str]:
    """In the copy's own folder."""
    own = {
        "model.path": folder / "policy",
        "reward_model.path": folder / "prm",
        "data.train": folder / "prompts.jsonl",
        "data.heldout": folder / "prompts.jsonl",
        "run.folder": folder / "runs",
    }
    return [f"{key}={value}" for key, value in own.items()] + [
        text.replace("HERE", str(folder)) for text in given
    ]


@pytest.mark.parametrize("name", REFUSED)
def test_the_doctor_tells_the_line_with_which_a_start_is_refused(folder, name):
    damage, given, words = REFUSED[name]
    if damage is not None:
        damage(folder)
    config = load_config(folder / "ppo.yaml", overrides(folder, given))
    with pytest.raises(UserError) as refused:
        prepare(config)
    assert words in str(refused.value)
    found = only(judge_start(config), "error")
    assert found.message == str(refused.value)


def test_a_model_that_is_to_be_fetched_is_a_warning(folder):
    config = load_config(folder / "ppo.yaml", [*overrides(folder, []), "model.path=no/such-model"])
    assert "would be fetched" in only(judge_start(config), "warning").message


def test_a_folder_of_another_run_and_a_damaged_checkpoint_are_errors(folder, monkeypatch):
    monkeypatch.setattr(folders, "LONGEST_LAG_SECONDS", 0.0)
    config = load_config(folder / "ppo.yaml", overrides(folder, []))
    step = config.run.path / "checkpoints" / "step-2"
    step.mkdir(parents=True)
    (step / "actor-1.safetensors").write_text("x")
    assert "step-2" in only(judge_start(config), "error").message
    shutil.rmtree(step)
    claim(config.run.path, "run")
    other = "algorithm: {kind: dpo}\nmodel: {path: x}\n"
    (config.run.path / "config.resolved.yaml").write_text(other)
    (config.run.path / "metrics.jsonl").write_text('{"step": 1}')
    assert "holds a run with algorithm.kind dpo" in only(judge_start(config), "error").message
