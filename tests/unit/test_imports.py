"""The import graph has one direction, and heavy libraries stay where they belong."""

import ast
import sys
from pathlib import Path

import pytest

PACKAGE = "megatron_amrlhf"
ROOT = Path(__file__).resolve().parents[2] / PACKAGE
ORDER = (
    "interrupts errors arguments reading files owned ports rendezvous sizes slurm config mask "
    "losses types parallel data demo models engine rollout rewards checkpoint conversion planning "
    "run report experience algorithms studies commands doctor cli_options cli launching __main__"
).split()
MEGATRON_MAY = ("parallel/", "models/", "rollout/", "conversion/torch_dist.py")
DEEPSPEED_MAY = (
    "engine/",
    "parallel/compat.py",
    "conversion/deepspeed_folder.py",
    "config/deepspeed_models.py",
)
TORCH_ONLY = ("mask", "losses")
FILES = sorted(ROOT.rglob("*.py"))


def imports_of(source: str, package: tuple[str, ...]) -> list[str]:
    """Dotted names that a file imports, also inside functions; relative ones made absolute.

    Args:
        source: the file's text.
        package: the parts of the package that holds the file.
    """
    names = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = list(package[: len(package) - node.level + 1]) if node.level else []
            module = ".".join(base + ([node.module] if node.module else []))
            # "from megatron_amrlhf import x" imports megatron_amrlhf.x
            names += [f"{module}.{a.name}" for a in node.names] if module == PACKAGE else [module]
    return names


def test_no_module_is_loaded_by_a_string():
    """The order below would not see it; what is heavy is imported inside a function by name."""
    calls = ("import_module(", "__import__(")
    assert [str(x) for x in FILES if any(call in x.read_text() for call in calls)] == []


def problems_of(relative: str, source: str) -> list[str]:
    """What a file of the package imports that it may not."""
    parts = Path(relative).with_suffix("").parts
    own, package = parts[0], (PACKAGE, *parts[:-1])
    if own == "__init__":
        return []
    problems = [] if own in ORDER else [f"{own} has no place in ORDER"]
    for name in imports_of(source, package):
        top = name.split(".")[0]
        if top == PACKAGE:
            target = name.split(".")[1] if "." in name else own
            if target not in ORDER:
                problems.append(f"{relative} imports {name}, which has no place in ORDER")
            elif target != own and ORDER.index(target) > ORDER.index(own):
                problems.append(f"{relative} imports {name}, which comes later")
            if own in TORCH_ONLY and target not in TORCH_ONLY:
                problems.append(f"{relative} imports {name}, {own} needs nothing but torch")
        elif top == "megatron" and not relative.startswith(MEGATRON_MAY):
            problems.append(f"{relative} imports {name}")
        elif top == "deepspeed" and not relative.startswith(DEEPSPEED_MAY):
            problems.append(f"{relative} imports {name}")
        elif own in TORCH_ONLY and top != "torch" and top not in sys.stdlib_module_names:
            problems.append(f"{relative} imports {name}, {own} needs nothing but torch")
    return problems


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_imports_only_what_comes_before_it(path):
    assert problems_of(path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("relative", "source"),
    [
        ("config/load.py", "from megatron_amrlhf.engine import zero3"),
        ("config/load.py", "from megatron_amrlhf import cli"),
        ("config/load.py", "from ..engine.zero3 import Zero3Engine"),
        ("data/prompts.py", "def f():\n    import megatron_amrlhf.models.build"),
        ("report/console.py", "from megatron_amrlhf.algorithms.ppo import step"),
        ("engine/zero3.py", "import megatron.core"),
        ("algorithms/ppo.py", "import deepspeed"),
        ("parallel/mesh.py", "from deepspeed.utils import groups"),
        ("mask/schmitt.py", "import numpy"),
        ("losses/ppo.py", "from megatron_amrlhf.config.schema import Config"),
        ("surprise/new.py", "import os"),
        ("config/load.py", "from megatron_amrlhf.surprise import new"),
    ],
)
def test_a_planted_wrong_import_is_found(relative, source):
    assert problems_of(relative, source)


@pytest.mark.parametrize(
    ("relative", "source"),
    [
        ("losses/ppo.py", "import math\nimport torch\nfrom megatron_amrlhf.mask.apply import x"),
        ("mask/bits.py", "from .schmitt import signs\nfrom torch.nn import functional"),
        ("models/build.py", "from megatron.core import mpu\nfrom megatron_amrlhf.types import A"),
        ("parallel/compat.py", "import deepspeed\nimport megatron.core"),
        ("config/load.py", "from megatron_amrlhf.errors import UserError"),
        ("algorithms/ppo.py", "from megatron_amrlhf.report.console import RunConsole"),
    ],
)
def test_allowed_imports_pass(relative, source):
    assert problems_of(relative, source) == []
