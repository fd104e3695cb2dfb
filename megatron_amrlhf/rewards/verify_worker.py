"""The process that judges answers: one JSON object a line in, one out.

It is a process of its own because what answers say may keep sympy busy for hours inside one call
that no signal interrupts; the caller kills it then.
"""

from __future__ import annotations

import ctypes
import json
import logging
import os
import signal
import sys
from collections.abc import Callable
from typing import TextIO

PR_SET_PDEATHSIG = 1  # linux/prctl.h


def end_with_parent() -> None:
    """Linux ends this process when its parent dies, also while sympy is busy."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def serve(lines: TextIO, out: TextIO) -> None:
    """Answers ``{"gold", "text"}`` lines by the fields of a ``Verdict``."""
    # After the caller has this process: the import of sympy takes seconds.
    from megatron_amrlhf.rewards.judge.judging import judge  # noqa: PLC0415 - heavy

    logging.disable(logging.WARNING)  # "timeout is disabled": the caller has one
    print(json.dumps({"ready": True}), file=out, flush=True)
    for line in lines:
        request = json.loads(line)
        verdict = _verdict(request["gold"], request["text"], judge)
        print(json.dumps(verdict), file=out, flush=True)


def _verdict(gold: str, text: str, judge: Callable) -> dict:
    try:
        outcome = judge(gold, text)
    except Exception as error:  # whatever sympy raises on an answer: the answer is not judged
        problem = f"{type(error).__name__}: {error}"[:200]
        return {"reward": None, "reason": "undecided", "problem": problem}
    if isinstance(outcome, bool):
        return {"reward": float(outcome)}
    return {"reward": None, "reason": outcome.reason, "problem": outcome.detail}


if __name__ == "__main__":
    end_with_parent()
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what libraries print is no reply
    serve(sys.stdin, replies)
