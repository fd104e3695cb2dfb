"""launch/slurm/train.sbatch around stand-ins for Slurm's commands."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.patience import PATIENCE_SECONDS

ROOT = Path(__file__).parents[3]
# The probe of the nodes at the end of a failed run has no --output.
SRUN = """\
#!/bin/bash
[[ "$*" == *" --output="* ]] || { echo "$@" >"$0.probe"; exit "$ALIVE"; }
sleep 0.5
"""
SCONTROL = """\
#!/bin/bash
case "$1" in show) echo here ;; esac
"""


@pytest.fixture
def job(tmp_path, config):
    """Runs the script as Slurm does; ``deed`` is what srun's tasks do."""

    def run(deed: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess:
        for name, text in (("srun", SRUN + deed), ("scontrol", SCONTROL)):
            (tmp_path / name).write_text(text)
            (tmp_path / name).chmod(0o755)
        slurm = {"SLURM_SUBMIT_DIR": str(ROOT), "SLURM_JOB_ID": "1", "SLURM_JOB_NUM_NODES": "1"}
        own = {"VENV": sys.prefix, "RANKS_BY": "srun", "SLURM_JOB_NODELIST": "here", "ALIVE": "0"}
        path = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
        return subprocess.run(
            ["bash", "launch/slurm/train.sbatch", str(config), *arguments],
            cwd=ROOT,
            env=os.environ | slurm | own | path | variables,
            capture_output=True,
            text=True,
            timeout=PATIENCE_SECONDS,
            check=False,
        )

    return run


def test_the_jobs_output_shows_rank_0_and_whoever_says_what_is_wrong(job):
    said = 'echo hello >"$LOGS/srun_rank0.log"; echo "error: x" >"$LOGS/srun_rank1.log"'
    answer = job(f"{said}; exit 2")
    assert answer.returncode == 2
    lines = answer.stdout.splitlines()
    assert lines.count("hello") == 1 and lines.count("error: x") == 1


def test_tasks_that_end_well_without_a_finished_run_are_no_success(job, tmp_path):
    assert job("exit 0").returncode == 1
    (tmp_path / "demo" / "fruitless").write_text("1\n")
    status = '{"attempt": 1, "step": 1, "state": "finished"}'
    assert job(f"echo '{status}' >\"$LOGS/../../status.json\"").returncode == 0
    assert not (tmp_path / "demo" / "fruitless").exists()


def test_a_dead_node_requeues_until_three_attempts_bring_no_step(job, tmp_path):
    dead = {"ALIVE": "1", "SRUN_OPTIONS": "--mpi=none"}
    answers = [job("exit 1", **dead) for _ in range(3)]
    assert [answer.returncode for answer in answers] == [0, 0, 1]
    assert "three attempts without a step" in answers[2].stdout
    assert (tmp_path / "srun.probe").read_text().startswith("--overlap --mpi=none ")


@pytest.mark.parametrize(
    ("deed", "code"),
    [("exit 5", 5), ('echo 247 >"$LOGS/exit-code"; exit 143', 247), ("exit 0", 1)],
)
def test_a_judge_that_fails_hides_no_exit_code(job, tmp_path, deed, code):
    """Of a run that saves and stops srun says 0 as well, so 0 alone is no success."""
    (tmp_path / "venv" / "bin").mkdir(parents=True)
    python = tmp_path / "venv" / "bin" / "python"
    refusal = '[[ "$*" != *.outcome* ]] || exit 9'
    python.write_text(f'#!/bin/bash\n{refusal}\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    answer = job(deed, VENV=str(tmp_path / "venv"))
    assert answer.returncode == code
    assert "train.sbatch: the run ended (srun's exit code " in answer.stdout.splitlines()[-1]
    dead = job(deed, VENV=str(tmp_path / "venv"), ALIVE="1")
    assert dead.returncode == code
    assert ("nothing says whether it may be requeued" in dead.stdout) == (deed != "exit 0")


def test_help_is_shown_and_nothing_is_run(job, tmp_path):
    answer = job("exit 1", "--help")
    assert answer.returncode == 0 and answer.stderr == ""
    assert answer.stdout.startswith("usage: amrlhf train") and not (tmp_path / "demo").exists()


def test_a_missing_environment_is_one_line_and_exit_code_2(job):
    answer = job("exit 1", VENV="/no/venv")
    assert answer.returncode == 2 and answer.stdout.count("\n") == 1 and answer.stderr == ""
    assert "bash launch/install.sh" in answer.stdout
