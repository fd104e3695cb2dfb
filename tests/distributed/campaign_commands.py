"""Ctrl-C in every command and tool, soon after its start and while it works."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.distributed.runs import step_lines, write_lines
from tests.signals import signals_as_usual

WAITS = (0.05, 0.5, 3.0, 9.0)  # seconds until the signal
PATIENCE_SECONDS = 120.0
CODES = (0, 75, 130)  # it may have been done before, or have saved
# In what Python says: it was before, or in, the first import.
STARTING = ("init_import_site", "from megatron_amrlhf.interrupts import")
AMRLHF = [sys.executable, "-m", "megatron_amrlhf"]


def _tool(name: str, *arguments: str) -> list[str]:
    return [sys.executable, f"tools/{name}.py", *arguments]


CASES = {
    "train": lambda c, f: [*AMRLHF, "train", c, "--set", "run.name=ctrl-c"],
    "score": lambda c, f: [*AMRLHF, "score", c, "--answers", answers(f), "--out", f"{f}/scores"],
    "plan": lambda c, f: [*AMRLHF, "plan", c, "--gpus", "4", "--memory", "16"],
    "config": lambda c, f: [*AMRLHF, "config", c],
    "doctor": lambda c, f: [*AMRLHF, "doctor", c],
    "status": lambda c, f: [*AMRLHF, "status", f"{f}/runs/base-2-False"],
    "show-masks": lambda c, f: [*AMRLHF, "show-masks", f"{f}/runs/base-2-False"],
    "launch/train.sh": lambda c, f: ["bash", "launch/train.sh", "--processes", "2", c],
    "launch/train.sh doctor": lambda c, f: ["bash", "launch/train.sh", "doctor", c],
    "make_demo_data": lambda c, f: _tool("make_demo_data", f"{f}/demo"),
    "split_steps": lambda c, f: _tool("split_steps", answers(f), f"{f}/train", f"{f}/heldout"),
    "score_tokens": lambda c, f: _tool(
        "score_tokens", c, "--answers", answers(f), "--out", f"{f}/tokens"
    ),
    "reward_error": lambda c, f: _tool("reward_error", "--out", f"{f}/errors"),
    "compare_supervision": lambda c, f: _tool("compare_supervision", scored(f)),
    "compare_step_dpo": lambda c, f: _tool("compare_step_dpo", f"{f}/step-dpo"),
    "benchmark_engine": lambda c, f: _tool("benchmark_engine", f"{f}/benchmark"),
    "convert_checkpoint": lambda c, f: _tool("convert_checkpoint", f"{f}/policy", f"{f}/converted"),
}


def answers(folder: str) -> str:
    return str(write_lines(Path(folder) / "answers.jsonl", step_lines()))


def scored(folder: str) -> str:
    """64 answers to each of 3,000 problems."""
    answers = [
        {"problem_id": str(n // 64), "correct": n % 3 == 0, "step_scores": [n % 7 / 7, n % 5 / 5]}
        for n in range(64 * 3000)
    ]
    return str(write_lines(Path(folder) / "scored.jsonl", answers))


def interrupt(name: str, stage) -> dict:
    """SIGINT to its process group, as a terminal sends it; again where it goes on."""
    stage.base(2)  # a run to look at
    problems, seen = [], []
    for wait in WAITS:
        command = CASES[name](str(stage.config), str(stage.folder))
        process = subprocess.Popen(
            command,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
            preexec_fn=signals_as_usual,
        )
        time.sleep(wait)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGINT)
        try:
            said = process.communicate(timeout=PATIENCE_SECONDS)[0]
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            said = process.communicate()[0]
            problems.append(f"after {wait} s it does not end")
        code = process.returncode
        seen.append(f"{wait} s: {code}")
        if any(mark in said for mark in STARTING):
            seen[-1] += " (Python itself was starting)"
        elif "Traceback" in said:
            problems.append(f"after {wait} s a traceback: {said.splitlines()[-1]}")
        elif code not in (*CODES, -signal.SIGINT):
            problems.append(f"after {wait} s code {code}: {said[-200:]}")
    return {"ok": not problems, "what": "; ".join([*problems, ", ".join(seen)])[:900]}
