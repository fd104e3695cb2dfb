"""SIGKILL at random moments of saving: there is always a complete checkpoint to go on from.

``AMRLHF_KILLS=50 pytest -s tests/distributed/test_kill.py`` does it 50 times.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import pytest

from megatron_amrlhf.checkpoint.files import on_all_ranks
from megatron_amrlhf.checkpoint.folders import Retention, clear_leftovers, find_latest, step_of
from megatron_amrlhf.checkpoint.loading import load_checkpoint
from megatron_amrlhf.checkpoint.store import CheckpointWriter
from megatron_amrlhf.parallel.mesh import build_mesh
from tests.distributed.processes import launch, run_on
from tests.distributed.small_run import VOCAB, build_engine, fingerprint, take_steps
from tests.helpers_models import make_tiny_model
from tests.patience import PATIENCE_SECONDS

pytestmark = pytest.mark.distributed

KILLS = int(os.environ.get("AMRLHF_KILLS", "3"))
RANKS = 2
FIRST_SECONDS = 0.1  # a save may take, where none has been timed


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("model")
    make_tiny_model(folder, tied=True, vocab_size=VOCAB, hidden=45, layers=2)
    return str(folder)


def undisturbed(folder: str, steps: int) -> list[dict[str, str]]:
    """All that both roles are on this rank, after 0, 1, 2 ... steps."""
    engine = build_engine(folder, build_mesh(1, 1), "float32")
    found = [fingerprint(engine)]
    for step in range(steps):
        take_steps(engine, range(step, step + 1))
        found.append(fingerprint(engine))
    return found


def train_until_killed(folder: str, root: str, asynchronous: bool, steps: int) -> None:
    """Goes on from the newest checkpoint; saves after every step. Writes down what it did."""
    mesh, checkpoints = build_mesh(1, 1), Path(root) / "checkpoints"
    engine = build_engine(folder, mesh, "float32")
    on_all_ranks(lambda: mesh.is_main and clear_leftovers(checkpoints), "clearing")
    latest = find_latest(checkpoints)
    step = 0 if latest is None else load_checkpoint(engine, latest).state["step"]
    log = (Path(root) / f"rank{mesh.rank}.jsonl").open("ab", buffering=0)

    def note(**record) -> None:
        log.write(json.dumps(record).encode() + b"\n")  # in one piece, or a kill would cut it

    note(resumed=step, state=fingerprint(engine))
    writer = CheckpointWriter(engine, checkpoints, Retention(2), asynchronous)
    while step < steps:
        take_steps(engine, range(step, step + 1))
        step += 1
        begun = time.monotonic()
        note(saving=step)
        writer.save(step, {"step": step})
        if not asynchronous:
            note(saved=step, seconds=time.monotonic() - begun)
        elif complete := writer.poll():
            note(saved=step_of(complete))
    writer.finish()


def read_log(root: Path, rank: int) -> list[dict]:
    file = root / f"rank{rank}.jsonl"
    whole = file.read_text().rpartition("\n")[0] if file.exists() else ""
    return [json.loads(line) for line in whole.splitlines()]


def last(log: list[dict], key: str, default: float = 0) -> float:
    return next((line[key] for line in reversed(log) if key in line), default)


def kill_while_saving(processes: list, root: Path, chance: random.Random) -> None:
    """Waits for the next save, then ends one rank within or soon after it, at random."""
    begun = sum("saving" in line for line in read_log(root, 0))
    deadline = time.monotonic() + PATIENCE_SECONDS
    while sum("saving" in line for line in read_log(root, 0)) < begun + 2:
        assert time.monotonic() < deadline and any(p.is_alive() for p in processes)
        time.sleep(0.001)
    time.sleep(chance.uniform(0, 1.1) * last(read_log(root, 0), "seconds", FIRST_SECONDS))
    victim = chance.randrange(RANKS)
    os.kill(processes[victim].pid, signal.SIGKILL)
    processes[victim].join()
    time.sleep(chance.uniform(0, 0.02))  # the other one may go on for a moment
    for process in processes:
        process.kill()
        process.join()
    assert processes[victim].exitcode == -signal.SIGKILL


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_killed_save_never_costs_more_than_itself(model, tmp_path, asynchronous):
    chance, most = random.Random(7 + asynchronous), 2 * KILLS + 20
    expected = run_on(RANKS, undisturbed, model, most)
    confirmed = unfinished = 0
    for _ in range(KILLS):
        arguments = (model, str(tmp_path), asynchronous, most)
        with launch(RANKS, train_until_killed, *arguments) as processes:
            kill_while_saving(processes, tmp_path, chance)
        for rank in range(RANKS):
            log = read_log(tmp_path, rank)
            step = last(log, "resumed")
            assert step >= confirmed, "a checkpoint that was complete is lost"
            (state,) = [line["state"] for line in log if line.get("resumed") == step][-1:]
            assert state == expected[rank][step], (rank, step)
        unfinished += "saving" in read_log(tmp_path, 0)[-1]
        confirmed = max(last(read_log(tmp_path, rank), "saved") for rank in range(RANKS))
    print(f"{KILLS} kills, {unfinished} of them before the save was complete")
    run_on(RANKS, train_until_killed, model, str(tmp_path), asynchronous, most)
    checkpoints = sorted(x.name for x in (tmp_path / "checkpoints").iterdir())
    assert checkpoints == ["latest", f"step-{most - 1}", f"step-{most}"], "no litter"
    assert multiprocessing.active_children() == []
