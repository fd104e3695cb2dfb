"""A heartbeat says where the main thread is, also where that thread lets no other one run."""

import ctypes
import json
import math
import queue
import signal
import subprocess
import sys
import threading
import time

import pytest

from megatron_amrlhf.report.console import RunConsole
from megatron_amrlhf.run import heartbeat as heartbeats
from megatron_amrlhf.run.beats import read_beats, read_dump
from megatron_amrlhf.run.heartbeat import Heartbeat, RankProgress, interval_seconds
from megatron_amrlhf.run.stacks import is_waiting
from tests.patience import PATIENCE_SECONDS

EVERY_SECONDS = 0.02
SCRIPT = """
import sys
from pathlib import Path
from megatron_amrlhf.run.heartbeat import Heartbeat, RankProgress
def keep_busy():
    print("busy", flush=True)
    input()
told = {"every_seconds": 1.0, "on_beat": print, "on_error": print}
with Heartbeat(Path(sys.argv[1]), 2, RankProgress(), **told):
    keep_busy()
"""


def silent(beat) -> None:
    pass


def heartbeat(folder, progress=None, on_beat=silent, on_error=silent, rank=0):
    return Heartbeat(
        folder,
        rank,
        progress or RankProgress(),
        every_seconds=EVERY_SECONDS,
        on_beat=on_beat,
        on_error=on_error,
    )


def test_the_file_follows_the_main_thread(tmp_path):
    beats = queue.Queue()
    progress = RankProgress()
    with heartbeat(tmp_path, progress, beats.put):
        progress.enter("rollout", step=3)
        progress.advance()
        progress.advance()
        while (beat := beats.get(timeout=PATIENCE_SECONDS)).done != 2:
            pass
        written = read_beats(tmp_path)[0]
    assert (beat.state, beat.step, beat.phase, beat.phases) == ("running", 3, "rollout", 1)
    assert written.phase == "rollout" and written.beats >= 2
    assert any("test_the_file_follows_the_main_thread" in line for line in beat.stack)
    end = read_beats(tmp_path)[0]
    assert (end.state, end.error) == ("finished", "")
    assert not [thread for thread in threading.enumerate() if thread.name == "heartbeat"]


def test_a_new_phase_is_written_long_before_the_next_interval(tmp_path):
    """A kill leaves the file as it is: it would name what the rank did seconds before."""
    progress = RankProgress()
    with Heartbeat(
        tmp_path, 0, progress, every_seconds=10 * PATIENCE_SECONDS, on_beat=silent, on_error=silent
    ):
        progress.enter("update", step=3)
        deadline = time.monotonic() + PATIENCE_SECONDS
        while (beat := read_beats(tmp_path)[0]).phase != "update":
            assert time.monotonic() < deadline
            time.sleep(0.02)
    assert (beat.state, beat.step) == ("running", 3)


def test_an_error_is_the_last_word_and_has_its_own_stack(tmp_path):
    def fail():
        raise ArithmeticError("one\ntwo")

    told = []
    with pytest.raises(ArithmeticError), heartbeat(tmp_path, on_error=told.append) as beating:
        fail()
    try:
        beat = read_beats(tmp_path)[0]
        assert (beat.state, beat.error) == ("failed", "ArithmeticError: one two")
        assert "fail: raise" in beat.stack[-1] and told == [beat]
    finally:
        beating._end.set()
        beating._thread.join()


def test_progress_stops_the_clock_of_stillness(tmp_path, monkeypatch):
    monkeypatch.setattr(heartbeats, "AWAY_AFTER", math.inf)  # of a thread that waits for the disk
    long_ago = 1000.0
    beats = queue.Queue()
    progress = RankProgress()
    progress.moved_at -= long_ago
    beating = heartbeat(tmp_path, progress, beats.put)
    beating._awake_since -= long_ago
    with beating:
        assert beats.get(timeout=PATIENCE_SECONDS).still_seconds >= long_ago
        progress.advance()
        while beats.get(timeout=PATIENCE_SECONDS).done == 0:
            pass
        # That one may have read the time of the last progress before there was one.
        assert beats.get(timeout=PATIENCE_SECONDS).still_seconds < long_ago


def test_the_thread_ends_before_the_block(tmp_path):
    turns = queue.Queue()

    def slow_turn(beat):
        turns.put("begin")
        time.sleep(10 * EVERY_SECONDS)
        turns.put("end")

    with heartbeat(tmp_path, on_beat=slow_turn):
        assert turns.get(timeout=PATIENCE_SECONDS) == "begin"
    assert turns.qsize() % 2 == 1


def test_a_main_thread_that_keeps_the_interpreter_leaves_its_stack(tmp_path):
    held_seconds = 50 * EVERY_SECONDS

    def keep_the_gil():
        ctypes.PyDLL(None).usleep(int(held_seconds * 1e6))  # PyDLL keeps the GIL

    beats = queue.Queue()
    end = time.monotonic() + PATIENCE_SECONDS
    with heartbeat(tmp_path, on_beat=beats.put, rank=1):
        # Not the first time, where a slow disk has let the thread's own time pass.
        while "keep_the_gil" not in read_dump(tmp_path, 1) and time.monotonic() < end:
            beats.get(timeout=PATIENCE_SECONDS)
            keep_the_gil()
        while not beats.empty():
            beats.get()
        beats.get(timeout=PATIENCE_SECONDS)  # may have been under way
        after = beats.get(timeout=PATIENCE_SECONDS)
    assert "keep_the_gil" in read_dump(tmp_path, 1)
    # Nobody could see progress: the watchdog's time begins again.
    assert after.still_seconds < held_seconds


@pytest.mark.parametrize(
    ("number", "words"),
    [(signal.SIGTERM, "Current thread"), (signal.SIGSEGV, "Segmentation fault")],
)
def test_a_signal_leaves_the_stack_and_ends_the_process(tmp_path, number, words):
    command = [sys.executable, "-c", SCRIPT, str(tmp_path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes) as process:
        assert any("busy" in line for line in process.stdout)
        process.send_signal(number)
        assert process.wait(PATIENCE_SECONDS) == -number
    assert words in read_dump(tmp_path, 2) and "keep_busy" in read_dump(tmp_path, 2)
    assert json.loads((tmp_path / "heartbeat" / "rank-0002.json").read_text())["state"] == "running"


def test_a_rank_without_a_file_is_missing(tmp_path):
    with heartbeat(tmp_path, rank=1):
        states = [beat.state for beat in read_beats(tmp_path, 3)]
        (tmp_path / "heartbeat" / "rank-0002.json").write_text("{")
        found = [beat.state for beat in read_beats(tmp_path)]
    assert states == ["missing", "running", "missing"]
    assert found == ["missing", "running", "unreadable"]


@pytest.mark.parametrize(
    ("place", "waits"),
    [
        ("/v/torch/distributed/distributed_c10d.py:3252 all_reduce: work.wait()", True),
        ("/v/deepspeed/comm/comm.py:5 broadcast: cdb.broadcast(tensor)", True),
        ("/v/p2p_communication.py:392 _communicate: req.wait()", True),
        ("/v/generator.py:90 decode: token = int(best.item())", True),
        ("/v/generator.py:90 decode: time.sleep(1)", False),
        ("/home/torch_user/train.py:3 wait: total += 1", False),
    ],
)
def test_only_a_stack_that_ends_in_a_wait_is_waiting(place, waits):
    outer = "/v/torch/distributed/distributed_c10d.py:1 barrier: work.wait()"
    assert is_waiting([outer, place]) is waits
    assert is_waiting([]) is False


def test_the_watchdogs_limit_is_many_beats():
    assert interval_seconds(0) == interval_seconds(1200) == 5.0
    assert interval_seconds(4) == 0.5


@pytest.mark.parametrize("rank", [0, 1])
def test_a_tracked_phase_is_progress_on_every_rank(rank, capsys):
    console = RunConsole(rank)
    with console.track("score", 8):
        console.tick(4)
        console.tick(0)  # a decode round in which no answer ended
    progress = console.progress
    assert (progress.phase, progress.phases, progress.done) == ("score", 1, 2)
