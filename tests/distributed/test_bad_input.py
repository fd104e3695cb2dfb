"""A user's mistake: one line on stderr, exit code 2, nothing written, nobody left running."""

from __future__ import annotations

import contextlib
import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from megatron_amrlhf.cli import main
from megatron_amrlhf.ports import free_port
from megatron_amrlhf.run.heartbeat import Heartbeat, RankProgress
from tests.distributed.processes import run_on
from tests.distributed.runs import make_models, write_config
from tests.helpers_models import tiny_tokenizer
from tests.patience import PATIENCE_SECONDS

pytestmark = pytest.mark.distributed

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bad")
    make_models(folder)
    return folder


def train(config: Path, *overrides: str) -> subprocess.CompletedProcess:
    """One rank, forked with everything imported."""
    arguments = ["train", str(config), *(["--set", *overrides] if overrides else [])]
    (code, stderr) = run_on(1, call_main, arguments)[0]
    return subprocess.CompletedProcess(arguments, code, stderr=stderr)


def call_main(arguments: list[str]) -> tuple[int, str]:
    stderr = io.StringIO()
    with contextlib.redirect_stderr(stderr):
        code = main(arguments)
    return code, stderr.getvalue()


def launch(config: Path, *overrides: str) -> subprocess.CompletedProcess:
    """Two ranks through the deepspeed launcher."""
    launcher = [str(Path(sys.executable).with_name("deepspeed")), "--log_level", "critical"]
    launcher += ["--num_gpus", "2", "--master_port", str(free_port()), "--no_local_rank"]
    command = [*launcher, "--module", "megatron_amrlhf", "train", str(config), "--set", *overrides]
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_SECONDS
    )


def assert_refused(
    done: subprocess.CompletedProcess, folder: Path, *words: str, at_most: int = 1
) -> None:
    lines = [line for line in done.stderr.splitlines() if line.startswith("error")]
    assert done.returncode == 2, done.stderr
    assert 1 <= len(lines) <= at_most and "Traceback" not in done.stderr, done.stderr
    assert all(word in line for word in words for line in lines), lines
    assert not (folder / "runs").exists()


# The second rank waits ten seconds for the first one to speak and the launcher to end it, which a
# busy machine may take longer for: then it says the same.
BUSY = 2


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["parallel.tensor=3"], ["1 processes", "3"]),
        (["run.stepz=1"], ["run.stepz", "did you mean run.steps"]),
        (["engine.micro_batch_size=0"], ["engine.micro_batch_size"]),
        (["model.path=/no/such/folder"], ["/no/such/folder"]),
        (["data.train=/no/such.jsonl"], ["/no/such.jsonl"]),
        (["data.max_prompt_tokens=20"], ["prompts.jsonl:1", "20"]),
        (["reward_model.path=POLICY"], ["reward head"]),
    ],
)
def test_wrong_key_value_or_file_is_one_line(folder, overrides, words):
    overrides = [text.replace("POLICY", str(folder / "policy")) for text in overrides]
    done = train(write_config(folder, "ppo"), *overrides)
    assert_refused(done, folder, *words)


def test_what_deepspeed_refuses_is_one_line(folder, tmp_path):
    content = json.loads((ROOT / "configs/deepspeed/zero3.json").read_text())
    content["tensorboard"] = {"fast": True}
    (tmp_path / "zero.json").write_text(json.dumps(content))
    overrides = [f"engine.deepspeed={tmp_path / 'zero.json'}", f"run.folder={tmp_path / 'late'}"]
    assert_refused(
        train(write_config(folder, "ppo"), *overrides), folder, "engine.deepspeed", "fast"
    )


@pytest.mark.parametrize("key", ["model", "reward_model"])
def test_weights_of_another_size_are_told_before_they_are_read(folder, tmp_path, key):
    models = dict(zip(("model", "reward_model"), make_models(tmp_path), strict=True))
    file = models[key] / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"intermediate_size": config["intermediate_size"] * 2}))
    done = train(write_config(folder, "ppo"), f"{key}.path={models[key]}")
    assert_refused(done, folder, str(models[key]), "has shape", "config.json and this run need")


@pytest.mark.parametrize("key", ["model", "reward_model"])
def test_a_vocabulary_beyond_the_embedding_is_refused(folder, tmp_path, key):
    """The data use none of the tokens that are too many."""
    models = dict(zip(("model", "reward_model"), make_models(tmp_path), strict=True))
    tiny_tokenizer(140).save_pretrained(models[key])
    done = train(write_config(folder, "ppo"), f"{key}.path={models[key]}")
    assert_refused(done, folder, str(models[key]), "has id 139", "vocab_size is 131")


@pytest.mark.parametrize("key", ["model", "reward_model"])
def test_weights_that_are_not_finite_are_told_as_such(folder, tmp_path, key):
    """They were told as a reward that failed, or as a loss that is not finite."""
    models = dict(zip(("model", "reward_model"), make_models(tmp_path), strict=True))
    file, name = models[key] / "model.safetensors", "model.layers.1.mlp.down_proj.weight"
    weights = load_file(file)
    weights[name][2, 3] = float("nan")
    save_file(weights, file, metadata={"format": "pt"})
    overrides = [f"{key}.path={models[key]}", f"run.folder={tmp_path / 'late'}"]
    role = {"model": "actor", "reward_model": "prm"}[key]
    words = (f"{models[key]}: the weights of the {role} are not finite: {name}",)
    assert_refused(train(write_config(folder, "ppo"), *overrides), folder, *words)


def test_missing_key_is_named(folder):
    path = write_config(folder, "ppo")
    config = json.loads(path.read_text())
    del config["data"]["train"]
    path.write_text(json.dumps(config))
    assert_refused(train(path), folder, "data.train")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"prompt": "a"}\n{"prompt": \n', ["broken.jsonl:2"]),
        ('{"prompt": "a"}\n{"promt": "b"}\n', ["broken.jsonl:2", "prompt"]),
        ("", ["broken.jsonl"]),
    ],
)
def test_broken_data_names_file_and_line(folder, text, words):
    (folder / "broken.jsonl").write_text(text)
    done = train(write_config(folder, "ppo"), f"data.train={folder / 'broken.jsonl'}")
    assert_refused(done, folder, *words)


def test_a_mistake_in_a_last_row_ends_both_ranks(folder):
    """The second rank finds it."""
    lines = [json.dumps({"prompt": f"What is {n}?"}) for n in range(300)]
    (folder / "last.jsonl").write_text("\n".join([*lines, '{"prompt": ["What?"]}']))
    done = launch(write_config(folder, "ppo"), f"data.train={folder / 'last.jsonl'}")
    words = "last.jsonl:301: 'prompt' must be a string"
    assert_refused(done, folder, words, at_most=BUSY)


@pytest.fixture(scope="module")
def odd(tmp_path_factory):
    """A model whose heads and layers no two ranks can share."""
    folder, _ = make_models(tmp_path_factory.mktemp("odd"))
    config = json.loads((folder / "config.json").read_text())
    config |= {"num_attention_heads": 3, "num_key_value_heads": 1, "num_hidden_layers": 3}
    config.pop("layer_types", None)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["parallel.pipeline=2", "parallel.tensor=2"], ["2 processes"]),
        (["parallel.pipeline=2", "model.path=ODD"], ["parallel.pipeline", "layers"]),
    ],
)
def test_a_wrong_layout_is_refused_on_every_rank(folder, odd, overrides, words):
    overrides = [text.replace("ODD", str(odd)) for text in overrides]
    arguments = ["train", str(write_config(folder, "ppo")), "--set", *overrides]
    (code, stderr), *others = run_on(2, call_main, arguments)
    assert_refused(subprocess.CompletedProcess(arguments, code, stderr=stderr), folder, *words)
    assert [code for code, _ in others] == [2]


def test_a_wrong_layout_ends_the_launcher_and_all_ranks(folder, odd):
    done = launch(write_config(folder, "ppo"), "parallel.tensor=2", f"model.path={odd}")
    assert_refused(done, folder, "parallel.tensor", "heads", at_most=BUSY)


def test_a_run_that_is_going_on_is_refused_on_every_rank(folder, tmp_path):
    config, run = write_config(folder, "ppo"), tmp_path / "living"
    run.mkdir()
    arguments = ["train", str(config), "--set", f"run.folder={tmp_path}", "run.name=living"]
    with Heartbeat(
        run,
        1,
        RankProgress(),
        every_seconds=0.5,
        on_beat=lambda beat: None,
        on_error=lambda beat: None,
    ):
        for code, error in run_on(2, call_main, arguments):
            assert code == 2 and "a run that is going on: rank 1 (host " in error, error
    assert [path.name for path in run.iterdir()] == ["heartbeat"]
