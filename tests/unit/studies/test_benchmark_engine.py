"""tools/benchmark_engine.py from the command line's side; no process is started."""

import importlib.util
import sys
from pathlib import Path

import pytest
from rich.console import Console

from megatron_amrlhf.studies.engine_tables import engine_tables

TOOL = Path(__file__).resolve().parents[3] / "tools" / "benchmark_engine.py"
SMALL = ["--size", "layers=4", "hidden=32", "heads=4", "kv_heads=2", "ffn=24", "vocab=50"]


def load():
    spec = importlib.util.spec_from_file_location("benchmark_engine", TOOL)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


benchmark_engine = load()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["tp2"], "must look like tp2-pp2-dp1"),
        (["tp1-pp1-dp1-fast"], "-fast is none of vN, sp"),
        (["tp1-pp3-dp1"], "does not divide the model's 4 layers"),
        (["tp4-pp1-dp1"], "does not divide the model's 2 key-value heads"),
        (["tp1-pp1-dp3"], "--answers 16 do not divide by 3"),
        (["tp1-pp1-dp1", "--set", "engine.gahter=step"], "did you mean"),
        (["tp1-pp1-dp1", "--size", "hiden=3"], "--size hiden=3"),
        (["tp1-pp1-dp1", "--size", "heads=3"], "heads must divide hidden"),
        (["tp1-pp1-dp1", "--model", "/no/such/model"], "/no/such/model"),
        (["tp1-pp1-dp1", "--out", f"{TOOL}/x"], f"--out {TOOL}/x: cannot be written"),
    ],
)
def test_a_wrong_layout_or_size_is_one_line(capsys, monkeypatch, arguments, expected):
    def never(*_unused):
        raise AssertionError("processes were started")

    monkeypatch.setattr(benchmark_engine, "_start", never)
    own_model = {"--size", "--model"} & set(arguments)
    model = [] if own_model else SMALL
    assert benchmark_engine.main(["--layouts", *arguments, *model]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1 and expected in err


def report(rank, scale):
    volumes = {"send over pipeline": 1024.0 * scale, "receive over pipeline": 4096.0}
    return {
        "stage": rank,
        "num_blocks": 3,
        "seconds": {phase: [4.0, 1.0, 2.0] for phase in benchmark_engine.PHASES},
        "counted": {phase: volumes for phase in benchmark_engine.PHASES},
        "analytic": {phase: {"send over pipeline": 1024.0} for phase in benchmark_engine.PHASES},
        "peak_bytes": dict.fromkeys(benchmark_engine.PHASES, 2**20 * scale),
        "analytic_bytes": dict.fromkeys(benchmark_engine.PHASES, 2**20),
        "planned_bytes": dict.fromkeys(benchmark_engine.PHASES, 2**20),
    }


def test_rounds_take_turns_and_give_medians_and_tables(capsys, monkeypatch, tmp_path):
    started = []

    def start(layout, work, *_unused):
        started.append((layout.name, work.counts))
        return [report(0, 1), report(1, 2)]

    monkeypatch.setattr(benchmark_engine, "_start", start)
    layouts = ["tp1-pp2-dp1", "tp1-pp2-dp1-v2-bf16"]
    out = tmp_path / "new"
    arguments = ["--layouts", *layouts, *SMALL, "--rounds", "2", "--out", str(out)]
    assert benchmark_engine.main(arguments) == 0
    assert started == [(name, first) for first in (True, False) for name in layouts]
    record = benchmark_engine.json.loads((out / "benchmark_engine.json").read_text())
    measured = record["layouts"][layouts[1]]
    assert measured["seconds"]["update"] == 2.0
    assert measured["tokens_per_second"]["rollout"] == 16 * 32 / 2.0
    assert measured["tokens_per_second"]["score"] == 2 * 16 * 96 / 2.0
    assert measured["bubble"] == pytest.approx(1 / (2 * 3 + 1))
    assert measured["config"]["model"]["dtype"] == "bfloat16"
    assert layouts[0] in capsys.readouterr().out
    console = Console(width=200, record=True, file=open(tmp_path / "t.txt", "w"))
    for table in engine_tables(record):
        console.print(table)
    text = console.export_text()
    # The rank that sends most, and the one with the highest peak.
    assert "2 KiB" in text and "+100.0%" in text and "2 MiB" in text
    assert "receive" not in text
