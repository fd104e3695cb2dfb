"""A rank whose launcher was killed ends itself, and says so; no other process does."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_amrlhf.run import launcher
from megatron_amrlhf.run.beats import read_beats
from megatron_amrlhf.run.folder import RunFolder
from megatron_amrlhf.run.launcher import ends_with_launcher, has_launcher
from megatron_amrlhf.run.postmortem import find_cause
from megatron_amrlhf.run.status_file import read_status
from tests.patience import PATIENCE_SECONDS
from tests.unit.config.samples import PRM, make_config

RANK = """
import sys, time
from pathlib import Path
from megatron_amrlhf.run.heartbeat import Heartbeat, RankProgress
from megatron_amrlhf.run.launcher import ends_with_launcher
folder, progress = Path(sys.argv[1]), RankProgress()
progress.enter("update", step=3)
told = {"every_seconds": 5.0, "on_beat": print, "on_error": print}
with ends_with_launcher(folder), Heartbeat(folder, 0, progress, **told):
    print("runs", flush=True)
    time.sleep(3600)
"""
# Starts a rank as DeepSpeed's launcher does, and waits for it.
LAUNCHER = "import subprocess, sys; subprocess.run([sys.executable, '-c', *sys.argv[1:]])"
DEEPSPEED = {"RANK": "0", "CROSS_RANK": "0"}


@pytest.fixture
def folder(tmp_path):
    return RunFolder.create(make_config(PRM, run={"folder": str(tmp_path)}), 0)


def wait_until(condition) -> None:
    end = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def has_ended(pid: int) -> bool:
    """Whether a process is gone, or waits for somebody to ask for its exit code."""
    try:
        return "State:\tZ" in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return True


@pytest.mark.parametrize("parent", ["launcher", "script"])
def test_a_rank_ends_with_its_launcher_but_not_with_a_script(folder, tmp_path, parent):
    variables = DEEPSPEED if parent == "launcher" else {"RANK": "0"}
    clean = {name: value for name, value in os.environ.items() if name not in launcher.MARKS}
    log = tmp_path / "log"
    with log.open("w") as out:
        process = subprocess.Popen(
            [sys.executable, "-c", LAUNCHER, RANK, str(folder.path)],
            env=clean | variables,
            stdout=out,
            stderr=out,
        )
    wait_until(lambda: "runs" in log.read_text())
    rank = read_beats(folder.path)[0].pid
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    if parent == "script":
        time.sleep(2 * launcher.LOOK_SECONDS)
        assert not has_ended(rank)
        os.kill(rank, signal.SIGKILL)
        return
    wait_until(lambda: has_ended(rank))
    why = f"its launcher (process {process.pid}) is gone, so it has ended"
    assert log.read_text().splitlines()[-1] == f"error: rank 0: {why}, without a checkpoint"
    status, beat = read_status(folder.path), read_beats(folder.path)[0]
    assert status["state"] == "failed" and why in status["message"]
    assert (beat.state, beat.error, beat.phase, beat.step) == ("failed", why, "update", 3)
    assert why in find_cause(folder.path, 0.0)


@pytest.mark.parametrize(
    ("environment", "is_one"),
    [
        ({}, False),
        ({"RANK": "0", "WORLD_SIZE": "2"}, False),
        (DEEPSPEED, True),
        ({"RANK": "1", "TORCHELASTIC_RUN_ID": "none"}, True),
        ({"TORCHELASTIC_RUN_ID": "none"}, False),
        ({"RANK": "1", "SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "4"}, True),
        ({"RANK": "3", "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "4"}, False),
        ({"RANK": "0", "SLURM_PROCID": "0"}, False),  # started by hand in a batch script
        ({"RANK": "0", "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"}, False),
    ],
)
def test_only_launchers_that_wait_for_their_ranks_are_watched(environment, is_one):
    assert has_launcher(environment) is is_one


@pytest.mark.parametrize("state", ["running", "finished"])
def test_a_run_that_has_finished_stays_so(folder, monkeypatch, capsys, state):
    """Its launcher may be killed while the ranks leave; nothing is written for another command."""
    folder.status(state, 3, "as it was")
    for name, value in DEEPSPEED.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(launcher, "LOOK_SECONDS", 0.01)
    codes: list[int] = []
    with ends_with_launcher(None, parent=-1, end=codes.append):
        wait_until(lambda: codes)
    assert json.loads((folder.path / "status.json").read_text())["message"] == "as it was"
    with ends_with_launcher(folder.path, parent=-1, end=codes.append):
        wait_until(lambda: len(codes) == 2)
    record = read_status(folder.path)
    assert record["state"] == ("failed" if state == "running" else "finished")
    assert codes == [launcher.EXIT_ORPHANED] * 2 and "is gone" in capsys.readouterr().err


def test_a_folder_that_is_gone_does_not_keep_a_rank_alive(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("CROSS_RANK", "0")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr(launcher, "LOOK_SECONDS", 0.01)
    (tmp_path / "status.json").write_text("{")
    codes: list[int] = []
    with ends_with_launcher(tmp_path, parent=-1, end=codes.append):
        wait_until(lambda: codes)
    assert "does not tell it" in capsys.readouterr().err
