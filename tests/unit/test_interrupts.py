"""Ctrl-C while a program loads its libraries, which may catch any exception."""

import ast
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_amrlhf import interrupts
from megatron_amrlhf.interrupts import EXIT_INTERRUPTED, as_usual, end_at_once, loading
from tests.patience import PATIENCE_SECONDS
from tests.signals import signals_as_usual

ROOT = Path(__file__).parents[2]
LAUNCHING = ("demonstration", "estimate", "outcome", "prepare", "start")
PROGRAMS = [
    *sorted((ROOT / "tools").glob("*.py")),
    ROOT / "launch" / "slurm" / "submit.py",
    *(ROOT / "megatron_amrlhf" / "launching" / f"{name}.py" for name in LAUNCHING),
    ROOT / "megatron_amrlhf" / "__main__.py",
]
QUICK = ("__future__", "sys")
LIBRARY = """
import time
try:
    print("loading", flush=True)
    time.sleep(3600)
except BaseException:  # some do
    pass
"""


@pytest.fixture
def usual():
    """Python's own handling, whoever has started the tests."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_a_program_that_loads_ends_at_once_and_says_nothing(tmp_path):
    (tmp_path / "library.py").write_text(LIBRARY)
    imports = "from megatron_amrlhf.interrupts import loading"
    program = f"{imports}\nwith loading():\n    import library\nprint('went on')"
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        env=os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=signals_as_usual,
    )
    assert process.stdout.readline() == "loading\n"
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=PATIENCE_SECONDS)[0]
    assert said == "" and process.returncode == EXIT_INTERRUPTED


def test_afterwards_it_raises_as_usual(usual):
    with loading():
        assert signal.getsignal(signal.SIGINT) is interrupts._end
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    end_at_once()
    assert signal.getsignal(signal.SIGINT) is interrupts._end
    as_usual()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_what_else_is_done_on_it_stays(usual):
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # what a shell starts in the background
    end_at_once()
    as_usual()
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


@pytest.mark.parametrize("file", PROGRAMS, ids=lambda path: path.stem)
def test_every_program_begins_with_it(file):
    """Before anything is imported that takes time."""
    found = [name for name in first_imports(ast.parse(file.read_text())) if name not in QUICK]
    assert found[0] == "megatron_amrlhf.interrupts"


def first_imports(tree: ast.Module) -> list[str]:
    """Modules in the order in which the program imports them."""
    names = []
    for node in tree.body:
        inside = node.body if isinstance(node, ast.If) else [node]
        for each in inside:
            if isinstance(each, ast.ImportFrom):
                names.append(each.module)
            elif isinstance(each, ast.Import):
                names += [alias.name for alias in each.names]
    return names
