"""launch/train.sh around a stand-in for the deepspeed launcher."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_amrlhf.run.stop_request import Reason, _asked_by, why_end_now
from tests.patience import PATIENCE_SECONDS
from tests.signals import signals_as_usual

ROOT = Path(__file__).parents[3]
LAUNCHER = """\
#!/bin/bash
printf '%s\\n' "$@" >"$0.arguments"
while [[ $# -gt 0 && "$1" != --enable_each_rank_log ]]; do shift; done
LOGS="$2" FOLDER="${2%/logs/*}"
status() {
    local rest='"attempt": 1, "step": 1, "message": "", "time": "2026-01-01T00:00:00+00:00"'
    echo '{"state": "'"$1"'", '"$rest}" >"$FOLDER/status.json"
    : >"$FOLDER/config.resolved.yaml" # so that the folder is a run's
}
"""
WAIT_FOR_STOP = 'for _ in {1..99}; do [[ ! -e "$FOLDER/stop" ]] || break; sleep 0.1; done'


class Launch:
    """Runs train.sh in a folder of its own, with a launcher that does what the test says."""

    def __init__(self, folder: Path):
        self.folder, self.bin = folder, folder / "venv" / "bin"
        self.bin.mkdir(parents=True)
        self.run = folder / "demo"
        (folder / "hosts").write_text("one slots=1\ntwo slots=1\n")
        self.judge('exec "$PYTHON" "$@"')

    def judge(self, deed: str) -> None:
        """What Python does where it is asked how the run has ended."""
        given = f'#!/bin/bash\nPYTHON="{sys.executable}"\n'
        self.write("python", f'{given}[[ "$*" != *.outcome* ]] || {deed}\nexec "$PYTHON" "$@"\n')

    def write(self, name: str, text: str) -> None:
        (self.bin / name).write_text(text)
        (self.bin / name).chmod(0o755)

    def __call__(self, deed: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess:
        self.write("deepspeed", LAUNCHER + deed)
        return subprocess.run(
            ["bash", str(ROOT / "launch" / "train.sh"), *(arguments or ["run.yaml"])],
            cwd=self.folder,
            env=os.environ | {"VENV": "venv"} | variables,
            capture_output=True,
            text=True,
            timeout=PATIENCE_SECONDS,
            start_new_session=True,  # its signals are not the tests'
            preexec_fn=signals_as_usual,
            check=False,
        )

    @property
    def arguments(self) -> list[str]:
        """What the launcher was given."""
        return (self.bin / "deepspeed.arguments").read_text().splitlines()


@pytest.fixture
def launch(tmp_path, config):
    return Launch(tmp_path)


def test_a_folders_name_is_no_pattern(launch):
    more = ["run.yaml", "--set", "run.name=x[1]"]
    answer = launch('echo "error: told" >"$LOGS/x_rank0.log"; exit 2', *more)
    assert (answer.returncode, answer.stdout) == (2, "error: told\n")


def test_a_launcher_that_dies_before_any_rank_has_a_log_ends_the_script(launch):
    answer = launch("exit 3")
    assert answer.returncode == 3
    assert "the run failed (exit code 3), see " in answer.stderr


@pytest.mark.parametrize("command", ["train", "score"])
def test_only_the_logs_of_this_start_are_shown(launch, command):
    more = ["--answers", "steps.jsonl", "--out", "demo"] if command == "score" else []
    for word in ("old", "new"):
        deed = f'echo "error: {word}" >"$LOGS/x_rank0.log"; exit 2'
        answer = launch(deed, command, "run.yaml", *more)
        assert (answer.returncode, answer.stdout) == (2, f"error: {word}\n")


@pytest.mark.parametrize(("state", "code"), [("running", 1), ("finished", 0), ("preempted", 0)])
def test_success_needs_a_run_that_says_so(launch, state, code):
    assert launch(f"status {state}; exit 0").returncode == code
    again = launch("exit 0")  # the status is that of the start before
    assert again.returncode == 1 and "the launcher ended before the run" in again.stderr


@pytest.mark.parametrize(("death", "code"), [("exit 0", 1), ("kill -KILL $$", 137)])
def test_ranks_whose_launcher_was_killed_are_ended(launch, death, code):
    """DeepSpeed's launcher on a node was killed, or the one that waits for it."""
    answer = launch(f'status running; sleep 300 & echo $! >"$FOLDER/pid"; {death}')
    assert answer.returncode == code and "cause: the launcher" in answer.stderr
    assert why_end_now(launch.run / "stop") == "its launcher was killed"
    left = Path("/proc") / (launch.run / "pid").read_text().strip()
    time.sleep(0.2)
    assert not left.exists() or "State:\tZ" in (left / "status").read_text()


@pytest.mark.parametrize("name", ["TERM", "INT", "HUP"])
def test_a_signal_right_after_the_start_is_a_request_that_names_it(launch, name):
    answer = launch(f'kill -{name} "$PPID"; {WAIT_FOR_STOP}; exit 75')
    assert answer.returncode == 75 and "the run saves and stops" in answer.stderr
    assert _asked_by(launch.run / "stop") is getattr(Reason, f"SCRIPT_{name}")


@pytest.mark.parametrize("kind", ["train", "score", "doctor"])
def test_a_run_whose_script_is_killed_is_ended(launch, kind):
    """The stand-in ends by the stop file where ranks look at it, and by SIGTERM otherwise."""
    more = {
        "train": ["run.yaml"],
        "score": ["score", "run.yaml", "--answers", "steps.jsonl", "--out", "demo"],
        "doctor": ["doctor"],
    }[kind]
    look = f'grep -s script "{launch.run}/stop" && exit'
    wait = f"for _ in {{1..99}}; do {look}; sleep 0.1; done"
    answer = launch(f'sleep 0.5; kill -KILL "$PPID"; {wait}; echo left', *more)
    assert answer.returncode == -signal.SIGKILL
    assert answer.stdout == ("now script\n" if kind == "train" else "")
    if kind == "train":
        assert why_end_now(launch.run / "stop") == "launch/train.sh was killed"


@pytest.mark.parametrize("name", ["INT", "TERM", "HUP"])
def test_the_console_shows_what_rank_0_says_after_a_signal_to_all(launch, name):
    """A terminal's Ctrl-C, or what ends a job, goes to the group that the script leads."""
    says = 'echo {} >>"$LOGS/x_rank0.log"; sleep 1'
    interrupt = f'kill -{name} -- "-$PPID"; {WAIT_FOR_STOP}'
    answer = launch(f"{says.format('one')}; {interrupt}; {says.format('two')}; exit 75")
    assert (answer.returncode, answer.stdout) == (75, "one\ntwo\n")


@pytest.mark.parametrize("command", ["doctor", "score", "run.yaml"])
def test_help_of_a_command_is_shown_and_nothing_is_run(launch, command):
    answer = launch("exit 9", command, "--help")
    assert answer.returncode == 0 and answer.stderr == ""
    assert answer.stdout.startswith("usage: amrlhf ") and not (launch.run / "logs").exists()


def test_a_failed_scoring_names_its_logs(launch):
    answer = launch("exit 1", "score", "run.yaml", "--answers", "steps.jsonl", "--out", "scores")
    assert answer.returncode == 1
    assert answer.stderr.strip() == (
        f"train.sh: the run failed (exit code 1), see {launch.folder}/scores/logs/attempt-01"
    )


@pytest.mark.parametrize("code", [0, 3, 75])
@pytest.mark.parametrize("deed", ["exit 1", "kill -KILL $$"])
def test_a_judge_that_fails_hides_no_exit_code(launch, code, deed):
    launch.judge(deed)
    answer = launch(f"exit {code}")
    assert answer.returncode == code
    assert f"train.sh: the run ended (exit code {code}), see {launch.run}/logs/" in answer.stderr


@pytest.mark.parametrize("name", ["INT", "TERM", "HUP"])
def test_a_signal_to_all_while_it_is_judged_hides_no_exit_code(launch, name):
    find = "read -r _ _ _ _ group _ </proc/self/stat"
    launch.judge(f'{{ {find}; kill -{name} -- "-$group"; sleep 1; }}')
    answer = launch("exit 3")
    assert answer.returncode == 3 and "the run saves and stops" in answer.stderr
    assert "the run ended (exit code 3), see " in answer.stderr.splitlines()[-1]


def test_the_script_does_as_it_is_judged(launch):
    log = launch.folder / "a log"
    log.write_text("".join(f"{number}\n" for number in range(99)))
    said = f"CODE=5 REST=1 SHOWN=('{log}') LAST='told'"
    launch.judge(f'{{ echo "{said}"; exit; }}')
    answer = launch('sleep 300 & echo $! >"$FOLDER/pid"; echo hello >"$LOGS/x_rank0.log"')
    assert (answer.returncode, answer.stdout) == (5, "hello\n")
    assert answer.stderr.split() == [*map(str, range(79, 99)), "told"]
    assert why_end_now(launch.run / "stop") == "its launcher was killed"
    left = Path("/proc") / (launch.run / "pid").read_text().strip()
    assert not left.exists() or "State:\tZ" in (left / "status").read_text()


def test_files_are_those_of_the_callers_folder(launch):
    arguments = ["score", "run.yaml", "--answers=steps.jsonl", "--out=scores"]
    launch("exit 0", *arguments)
    given = launch.arguments
    for name in ("run.yaml", "steps.jsonl", "scores"):
        assert str(launch.folder / name) in " ".join(given).replace("=", " ").split(), name


def test_the_given_master_beats_the_variable(launch):
    nodes = ["--hostfile", "hosts", "--node-rank", "0"]
    launch("exit 3", *nodes, "--master", "one:111", "run.yaml", MASTER_PORT="222")
    assert launch.arguments[launch.arguments.index("--master_port") + 1] == "111"
    launch("exit 3", *nodes, "run.yaml", MASTER_PORT="222")
    assert launch.arguments[launch.arguments.index("--master_port") + 1] == "222"
