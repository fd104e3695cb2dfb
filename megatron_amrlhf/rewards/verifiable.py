"""Verifiable rewards: whether a text gives the reference answer, by the judge in a process."""

from __future__ import annotations

import importlib.util
import json
import queue
import subprocess
import sys
import threading
from contextlib import suppress
from dataclasses import dataclass

from megatron_amrlhf.errors import UserError

WORKER = "megatron_amrlhf.rewards.verify_worker"
DIED = {"reason": "worker", "problem": "the worker that compares answers has died"}
START_SECONDS = 120.0  # importing sympy on a busy machine


@dataclass(frozen=True)
class Verdict:
    """``reward`` is 1 or 0, or None where the answer is not judged.

    Attributes:
        reward: 1 right, 0 wrong.
        reason: why there is none, one of ``REASONS``.
        problem: the same in words.
    """

    reward: float | None
    reason: str = ""
    problem: str = ""


class Verifier:
    """Judges answers in a process of its own, which is ended when an answer takes too long.

    Args:
        timeout_seconds: for one answer.
        command: starts the worker; None: the package's own.
    """

    def __init__(self, timeout_seconds: float, command: list[str] | None = None):
        self.timeout_seconds = timeout_seconds
        self._command = command or [sys.executable, "-m", WORKER]
        self._process: subprocess.Popen | None = None
        self._broken: str | None = None
        self._replies: queue.Queue[str | None] = queue.Queue()

    def judge(self, gold: str, text: str) -> Verdict:
        """1 if ``text`` gives the answer ``gold``, else 0; neither if it cannot be told."""
        if self._process is None and (problem := self._start()):
            return Verdict(None, "worker", problem)
        worker = self._process
        assert worker is not None and worker.stdin is not None
        try:
            worker.stdin.write(json.dumps({"gold": gold, "text": text}) + "\n")
            worker.stdin.flush()
        except OSError as error:
            self.close()
            return Verdict(None, "worker", f"the worker has ended ({error})")
        reply = self._reply(self.timeout_seconds)
        if reply is None or reply is DIED:
            self.close()
            if reply is DIED:
                return Verdict(None, **DIED)
            return Verdict(None, "timeout", f"no verdict within {self.timeout_seconds:g} s")
        return Verdict(**reply)

    def close(self) -> None:
        """Ends the worker; the next answer starts a new one."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
            if process.stdin is not None:
                with suppress(OSError):  # of what it has not read
                    process.stdin.close()

    def _start(self) -> str | None:
        """Starts the worker; what went wrong, or None. It is tried once."""
        if self._broken is not None:
            return self._broken
        self._replies = queue.Queue()
        self._process = subprocess.Popen(
            self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        reader = threading.Thread(
            target=_read_lines, args=(self._process.stdout, self._replies), daemon=True
        )
        reader.start()
        if self._reply(START_SECONDS) in (None, DIED):
            self.close()
            self._broken = "the worker that compares answers does not start"
        return self._broken

    def _reply(self, seconds: float) -> dict | None:
        """The worker's next line, ``DIED`` at its end, None where none comes in time."""
        try:
            line = self._replies.get(timeout=seconds)
        except queue.Empty:
            return None
        return DIED if line is None else json.loads(line)


def _read_lines(stream, replies: queue.Queue) -> None:
    """Passes a worker's lines on; None at its end."""
    with stream:
        for line in stream:
            replies.put(line)
    replies.put(None)


def check_library() -> None:
    """Whether answers can be compared here.

    Raises:
        UserError: math-verify is not installed.
    """
    if importlib.util.find_spec("math_verify") is None:
        raise UserError("reward.verifiable_weight: needs the library math-verify: install it")
