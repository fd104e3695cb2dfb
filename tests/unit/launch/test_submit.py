"""What is submitted to Slurm, and the inputs that are refused before that."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from megatron_amrlhf.errors import UserError
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


def submit(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "launch" / "slurm" / "submit.py"), *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)


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
    assert f"set -- {ROOT / PPO} --set run.seed=3\n" in answer.stdout
    checked = subprocess.run(["bash", "-n"], input=answer.stdout, text=True, check=False)
    assert checked.returncode == 0


def test_a_sweep_is_one_array_of_named_runs(site):
    sweep = ["--sweep", "run.seed=0,1", "optimizer.lr=1e-6,1e-5"]
    answer = submit("--site", site(), PPO, DPO, *sweep, "--dry-run")
    assert "--array=0-7" in headers(answer.stdout)
    names = [part for part in answer.stdout.split() if part.startswith("run.name=")]
    assert len(set(names)) == 8 and "run.name=ppo-demo-seed0-lr1e-6" in names


def test_a_swept_list_stays_whole(site):
    sweep = ["--sweep", "optimizer.betas=[0.9,0.95], [0.8,0.9]"]
    answer = submit("--site", site(), PPO, *sweep, "--dry-run")
    assert "--array=0-1" in headers(answer.stdout), answer.stderr
    for betas in ("[0.9,0.95]", "[0.8,0.9]"):
        assert f"'optimizer.betas={betas}'" in answer.stdout


def test_a_job_submitted_from_elsewhere_runs_in_the_repository(site, config):
    answer = submit("--site", site(nodes=1), config.name, "--dry-run", cwd=config.parent)
    assert f"export AMRLHF_HOME={ROOT}\n" in answer.stdout, answer.stderr
    assert f"set -- {config}\n" in answer.stdout


def test_values_with_spaces_are_quoted_for_sbatch(site):
    keys = ["--set", "run.name=my run", "run.folder=/a b"]
    answer = submit("--site", site(constraint="a&b"), PPO, *keys, "--dry-run")
    expected = {"--job-name=my-run", "--output='/a b/slurm-my-run-%j.out'", "--constraint='a&b'"}
    assert expected <= set(headers(answer.stdout)), answer.stderr


@pytest.mark.parametrize("time", ["5", "5:00", "00:05:00", "0-00:05", "0-0:5:0"])
def test_a_lead_that_leaves_no_time_is_refused(site, time):
    load_site(Path(site(time=time, signal_lead_seconds=299)))
    with pytest.raises(UserError, match=r"signal_lead_seconds: 300 .* 300 s"):
        load_site(Path(site(time=time, signal_lead_seconds=300)))


def test_the_example_site_is_valid():
    assert load_site(ROOT / "launch" / "slurm" / "site_example.yaml").gpus_per_node == 8


@pytest.mark.parametrize(
    ("keys", "arguments", "words"),
    [
        ({"partitoin": "x"}, [PPO], "partitoin: unknown key, did you mean partition?"),
        ({"nodes": 0}, [PPO], "nodes: must be"),
        ({"setup": "foo"}, [PPO], "setup: must be a list such as [A, B] (got 'foo')"),
        ({"environment": {"A B": "c"}}, [PPO], "'A B' is no name of a shell variable"),
        ({}, ["no.yaml"], "no.yaml: no such file"),
        ({"processes_per_node": 3}, [PPO], "does not divide by the 3"),
        ({}, [PPO, PPO], "run.name: ppo-demo twice"),
        ({}, [PPO, "--sweep", "run.seed"], "--sweep run.seed: must look like"),
        ({}, [PPO, "--first", PRM, "--set", "run.sed=1"], "did you mean run.seed?"),
        ({}, [PPO, "--no-such"], "unrecognized arguments: --no-such"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(site, keys, arguments, words):
    answer = submit("--site", site(**keys), *arguments, "--dry-run")
    assert answer.returncode == 2 and answer.stdout == ""
    assert words in answer.stderr and answer.stderr.count("\n") == 1


def test_a_missing_site_is_not_taken_for_a_run():
    answer = submit("--site", "nosite", PPO, "--dry-run")
    assert answer.returncode == 2
    assert answer.stderr == (
        "error: nosite: no such file (give the path of a site's YAML, see "
        "launch/slurm/site_example.yaml)\n"
    )
