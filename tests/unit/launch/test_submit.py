"""What is submitted to Slurm, and the inputs that are refused before that."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from megatron_amrlhf.launching.site import load_site

ROOT = Path(__file__).parents[3]
PRM, PPO, DPO = (f"configs/{name}_demo.yaml" for name in ("prm", "ppo", "dpo"))


@pytest.fixture
def site(tmp_path):
    def write(**keys) -> str:
        path = tmp_path / "site.yaml"
        path.write_text(yaml.safe_dump({"nodes": 2, "processes_per_node": 2} | keys))
        return str(path)

    return write


def submit(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "launch/slurm/submit.py", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def headers(script: str) -> list[str]:
    return [line.removeprefix("#SBATCH ") for line in script.splitlines() if "#SBATCH" in line]


def test_a_dry_run_prints_a_whole_script(site):
    path = site(partition="gpu", account="us", gpus_per_node=2, modules=["cuda"], time="01:00:00")
    answer = submit("--site", path, PPO, "--set", "run.seed=3", "--dry-run")
    assert answer.returncode == 0, answer.stderr
    expected = {"--partition=gpu", "--account=us", "--nodes=2", "--gpus-per-node=2"}
    expected |= {"--time=01:00:00", "--signal=B:USR1@300", "--requeue", "--job-name=ppo-demo"}
    assert expected <= set(headers(answer.stdout))
    assert "module load cuda\n" in answer.stdout and "export PROCESSES=2\n" in answer.stdout
    assert f"set -- {PPO} --set run.seed=3\n" in answer.stdout
    checked = subprocess.run(["bash", "-n"], input=answer.stdout, text=True, check=False)
    assert checked.returncode == 0


def test_a_sweep_is_one_array_of_named_runs(site):
    sweep = ["--sweep", "run.seed=0,1", "optimizer.lr=1e-6,1e-5"]
    answer = submit("--site", site(), PPO, DPO, *sweep, "--dry-run")
    assert "--array=0-7" in headers(answer.stdout)
    names = [part for part in answer.stdout.split() if part.startswith("run.name=")]
    assert len(set(names)) == 8 and "run.name=ppo-demo-seed0-lr1e-6" in names


def test_the_example_site_is_valid():
    assert load_site(ROOT / "launch" / "slurm" / "site_example.yaml").gpus_per_node == 8


@pytest.mark.parametrize(
    ("keys", "arguments", "words"),
    [
        ({"partitoin": "x"}, [PPO], "partitoin: unknown key, did you mean partition?"),
        ({"nodes": 0}, [PPO], "nodes: must be"),
        ({}, ["no.yaml"], "no.yaml: no such file"),
        ({"processes_per_node": 3}, [PPO], "does not divide by the 3"),
        ({}, [PPO, PPO], "run.name: ppo-demo twice"),
        ({}, [PPO, "--sweep", "run.seed"], "--sweep run.seed: must look like"),
        ({}, [PPO, "--first", PRM, "--set", "run.sed=1"], "did you mean run.seed?"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(site, keys, arguments, words):
    answer = submit("--site", site(**keys), *arguments, "--dry-run")
    assert answer.returncode == 2 and answer.stdout == ""
    assert words in answer.stderr and answer.stderr.count("\n") == 1
