"""reward_error.py, compare_supervision.py and compare_step_dpo.py from the command line's side."""

import json

import pytest

from tests.helpers import load_tool
from tests.helpers_models import make_tiny_model

PNG_START = b"\x89PNG\r\n"
MAX_PNG_BYTES = 100_000

reward_error, compare_supervision = load_tool("reward_error"), load_tool("compare_supervision")
compare_step_dpo = load_tool("compare_step_dpo")
SMALL = ["--samples", "4", "--length", "40", "--snr", "2", "4", "--deltas", "0", "0.2"]


def sample(rewards, tokens=None):
    count = len(rewards)
    return {
        "step": 1,
        "prompt": "p",
        "answer": "x" * count,
        "token_ids": [7] * count,
        "tokens": tokens or ["x"] * count,
        "token_rewards": rewards,
        "signal": rewards,
        "baseline": 0.0,
        "delta": 0.0,
        "mask": [1] * count,
        "messages": [],
        "sequence_reward": 0.0,
        "chosen": True,
        "ended": True,
        "from_reference": False,
    }


def write_run(folder, *samples):
    lines = [json.dumps(record) + "\n" for record in samples]
    (folder / "samples.jsonl").write_text("".join(lines))
    return str(folder)


@pytest.mark.parametrize("extra", [[], ["--levels", "many"], ["--judge", "observed"]])
def test_synthetic_rewards_give_table_json_and_picture(tmp_path, capsys, extra):
    assert reward_error.main([*SMALL, *extra, "--out", str(tmp_path / "new")]) == 0
    out = capsys.readouterr().out
    assert "optimum" in out and "delta" in out
    result = json.loads((tmp_path / "new" / "reward_error.json").read_text())
    errors = result["errors"]["4"]
    assert errors["optimum"]["total"] <= min(errors[n]["total"] for n in ("token", "message"))
    picture = (tmp_path / "new" / "reward_error.png").read_bytes()
    assert picture.startswith(PNG_START) and len(picture) < MAX_PNG_BYTES


def test_a_runs_rewards_are_cut_at_its_newlines(tmp_path):
    rewards = [1.0, 1.0, -1.0, -1.0]
    run = write_run(tmp_path, sample(rewards, ["a", "b\n", "c", "d"]), sample([]))
    assert reward_error.main([run, "--noise", "0.5", "--out", run]) == 0
    result = json.loads((tmp_path / "reward_error.json").read_text())
    assert result["answers"] == 1
    totals = {name: error["total"] for name, error in result["errors"].items()}
    expected = {"sequence": 4.25, "step": 0.5, "token": 1.0, "message": 0.5, "optimum": 0.5}
    assert totals == pytest.approx(expected)


def test_answers_whose_reward_failed_are_left_out(tmp_path, capsys):
    right = sample([1.0, 1.0, -1.0, -1.0], ["a", "b\n", "c", "d"])
    failed = sample([0.0, 0.0, 0.0]) | {"sequence_reward": None}
    run = write_run(tmp_path, right, failed)
    assert reward_error.main([run, "--noise", "0.5", "--out", run]) == 0
    assert "1 of 2 answers are left out" in capsys.readouterr().out
    assert json.loads((tmp_path / "reward_error.json").read_text())["answers"] == 1


@pytest.mark.parametrize(
    ("samples", "expected"),
    [
        ([sample([1.0, 1.0, 1.0])], "--noise"),
        ([sample([1.0, None])], "sample 1: token_rewards are not all finite"),
        ([sample([])], "all answers are empty"),
        ([], "no samples"),
    ],
)
def test_unusable_runs_are_a_users_error(tmp_path, capsys, samples, expected):
    assert reward_error.main([write_run(tmp_path, *samples)]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1 and expected in err


def test_best_of_n_gives_table_json_and_picture(tmp_path, capsys):
    path = tmp_path / "answers.jsonl"
    lines = [
        {"problem_id": p, "correct": (p + i) % 3 == 0, "step_scores": [0.1 * i, 0.9], "orm": i}
        for p in range(2)
        for i in range(5)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert compare_supervision.main([str(path), "--out", str(tmp_path)]) == 0
    assert "PRM_O min" in capsys.readouterr().out
    assert json.loads((tmp_path / "compare_supervision.json").read_text())["n"] == [1, 2, 4]
    picture = (tmp_path / "compare_supervision.png").read_bytes()
    assert picture.startswith(PNG_START) and len(picture) < MAX_PNG_BYTES
    assert compare_supervision.main([str(path), "--n", "6"]) == 2
    assert "must be from 1 to 5" in capsys.readouterr().err
    assert compare_supervision.main([str(tmp_path / "none.jsonl")]) == 2


def test_problems_with_few_answers_can_be_left_out(tmp_path, capsys):
    path = tmp_path / "answers.jsonl"
    counts = {"few": 2, "many": 4, "more": 5}
    lines = [
        {"problem_id": name, "correct": i == 0, "step_scores": [0.5]}
        for name, count in counts.items()
        for i in range(count)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    arguments = [str(path), "--out", str(tmp_path), "--at-least"]
    assert compare_supervision.main([*arguments, "4"]) == 0
    assert "1 of 3 problems left out" in capsys.readouterr().out
    found = json.loads((tmp_path / "compare_supervision.json").read_text())
    assert (found["n"], found["problems"]) == ([1, 2, 4], 2)
    assert found["accuracy"]["random"][0] == (1 / 4 + 1 / 5) / 2
    assert compare_supervision.main([*arguments, "6"]) == 2
    assert "no problem has more than 5 answers" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_is_told_before_the_measurement(
    tmp_path, capsys, monkeypatch
):
    def never():
        raise AssertionError("the measurement has begun")

    monkeypatch.setattr(compare_step_dpo, "start_processes", never)
    make_tiny_model(tmp_path / "model", "qwen2")
    (tmp_path / "taken").touch()
    out = tmp_path / "taken" / "x"
    assert compare_step_dpo.main(["--model", str(tmp_path / "model"), "--out", str(out)]) == 2
    assert f"--out {out}: cannot be written" in capsys.readouterr().err
