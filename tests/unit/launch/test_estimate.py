"""The time that the quick start tells follows from its work and from what was measured."""

import pytest
import yaml

from megatron_amrlhf.config.load import load_config
from megatron_amrlhf.demo.data import write_demo_data
from megatron_amrlhf.launching import estimate
from megatron_amrlhf.launching.estimate import (
    START_SECONDS,
    Speeds,
    amounts_of,
    measure,
    run_seconds,
)
from tests.helpers_models import make_tiny_model

SPEEDS = Speeds("float32", flops=1e9, reads=1e9)


@pytest.fixture(scope="module")
def configs(tmp_path_factory):
    """A PRM's run and a policy's, as the quick start has them, on a tiny model."""
    folder = tmp_path_factory.mktemp("estimate")
    make_tiny_model(folder / "model", "llama", layers=4, vocab_size=131)
    write_demo_data(folder / "data", 0, 32, 8)
    files = []
    for name, rows in (("prm", "prm"), ("ppo", "prompts")):
        with open(f"configs/{name}_demo.yaml") as file:
            content = yaml.safe_load(file)
        content["model"]["path"] = str(folder / "model")
        content["data"]["train"] = str(folder / "data" / f"{rows}_train.jsonl")
        content["data"]["heldout"] = str(folder / "data" / f"{rows}_heldout.jsonl")
        content["evaluation"] = {"prompts": 8}
        content["optimizer"]["warmup_steps"] = 0
        files.append(folder / f"{name}.yaml")
        files[-1].write_text(yaml.safe_dump(content))
    return files


def expected(config, speeds=SPEEDS):
    return run_seconds(config, amounts_of(config), 2, speeds)


@pytest.mark.parametrize("place", [0, 1])
def test_twice_the_speed_halves_the_time_and_twice_the_steps_double_it(configs, place):
    config = load_config(configs[place], ["run.steps=4"])
    slow = expected(config) - START_SECONDS
    fast = expected(config, Speeds("float32", 2e9, 2e9)) - START_SECONDS
    assert slow == pytest.approx(2 * fast, rel=0.01)  # but for what the stages send
    more = load_config(configs[place], ["run.steps=8"])
    without = load_config(configs[place], ["run.steps=4", "data.heldout=null"])
    steps = expected(without) - START_SECONDS
    assert expected(more) - START_SECONDS - slow == pytest.approx(steps, rel=0.02)


def test_the_line_names_the_runs_and_the_seconds_go_to_the_script(configs, capsys, monkeypatch):
    monkeypatch.setattr(estimate, "measure", lambda config: SPEEDS)
    arguments = [x for file in configs for x in ("--run", str(file), "run.steps=4")]
    assert estimate.main(["--processes", "2", *arguments]) == 0
    printed = capsys.readouterr()
    seconds = [int(line) for line in printed.out.splitlines()]
    assert len(seconds) == 2 and min(seconds) > START_SECONDS
    first, line = printed.err.splitlines()
    assert first.startswith("measuring ") and line.startswith("estimated time on this machine: ")
    assert "(prm " in printed.err and ", ppo " in printed.err and "float32" in printed.err


def test_a_step_is_measured_in_the_dtype_of_the_run(configs):
    found = measure(load_config(configs[0], ["model.dtype=float32"]))
    assert found.dtype == "float32" and found.flops > 1e6 and found.reads > 1e6


@pytest.mark.parametrize(
    ("place", "key", "words"),
    [
        (0, "optimizer.warmup_steps=5", "optimizer.warmup_steps = 5 leaves nothing of the run's 2"),
        (1, "run.name=a/b", "run.name: must be a plain folder name"),
        (1, "data.train=nowhere.jsonl", "nowhere.jsonl"),
    ],
)
def test_a_mistake_is_told_before_anything_is_measured(
    configs, capsys, monkeypatch, place, key, words
):
    monkeypatch.setattr(estimate, "measure", lambda config: pytest.fail("it was measured"))
    runs = [["--run", str(file)] for file in configs]
    runs[place] += [key]
    assert estimate.main(["--processes", "2", *runs[0], *runs[1]]) == 2
    told = capsys.readouterr().err
    assert words in told and len(told.splitlines()) == 1
