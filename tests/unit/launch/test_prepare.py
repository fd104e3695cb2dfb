"""What is done before any process of a run is started: refusals, folders of logs."""

import json
import os
from unittest import mock

import pytest
import yaml

from megatron_amrlhf.errors import UserError
from megatron_amrlhf.launching import prepare
from megatron_amrlhf.launching.prepare import new_attempt, refuse_for_shells
from megatron_amrlhf.run.folder import RunFolder
from tests.unit.config.samples import PPO, make_config


@pytest.fixture(autouse=True)
def environment():
    """What `prepare.main` sets for the ranks is gone after the test."""
    with mock.patch.dict(os.environ):
        yield


@pytest.fixture
def start(tmp_path):
    def write(attempt: str, *ranks: int) -> None:
        folder = tmp_path / "logs" / attempt
        folder.mkdir(parents=True)
        for rank in ranks:
            (folder / f"2026_rank{rank}.log").touch()

    return write


def test_a_start_never_gets_an_earlier_ones_logs(tmp_path, start):
    assert new_attempt(tmp_path, 0) == "attempt-01"
    start("attempt-01", 0, 1)
    start("attempt-09", 0, 1)
    start("attempt-old", 0)
    assert new_attempt(tmp_path, 0) == "attempt-10"
    status = {"attempt": 12, "state": "failed", "step": 3, "message": ""}
    status["time"] = "2026-01-01T00:00:00+00:00"
    (tmp_path / "status.json").write_text(json.dumps(status))
    assert new_attempt(tmp_path, 0) == "attempt-13"


@pytest.mark.parametrize("first", [0, 2])
def test_nodes_started_one_by_one_share_a_folder(tmp_path, start, first):
    start("attempt-01", 0, 1, 2, 3)
    start("attempt-02", first, first + 1)  # the node that came first
    assert new_attempt(tmp_path, 2 - first) == "attempt-02"
    assert new_attempt(tmp_path, first) == "attempt-03"


@pytest.mark.parametrize(
    "text", ["a b", "a;b", "$HOME", "a<b", "*", "`a`", "a|b", "{a: 1}", "%h", ""]
)
def test_what_a_shell_would_change_is_refused_with_the_way_out(text):
    with pytest.raises(UserError, match="--node-rank"):
        refuse_for_shells([text])


def test_what_a_shell_leaves_is_taken():
    refuse_for_shells(["train", "/r/ppo.yaml", "--set", "optimizer.lr=1e-6", "a.b=[1,2]", "~/x"])


def test_a_refused_start_leaves_another_runs_folder_alone(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(prepare, "check_files", lambda *arguments: None)
    config = make_config(PPO, run={"folder": str(tmp_path)})
    folder = RunFolder.create(config, rank=0)
    folder.stop.touch()
    folder.metrics.write_text('{"step": 1}\n')
    before = {x: x.read_bytes() for x in folder.path.rglob("*") if x.is_file()}
    other = make_config(PPO, run={"folder": str(tmp_path)}, model={"path": "other"})
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(other.model_dump(mode="json")))
    assert prepare.main(["--", "train", str(tmp_path / "run.yaml")]) == 2
    assert "choose another run.name" in capsys.readouterr().err
    assert {x: x.read_bytes() for x in folder.path.rglob("*") if x.is_file()} == before


def test_missing_answers_are_told_before_any_folder_is_made(config, tmp_path, capsys):
    answers, out = str(tmp_path / "no.jsonl"), tmp_path / "scores"
    (tmp_path / "prm").mkdir()
    given = ["score", str(config), "--answers", answers, "--out", str(out)]
    assert prepare.main(["--", *given, "--set", f"reward_model.path={tmp_path / 'prm'}"]) == 2
    assert capsys.readouterr().err == f"error: --answers {answers}: no such file\n"
    assert not out.exists()


def test_logs_of_an_earlier_start_are_not_mixed_with_new_ones(config, tmp_path, capsys):
    given = ["--logs", str(tmp_path / "logs"), "--", "train", str(config)]
    assert prepare.main(given) == 0
    (tmp_path / "logs" / "20260101_rank0.log").touch()
    assert prepare.main(given) == 2
    assert "has an earlier start's logs: give a new folder" in capsys.readouterr().err


@pytest.mark.parametrize("key", ["--logs", "run.folder"])
def test_a_folder_that_cannot_be_written_is_blamed_on_its_option(config, tmp_path, capsys, key):
    (tmp_path / "file").touch()
    wrong = str(tmp_path / "file" / "x")
    logs = ["--logs", wrong] if key == "--logs" else []
    overrides = ["--set", f"run.folder={wrong}"] if key == "run.folder" else []
    assert prepare.main([*logs, "--", "train", str(config), *overrides]) == 2
    told = capsys.readouterr().err
    assert told.startswith(f"error: {key} {wrong}") and "cannot be written" in told
