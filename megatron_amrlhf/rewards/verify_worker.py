"""The process that compares answers with math-verify: one JSON object a line in, one out.

It is a process of its own because what answers say may keep sympy busy for hours inside one
call that no signal interrupts (``9**9**9**9``); the caller kills it then.
"""

from __future__ import annotations

import ctypes
import json
import logging
import os
import re
import signal
import sys
from decimal import Decimal
from typing import TextIO

PR_SET_PDEATHSIG = 1  # linux/prctl.h
# math-verify finds no number that touches a Chinese character or full stop.
_CHINESE = re.compile(r"[\u3000-\u303f\u4e00-\u9fff\uff00-\uffef]+")
_SCIENTIFIC = re.compile(r"[-+]?\d+(\.\d+)?[eE][-+]?\d+")
_WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{2,}")
_FORMULA = re.compile(r"[0-9\\]")
_DELIMITED = re.compile(r"\$|\\\(|\\\[|\\boxed")


def end_with_parent() -> None:
    """Linux ends this process when its parent dies, also while sympy is busy."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def serve(lines: TextIO, out: TextIO) -> None:
    """Answers ``{"gold", "text"}`` lines by ``{"reward": 0 or 1}`` or ``{"problem"}``."""
    # After the caller has this process: the import takes seconds.
    from math_verify import parse, verify  # noqa: PLC0415

    logging.disable(logging.WARNING)  # "timeout is disabled": the caller has one
    print(json.dumps({"ready": True}), file=out, flush=True)
    for line in lines:
        request = json.loads(line)
        print(json.dumps(_compare(request, parse, verify)), file=out, flush=True)


def as_mathematics(gold: str) -> str:
    """A reference answer as math-verify reads it whole.

    Without delimiters it reads the first number that it finds: 2 of ``2\\sqrt{3}``. A text with
    words (``18 dollars``), or without a digit or command, is left to that.
    """
    gold = gold.strip()
    if _SCIENTIFIC.fullmatch(gold):
        return f"{Decimal(gold):f}"
    is_formula = _FORMULA.search(gold) and not _WORD.search(gold)
    return f"${gold}$" if is_formula and not _DELIMITED.search(gold) else gold


def _compare(request: dict, parse, verify) -> dict:
    try:
        gold = parse(as_mathematics(request["gold"]), parsing_timeout=None, raise_on_error=True)
        if not gold:
            return {"problem": f"no number in the reference answer {request['gold'][:40]!r}"}
        text = _CHINESE.sub(r" \g<0> ", request["text"])
        found = parse(text, parsing_timeout=None, raise_on_error=True)
        right = verify(gold, found, timeout_seconds=None, raise_on_error=True)
    except Exception as error:  # whatever sympy raises on an answer: the answer is not judged
        return {"problem": f"{type(error).__name__}: {error}"[:200]}
    return {"reward": float(right)}


if __name__ == "__main__":
    end_with_parent()
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what libraries print is no reply
    serve(sys.stdin, replies)
