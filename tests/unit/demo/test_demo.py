"""The demonstration data is whole, the same for a seed, and never overwrites foreign files."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from megatron_amrlhf.data.jsonl import read_jsonl
from megatron_amrlhf.demo import data as demo
from megatron_amrlhf.demo.data import write_demo_data
from megatron_amrlhf.demo.general_prompts import general_prompts
from megatron_amrlhf.errors import UserError
from tests.patience import PATIENCE_SECONDS

FILES = [
    f"{kind}_{split}.jsonl"
    for kind in ("prm", "pairs", "prompts")
    for split in ("train", "heldout")
]
ROOT = Path(__file__).parents[3]


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("kind", ["sums", "words"])
def test_files_are_whole_and_train_and_heldout_are_disjoint(tmp_path, kind):
    assert write_demo_data(tmp_path / "d", 0, 60, 20, kind)
    assert sorted(contents(tmp_path / "d")) == sorted([*FILES, "demo.json"])
    rows = {name: read_jsonl(tmp_path / "d" / name, {"prompt": str}) for name in FILES}
    prompts = {name: {row["prompt"] for row in rows[name]} for name in FILES}
    assert [len(rows[name]) for name in FILES[:2]] == [60, 20]
    for name in ("prm", "pairs", "prompts"):
        assert not prompts[f"{name}_train.jsonl"] & prompts[f"{name}_heldout.jsonl"]
    for split in ("train", "heldout"):
        assert prompts[f"pairs_{split}.jsonl"] == prompts[f"prm_{split}.jsonl"]
        general = set(general_prompts(split)) if kind == "words" else set()
        assert prompts[f"prompts_{split}.jsonl"] == prompts[f"prm_{split}.jsonl"] | general
        kinds = ["answer" in row for row in rows[f"prompts_{split}.jsonl"][:40]]
        assert set(kinds) == ({True, False} if general else {True})  # mixed


@pytest.mark.parametrize("kind", ["sums", "words"])
def test_a_pair_is_a_right_and_a_wrong_solution_of_the_same_problem(tmp_path, kind):
    write_demo_data(tmp_path, 0, 60, 20, kind)
    problems = read_jsonl(tmp_path / "prm_train.jsonl", {"steps": list})
    shared = {"sums": {"system", "history"}, "words": set()}[kind]
    for pair, problem in zip(read_jsonl(tmp_path / "pairs_train.jsonl", {}), problems, strict=True):
        assert pair["prompt"] == problem["prompt"] and pair["chosen"] != pair["rejected"]
        assert pair.keys() - {"prompt", "chosen", "rejected"} == shared
        answer = f"The answer is {problem['answer']}."
        assert pair["chosen"].endswith(answer)
        if all(problem["labels"]):
            assert pair["chosen"] == "\n".join(problem["steps"])


def test_a_second_call_changes_nothing(tmp_path):
    assert write_demo_data(tmp_path, 0, 30, 10)
    times = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert not write_demo_data(tmp_path, 0, 30, 10)
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == times


def test_other_parameters_replace_the_data_and_the_same_ones_give_the_same_bytes(tmp_path):
    write_demo_data(tmp_path / "a", 0, 30, 10)
    first = contents(tmp_path / "a")
    assert write_demo_data(tmp_path / "a", 1, 30, 10)
    assert contents(tmp_path / "a") != first
    assert write_demo_data(tmp_path / "b", 0, 30, 10)
    assert contents(tmp_path / "b") == first


def test_an_interrupted_write_is_completed(tmp_path, monkeypatch):
    write_demo_data(tmp_path, 0, 30, 10)
    whole = contents(tmp_path)
    write_demo_data(tmp_path, 1, 30, 10)
    real = demo.write_atomic

    def fail_at_the_third(path, content):
        if Path(path).name == demo.PROMPTS_TRAIN:
            raise OSError(28, "No space left on device")
        real(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(demo, "write_atomic", fail_at_the_third)
        with pytest.raises(UserError, match="No space left"):
            write_demo_data(tmp_path, 0, 30, 10)
    assert write_demo_data(tmp_path, 0, 30, 10)
    assert contents(tmp_path) == whole


def test_foreign_and_edited_files_are_never_overwritten(tmp_path):
    (tmp_path / "prm_train.jsonl").write_text("mine\n")
    with pytest.raises(UserError, match="prm_train.jsonl: this file is not"):
        write_demo_data(tmp_path, 0, 30, 10)
    assert contents(tmp_path) == {"prm_train.jsonl": b"mine\n"}


@pytest.mark.parametrize("counts", [(0, 0, 1), (0, 1, 0), (-1, 1, 1)])
def test_counts_and_seed_are_checked(tmp_path, counts):
    with pytest.raises(UserError, match="at least 1"):
        write_demo_data(tmp_path, *counts)


def test_general_prompts_are_distinct_english_and_chinese():
    prompts = general_prompts()
    chinese = [text for text in prompts if any("\u4e00" <= letter <= "\u9fff" for letter in text)]
    assert len(chinese) >= 20 and len(prompts) - len(chinese) >= 40
    assert len(set(prompts)) == len(prompts)
    train, heldout = general_prompts("train"), general_prompts("heldout")
    assert sorted(train + heldout) == sorted(prompts) and set(heldout) & set(chinese)


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--help"], 0, "algorithm kind: prm"),
        (["{folder}", "--num-problems", "8", "--num-heldout", "4"], 0, "data written"),
        (["{folder}", "--num-problems", "0"], 2, "error: demo data needs"),
        (["{folder}", "--num-problems", "many"], 2, "invalid int value"),
        ([], 2, "FOLDER"),
    ],
)
def test_the_tool_teaches_and_exits_with_2_on_mistakes(tmp_path, arguments, code, words):
    tool = [sys.executable, str(ROOT / "tools" / "make_demo_data.py")]
    filled = [argument.format(folder=tmp_path / "d") for argument in arguments]
    done = subprocess.run(
        tool + filled,
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(ROOT)},
        timeout=PATIENCE_SECONDS,
    )
    assert done.returncode == code, done.stderr
    assert words in done.stdout + done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "text",
    ['{"mine": 1}', "[]", '{"parameters": {}, "sha256": []}', "[" * 100_000, "\0" * 50],
)
def test_a_manifest_of_somebody_else_is_never_written_over(tmp_path, text):
    (tmp_path / "demo.json").write_text(text)
    with pytest.raises(UserError, match="demo.json: this file is not as the demo wrote it"):
        write_demo_data(tmp_path, 0, 4, 2)
    assert (tmp_path / "demo.json").read_text() == text
    assert [x.name for x in tmp_path.iterdir()] == ["demo.json"]
