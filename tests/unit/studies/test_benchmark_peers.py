"""tools/benchmark_peers.py: its figures by hand, and a real run of a tiny model."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

from rich.console import Console

TOOL = Path(__file__).resolve().parents[3] / "tools" / "benchmark_peers.py"
TINY_RUN = """
import runpy, sys
tool = runpy.run_path(sys.argv[1])
tool["SHAPES"]["12m"] |= {"hidden": 16, "layers": 1, "heads": 4, "kv": 2, "ffn": 16, "vocab": 64}
for name, work in tool["WORKS"].items():
    tool["WORKS"][name] = tool["Work"](2, 3, work.samples, 4)
sys.exit(tool["main"](["--rounds", "2", "--out", sys.argv[2]]))
"""


def load():
    spec = importlib.util.spec_from_file_location("benchmark_peers", TOOL)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


benchmark_peers = load()


def seconds(*walls: float) -> list[dict]:
    return [{"wall": wall, "cpu": 2 * wall} for wall in walls]


def test_the_ratio_is_the_median_of_the_rounds():
    sides = {"ours": seconds(1.0, 2.0, 4.0), "generate": seconds(3.0, 3.0, 2.0)}
    table = benchmark_peers.table_of({"12m": {"16 prompts": sides}})
    console = Console(width=120)
    with console.capture() as captured:
        console.print(table)
    text = captured.get()
    assert "2.00 (4.00)" in text and "3.00 (6.00)" in text
    assert "1.50 (0.50 to 3.00)" in text


def test_a_wrong_size_is_refused(capsys):
    assert benchmark_peers.main(["--sizes", "1t"]) == 2
    assert "--sizes" in capsys.readouterr().err


def test_both_sides_run_and_are_written(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", TINY_RUN, str(TOOL), str(tmp_path)],
        cwd=TOOL.parents[1],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "benchmark_peers.json").read_text())["seconds"]["12m"]
    assert found.keys() == benchmark_peers.WORKS.keys()
    for sides in found.values():
        assert [len(sides[side]) for side in ("ours", "generate")] == [2, 2]
        assert all(each["wall"] > 0 for side in sides.values() for each in side)
