"""What one rank sees of a request to stop."""

import os
import signal
import threading
import time

from megatron_amrlhf.report.stop_request import Reason, StopRequest

PATIENCE_SECONDS = 60.0


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
