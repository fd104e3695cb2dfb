"""A run that is asked to stop, wherever it is, saves, and goes on as if nothing had been."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest

from megatron_amrlhf.commands import train
from megatron_amrlhf.config.load import load_config
from megatron_amrlhf.errors import UserError
from megatron_amrlhf.report.console import RunConsole
from megatron_amrlhf.run.stop_request import Reason, StopRequest, process_age
from tests.distributed.processes import run_on
from tests.distributed.runs import make_models, numbers, run_config, write_config

pytestmark = pytest.mark.distributed

KIND, TP, PP, DP = "ppo", 1, 2, 2
WORLD = TP * PP * DP
# The one rank that sees the request: of the last stage, which samples, of the second replica.
SEEING_RANK = 3
KEYS = ("checkpoint.export=false", f"parallel.tensor={TP}", f"parallel.pipeline={PP}")
# Where the request is seen: step, phase, at which look in there, and whether only before a step.
PLACES = {
    "at the start": (0, "evaluate", 3, False),
    "between steps": (1, "update", 1, True),
    "in mid-decode": (2, "rollout", 5, False),
    "while scoring": (2, "score", 2, False),
    "in the evaluation": (2, "evaluate", 4, False),
}
SAVED_STEP = dict(zip(PLACES, (None, 1, 1, 1, 2), strict=True))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("preempted")
    make_models(folder)
    config = write_config(folder, KIND)
    run_on(WORLD, run_config, str(config), ["run.name=undisturbed", *KEYS])
    return folder, config


def run_until_asked(path: str, overrides: list[str], place: tuple[int, str, int, bool]) -> bool:
    """A run on this rank; one rank of all sees a request at ``place``."""
    wanted_step, wanted_phase, look, only_before_step = place
    consoles, looks = [], []

    class Console(RunConsole):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            consoles.append(self)

    class Request(StopRequest):
        def seen(self, before_step: bool = False) -> Reason:
            now = consoles[0].progress
            if (now.step, now.phase) == (wanted_step, wanted_phase):
                if before_step or not only_before_step:
                    looks.append(now.done)
            return Reason.FILE if len(looks) == look else Reason.NONE

    train.RunConsole = Console
    if os.environ["RANK"] == str(SEEING_RANK):
        train.StopRequest = Request
    return train.run(load_config(path, overrides))


@pytest.mark.parametrize("place", PLACES)
def test_a_run_asked_to_stop_goes_on_bit_for_bit(undisturbed, place):
    folder, config = undisturbed
    name = place.replace(" ", "-")
    overrides = [f"run.name={name}", *KEYS]
    run = folder / "runs" / name
    assert run_on(WORLD, run_until_asked, str(config), overrides, PLACES[place]) == [False] * WORLD
    status = json.loads((run / "status.json").read_text())
    saved = SAVED_STEP[place]
    assert (status["state"], status["step"], status["total"]) == ("preempted", saved or 0, 2)
    found = sorted(x.name for x in run.glob("checkpoints/step-*"))
    assert found == ([f"step-{saved}"] if saved else [])
    # What was abandoned is not logged; a step that waits for its evaluation is not either.
    logged = numbers(run) if (run / "metrics.jsonl").exists() else []
    assert [line["step"] for line in logged] == ([1] if saved else [])
    run_on(WORLD, run_config, str(config), overrides)
    status = json.loads((run / "status.json").read_text())
    assert (status["state"], status["attempt"]) == ("finished", 2)
    assert numbers(run) == numbers(folder / "runs" / "undisturbed")
    samples = [x / "samples.jsonl" for x in (run, folder / "runs" / "undisturbed")]
    assert samples[0].read_bytes() == samples[1].read_bytes()


def run_with_signals(path: str, overrides: list[str]) -> bool:
    """A run whose process gets SIGTERM, once, in its first decode round."""
    seen, signals = StopRequest.seen, [signal.SIGTERM]

    def seen_after_signal(self, before_step: bool = False) -> Reason:
        if signals and not before_step:
            os.kill(os.getpid(), signals.pop())
        return seen(self, before_step)

    StopRequest.seen = seen_after_signal
    return train.run(load_config(path, overrides))


def test_sigterm_and_the_stop_file_are_requests(undisturbed):
    folder, config = undisturbed
    keys = [*KEYS, "parallel.pipeline=1", "evaluation.prompts=0"]
    assert run_on(1, run_with_signals, str(config), ["run.name=signal", *keys]) == [False]
    assert status_of(folder, "signal")["message"].startswith("stopped by a signal after step 0")
    stop = folder / "runs" / "file" / "stop"
    stop.parent.mkdir()
    arguments = (str(config), ["run.name=file", *keys])
    assert run_on(1, run_with_file, *arguments, str(stop)) == [False]
    assert "the file 'stop'" in status_of(folder, "file")["message"]
    assert not stop.exists(), "it would stop the next attempt too"


def run_with_file(path: str, overrides: list[str], stop: str) -> bool:
    """A run that is asked to stop once its process has started."""
    Path(stop).touch()
    return train.run(load_config(path, overrides))


@pytest.mark.parametrize("text", ["", "now"])
def test_a_stop_file_of_an_earlier_attempt_stops_nothing(undisturbed, text):
    folder, config = undisturbed
    name = f"earlier-{text}"
    stop = folder / "runs" / name / "stop"
    stop.parent.mkdir()
    stop.write_text(text)
    # Earlier than the ranks' start by more than the 10 ms to which a process knows its age.
    os.utime(stop, times=(time.time() - 1, time.time() - 1))
    run_on(WORLD, run_config, str(config), [f"run.name={name}", *KEYS])
    assert status_of(folder, name)["state"] == "finished" and not stop.exists()


def status_of(folder: Path, name: str) -> dict:
    return json.loads((folder / "runs" / name / "status.json").read_text())


def run_by_the_clock(path: str, overrides: list[str], limit_after: int) -> str:
    """A run whose limit, after so many steps, is what has passed: none waits for a real minute."""
    note_step = StopRequest.note_step

    def note_step_and_limit(self, seconds: float) -> None:
        note_step(self, seconds)
        if self._num_steps == limit_after:
            self._limit = process_age()

    StopRequest.note_step = note_step_and_limit
    try:
        return str(train.run(load_config(path, overrides)))
    except UserError as error:
        return str(error)


def test_a_run_stops_by_the_clock(undisturbed):
    folder, config = undisturbed
    keys = [*KEYS, "parallel.pipeline=1", "evaluation.prompts=0", "run.steps=5"]
    late = ["run.name=late", *keys, "run.max_minutes=0.001"]
    outcome = run_on(1, run_by_the_clock, str(config), late, 0)
    assert outcome[0].startswith("run.max_minutes = 0.001 leaves no time for a step")
    clock = ["run.name=clock", *keys, "run.max_minutes=1000"]
    assert run_on(1, run_by_the_clock, str(config), clock, 3) == ["False"]
    status = status_of(folder, "clock")
    assert status["state"] == "preempted" and "run.max_minutes" in status["message"]
    assert status["step"] == 3 and status["step_seconds"] > 0
