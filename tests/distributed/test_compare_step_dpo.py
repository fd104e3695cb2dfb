"""tools/compare_step_dpo.py: as many passes as it says, over the right tokens, on the engine."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from pathlib import Path

import pytest

from tests.distributed.processes import run_on
from tests.helpers_models import make_tiny_model

pytestmark = pytest.mark.distributed

TOOL = Path(__file__).resolve().parents[2] / "tools" / "compare_step_dpo.py"
TOLERANCE = 1e-5  # float32, other paddings
PAIRS, PROMPT, STEP = 2, 3, 5
SETTINGS = ["--dtype", "float32", "--pairs", str(PAIRS), "--repeats", "1"]
SETTINGS += ["--prompt-tokens", str(PROMPT), "--step-tokens", str(STEP), "--steps", "1", "4"]


def run_tool(arguments: list[str]) -> int:
    spec = importlib.util.spec_from_file_location("compare_step_dpo", TOOL)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where its dataclass looks for its names
    spec.loader.exec_module(module)
    return module.main(arguments)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tool")
    make_tiny_model(folder / "model")
    out = folder / "out"
    arguments = ["--model", str(folder / "model"), *SETTINGS, "--out", str(out)]
    assert run_on(1, run_tool, arguments) == [0]
    assert (out / "compare_step_dpo.png").stat().st_size > 0
    return json.loads((out / "compare_step_dpo.json").read_text())["results"]


def test_passes_and_tokens(found):
    assert [result["steps"] for result in found] == [1, 4]
    for result in found:
        steps = result["steps"]
        whole = 2 * PAIRS * (PROMPT + steps * STEP)
        prefixes = sum(2 * PAIRS * (PROMPT + k * STEP) for k in range(1, steps + 1))
        tokens = {"masked": whole, "prefixes": prefixes, "whole": steps * whole}
        for form, count in tokens.items():
            assert result[form]["tokens"] == count, form
            assert result[form]["passes"] == (1 if form == "masked" else steps), form
            assert len(result[form]["seconds"]) == 1 and result[form]["median_seconds"] > 0


def test_a_step_has_the_same_loss_whether_or_not_what_follows_is_there(found):
    one, four = found
    for form in ("prefixes", "whole"):
        assert math.isclose(one[form]["loss"], one["masked"]["loss"], rel_tol=TOLERANCE)
    assert math.isclose(four["prefixes"]["loss"], four["whole"]["loss"], rel_tol=TOLERANCE)
    assert not math.isclose(four["masked"]["loss"], four["whole"]["loss"], rel_tol=0.01)
