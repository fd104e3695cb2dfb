"""scancel, a killed rank, a full time limit and a node that dies end as docs/cluster.md says."""

from __future__ import annotations

import pytest

from tests.distributed.processes import run_on
from tests.distributed.runs import numbers, run_config
from tests.slurm.jobs import LEAD_SECONDS, TIME_LIMIT, Job, wait_until

pytestmark = [pytest.mark.slurm, pytest.mark.distributed]

KEYS = ("checkpoint.every=1", "checkpoint.export=false", "evaluation.prompts=0", "run.steps=3")
ON_SECOND_NODE = 1
FAULT = (ON_SECOND_NODE, 2, "update")
EXIT_KILLED = "247:0"


@pytest.fixture(scope="module")
def jobs(cluster, work):
    """Three jobs of one rank a node at the same time, as most of it is waiting."""

    def start(name: str, plant: str, options: tuple[str, ...]) -> Job:
        given = {"plant": plant, "plant_rank": ON_SECOND_NODE, "options": options}
        return Job(cluster, work, "prm.yaml", name, 1, *KEYS, **given)

    return {
        "limit": start("limit", "stick", (TIME_LIMIT, f"--signal=B:USR1@{LEAD_SECONDS}")),
        "killed": start("killed", "kill", (TIME_LIMIT,)),
        "cancelled": start("cancelled", "stick", (TIME_LIMIT,)),
    }


def test_a_job_without_time_for_a_step_is_not_requeued_for_ever(cluster, work):
    """The third such attempt, stopped in its first rollout."""
    folder = work / "runs" / "no-time"
    folder.mkdir(parents=True)
    (folder / "fruitless").write_text("1\n2\n")
    keys = ("parallel.pipeline=2", "checkpoint.export=false", "evaluation.prompts=0")
    plant = {"plant": "wait", "plant_rank": ON_SECOND_NODE, "PLANT_STEP": "1"}
    job = Job(cluster, work, "ppo.yaml", "no-time", 1, *keys, **plant)
    job.wait_for(ON_SECOND_NODE, 1, "rollout")
    cluster.run("scancel", "--batch", "--signal=USR1", job.id)
    ended = job.wait()
    assert (ended["JobState"], ended["ExitCode"]) == ("FAILED", "75:0"), job.text()
    assert ended["Restarts"] == "0" and job.status()["step"] == 0
    assert "three attempts without a step" in job.log.read_text().splitlines()[-1]


def test_a_killed_rank_ends_the_job_and_is_named(jobs):
    job = jobs["killed"]
    ended = job.wait()
    assert (ended["JobState"], ended["ExitCode"]) == ("FAILED", EXIT_KILLED), job.text()
    last = job.log.read_text().splitlines()[-1]
    assert f"rank {ON_SECOND_NODE} " in last and "SIGKILL" in last and "update of step 2" in last
    assert job.status()["state"] == "failed" and ended["Restarts"] == "0"


def test_scancel_ends_the_job_at_once(cluster, jobs):
    job = jobs["cancelled"]
    job.wait_for(*FAULT)
    cluster.run("scancel", job.id)
    assert job.wait()["JobState"] == "CANCELLED", job.text()
    assert [path.name for path in job.folder.glob("checkpoints/step-*")] == ["step-1"]


def test_a_run_that_does_not_stop_ends_at_the_time_limit(cluster, jobs):
    """A rank hangs, so the early signal is in vain."""
    job = jobs["limit"]
    job.wait_for(*FAULT)
    job.shorten()
    ended = job.wait()
    assert ended["JobState"] == "TIMEOUT" and ended["Restarts"] == "0", job.text()
    assert "the early signal has come" in job.log.read_text()


def test_a_run_whose_node_dies_is_requeued_and_goes_on(cluster, work):
    run_on(2, run_config, str(work / "prm.yaml"), ["run.name=undisturbed-prm", *KEYS])
    plant = {"plant": "stick", "plant_rank": ON_SECOND_NODE}
    job = Job(cluster, work, "prm.yaml", "node-died", 1, *KEYS, **plant)
    job.wait_for(*FAULT)
    cluster.nodes.crash("node2")
    wait_until(lambda: cluster.job(job.id).get("Restarts") == "1", job.text)
    # Slurm repeats what a dead node did not answer, and would end the new attempt's tasks with the
    # old one's; a real cluster lets two minutes pass before a requeued job starts.
    cluster.run("scontrol", "hold", job.id)
    cluster.start_node("node2")
    cluster.wait_for_nodes()
    wait_until(lambda: cluster.queued_messages() == 0, job.text)
    cluster.run("scontrol", "release", job.id)
    ended = job.wait()
    assert ended["JobState"] == "COMPLETED", job.text()
    assert job.status()["attempt"] == 2
    assert numbers(job.folder) == numbers(work / "runs" / "undisturbed-prm")
