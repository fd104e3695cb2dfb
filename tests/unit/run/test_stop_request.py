"""What one rank sees of a request to stop."""

import os
import signal
import threading
import time

import pytest

from megatron_amrlhf.run.stop_request import Reason, StopRequest, why_end_now
from tests.patience import PATIENCE_SECONDS


def test_a_wait_ends_with_the_signal():
    stop = StopRequest()
    killer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM))
    start = time.monotonic()
    with stop.catch_signals():
        killer.start()
        stop.wait_for_signal(PATIENCE_SECONDS)
    assert stop.seen() is Reason.SIGNAL and time.monotonic() - start < PATIENCE_SECONDS


def test_a_wait_without_a_signal_ends_too():
    stop, start = StopRequest(), time.monotonic()
    stop.wait_for_signal(0.3)
    assert stop.seen() is Reason.NONE and time.monotonic() - start >= 0.3


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", Reason.FILE),
        ("SIGTERM\n", Reason.SCRIPT_TERM),
        ("SIGINT", Reason.SCRIPT_INT),
        ("SIGHUP\n", Reason.SCRIPT_HUP),
        ("slurm\n", Reason.SLURM),
        ("please, SIGTERM", Reason.FILE),
        ("\x1b[31m" * 1000, Reason.FILE),
        (None, Reason.NONE),
    ],
)
def test_who_asked_is_told_by_what_the_scripts_write(tmp_path, text, reason):
    file = tmp_path / "stop"
    if text is not None:
        file.write_text(text)
    assert StopRequest(file).seen() is reason
    assert reason.text.isprintable() and Reason(int(reason)) is reason


def test_a_folder_and_bytes_that_are_no_text_are_requests_too(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_bytes(b"\xff\xfe")
    assert {StopRequest(tmp_path / name).seen() for name in ("folder", "file")} == {Reason.FILE}
    assert StopRequest(tmp_path / "file" / "stop").seen() is Reason.NONE


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("now", "on demand"),
        ("now \n", "on demand"),
        ("now script\n", "launch/train.sh was killed"),
        ("now launcher\n", "its launcher was killed"),
        ("SIGTERM", ""),
    ],
)
def test_why_a_run_ends_without_a_checkpoint(tmp_path, text, why):
    (tmp_path / "stop").write_text(text)
    assert why_end_now(tmp_path / "stop") == why and why_end_now(tmp_path / "none") == ""
