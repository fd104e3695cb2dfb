"""Verified answers: right, wrong and not to be judged are three things."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_amrlhf.rewards import verify_worker
from megatron_amrlhf.rewards.verifiable import Verdict, Verifier
from tests.patience import PATIENCE_SECONDS


@pytest.fixture(scope="module")
def verifier():
    verifier = Verifier(PATIENCE_SECONDS)
    yield verifier
    verifier.close()


# Answers as the package's worker does, but for the reference answer "hang".
SLEEPER = """
import sys, time
from megatron_amrlhf.rewards import verify_worker
from megatron_amrlhf.rewards.judge import judging
judge = judging.judge
judging.judge = lambda gold, text: time.sleep(3600) if gold == "hang" else judge(gold, text)
verify_worker.end_with_parent()
verify_worker.serve(sys.stdin, sys.stdout)
"""


@pytest.mark.parametrize(
    ("gold", "text", "reward"),
    [
        ("72", "24 + 48 = 72 clips.\n#### 72", 1.0),
        ("72", "The answer is 71.", 0.0),
        ("72", "I do not know.", 0.0),
        ("2\\sqrt{3}", "So it is $2\\sqrt{3}$.", 1.0),
    ],
)
def test_an_answer_is_right_or_wrong(verifier, gold, text, reward):
    assert verifier.judge(gold, text) == Verdict(reward)


@pytest.mark.parametrize("gold", ["unknown", "?", "n/a", "..."])
def test_a_reference_answer_that_says_nothing_is_no_wrong_answer(verifier, gold):
    verdict = verifier.judge(gold, "12")
    assert verdict.reward is None and verdict.reason == "bad_reference"
    assert repr(gold) in verdict.problem


def test_an_answer_in_doubt_has_its_reason(verifier):
    verdict = verifier.judge("391", r"\boxed{17 \times 23}")
    assert (verdict.reward, verdict.reason) == (None, "form")


def test_an_error_of_the_library_is_no_wrong_answer():
    def fail(gold, text):
        raise RecursionError("too deep")

    verdict = Verdict(**verify_worker._verdict("1", "1", fail))
    assert verdict == Verdict(None, "undecided", "RecursionError: too deep")


def test_an_answer_that_keeps_it_busy_fails_and_the_next_one_is_judged():
    verifier = Verifier(PATIENCE_SECONDS, [sys.executable, "-c", SLEEPER])
    try:
        verifier.judge("1", "1")
        verifier.timeout_seconds, start = 1.0, time.monotonic()
        verdict = verifier.judge("hang", "9")
        assert (verdict.reward, verdict.reason) == (None, "timeout")
        assert "within 1 s" in verdict.problem
        assert time.monotonic() - start < PATIENCE_SECONDS
        verifier.timeout_seconds = PATIENCE_SECONDS
        assert verifier.judge("9", "9").reward == 1.0
    finally:
        verifier.close()


PARENT = f"""
import os, sys
from megatron_amrlhf.rewards.verifiable import Verifier
verifier = Verifier({PATIENCE_SECONDS}, [sys.executable, "-c", {SLEEPER!r}])
assert verifier.judge("1", "1").reward == 1.0
verifier._process.stdin.write('{{"gold": "hang", "text": "9"}}\\n')
verifier._process.stdin.flush()
print(verifier._process.pid, flush=True)
sys.stdin.readline()
os._exit(0)
"""


def is_running(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().split(")")[1].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_busy_worker_does_not_outlive_its_run():
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", PARENT], **pipes) as parent:
        pid = int(parent.stdout.readline())
        time.sleep(2.0)
        assert is_running(pid)
        parent.communicate("go\n")
    end = time.monotonic() + PATIENCE_SECONDS
    while is_running(pid) and time.monotonic() < end:
        time.sleep(0.1)
    try:
        assert not is_running(pid)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def test_a_worker_that_dies_is_a_failure():
    code = "import sys; print('{\"ready\": true}', flush=True); sys.stdin.readline()"
    verifier = Verifier(PATIENCE_SECONDS, [sys.executable, "-c", code])
    verdict = verifier.judge("1", "1")
    assert verdict.reward is None and verdict.reason == "worker" and "has died" in verdict.problem
    # One that has died between two answers has not read the second: that is lost, no more.
    verifier = Verifier(PATIENCE_SECONDS)
    assert verifier.judge("1", "1").reward == 1.0
    verifier._process.kill()
    verifier._process.wait()
    assert "has ended" in verifier.judge("1", "1").problem
    assert verifier.judge("1", "1").reward == 1.0
    verifier.close()
    dead = Verifier(PATIENCE_SECONDS, [sys.executable, "-c", "pass"])
    assert "does not start" in dead.judge("1", "1").problem
