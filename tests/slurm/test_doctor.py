"""The doctor as the ranks of a Slurm job on two nodes, one task a rank."""

from __future__ import annotations

import json
import sys

import pytest

from tests.slurm.jobs import ENDED, ROOT, TIME_LIMIT, environment, wait_until

pytestmark = [pytest.mark.slurm, pytest.mark.distributed]

# /dev/shm is each node's own: the fault of a run folder that is not on a shared file system.
SCRIPT = """\
DOCTOR="srun --kill-on-bad-exit=0 {python} -m megatron_amrlhf doctor"
$DOCTOR --folder {shared} --json {folder}/shared.json; echo code $?
$DOCTOR --folder /dev/shm/run --json {folder}/private.json; echo code $?
"""


def test_two_nodes_are_examined_and_a_folder_that_is_not_shared_is_named(cluster, tmp_path):
    script = SCRIPT.format(python=sys.executable, folder=tmp_path, shared=tmp_path / "run")
    options = ["--parsable", "--nodes=2", "--ntasks-per-node=1", TIME_LIMIT]
    log = tmp_path / "job.out"
    submit = ["sbatch", *options, f"--output={log}", "--wrap", script]
    answer = cluster.run(*submit, cwd=ROOT, **environment(tmp_path))
    assert answer.returncode == 0, answer.stderr
    job = answer.stdout.strip()
    wait_until(lambda: cluster.job(job).get("JobState") in ENDED, lambda: log.read_text())
    text = log.read_text()
    assert [line for line in text.splitlines() if line.startswith("code")] == ["code 0", "code 1"]
    shared, private = (
        json.loads((tmp_path / f"{x}.json").read_text()) for x in ("shared", "private")
    )
    assert not [x for x in shared["findings"] if x["level"] == "error"], text
    assert [x["host"] for x in shared["ranks"]] == ["node1", "node2"]
    assert [x["host"] for x in shared["clocks"]] == ["node2"]
    assert len(shared["links"]) == 1 and "between hosts" in text
    (error,) = [x for x in private["findings"] if x["level"] == "error"]
    assert error["check"] == "shared files"
    assert error["message"].startswith("node2 (rank 1) does not see what rank 0 writes into")
    assert not (tmp_path / "run").exists()
