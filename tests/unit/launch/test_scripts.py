"""The shell scripts answer wrong options, and the shipped configurations are valid."""

import hashlib
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from megatron_amrlhf.config.checks import check_run
from megatron_amrlhf.config.load import load_config
from tests.patience import PATIENCE_SECONDS

ROOT = Path(__file__).parents[3]
SCRIPTS = sorted((ROOT / "launch").glob("*.sh"))
WITH_OPTIONS = ("install.sh", "quickstart.sh", "test.sh", "train.sh")
DEMO_PROCESSES = 2
PROCESSES = {"prm_qwen2_7b": 8, "ppo_qwen2_7b": 8, "ppo_llama3_70b": 64, "ppo_llama3_405b": 512}


def _bash(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["bash", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
        check=False,
    )


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_a_script_is_valid_bash(script):
    assert _bash("-n", str(script)).returncode == 0


@pytest.mark.parametrize("script", WITH_OPTIONS)
def test_help_tells_the_usage(script):
    answer = _bash(f"launch/{script}", "--help")
    assert answer.returncode == 0 and answer.stdout.startswith(f"Usage: bash launch/{script}")


@pytest.mark.parametrize(
    "arguments",
    [
        ("install.sh", "--nope"),
        ("install.sh", "--venv"),
        ("train.sh", "--nope"),
        ("train.sh",),
        ("train.sh", "--processes", "0", "configs/prm_demo.yaml"),
        ("quickstart.sh", "--nope"),
        ("quickstart.sh", "ppo"),
        ("quickstart.sh", "--steps"),
        ("quickstart.sh", "--steps", "-1"),
        ("quickstart.sh", "--algorithm", "nope"),
    ],
    ids=" ".join,
)
def test_a_wrong_option_is_one_line_and_exit_code_2(arguments):
    script, *options = arguments
    answer = _bash(f"launch/{script}", *options)
    assert answer.returncode == 2 and not answer.stdout
    assert answer.stderr.startswith(f"{script}: ") and answer.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("configs/ppo_demo.yaml", "--processes", "4"), "--processes is the launcher's: it goes"),
        (("doctor", "--hostfile=hosts"), "--hostfile is the launcher's: it goes before"),
        (("plan", "configs/ppo_demo.yaml"), "/bin/amrlhf plan configs/ppo_demo.yaml"),
        (("config", "configs/ppo_demo.yaml"), "only train, score and doctor are launched"),
    ],
)
def test_what_is_not_launched_or_not_in_its_place_is_told_so(arguments, words):
    answer = _bash("launch/train.sh", *arguments)
    assert answer.returncode == 2 and words in answer.stderr
    assert answer.stderr.startswith("train.sh: ") and answer.stderr.count("\n") == 1


def _install(venv: Path) -> subprocess.CompletedProcess:
    """Without pip in ``venv``, so that it is to be made; a stand-in for Python makes nothing."""
    (venv / "bin").mkdir()
    (venv / "bin" / "python").symlink_to(sys.executable)
    (venv / "stand-in").write_text('#!/bin/bash\n[[ "$1" == -c ]]\n')  # it fits
    (venv / "stand-in").chmod(0o755)
    command = ["bash", "launch/install.sh", "--venv", str(venv)]
    given = os.environ | {"PYTHON": str(venv / "stand-in")}
    return subprocess.run(
        command, cwd=ROOT, env=given, capture_output=True, text=True, timeout=PATIENCE_SECONDS
    )


def test_an_environment_without_pip_is_made_again(tmp_path):
    answer = _install(tmp_path)
    assert answer.returncode == 2 and f"could not make {tmp_path}" in answer.stderr


def test_an_environment_of_another_checkout_is_left_to_it(tmp_path):
    venv, other = tmp_path / "venv", tmp_path / "other"
    venv.mkdir()
    (other / "launch").mkdir(parents=True)
    (other / "launch" / "install.sh").touch()
    (venv / ".amrlhf-installed").write_text(f"{'0' * 64} {other}\n")
    answer = _install(venv)
    assert answer.returncode == 2 and not answer.stdout and answer.stderr.count("\n") == 1
    assert f"{venv} belongs to the checkout {other}: " in answer.stderr


@pytest.mark.parametrize("owner", ["/no/checkout", str(ROOT)])
def test_an_environment_of_this_or_of_no_checkout_is_taken(tmp_path, owner):
    (tmp_path / ".amrlhf-installed").write_text(f"{'0' * 64} {owner}\n")
    assert f"could not make {tmp_path}" in _install(tmp_path).stderr


def _installed(venv: Path) -> Path:
    """An environment that install.sh takes for complete; its programs tell how they are called."""
    (venv / "bin").mkdir()
    for name in ("pip", "python", "ruff", "mypy"):
        program = venv / "bin" / name
        program.write_text(f'#!/bin/bash\n[[ "$1" == -c ]] || echo {name} "$@"\n')
        program.chmod(0o755)
    given = ("requirements.txt", "launch/constraints.txt", "pyproject.toml", "launch/install.sh")
    wanted = hashlib.sha256(b"".join((ROOT / name).read_bytes() for name in given)).hexdigest()
    tests = hashlib.sha256((ROOT / "requirements-test.txt").read_bytes()).hexdigest()
    (venv / ".amrlhf-installed").write_text(f"{wanted} {ROOT}\n{wanted} {ROOT} {tests}\n")
    return venv


@pytest.mark.parametrize(
    ("arguments", "checks"),
    [
        ((), True),
        (("-m", "not slow", "-x"), True),
        (("-n", "0", "tests/unit/launch/test_scripts.py"), False),
        (("tests/unit/launch/test_scripts.py::test_a_script_is_valid_bash",), False),
        (("-k", "scripts"), False),
    ],
    ids=str,
)
def test_the_code_is_checked_where_no_tests_are_chosen(tmp_path, arguments, checks):
    answer = subprocess.run(
        ["bash", "launch/test.sh", *arguments],
        cwd=ROOT,
        env=os.environ | {"VENV": str(_installed(tmp_path))},
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
    )
    *before, tests = answer.stdout.splitlines()
    assert answer.returncode == 0, answer.stderr
    assert before == (["ruff check", "ruff format --check", "mypy"] if checks else [])
    assert tests.startswith("python -m pytest -n ")
    assert tests.endswith(" ".join(("--no-loadscope-reorder", *arguments)))


def test_a_commit_is_checked_by_the_programs_of_the_test_script():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    script = (ROOT / "launch" / "test.sh").read_text()
    for hook in hooks:
        program, *options = hook["entry"].removeprefix(".venv/bin/").split()
        assert " ".join((f'"$VENV/bin/{program}"', *options)) + "\n" in script


@pytest.mark.parametrize("file", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda f: f.name)
def test_a_shipped_configuration_is_valid(file):
    config = load_config(file)
    check_run(config, PROCESSES.get(file.stem, DEMO_PROCESSES))
    assert config.run.name == file.stem.replace("_", "-")


def test_dependencies_are_listed_once():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert "dependencies" in project["project"]["dynamic"]
    assert project["tool"]["setuptools"]["dynamic"]["dependencies"]["file"] == ["requirements.txt"]
    for pinned in ("megatron-core==", "deepspeed=="):
        assert pinned in (ROOT / "requirements.txt").read_text()
