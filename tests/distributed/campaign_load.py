"""Large data and many steps: memory, open files and the time of a step stay flat."""

from __future__ import annotations

import os
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path

from tests.distributed.runs import numbers, read_metrics, write_lines

WORDS = ("add", "two", "apples", "to", "a", "long", "list", "of", "things", "and", "count")
LOOK_SECONDS = 0.5
FLAT = 1.25  # the last fifth of a run against the second


def prompts(folder: Path, count: int) -> Path:
    """Prompts of 1 to 12 words."""
    chance = random.Random(5)
    lines = [
        {"prompt": " ".join(chance.choices(WORDS, k=chance.randint(1, 12))), "answer": "3"}
        for _ in range(count)
    ]
    return write_lines(folder / "many.jsonl", lines)


def step_rows(folder: Path, count: int) -> Path:
    chance = random.Random(6)
    lines = []
    for _ in range(count):
        steps = [f"{chance.randint(1, 99)}+1={chance.randint(2, 99)}" for _ in range(3)]
        lines.append({"prompt": "Add one", "steps": steps, "labels": [1, 0, 1]})
    return write_lines(folder / "many-steps.jsonl", lines)


LOADS = {
    "300 steps, a checkpoint every 10": lambda folder: [
        "run.steps=300",
        "checkpoint.every=10",
        "evaluation.prompts=0",
    ],
    "20,000 prompts of mixed lengths": lambda folder: [
        f"data.train={prompts(folder, 20000)}",
        "run.steps=20",
        "evaluation.prompts=0",
    ],
    "64 answers a prompt": lambda folder: [
        "rollout.samples_per_prompt=64",
        "run.steps=6",
        "evaluation.prompts=0",
    ],
    "200,000 rows": lambda folder: [
        "algorithm.kind=prm",
        "data.format=steps",
        f"data.train={step_rows(folder, 200000)}",
        "data.heldout=null",
        "run.steps=20",
        "reward_model.path=null",
    ],
    "four runs at once": lambda folder: ["run.steps=5"],
}


def carry(name: str, stage) -> dict:
    """One process (four where the name says so), watched from outside."""
    count = 4 if name.startswith("four") else 1
    keys = LOADS[name](stage.folder)
    start, running = time.monotonic(), []
    for number in range(count):
        given = [f"run.name=load-{name.split()[0].replace(',', '')}-{number}", *keys]
        given += ["checkpoint.export=false"]
        running.append(_start(stage, given))
    seen: list[tuple[float, float, int]] = []
    while running[0][0].poll() is None:
        seen += [] if (look := _look(running[0][0].pid, start)) is None else [look]
        time.sleep(LOOK_SECONDS)
    codes = [process.wait() for process, _ in running]
    runs = [folder for _, folder in running]
    if any(codes):
        said = (runs[codes.index(max(codes, key=abs))].with_suffix(".log")).read_text()[-600:]
        return {"ok": False, "what": f"codes {codes}: {said}"}
    if count > 1:
        same = all(numbers(folder) == numbers(runs[0]) for folder in runs)
        return {"ok": same, "what": f"codes {codes}, {'the same' if same else 'other'} numbers"}
    return _judge(runs[0], seen)


def _start(stage, overrides: list[str]) -> tuple[subprocess.Popen, Path]:
    folder = stage.folder / "runs" / overrides[0].partition("=")[2]
    folder.parent.mkdir(exist_ok=True)
    with folder.with_suffix(".log").open("w") as log:
        words = [sys.executable, "-m", "megatron_amrlhf", "train", str(stage.config), "--set"]
        process = subprocess.Popen(
            [*words, *overrides],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=log,
            stderr=log,
        )
    return process, folder


def _look(pid: int, start: float) -> tuple[float, float, int] | None:
    """Seconds, resident MiB and open files of a process; None: it is just gone."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
        resident = int(status.split("VmRSS:")[1].split()[0]) / 1024
        return time.monotonic() - start, resident, len(os.listdir(f"/proc/{pid}/fd"))
    except (OSError, IndexError):
        return None


def _judge(folder: Path, seen: list[tuple[float, float, int]]) -> dict:
    """Means of the second and of the last fifth of the run, of what was seen while it trained."""
    times = [
        sum(value for key, value in line.items() if key.startswith("time/"))
        for line in read_metrics(folder)
    ]
    training = [look for look in seen if look[0] > seen[-1][0] - sum(times)]

    def ends(values: list[float]) -> tuple[float, float]:
        fifth = max(1, len(values) // 5)
        second = values[fifth : 2 * fifth] or values
        return statistics.median(second), statistics.median(values[-fifth:])

    memory, files = ends([x[1] for x in training]), ends([x[2] for x in training])
    step = ends(times)
    flat = memory[1] <= memory[0] * FLAT and files[1] <= files[0] + 2
    what = (
        f"{len(times)} steps; memory {memory[0]:.0f} to {memory[1]:.0f} MiB, open files "
        f"{files[0]:.0f} to {files[1]:.0f}, a step {step[0]:.2f} to {step[1]:.2f} s, in the "
        "second and the last fifth"
    )
    return {"ok": flat, "what": what}
