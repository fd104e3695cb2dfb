"""tools/benchmark_peers.py: its figures by hand, and real runs of a tiny model."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console
from transformers import AutoTokenizer

from megatron_amrlhf.errors import UserError
from megatron_amrlhf.studies import peer_training
from megatron_amrlhf.studies.peer_inputs import (
    POLICY,
    ROWS,
    SHAPES,
    write_config,
    write_data,
    write_models,
)
from megatron_amrlhf.studies.peer_tables import Found, per_step, table_of

TOOL = Path(__file__).resolve().parents[3] / "tools" / "benchmark_peers.py"
TINY_RUN = """
import runpy, sys
from megatron_amrlhf.studies import peer_rollouts
from megatron_amrlhf.studies.peer_inputs import SHAPES
SHAPES["12m"] |= {"hidden": 16, "layers": 1, "heads": 4, "kv": 2, "ffn": 16, "vocab": 64}
for name, work in peer_rollouts.WORKS.items():
    peer_rollouts.WORKS[name] = peer_rollouts.Work(2, 3, work.samples, 4)
sys.exit(runpy.run_path(sys.argv[1])["main"](sys.argv[2:]))
"""


def load():
    spec = importlib.util.spec_from_file_location("benchmark_peers", TOOL)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


benchmark_peers = load()


def found(*walls: float, peak: int | None = None) -> list[Found]:
    return [Found(wall, 2 * wall, peak) for wall in walls]


def run_tiny(folder: Path, *arguments: str) -> dict:
    done = subprocess.run(
        [sys.executable, "-c", TINY_RUN, str(TOOL), "--out", str(folder), *arguments],
        cwd=TOOL.parents[1],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "benchmark_peers.json").read_text())["found"]["12m"]


def test_the_ratio_is_the_median_of_the_rounds():
    sides = {
        "ours": found(1.0, 2.0, 4.0, peak=2**30),
        "trl 1": found(3.0, 3.0, 2.0, peak=3 * 2**29),
    }
    console = Console(width=200)
    with console.capture() as captured:
        console.print(table_of({"12m": {"dpo": sides}}))
    text = captured.get()
    assert "2.00 (4.00)" in text and "3.00 (6.00)" in text
    assert text.count("1.50 (0.50 to 3.00)") == 2  # by the clock and of CPU seconds
    assert "1.00 / 1.50" in text


def test_a_step_is_what_lies_between_two_ends():
    ends = [(10.0, 100.0), (11.0, 102.0), (14.0, 103.0), (16.0, 107.0)]
    assert per_step(ends, 5) == Found(2.0, 2.0, 5)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--sizes", "1t"], "--sizes"),
        (["--works", "dpo"], "--peers"),
        (["--peers", "no-such-python"], "no-such-python"),
        (["--steps", "2"], "--steps"),
    ],
)
def test_a_wrong_argument_is_refused(arguments, words, capsys):
    assert benchmark_peers.main(arguments) == 2
    assert words in capsys.readouterr().err


def test_a_row_has_128_tokens_for_everyone(tmp_path):
    write_models("12m", tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / POLICY)
    assert len(tokenizer) == SHAPES["12m"]["vocab"]
    row = json.loads(write_data("12m", tmp_path, "dpo").read_text().splitlines()[0])
    for answer in (row["chosen"], row["rejected"]):
        turns = [{"role": "user", "content": row["prompt"]}]
        turns.append({"role": "assistant", "content": answer})
        ids = tokenizer.apply_chat_template(turns, return_dict=False)
        assert len(ids) == 128 and tokenizer.unk_token_id not in ids
    config = json.loads(write_config(tmp_path, "dpo", False, 3, "float32").read_text())
    assert 2 * config["rollout"]["prompts_per_step"] == ROWS


def test_rollouts_run_and_are_written(tmp_path):
    works = run_tiny(tmp_path, "--rounds", "2")
    assert len(works) == 2
    for sides in works.values():
        assert [len(sides[side]) for side in ("ours", "generate")] == [2, 2]
        assert all(each["wall"] > 0 for side in sides.values() for each in side)


def test_training_runs_beside_trl(tmp_path):
    works = ["--works", "dpo-masked", "--peers", sys.executable]
    sides = run_tiny(tmp_path, "--rounds", "1", "--steps", "3", *works)["dpo-masked"]
    assert sides.keys() == {"ours", f"trl {importlib.metadata.version('trl')}"}
    assert all(side[0]["peak_bytes"] > 2**27 and side[0]["wall"] > 0 for side in sides.values())


def test_a_trl_without_a_trainer_is_left_out_and_a_failure_is_not(tmp_path):
    leaves = [sys.executable, "-c", f"raise SystemExit({peer_training.NOT_THERE})"]
    assert peer_training._measured(leaves, tmp_path / "record.json") == ("", None)
    with pytest.raises(UserError, match=r"(?s)exit code 1 of .*ZeroDivisionError"):
        peer_training._measured([sys.executable, "-c", "1 / 0"], tmp_path / "record.json")
