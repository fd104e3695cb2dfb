"""A rank that dies, stops or hangs: the run ends in time, says which one, and leaves nobody."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_amrlhf.run.stop_request import EXIT_AGAIN, POLL_SECONDS
from megatron_amrlhf.run.watchdog import EXIT_STALLED
from tests.distributed.runs import make_models, numbers, start, write_config
from tests.patience import PATIENCE_SECONDS

pytestmark = pytest.mark.distributed

ROOT = Path(__file__).parents[2]
STEPS = 3
KEYS = (f"run.steps={STEPS}", "checkpoint.export=false", "evaluation.prompts=0")
FAULTY = 1
# Long enough for a busy machine to build the model, and to wake a stopped rank after the warning.
LIMIT_SECONDS, DELAYED_LIMIT_SECONDS = 20.0, 30.0
EXIT_KILLED, EXIT_TERMINATED = 247, 143


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("watch")
    make_models(folder)
    write_config(folder, "prm")
    return folder


class Launched:
    """A run of two ranks through launch/train.sh, one of which goes wrong."""

    def __init__(self, folder: Path, plant: str, pp: int, limit: float):
        name = f"{plant}-{limit:g}"
        self.folder, self.log = folder / "runs" / name, folder / f"{name}.log"
        self.mark = f"WATCHED_RUN={self.folder}".encode()
        environment = {"VENV": sys.prefix, "OMP_NUM_THREADS": "1"}
        environment |= {"PLANT": plant, "PLANT_RANK": str(FAULTY)}
        environment |= {"WATCHED_RUN": str(self.folder)}
        environment |= {"PYTHONPATH": str(Path(__file__).parent / "planted")}
        keys = [f"run.name={name}", f"parallel.pipeline={pp}", *KEYS]
        keys += [f"engine.watchdog_seconds={limit}"]
        command = ["bash", "launch/train.sh", "--processes", "2", str(folder / "prm.yaml")]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [*command, "--set", *keys],
                cwd=ROOT,
                env=os.environ | environment,
                stdout=log,
                stderr=log,
            )

    def __enter__(self) -> Launched:
        return self

    def __exit__(self, *error) -> None:
        for pid in self.living():
            os.kill(pid, signal.SIGKILL)
        self.process.wait()

    def wait_for_fault(self) -> None:
        """Until the faulty rank has said that it is where it goes wrong."""
        self._wait(lambda: (self.beat(FAULTY)["step"], self.beat(FAULTY)["phase"]) == (2, "update"))

    def wait_for_standstill(self) -> None:
        """Until the faulty rank has stopped itself."""
        stat = Path(f"/proc/{self.beat(FAULTY)['pid']}/stat")
        self._wait(lambda: stat.read_text().rpartition(")")[2].split()[0] == "T")

    def wait_for(self, words: str) -> None:
        """Until the output has the words."""
        self._wait(lambda: words in self.text())

    def _wait(self, happened: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not happened():
            assert self.process.poll() is None and time.monotonic() < deadline, self.text()
            time.sleep(0.05)

    def wait(self) -> int:
        """The exit code; no process of the run may be left then."""
        code = self.process.wait(PATIENCE_SECONDS)
        assert self.living() == []
        return code

    def living(self) -> list[int]:
        """Processes that carry the run's environment, whoever their parent is now."""
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                if self.mark in (entry / "environ").read_bytes().split(b"\0"):
                    found.append(int(entry.name))
            except OSError:
                continue
        return found

    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def beat(self, rank: int) -> dict:
        path = self.folder / "heartbeat" / f"rank-{rank:04d}.json"
        return json.loads(path.read_text()) if path.exists() else {"step": None, "phase": None}

    def assert_failed(self, *words: str) -> None:
        """The last line and status.json name the cause."""
        last, status = self.text().splitlines()[-1], self.status()
        assert status["state"] == "failed" and "\n" not in status["message"]
        for word in words:
            assert word in last and word in status["message"], (word, last, status)

    def status(self) -> dict:
        return json.loads((self.folder / "status.json").read_text())


@pytest.mark.parametrize(
    ("plant", "code", "word"),
    [("kill", EXIT_KILLED, "SIGKILL"), ("raise", 1, "ArithmeticError: planted error")],
)
def test_a_dying_rank_ends_the_run_and_is_named(folder, plant, code, word):
    with Launched(folder, plant, pp=1, limit=0) as run:
        run.wait_for_fault()
        assert run.wait() == code, run.text()
        run.assert_failed(f"rank {FAULTY} ", word, "phase update of step 2")


def test_a_rank_that_hangs_or_is_stopped_is_named(folder):
    """Both at once: half of the time goes by without work."""
    with (
        Launched(folder, "stick", pp=2, limit=LIMIT_SECONDS) as stuck,
        Launched(folder, "stop", pp=2, limit=LIMIT_SECONDS) as stopped,
    ):
        for run, word in ((stuck, "is not in a collective"), (stopped, "does not run any more")):
            run.wait_for_fault()
            assert run.wait() == EXIT_STALLED, run.text()
            run.assert_failed(f"rank {FAULTY} ", word, "phase update of step 2")
            assert run.text().count("error: no progress") == 1
        assert "go_wrong: time.sleep(0.1)" in stuck.text()
        report = (stuck.folder / "watchdog.txt").read_text()
        assert "go_wrong: time.sleep(0.1)" in report and "run_forward_backward" in report


def test_a_first_signal_asks_and_a_second_one_ends(folder):
    with Launched(folder, "stick", pp=2, limit=0) as run:
        run.wait_for_fault()
        run.process.send_signal(signal.SIGTERM)
        run.wait_for("the run saves and stops")
        assert (run.folder / "stop").exists() and run.process.poll() is None
        run.process.send_signal(signal.SIGTERM)
        assert run.wait() == EXIT_TERMINATED, run.text()
        assert run.status()["state"] in ("stopped", "failed")
    with Launched(folder, "stop", pp=2, limit=0) as run:  # the first one stays where it was
        run.wait_for_fault()
        run.process.send_signal(signal.SIGTERM)
        run.wait_for("the run saves and stops")
        run.wait_for_standstill()
        time.sleep(2 * POLL_SECONDS)  # so that the next look for a stop file is due
        os.kill(run.beat(FAULTY)["pid"], signal.SIGCONT)
        assert run.wait() == EXIT_AGAIN, run.text()
        assert (run.status()["state"], run.status()["step"]) == ("preempted", 2)
        assert not (run.folder / "stop").exists()


def test_a_delayed_rank_changes_nothing(folder):
    undisturbed = start(folder, folder / "prm.yaml", 1, 2, 1, *KEYS)
    with Launched(folder, "stop", pp=2, limit=DELAYED_LIMIT_SECONDS) as run:
        run.wait_for("warning: no progress")
        os.kill(run.beat(FAULTY)["pid"], signal.SIGCONT)
        assert run.wait() == 0, run.text()
        assert f"rank {FAULTY} " in run.text() and not (run.folder / "watchdog.txt").exists()
        assert run.status()["state"] == "finished"
        assert numbers(run.folder) == numbers(undisturbed)
        assert len(numbers(run.folder)) == STEPS
