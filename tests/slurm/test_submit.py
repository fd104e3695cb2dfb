"""The real Slurm takes what submit.py renders."""

from __future__ import annotations

import sys

import pytest
import yaml

from tests.slurm.jobs import ROOT

pytestmark = pytest.mark.slurm

PRM, PPO, DPO = (f"configs/{name}_demo.yaml" for name in ("prm", "ppo", "dpo"))


@pytest.fixture
def submit(cluster, tmp_path):
    def call(site: dict, *arguments: str):
        path = tmp_path / "site.yaml"
        path.write_text(yaml.safe_dump({"nodes": 2, "processes_per_node": 1} | site))
        command = [sys.executable, "launch/slurm/submit.py", "--site", str(path), *arguments]
        return cluster.run(*command, cwd=ROOT, PYTHONPATH=str(ROOT))

    return call


def test_slurm_is_asked_and_may_refuse(submit):
    answer = submit({}, PPO, "--test-only")
    assert answer.returncode == 0 and "to start at" in answer.stdout, answer.stderr
    refused = submit({"partition": "nowhere"}, PPO, "--test-only")
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1
    assert "Slurm refuses the job" in refused.stderr and "partition" in refused.stderr


def test_a_sweep_waits_for_the_first_run(cluster, submit, tmp_path):
    held = {"sbatch_options": ["--hold"]}
    sweep = ["--sweep", "run.seed=0,1", f"run.folder={tmp_path}"]
    answer = submit(held, "--first", PRM, PPO, DPO, *sweep)
    assert answer.returncode == 0, answer.stderr
    first, rest = (line.split()[1].rstrip(":") for line in answer.stdout.splitlines())
    job = cluster.job(rest)
    assert job["Dependency"].startswith(f"afterok:{first}") and job["ArrayTaskId"] == "0-3"
    assert cluster.job(first)["JobState"] == "PENDING"
    cluster.run("scancel", first, rest)
