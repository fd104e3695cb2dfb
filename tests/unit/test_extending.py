"""The recipes of docs/extending.md, each carried out on a copy of the package."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "extending.md"
RECIPE = re.compile(r"^## (?P<title>.+?)\n.*?^```diff\n(?P<diff>.+?)^```$", re.M | re.S)
RECIPES = {x["title"]: x["diff"] for x in RECIPE.finditer(PAGE.read_text())}
# Files that an addition may touch in the package.
MOST_FILES = {
    "A variant of a loss": 2,
    "A signal or a threshold": 2,
    "A format of step labels": 2,
    "A reward": 2,
    "A model family": 1,
    "An algorithm": 4,
}


@pytest.fixture(scope="module")
def copy(tmp_path_factory) -> Path:
    """A copy of the package with all recipes carried out, one after the other."""
    copy = tmp_path_factory.mktemp("extended")
    for part in ("megatron_amrlhf", "configs"):
        shutil.copytree(ROOT / part, copy / part)
    for title, diff in RECIPES.items():
        applied = subprocess.run(
            ["git", "apply", "-"], input=diff, text=True, cwd=copy, capture_output=True
        )
        assert applied.returncode == 0, (
            f"docs/extending.md, {title}: the example's context lines are no longer those of the "
            f"code, bring them up to date there: {applied.stderr}"
        )
    return copy


def test_each_recipe_has_an_example_of_no_more_files_than_it_says():
    files = {x: set(re.findall(r"^\+\+\+ b/(\S+)", diff, re.M)) for x, diff in RECIPES.items()}
    assert {title: len(found) for title, found in files.items()} == MOST_FILES
    for title, found in files.items():
        text = PAGE.read_text().split(f"## {title}\n")[1]
        for path in found:
            told = path.removeprefix("megatron_amrlhf/")
            assert told in text or Path(told).stem in ("dpo", "rloo"), f"{title}: {told}"


def test_the_recipes_pass_the_checks_of_the_house(copy):
    """Lint and format of a stranger's additions; the type checker takes too long for that here."""
    for command in (["check"], ["format", "--check"]):
        settings = ["--config", str(ROOT / "pyproject.toml"), "--no-cache"]
        done = subprocess.run(
            [sys.executable, "-m", "ruff", *command, *settings, "megatron_amrlhf"],
            cwd=copy,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout + done.stderr


def test_what_the_recipes_add_works(copy, tmp_path):
    """Numbers by hand; the algorithm goes through config, plan, doctor and two training steps."""
    environment = os.environ | {"PYTHONPATH": f"{copy}:{ROOT}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.extended", str(copy), str(tmp_path)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "all recipes work"
