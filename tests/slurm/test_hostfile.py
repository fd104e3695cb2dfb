"""launch/train.sh on two machines by a hostfile: pdsh over a stand-in for ssh, no Slurm."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from contextlib import suppress
from pathlib import Path

import pytest

from tests.distributed.processes import run_on
from tests.distributed.runs import numbers, read_metrics, run_config
from tests.signals import signals_as_usual
from tests.slurm.jobs import ROOT, environment, living, wait_until
from tests.slurm.nodes import HEAD, NODES, Nodes, why_not

pytestmark = [pytest.mark.slurm, pytest.mark.distributed]

SECRET = {"MLFLOW_TRACKING_TOKEN": "a-secret-of-the-test"}  # DeepSpeed would forward it
LAYOUT = ("parallel.tensor=2", "parallel.pipeline=2", "checkpoint.export=false", "run.steps=10")


@pytest.fixture(scope="module")
def machines(tmp_path_factory):
    """Two nodes that ssh's stand-in finds."""
    if shutil.which("pdsh") is None:
        pytest.skip("no pdsh (Debian: apt-get install pdsh)")
    if reason := why_not():
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("machines")
    nodes = Nodes(folder)
    for name in NODES:
        nodes.start(name, ["sleep", "infinity"], folder / f"{name}.out")
    pids = folder / "pids"

    def ready() -> bool:
        try:
            pids.write_text("".join(f"{name} {nodes.pid(name)}\n" for name in NODES))
        except IndexError:
            return False
        names = [on_node(nodes.pid(name), "hostname") for name in NODES]
        return names == list(NODES)

    wait_until(ready, lambda: "no nodes")
    (folder / "hostfile").write_text("".join(f"{name} slots=2\n" for name in NODES))
    yield nodes, folder, pids
    nodes.close()


def on_node(pid: int, *command: str) -> str:
    """What a command says on the node whose first process is ``pid``."""
    enter = ["nsenter", "-t", str(pid), "--net", "--mount", "--uts", "--pid"]
    return subprocess.run([*enter, *command], capture_output=True, text=True).stdout.strip()


def command_lines() -> list[bytes]:
    """Of all processes, those of the nodes too."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):  # it has just ended
            found.append(path.read_bytes())
    return found


class Launch:
    """launch/train.sh on the head of the network; ``run`` is what it is told to do."""

    def __init__(self, machines, run: list[str], work: Path, name: str):
        nodes, folder, pids = machines
        self.folder, self.log = work / "runs" / name, folder / f"{name}.log"
        given = environment(self.folder) | {"AMRLHF_TEST_PIDS": str(pids)}
        given |= SECRET | {"PATH": f"{ROOT / 'tests' / 'slurm'}:{os.environ['PATH']}"}
        command = ["bash", "launch/train.sh", "--hostfile", str(folder / "hostfile")]
        with self.log.open("w") as out:
            self.process = subprocess.Popen(
                [*nodes.inside(HEAD), *command, *run],
                cwd=ROOT,
                env=os.environ | given,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                preexec_fn=signals_as_usual,
            )

    def wait(self) -> int:
        """The exit code; no process may be left on any node."""
        code = self.process.wait(400)
        wait_until(lambda: not living(self.folder), lambda: f"left: {living(self.folder)}")
        return code


def test_a_run_on_two_machines_stops_and_goes_on_with_the_same_numbers(machines, work):
    run_on(4, run_config, str(work / "ppo.yaml"), ["run.name=one-machine", *LAYOUT])
    run = [str(work / "ppo.yaml"), "--set", "run.name=hostfile", *LAYOUT]
    first = Launch(machines, run, work, "hostfile")
    metrics = first.folder / "metrics.jsonl"

    def has_begun() -> bool:
        has_step = metrics.exists() and read_metrics(first.folder)
        return bool(has_step) or first.process.poll() is not None

    wait_until(has_begun, first.log.read_text)
    commands = command_lines()
    assert any(b"pdsh" in command for command in commands)
    for name, value in SECRET.items():
        assert not any(value.encode() in command for command in commands)
        assert f"not forwarded to other nodes: {name} (secret" in first.log.read_text()
    first.process.send_signal(signal.SIGINT)
    assert first.wait() == 75, first.log.read_text()
    assert "the run saves and stops" in first.log.read_text()
    second = Launch(machines, run, work, "hostfile")
    assert second.wait() == 0, second.log.read_text()
    assert "resumed from" in second.log.read_text()  # rank 0's output, shown on the head
    assert numbers(first.folder) == numbers(work / "runs" / "one-machine")
    assert len(list(first.folder.glob("logs/attempt-02/*_rank*.log"))) == 4
    assert "OMP_NUM_THREADS=1\n" in (first.folder / ".deepspeed_env").read_text()


def test_the_doctor_examines_the_machines_of_a_hostfile(machines, tmp_path):
    folder = tmp_path / "runs" / "examined"
    folder.mkdir(parents=True)
    (folder / "stop").touch()  # of a run that goes on there
    healthy = Launch(machines, ["doctor", "--folder", str(folder)], tmp_path, "examined")
    assert healthy.wait() == 0, healthy.log.read_text()
    text = healthy.log.read_text()
    assert "4 ranks on node1, node2" in text and "2 links between hosts" in text
    assert sorted(path.name for path in folder.iterdir()) == [".deepspeed_env", "stop"]
    # Each node has its own; the head's is the machine's.
    private = f"/dev/shm/{folder.name}-{os.getpid()}"
    blind = Launch(machines, ["doctor", "--folder", private], tmp_path, "blind")
    try:
        assert blind.wait() == 1, blind.log.read_text()
    finally:
        shutil.rmtree(private, ignore_errors=True)
    text = blind.log.read_text()
    assert text.count("node2 (ranks 2-3) does not see what rank 0 writes into") == 1
    assert text.count("error") == 2  # the finding, and the count of errors
