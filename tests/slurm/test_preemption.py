"""A two-node run that Slurm preempts, requeues and goes on with, against an undisturbed one."""

from __future__ import annotations

import json

import pytest

from tests.distributed.processes import run_on
from tests.distributed.runs import numbers, run_config
from tests.slurm.jobs import LEAD_SECONDS, TIME_LIMIT, Job, wait_until

pytestmark = [pytest.mark.slurm, pytest.mark.distributed]

LAYOUT = ("parallel.tensor=2", "parallel.pipeline=2", "checkpoint.export=false")
WORLD = 4
SAMPLING_RANK = 2  # of the last stage, on the second node


@pytest.fixture(scope="module")
def undisturbed(work):
    run_on(WORLD, run_config, str(work / "ppo.yaml"), ["run.name=undisturbed", *LAYOUT])
    return work / "runs" / "undisturbed"


def test_a_run_preempted_in_mid_step_goes_on_bit_for_bit(cluster, work, undisturbed):
    options = (TIME_LIMIT, f"--signal=B:USR1@{LEAD_SECONDS}")
    plant = {"plant": "wait", "plant_rank": SAMPLING_RANK}
    job = Job(cluster, work, "ppo.yaml", "preempted", 2, *LAYOUT, options=options, **plant)
    job.wait_for(SAMPLING_RANK, 2, "rollout")
    job.shorten()
    wait_until(lambda: cluster.job(job.id).get("Restarts") == "1", job.text)
    cluster.run("scontrol", "update", f"JobId={job.id}", "TimeLimit=60")
    status = json.loads((job.folder / "status.json").read_text())
    found = [path.name for path in job.folder.glob("checkpoints/step-*")]
    ended = job.wait()
    assert ended["JobState"] == "COMPLETED", job.text()
    assert "the early signal has come" in job.text() and "requeued" in job.log.read_text()
    if status["attempt"] == 1:  # the second attempt had not begun when the files were read
        assert (status["state"], status["step"], found) == ("preempted", 1, ["step-1"])
    assert job.status()["state"] == "finished" and job.status()["attempt"] == 2
    assert {path.name for path in job.folder.glob("logs/*")} == {"attempt-01", "attempt-02"}
    assert "/checkpoints/step-1: weights" in job.text()
    assert numbers(job.folder) == numbers(undisturbed)
    samples = [folder / "samples.jsonl" for folder in (job.folder, undisturbed)]
    assert samples[0].read_bytes() == samples[1].read_bytes()


def test_one_task_a_rank_gives_the_same_run(cluster, work, undisturbed):
    job = Job(cluster, work, "ppo.yaml", "tasks", 2, *LAYOUT, RANKS_BY="srun")
    assert job.wait()["JobState"] == "COMPLETED", job.text()
    assert numbers(job.folder) == numbers(undisturbed)
    assert len(list(job.folder.glob("logs/attempt-01/srun_rank*.log"))) == WORLD
