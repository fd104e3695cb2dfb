"""Whether a run still lives: seen from the counters of its heartbeats and from its processes."""

import json
import os
import socket
import subprocess
from dataclasses import asdict, replace
from datetime import UTC, datetime, timedelta

import pytest

from megatron_amrlhf.errors import UserError
from megatron_amrlhf.run import living
from megatron_amrlhf.run.beats import Beat
from megatron_amrlhf.run.folder import RunFolder
from megatron_amrlhf.run.living import refuse_living_run
from tests.unit.config.samples import PPO, make_config

HERE, ELSEWHERE = socket.gethostname(), "far"


def put(folder, beat):
    (folder / "heartbeat").mkdir(exist_ok=True)
    (folder / "heartbeat" / f"rank-{beat.rank:04d}.json").write_text(json.dumps(asdict(beat)))


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Puts a rank's beat; during each watch its counter rises by ``rise``."""
    waits = []

    def _run(host=ELSEWHERE, pid=None, age_seconds=0.0, state="running", rise=0):
        time = (datetime.now(UTC) - timedelta(seconds=age_seconds)).isoformat()
        beat = Beat(1, host, pid or os.getpid(), state, 2, beats=7, time=time, started="then")
        put(tmp_path, beat)

        def sleep(seconds):
            waits.append(seconds)
            put(tmp_path, replace(beat, beats=beat.beats + rise))

        monkeypatch.setattr(living.time, "sleep", sleep)
        return waits

    return _run


@pytest.mark.parametrize("host", [HERE, ELSEWHERE])
def test_a_run_whose_counter_rises_is_refused(run, tmp_path, host):
    run(host, rise=1)
    with pytest.raises(UserError, match=rf"rank 1 \(host {host}, pid .*started then.*/stop"):
        refuse_living_run(tmp_path)


@pytest.mark.parametrize("host", [HERE, ELSEWHERE])
def test_a_run_whose_counter_stands_still_is_not(run, tmp_path, host):
    waits = run(host)
    refuse_living_run(tmp_path)
    assert len(waits) == 1


@pytest.mark.parametrize("known", [{"age_seconds": 60}, {"state": "finished"}, {"host": HERE}])
def test_nobody_waits_for_a_run_that_is_surely_gone(run, tmp_path, known):
    with subprocess.Popen(["true"]) as gone:
        pass
    waits = run(**known, pid=gone.pid, rise=1)
    refuse_living_run(tmp_path)
    assert waits == []


def test_a_second_start_of_a_living_run_changes_nothing(run, tmp_path):
    config = make_config(PPO, run={"name": tmp_path.name, "folder": str(tmp_path.parent)})
    RunFolder.create(config, rank=0)
    before = (tmp_path / "status.json").read_bytes()
    run(rise=1)
    with pytest.raises(UserError, match="going on"):
        RunFolder.create(config, rank=0)
    assert (tmp_path / "status.json").read_bytes() == before
    assert (tmp_path / "heartbeat").exists()
