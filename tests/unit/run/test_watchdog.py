"""Which rank is named, by whom, and when a run is left alone."""

import json
from dataclasses import asdict, replace

import pytest

from megatron_amrlhf.run.beats import Beat
from megatron_amrlhf.run.folder import RunFolder
from megatron_amrlhf.run.watchdog import EXIT_STALLED, Watchdog, find_laggard
from tests.unit.config.samples import PRM, make_config

LIMIT = 8.0
TIME = "2026-01-01T00:00:00+00:00"
WAITING = Beat(0, "far", 1, "running", 2, "update", 9, 5, LIMIT, True, 7, TIME, "", ("a:1 f: g()",))
WORKING = replace(WAITING, rank=1, waiting=False, stack=("b:1 stuck: loop()",))


@pytest.fixture
def folder(tmp_path):
    return RunFolder.create(make_config(PRM, run={"folder": str(tmp_path)}), 0)


def put(folder, *beats):
    for beat in beats:
        path = folder.path / "heartbeat" / f"rank-{beat.rank:04d}.json"
        path.write_text(json.dumps(asdict(beat)))


class Rank:
    """One rank's watchdog and the exit codes that it ended with."""

    def __init__(self, folder, world_size=2):
        self.codes = []
        self.dog = Watchdog(folder, world_size, LIMIT, self.codes.append)

    def stands(self, beat, seconds):
        self.dog.check(replace(beat, still_seconds=seconds))
        return self.codes


def test_a_short_delay_is_left_alone(folder, capsys):
    put(folder, WAITING, WORKING)
    assert Rank(folder).stands(WAITING, LIMIT / 2 - 0.1) == []
    assert capsys.readouterr().err == ""


def test_a_warning_comes_once_and_again_for_the_next_delay(folder, capsys):
    put(folder, WAITING, WORKING)
    one, other = Rank(folder), Rank(folder)
    for _ in range(2):
        assert one.stands(WAITING, LIMIT / 2) == other.stands(WORKING, LIMIT / 2) == []
        assert one.stands(WAITING, LIMIT - 0.1) == []
        warning = capsys.readouterr().err
        assert warning.count("warning") == warning.count("\n") == 1
        assert "rank 1 (host far, pid 1) is not in a collective" in warning
        assert one.stands(WAITING, 0.1) == other.stands(WORKING, 0.1) == []
    assert json.loads((folder.path / "status.json").read_text())["state"] == "running"


def test_at_the_limit_one_rank_reports_and_all_end(folder, capsys):
    put(folder, WAITING, WORKING)
    ranks = [(Rank(folder), WAITING), (Rank(folder), WORKING)]
    for rank, beat in ranks:
        assert rank.stands(beat, LIMIT / 2) == []
    put(folder, replace(WAITING, beats=8), replace(WORKING, beats=8))
    capsys.readouterr()
    for rank, beat in ranks:
        assert rank.stands(beat, LIMIT) == [EXIT_STALLED]
    err = capsys.readouterr().err
    assert err.count("error: ") == 1 and "b:1 stuck: loop()" in err
    status = json.loads((folder.path / "status.json").read_text())
    assert status["state"] == "failed" and "rank 1 " in status["message"]
    assert "is not in a collective, phase update of step 2" in status["message"]
    report = folder.watchdog.read_text()
    assert report.startswith(status["message"])
    assert "a:1 f: g()" in report and "b:1 stuck: loop()" in report


def test_a_rank_without_limit_ends_with_the_others(folder):
    folder.watchdog.write_text("")
    assert Rank(folder).stands(WAITING, 0.0) == [EXIT_STALLED]


def test_a_reporter_that_dies_does_not_keep_the_others(folder):
    put(folder, WAITING, WORKING)
    rank = Rank(folder)
    rank.stands(WAITING, LIMIT / 2)
    (folder.path / "heartbeat" / "reporter").touch()
    assert rank.stands(WAITING, LIMIT) == []
    assert rank.stands(WAITING, 1.3 * LIMIT) == [EXIT_STALLED]


@pytest.mark.parametrize("beats", [7, 8])
def test_a_heartbeat_that_stands_still_is_a_process_that_does_not_run(folder, beats):
    stopped = replace(WAITING, rank=1)
    put(folder, WAITING, stopped)
    rank = Rank(folder)
    rank.stands(WAITING, LIMIT / 2)
    put(folder, replace(WAITING, beats=8), replace(stopped, beats=beats))
    rank.stands(WAITING, LIMIT)
    message = json.loads((folder.path / "status.json").read_text())["message"]
    assert ("rank 1 (host far, pid 1) does not run any more" in message) is (beats == 7)


def test_the_laggard_is_the_rank_that_does_not_wait():
    ahead = replace(WORKING, rank=2, done=6)
    beats = [WAITING, WORKING, ahead, replace(WAITING, rank=3, step=1)]
    assert find_laggard(beats, set()).rank == 1
    assert find_laggard(beats, {3}).rank == 3
    assert find_laggard([*beats, Beat(4)], set()).rank == 4
    assert find_laggard([*beats, replace(WAITING, rank=4, state="failed")], {3}).rank == 4
    assert find_laggard([WAITING, replace(WORKING, state="finished")], {1}).rank == 0


@pytest.mark.parametrize("key", ["step", "phases", "done"])
def test_among_waiting_ranks_the_one_behind_is_named(key):
    behind = replace(WAITING, rank=1, **{key: 1})
    assert find_laggard([WAITING, behind], set()).rank == 1
