"""What a run ended of, told from the files of its ranks."""

import json
import os
from dataclasses import asdict, replace
from datetime import UTC, datetime

import pytest

from megatron_amrlhf import cli
from megatron_amrlhf.run import living
from megatron_amrlhf.run.beats import Beat, read_beats
from megatron_amrlhf.run.postmortem import find_cause, first_failure

START = 0.0
LOST = "RuntimeError: [gloo/transport/tcp/pair.cc:537] Read error: Connection reset by peer"
TERMINATED = "Current thread 0x1 (most recent call first):\n  File x\n"
TIMER = "Timeout (0:00:20)!\nThread 0x1 (most recent call first):\n  File x\n"


def beat(rank, second, state="running", error=""):
    time = f"2026-01-01T00:00:{second:02d}.000+00:00"
    return Beat(rank, "far", 10 + rank, state, 2, "update", 9, 5, 0.0, True, 7, time, error)


def put(folder, *beats, dumps=(), state="running"):
    (folder / "heartbeat").mkdir()
    record = {"state": state, "step": 1, "message": "1 of 3 steps", "attempt": 2, "total": 3}
    record |= {"step_seconds": 1e9, "time": "2026-01-01T00:00:00+00:00"}
    (folder / "status.json").write_text(json.dumps(record))
    for one in beats:
        path = folder / "heartbeat" / f"rank-{one.rank:04d}.json"
        path.write_text(json.dumps(asdict(one)))
        path.with_suffix(".stacks.txt").write_text(dict(dumps).get(one.rank, ""))


@pytest.mark.parametrize("timer", ["", TIMER])
def test_a_rank_without_a_last_word_was_killed(tmp_path, timer):
    put(
        tmp_path,
        beat(0, 9, "failed", LOST),
        beat(1, 5),
        beat(2, 6),
        dumps={1: timer, 2: TERMINATED},
    )
    cause = find_cause(tmp_path, START)
    assert cause.startswith("rank 1 (host far, pid 11) was killed by SIGKILL")
    assert "phase update of step 2" in cause


@pytest.mark.parametrize("lives", [False, True])
def test_a_rank_of_another_host_that_still_beats_was_not_killed(tmp_path, monkeypatch, lives):
    here = replace(beat(0, 0, "failed", LOST), time=datetime.now(UTC).isoformat())
    there = replace(beat(1, 0), time=here.time)
    put(tmp_path, here, there)

    def go_on(seconds):
        later = json.dumps(asdict(replace(there, beats=there.beats + lives)))
        (tmp_path / "heartbeat" / "rank-0001.json").write_text(later)

    monkeypatch.setattr(living.time, "sleep", go_on)
    named = "rank 0 (host far, pid 10) failed" if lives else "rank 1 (host far, pid 11) was killed"
    assert find_cause(tmp_path, START).startswith(named)


def test_a_run_that_was_ended_on_demand_has_no_cause(tmp_path):
    put(tmp_path, beat(0, 9), state="stopped")
    assert find_cause(tmp_path, START) is None


def test_an_error_of_its_own_comes_before_lost_connections(tmp_path):
    own = "ValueError: planted"
    put(
        tmp_path,
        beat(0, 5, "failed", LOST),
        beat(1, 8, "failed", own),
        beat(2, 9, "failed", "KeyError: later"),
        beat(3, 30),  # killed by the launcher, because SIGTERM did not end it
    )
    assert find_cause(tmp_path, START).startswith(f"rank 1 (host far, pid 11) failed: {own}")


def test_a_fatal_signal_is_named(tmp_path):
    dump = "Fatal Python error: Segmentation fault\n\n" + TERMINATED
    put(tmp_path, beat(0, 9, "failed", LOST), beat(1, 5), dumps={1: dump})
    assert "rank 1 (host far, pid 11) died: Segmentation fault" in find_cause(tmp_path, START)


def test_ended_from_outside(tmp_path):
    put(tmp_path, beat(0, 9), beat(1, 9), dumps={0: TERMINATED, 1: TERMINATED})
    assert "ended from outside by SIGTERM" in find_cause(tmp_path, START)


def test_the_watchdogs_word_is_the_last(tmp_path):
    put(tmp_path, beat(0, 9), beat(1, 5))
    (tmp_path / "watchdog.txt").write_text("no progress: rank 3\n\nmore\n")
    assert find_cause(tmp_path, START) == "no progress: rank 3"


def test_finished_ranks_and_earlier_attempts_say_nothing(tmp_path):
    assert find_cause(tmp_path, START) is None
    put(tmp_path, beat(0, 9, "finished"), beat(1, 5, "finished"))
    assert find_cause(tmp_path, START) is None
    put_since = 4e9
    (tmp_path / "heartbeat" / "rank-0001.json").write_text(json.dumps(asdict(beat(1, 5))))
    assert find_cause(tmp_path, START) and find_cause(tmp_path, put_since) is None


def test_first_failure_is_the_earliest_one_of_its_own():
    beats = [beat(0, 3, "failed", LOST), beat(1, 9, "failed", "B: b"), beat(2, 8, "failed", "A: a")]
    assert "A: a" in first_failure(beats)
    assert LOST in first_failure(beats[:1] + [beat(1, 1)])
    assert first_failure([beat(0, 1)]) is None


def test_status_lists_the_ranks(tmp_path, capsys):
    put(tmp_path, beat(0, 9), replace(beat(1, 5), still_seconds=30.0))
    assert cli.main(["status", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("running, attempt 2, step 1 of 3: 1 of 3 steps; about ")
    assert lines[0].endswith(" min left") and "no sign of life" in lines[1]
    assert "rank 1" in lines[3] and "no progress for 30 s" in lines[3]


def test_status_after_the_end_names_the_cause_and_keeps_it(tmp_path, capsys):
    put(tmp_path, beat(0, 9, "failed", LOST), beat(1, 5))
    assert cli.main(["status", str(tmp_path), "--ended-since", "0"]) == 0
    out = capsys.readouterr().out
    status = json.loads((tmp_path / "status.json").read_text())
    assert status["state"] == "failed" and status["step"] == 1
    assert out == f"cause: {status['message']}\n" and "rank 1" in out


def test_status_lists_the_other_ranks_beside_one_that_it_cannot_read(tmp_path, capsys):
    put(tmp_path, beat(1, 9), beat(2, 9))
    (tmp_path / "heartbeat" / "rank-0002.json").write_text("{")
    assert cli.main(["status", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()[2:]
    assert lines[0] == "rank 0: no heartbeat yet" and lines[1].startswith("rank 1 (host far")
    assert lines[2] == "rank 2: its heartbeat file is damaged"


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"time": "yesterday"}'])
def test_a_damaged_status_is_one_line(tmp_path, capsys, text):
    (tmp_path / "status.json").write_text(text)
    assert cli.main(["status", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "status.json is damaged" in error and error.count("\n") == 1


def test_no_run_is_one_line(tmp_path, capsys):
    assert cli.main(["status", str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


STRAY = (
    "rank-x.json",
    "rank-.json",
    "rank-0002 (copy).json",
    "rank-00001.json",
    "rank-\u0663.json",
)


def test_stray_files_beside_the_heartbeats_are_no_ranks(tmp_path, capsys):
    """Neither a crash nor, by a large number in a name or a pipe, a status that never ends."""
    put(tmp_path, beat(0, 9), beat(1, 9))
    beats = tmp_path / "heartbeat"
    for name in (*STRAY, "rank-99999999999999999999.json"):
        (beats / name).write_text("{}")
    (beats / "rank-0004.json").mkdir()
    os.mkfifo(beats / "rank-0005.json")
    (beats / "rank-0006.json").symlink_to("/dev/zero")
    (beats / "rank-0007.json").symlink_to("rank-0007.json")
    (beats / "rank-999999.json").write_text(json.dumps(asdict(beat(3, 9))))
    (beats / "rank-0001.stacks.txt").unlink()
    (beats / "rank-0001.stacks.txt").mkdir()
    os.mkfifo(tmp_path / "watchdog.txt")
    assert cli.main(["status", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()[2:]
    assert [line.partition(" (")[0] for line in lines[:2]] == ["rank 0", "rank 1"]
    damaged = [f"rank {rank}: its heartbeat file is damaged" for rank in (4, 5, 6, 7, 999999)]
    assert lines[2:] == damaged
    assert find_cause(tmp_path, START).startswith("rank 0 (host far, pid 10) was killed")


@pytest.mark.parametrize(
    "change",
    [
        {"pid": 0},
        {"pid": -1},
        {"pid": 10**9},
        {"rank": 7},
        {"rank": "0"},
        {"state": "missing"},
        {"step": -1},
        {"still_seconds": float("nan")},
        {"still_seconds": -3.0},
        {"time": ""},
        {"time": "2026-01-01"},
        {"time": "9999-12-31T23:59:59+00:00"},
        {"stack": "text"},
        {"stack": None},
        {"beats": 1e99},
        {"error": None},
        {"waiting": 1},
    ],
)
def test_a_heartbeat_that_no_rank_has_written_is_damaged(tmp_path, change):
    """A pid of 0 or less would be a group of processes to `os.kill`."""
    put(tmp_path, beat(0, 9))
    file = tmp_path / "heartbeat" / "rank-0000.json"
    assert read_beats(tmp_path)[0].state == "running"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    assert [x.state for x in read_beats(tmp_path)] == ["unreadable"]
    assert read_beats(tmp_path, 2)[0].pid == 0 and read_beats(tmp_path, 2)[1].state == "missing"


def test_what_files_say_does_not_steer_the_terminal(tmp_path, capsys):
    steer = "\x1b[2J\x1b]0;x\x07\x9b31m\u202e\n\rmore"
    put(tmp_path, replace(beat(0, 9, "failed", steer), host=steer, phase=steer))
    status = tmp_path / "status.json"
    status.write_text(json.dumps(json.loads(status.read_text()) | {"message": steer}))
    assert cli.main(["status", str(tmp_path)]) == 0
    assert cli.main(["status", str(tmp_path), "--ended-since", "0"]) == 0
    assert cli.main(["status", str(tmp_path / steer)]) == 2
    (tmp_path / "watchdog.txt").write_text(steer)
    assert cli.main(["status", str(tmp_path), "--ended-since", "0"]) == 0
    said = "".join(capsys.readouterr())
    assert said.count("\\x1b[2J") >= 6
    assert all(c == "\n" or c.isprintable() for c in said)
