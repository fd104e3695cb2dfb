"""How a run's end is judged: exit codes, causes, logs that are shown, requeues."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_amrlhf.launching import left_behind, outcome
from megatron_amrlhf.launching.left_behind import (
    Status,
    completed_steps,
    noted_cause,
    read_status_of,
)
from megatron_amrlhf.launching.outcome import (
    LAUNCHER_KILLED,
    LAUNCHER_LOST,
    MOST_FRUITLESS,
    JobOutcome,
    Outcome,
    Start,
    count_fruitless,
    judge_job,
    judge_run,
    refusal,
)

ROOT = Path(__file__).parents[3]
CAUSE = "rank 1 (host here, pid 7) failed: ValueError: of rank 0 or so (phase update of step 2)"
STALLED = "no progress for 9 s on rank 0 (limit 9): rank 2 (host far, pid 9) is stopped, phase x"
NO_BEAT = "no progress for 9 s on rank 0 (limit 9): rank 2 has written no heartbeat, phase x"
OF_RANK_0 = "rank 0 (host here, pid 7) failed: KeyError: 'x'"
FINISHED, PREEMPTED, RUNNING, NOTHING = map(Status, ("finished", "preempted", "running", ""))


@pytest.fixture
def logs(tmp_path):
    for rank in range(3):
        (tmp_path / f"x_rank{rank}.log").touch()
    return tmp_path


def never():
    raise AssertionError("the cause is not asked for")


@pytest.mark.parametrize(
    ("command", "code", "killed", "status", "expected"),
    [
        ("train", 0, False, FINISHED, (0, False, "")),
        ("train", 0, False, PREEMPTED, (0, False, "")),
        ("train", 75, False, PREEMPTED, (75, False, "")),
        ("train", 75, False, RUNNING, (75, False, "")),
        ("train", 130, False, RUNNING, (130, False, "")),
        ("train", 130, True, RUNNING, (130, True, "")),
        ("train", 0, False, RUNNING, (1, True, f"failed (exit code 1), cause: {LAUNCHER_LOST}")),
        ("train", 0, False, NOTHING, (1, True, f"failed (exit code 1), cause: {LAUNCHER_LOST}")),
        ("train", 137, True, RUNNING, (137, True, f"(exit code 137), cause: {LAUNCHER_KILLED}")),
        ("score", 137, True, NOTHING, (137, True, f"(exit code 137), cause: {LAUNCHER_KILLED}")),
        ("score", 0, False, NOTHING, (0, False, "")),
        ("doctor", 0, False, NOTHING, (0, False, "")),
        ("doctor", 1, False, NOTHING, (1, False, "")),
        ("doctor", 2, False, NOTHING, (2, False, "")),
        ("doctor", 247, False, NOTHING, (247, False, "the doctor has not ended as it should")),
        ("doctor", 137, True, NOTHING, (137, True, "not ended as it should (exit code 137)")),
    ],
)
def test_an_end_whose_cause_need_not_be_looked_for(logs, command, code, killed, status, expected):
    found = judge_run(Start(command, logs), code, killed, status, never)
    code, rest, last = expected
    assert (found.code, found.rest, found.shown) == (code, rest, ())
    assert last in found.last and bool(found.last) == bool(last)
    assert not found.last or found.last.startswith("train.sh: the ")


def test_only_the_machine_of_rank_0_doubts_a_success(logs):
    start = Start("train", logs, has_rank_0=False)
    assert judge_run(start, 0, False, RUNNING, never) == Outcome(0)


@pytest.mark.parametrize(
    ("code", "cause", "has_rank_0", "shown"),
    [
        (1, CAUSE, True, [1]),
        (247, CAUSE, False, [1]),
        (3, STALLED, True, [2]),
        (3, NO_BEAT, True, [2]),
        (1, OF_RANK_0, True, []),  # the console has shown it
        (1, OF_RANK_0, False, [0]),
        (1, "rank 7 (host far, pid 1) failed: x", True, []),  # its log is elsewhere
    ],
)
@pytest.mark.parametrize("command", ["train", "score"])
def test_a_failed_run_names_its_cause_and_shows_the_log(
    logs, command, code, cause, has_rank_0, shown
):
    start = Start(command, logs, has_rank_0)
    found = judge_run(start, code, False, RUNNING, lambda: cause)
    assert found.last == f"train.sh: the run failed (exit code {code}), cause: {cause}"
    assert (found.code, found.rest) == (code, False)
    assert found.shown == tuple(logs / f"x_rank{rank}.log" for rank in shown)


def test_without_a_cause_the_logs_are_named(logs):
    found = judge_run(Start("train", logs), 3, False, RUNNING, lambda: None)
    assert found == Outcome(3, last=f"train.sh: the run failed (exit code 3), see {logs}")


@pytest.mark.parametrize(
    ("rank", "text", "told"),
    [
        (0, "error: x\n", ""),  # the console has shown it
        (1, "words\nerror (rank 1): x\nerror: y\n", "error (rank 1): x"),
        (1, "an error: x\n", ""),
    ],
)
def test_a_mistake_is_told_once_whichever_rank_has_found_it(logs, rank, text, told):
    (logs / f"x_rank{rank}.log").write_text(text)
    (logs / "x_rank2.log").write_text("error: z\n" if told or rank == 0 else "")
    found = judge_run(Start("train", logs), 2, False, RUNNING, never)
    assert found == Outcome(2, last=told)
    job = judge_job(
        logs, 2, asked=False, one_task_a_rank=True, status=RUNNING, cause_of=lambda: None
    )
    assert (job.code, job.error) == (2, told)
    assert not judge_job(
        logs, 2, asked=False, one_task_a_rank=False, status=RUNNING, cause_of=lambda: None
    ).error


STOPPED = "the run was asked to stop: submit it again to go on"


@pytest.mark.parametrize(
    ("code", "asked", "status", "expected"),
    [
        (0, False, FINISHED, JobOutcome(0)),
        (0, True, FINISHED, JobOutcome(0)),
        (0, True, PREEMPTED, JobOutcome(75, again="stopped in time")),
        (0, False, PREEMPTED, JobOutcome(75, last=STOPPED)),
        (
            0,
            False,
            Status("preempted", "stopped by run.max_minutes"),
            JobOutcome(75, again="stopped in time"),
        ),
        (
            137,
            True,
            PREEMPTED,
            JobOutcome(137, last=f"the run failed (exit code 137), cause: {CAUSE}"),
        ),
    ],
)
def test_a_job_goes_on_after_slurms_signal_and_the_clock(logs, code, asked, status, expected):
    cause_of = (lambda: CAUSE) if code else never
    assert (
        judge_job(logs, code, asked=asked, one_task_a_rank=True, status=status, cause_of=cause_of)
        == expected
    )


@pytest.mark.parametrize("status", [RUNNING, NOTHING, Status("failed")])
def test_a_job_without_a_finished_run_is_no_success(logs, status):
    found = judge_job(logs, 0, asked=True, one_task_a_rank=True, status=status, cause_of=never)
    assert found.code == 1 and not found.again
    assert found.last.startswith("the run has not finished, though") and str(logs) in found.last


@pytest.mark.parametrize(
    ("left", "code"), [("247\n", 247), ("", 143), ("nonsense", 143), (None, 143)]
)
def test_a_job_ends_with_the_code_of_the_task_that_failed_first(logs, left, code):
    """srun's own may be that of a task which srun has ended."""
    if left is not None:
        (logs / "exit-code").write_text(left)
    found = judge_job(
        logs, 143, asked=False, one_task_a_rank=True, status=RUNNING, cause_of=lambda: None
    )
    assert found == JobOutcome(code, last=f"the run failed (exit code {code}), see {logs}")


@pytest.mark.parametrize(
    ("fruitless", "restarts", "most", "words"),
    [
        (0, 0, 100, ""),
        (2, 99, 100, ""),
        (MOST_FRUITLESS, 0, 100, "three attempts without a step"),
        (0, 100, 100, "requeued 100 times"),
        (0, 0, 0, "requeued 0 times"),
    ],
)
def test_when_a_job_is_not_requeued(fruitless, restarts, most, words):
    found = refusal(fruitless, restarts, most)
    assert words in found and bool(found) == bool(words)


def test_attempts_in_a_row_without_a_step_are_counted(tmp_path):
    counts = [count_fruitless(tmp_path, "a", step) for step in (False, False, True, False, False)]
    assert counts == [1, 2, 0, 1, 2]
    assert count_fruitless(tmp_path, "b", False) == MOST_FRUITLESS
    assert count_fruitless(tmp_path, "c", False) == 1  # submitted again


def write_status(folder, text):
    (folder / "status.json").write_text(text)


def test_the_status_is_that_of_a_later_attempt_or_none(tmp_path):
    assert read_status_of(tmp_path, 0) == NOTHING and completed_steps(tmp_path) == 0
    record = {"attempt": 3, "state": "preempted", "message": "why", "step": 4}
    write_status(tmp_path, json.dumps(record))
    assert read_status_of(tmp_path, 2) == Status("preempted", "why")
    assert read_status_of(tmp_path, 3) == NOTHING and completed_steps(tmp_path) == 4


@pytest.mark.parametrize("text", ["", "{", "[]", '{"state": 3, "step": "x"}', "\0"])
def test_a_damaged_status_is_no_success_and_no_traceback(tmp_path, capsys, text):
    write_status(tmp_path, text)
    found = judge_run(Start("train", tmp_path), 0, False, read_status_of(tmp_path, 1), never)
    assert found.code == 1 and completed_steps(tmp_path) == 0
    assert noted_cause(tmp_path, 0.0) is None
    assert "status.json is damaged" in capsys.readouterr().err


def evaluated(text: str, names: str) -> list[str]:
    """What a script has after evaluating the assignments; the last name is an array."""
    *plain, array = names.split()
    shown = " ".join(f'"${name}"' for name in plain)
    script = f'set -euo pipefail; eval "$(cat)"; printf \'%s|\' {shown} "${{{array}[@]}}"'
    answer = subprocess.run(["bash", "-c", script], input=text, capture_output=True, text=True)
    return answer.stdout.split("|")[:-1]


def test_what_train_sh_evaluates(logs, monkeypatch, capsys):
    evil = "rank 1 (host $(touch x), pid 7) failed: it's `that`"
    monkeypatch.setattr(
        left_behind, "find_cause", lambda folder, since: evil if since == 5 else None
    )
    command = ["run", "--command", "train", "--node-rank", "0", "--folder", str(logs)]
    command += ["--logs", str(logs), "--last-attempt", "0", "--code"]
    assert outcome.main([*command, "1", "--since", "5"]) == 0
    told = f"train.sh: the run failed (exit code 1), cause: {evil}"
    given = capsys.readouterr().out
    assert evaluated(given, "CODE REST LAST SHOWN") == ["1", "", told, str(logs / "x_rank1.log")]
    write_status(logs, '{"attempt": 1, "state": "finished"}')
    assert outcome.main([*command, "0", "--since", "5"]) == 0
    assert evaluated(capsys.readouterr().out, "CODE REST LAST SHOWN") == ["0", "", ""]
    assert outcome.main([*command, "137", "--since", "5", "--launcher-killed"]) == 0
    assert evaluated(capsys.readouterr().out, "CODE REST SHOWN") == ["137", "1"]


def test_what_train_sbatch_evaluates(logs, capsys):
    job = ["job", "--folder", str(logs), "--logs", str(logs), "--since", "0", "--code", "0"]
    job += ["--ranks-by", "srun", "--last-attempt"]
    (logs / "fruitless").write_text("x\n")
    write_status(logs, '{"attempt": 1, "state": "preempted", "step": 2}')
    assert outcome.main([*job, "0", "--asked"]) == 0
    given = capsys.readouterr().out
    assert evaluated(given, "CODE AGAIN ERROR LAST") == ["75", "stopped in time", "", ""]
    again = ["requeue", "--folder", str(logs), "--logs", str(logs), "--max-restarts", "9"]
    assert outcome.main([*again, "--last-step", "2", "--restarts", "3"]) == 0
    assert capsys.readouterr().out == "REFUSAL=''\n"
    assert len((logs / "fruitless").read_text().splitlines()) == 2
    assert outcome.main([*again, "--last-step", "1", "--restarts", "9"]) == 0
    assert "requeued 9 times" in capsys.readouterr().out and not (logs / "fruitless").exists()
    (logs / "fruitless").write_text("x\n")
    write_status(logs, '{"attempt": 1, "state": "finished", "step": 3}')
    assert outcome.main([*job, "0"]) == 0
    assert not (logs / "fruitless").exists()


def test_it_starts_without_libraries_that_take_seconds():
    heavy = "{'torch', 'numpy', 'transformers', 'deepspeed', 'megatron'}"
    script = f"import {outcome.__name__}, sys; print({heavy} & set(sys.modules) or 'none')"
    command = [sys.executable, "-c", script]
    answer = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert answer.stdout == "none\n", answer.stderr
