"""``python -m megatron_amrlhf.launching.outcome run|job|requeue ...``

Judges how a run has ended, for the launch scripts: its exit code, what a person is told of the
cause, which log is shown, and whether Slurm starts it again. Prints shell assignments. A script
that gets none of them keeps the exit code that it has.
"""

from __future__ import annotations

if __name__ == "__main__":
    from megatron_amrlhf.interrupts import end_at_once

    end_at_once()

import argparse
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from megatron_amrlhf.errors import EXIT_USER_ERROR, tells_user_errors
from megatron_amrlhf.interrupts import EXIT_INTERRUPTED
from megatron_amrlhf.launching.left_behind import (
    Status,
    completed_steps,
    first_code,
    noted_cause,
    read_status_of,
    unseen_error,
)
from megatron_amrlhf.launching.shell import print_assignments
from megatron_amrlhf.reading import read_text
from megatron_amrlhf.run.stop_request import EXIT_AGAIN, Reason

EXIT_OK, EXIT_FAILED = 0, 1
FINISHED, PREEMPTED = "finished", "preempted"
FRUITLESS_NAME = "fruitless"  # in the run's folder: the attempts in a row without a step
MOST_FRUITLESS = 3
LAUNCHER_KILLED = "the launcher was killed (out of memory, or by hand)"
LAUNCHER_LOST = "the launcher ended before the run (killed: out of memory, or by hand)"
# The rank that a cause names; the watchdog's names the one that waited before it.
BLAMED = (re.compile(r"rank (\d+) \(host"), re.compile(r".*rank (\d+) "))
FindCause = Callable[[], str | None]


@dataclass(frozen=True)
class Start:
    """What a launch script knows of the start that has ended.

    Attributes:
        command: ``train``, ``score`` or ``doctor``.
        logs: of its ranks.
        has_rank_0: whether rank 0 was on this machine, so that the console has shown its log.
    """

    command: str
    logs: Path
    has_rank_0: bool = True


@dataclass(frozen=True)
class Outcome:
    """What launch/train.sh makes of a run's end.

    Attributes:
        code: its exit code.
        rest: whether processes of the run may be left, which it has to end.
        shown: logs whose last lines the console has not shown, but should.
        last: the last line that it tells; empty: none.
    """

    code: int
    rest: bool = False
    shown: tuple[Path, ...] = ()
    last: str = ""


@dataclass(frozen=True)
class JobOutcome:
    """What launch/slurm/train.sbatch makes of a run's end.

    Attributes:
        code: its exit code, unless the job is requeued.
        again: why Slurm should start it again; empty: it should not.
        error: the line of a rank that the job's output has not shown; empty: none.
        last: the last line that it tells; empty: none.
    """

    code: int
    again: str = ""
    error: str = ""
    last: str = ""


def judge_run(
    start: Start, code: int, launcher_killed: bool, status: Status, cause_of: FindCause
) -> Outcome:
    """The end of a run whose ranks the deepspeed launcher has started.

    Args:
        start: what was started.
        code: the launcher's exit code.
        launcher_killed: it died of a signal, and has left processes.
        status: what the run itself says.
        cause_of: looks for the cause in what the ranks have left.
    """
    lost = LAUNCHER_KILLED if launcher_killed else ""
    # DeepSpeed says 0 where its launcher on a node, or pdsh, was killed: the run knows better.
    is_judged = start.command == "train" and start.has_rank_0
    if code == EXIT_OK and is_judged and status.state not in (FINISHED, PREEMPTED):
        code, lost = EXIT_FAILED, LAUNCHER_LOST
    rest, is_doctor = bool(lost), start.command == "doctor"
    if code in (EXIT_OK, EXIT_AGAIN, EXIT_INTERRUPTED):
        return Outcome(code, rest)
    if is_doctor and code in (EXIT_FAILED, EXIT_USER_ERROR):  # it has said what is wrong
        return Outcome(code, rest)
    if code == EXIT_USER_ERROR:  # one rank has said what is wrong
        return Outcome(code, rest, last=unseen_error(start.logs))
    if is_doctor:
        last = f"train.sh: the doctor has not ended as it should (exit code {code})"
        return Outcome(code, rest, last=last)
    cause = lost or cause_of() or ""
    last = f"train.sh: {failure(code, cause, start.logs)}"
    return Outcome(code, rest, unseen_logs(start, cause), last)


def judge_job(
    logs: Path,
    code: int,
    *,
    asked: bool,
    one_task_a_rank: bool,
    status: Status,
    cause_of: FindCause,
) -> JobOutcome:
    """The end of a run's Slurm job.

    Args:
        logs: of its ranks.
        code: srun's exit code, which is 0 where all tasks have ended with 0 or 75.
        asked: whether the job has asked the run to stop, on Slurm's early signal.
        one_task_a_rank: the tasks are ranks, and not launchers that tell the errors of theirs.
        status: what the run itself says.
        cause_of: looks for the cause in what the ranks have left.
    """
    if code == EXIT_OK and status.state == PREEMPTED:
        # Somebody else's stop file means: stop. The clock and the early signal mean: go on.
        if asked or Reason.CLOCK.text in status.message:
            return JobOutcome(EXIT_AGAIN, again="stopped in time")
        return JobOutcome(EXIT_AGAIN, last="the run was asked to stop: submit it again to go on")
    if code == EXIT_OK and status.state == FINISHED:
        return JobOutcome(EXIT_OK)
    if code == EXIT_OK:
        last = f"the run has not finished, though its ranks ended without an error: see {logs}"
        return JobOutcome(EXIT_FAILED, last=last)
    code = first_code(logs) or code
    is_mistake = code == EXIT_USER_ERROR and one_task_a_rank
    error = unseen_error(logs) if is_mistake else ""
    return JobOutcome(code, error=error, last=failure(code, cause_of() or "", logs))


def refusal(fruitless: int, restarts: int, most: int) -> str:
    """Why a job is not requeued again; empty: it is.

    Args:
        fruitless: attempts in a row, this one included, that have not completed a step.
        restarts: how often the job was requeued so far.
        most: of these.
    """
    if fruitless >= MOST_FRUITLESS:
        return (
            "but three attempts without a step: --time is too short, the lead of --signal too "
            "long, or a node bad"
        )
    if restarts >= most:
        return f"requeued {restarts} times: submit it again to go on"
    return ""


def count_fruitless(folder: Path, attempt: str, has_steps: bool) -> int:
    """Attempts in a row without a step, this one included.

    Args:
        folder: of the run; a file in it has a line for each such attempt.
        attempt: how the line names this one.
        has_steps: whether this one has completed a step.
    """
    file = folder / FRUITLESS_NAME
    if has_steps:
        file.unlink(missing_ok=True)
        return 0
    with file.open("a", encoding="utf-8") as opened:
        opened.write(f"{attempt}\n")
    fruitless = len(read_text(file).splitlines())
    if fruitless >= MOST_FRUITLESS:
        file.unlink()  # whoever submits it again has changed something
    return fruitless


def failure(code: int, cause: str, logs: Path) -> str:
    """One line on a run that failed."""
    return f"the run failed (exit code {code}), {f'cause: {cause}' if cause else f'see {logs}'}"


def unseen_logs(start: Start, cause: str) -> tuple[Path, ...]:
    """The logs of the rank that a cause names, unless the console has shown them."""
    found = next(filter(None, (pattern.search(cause) for pattern in BLAMED)), None)
    if found is None or start.has_rank_0 and int(found[1]) == 0:
        return ()
    return tuple(sorted(start.logs.glob(f"*_rank{found[1]}.log")))


@tells_user_errors
def main(argv: list[str] | None = None) -> int:
    """Prints an outcome: of ``run`` or ``job``, or the ``REFUSAL`` of ``requeue``."""
    options = _parse(argv)
    if options.kind == "requeue":
        has_steps = completed_steps(options.folder) > options.last_step
        fruitless = count_fruitless(options.folder, str(options.logs), has_steps)
        refused = refusal(fruitless, options.restarts, options.max_restarts)
        print_assignments({"REFUSAL": refused})
        return EXIT_OK
    status = read_status_of(options.folder, options.last_attempt)

    def cause_of() -> str | None:
        return noted_cause(options.folder, options.since)

    if options.kind == "run":
        start = Start(options.command, options.logs, options.node_rank == 0)
        run = judge_run(start, options.code, options.launcher_killed, status, cause_of)
        rest = "1" if run.rest else ""
        shown = [str(log) for log in run.shown]
        print_assignments({"CODE": run.code, "REST": rest, "SHOWN": shown, "LAST": run.last})
        return EXIT_OK
    by_srun = options.ranks_by == "srun"
    job = judge_job(
        options.logs,
        options.code,
        asked=options.asked,
        one_task_a_rank=by_srun,
        status=status,
        cause_of=cause_of,
    )
    if job.code == EXIT_OK:
        (options.folder / FRUITLESS_NAME).unlink(missing_ok=True)
    again = {"AGAIN": job.again, "ERROR": job.error, "LAST": job.last}
    print_assignments({"CODE": job.code, **again})
    return EXIT_OK


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="outcome", description=__doc__)
    kinds = parser.add_subparsers(dest="kind", required=True)
    run, job, requeue = (kinds.add_parser(name) for name in ("run", "job", "requeue"))
    for kind in (run, job, requeue):
        kind.add_argument("--folder", type=Path, required=True, help="the run's")
        kind.add_argument("--logs", type=Path, required=True, help="the ranks'")
    for kind in (run, job):
        kind.add_argument("--code", type=int, required=True, help="the launcher's or srun's")
        kind.add_argument("--since", type=float, required=True, help="Unix time of the start")
        kind.add_argument("--last-attempt", type=int, required=True, help="the one before")
    run.add_argument("--command", choices=("train", "score", "doctor"), required=True)
    run.add_argument("--node-rank", type=int, required=True)
    run.add_argument("--launcher-killed", action="store_true", help="it has left processes")
    job.add_argument("--ranks-by", choices=("launcher", "srun"), required=True)
    job.add_argument("--asked", action="store_true", help="the early signal has come")
    requeue.add_argument("--last-step", type=int, required=True, help="the one before the start")
    requeue.add_argument("--restarts", type=int, required=True, help="requeues so far")
    requeue.add_argument("--max-restarts", type=int, required=True)
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
