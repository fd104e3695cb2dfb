"""Why a run ended, from the files that its ranks left."""

from __future__ import annotations

import re
from datetime import datetime
from pathlib import Path

from megatron_amrlhf.errors import UserError, printable
from megatron_amrlhf.reading import Unreadable, read_text
from megatron_amrlhf.run.beats import HEARTBEAT_NAME, Beat, read_beats, read_dump, seconds_since
from megatron_amrlhf.run.living import living
from megatron_amrlhf.run.status_file import STATUS_NAME, read_status
from megatron_amrlhf.run.way import WATCHDOG_NAME

# In the message of a rank whose partner has gone; it is a consequence, not the cause.
LOST_PARTNER = re.compile(
    r"gloo|nccl|connection (closed|reset|refused)|broken pipe|DistNetworkError|DistBackendError",
    re.IGNORECASE,
)
SILENT_SECONDS = 60.0  # heartbeats come each 5 seconds
NO_BEAT = {"missing": "no heartbeat yet", "unreadable": "its heartbeat file is damaged"}
FATAL = re.compile(r"^Fatal Python error: (.*)$", re.MULTILINE)


def lost_partner(beat: Beat) -> bool:
    """Whether a rank failed only because another one has gone."""
    return LOST_PARTNER.search(beat.error) is not None


def first_failure(beats: list[Beat]) -> str | None:
    """One line on the rank that failed first by an exception of its own, or None.

    A lost connection counts only where there is nothing else.
    """
    failed = [beat for beat in beats if beat.state == "failed"]
    own = [beat for beat in failed if not lost_partner(beat)]
    first = min(own or failed, key=lambda beat: beat.time, default=None)
    return None if first is None else _failure(first)


def status_lines(folder: Path) -> list[str]:
    """The run's state and each rank's last sign of life.

    Raises:
        UserError: there is no run in the folder, or its status is damaged.
    """
    record = read_status(folder)
    if record is None:
        raise UserError(f"{folder}: no run ({STATUS_NAME} is missing)")
    lines = [_headline(record)]
    beats = read_beats(folder)
    youngest = min((seconds_since(beat.time) for beat in beats if beat.time), default=0.0)
    if record["state"] == "running" and youngest > SILENT_SECONDS:
        lines.append(f"no sign of life for {youngest:.0f} s: the run is gone, or its node is")
    for beat in beats:
        if beat.state in NO_BEAT:
            lines.append(f"{beat.who}: {NO_BEAT[beat.state]}")
            continue
        age = seconds_since(beat.time)
        text = f"{beat.who}: {beat.state}, {beat.where}; last heartbeat {age:.0f} s ago"
        lines.append(f"{text}, no progress for {beat.still_seconds:.0f} s before it")
    return [_as_one_line(line) for line in lines]


def find_cause(folder: Path, since: float) -> str | None:
    """One line on what ended a run; ranks of other hosts may not have noticed yet.

    A rank that was killed by SIGKILL left a heartbeat that still says ``running`` and no stack;
    one that was ended by SIGTERM, as the launcher does once a rank has failed, left a stack.

    Args:
        folder: the run's folder.
        since: when it was started (Unix time); what is older is left out.

    Returns:
        None where the ranks left nothing, or all finished, or were ended on demand.
    """
    cause = _cause(folder, since)
    return None if cause is None else _as_one_line(cause)


def _cause(folder: Path, since: float) -> str | None:
    status = read_status(folder)
    if status is not None and status["state"] == "stopped":
        return None
    alive = {beat.rank for beat in living(folder)}
    beats = [beat for beat in read_beats(folder) if _is_since(beat, since)]
    beats = [beat for beat in beats if beat.rank not in alive]
    if beats and (report := _watchdog_report(folder)):
        return report.split("\n", 1)[0]
    dumps = {beat.rank: read_dump(folder, beat.rank) for beat in beats}
    own: list[tuple[str, str]] = []
    for beat in beats:
        fatal = FATAL.search(dumps[beat.rank])
        if beat.state == "failed":
            if not lost_partner(beat):
                own.append((beat.time, _failure(beat)))
        elif fatal:
            own.append((beat.time, f"{beat.who} died: {fatal[1]} ({beat.where})"))
        elif beat.state == "running" and not _was_terminated(dumps[beat.rank]):
            text = "was killed by SIGKILL (out of memory, or by hand), last seen in"
            own.append((beat.time, f"{beat.who} {text} {beat.where}"))
    # A killed rank's last beat is before the others' errors; the launcher kills after them.
    if own:
        return min(own)[1]
    return first_failure(beats) or _first_terminated(folder, beats)


def _watchdog_report(folder: Path) -> str:
    try:
        return read_text(folder / WATCHDOG_NAME)
    except (FileNotFoundError, Unreadable):
        return ""


def _as_one_line(text: str) -> str:
    """What files say can hold anything."""
    return printable(" ".join(text.split()))


def _headline(record: dict) -> str:
    """``running, attempt 2, step 3 of 10: ...; about 12 min left``."""
    total, seconds = record.get("total"), record.get("step_seconds")
    step = f"step {record['step']}" + (f" of {total}" if total else "")
    line = f"{record['state']}, attempt {record['attempt']}, {step}: {record['message']}"
    if record["state"] != "running" or not total or not seconds:
        return line
    left = max(0.0, (total - record["step"]) * seconds - seconds_since(record["time"]))
    return f"{line}; about {left / 60:.0f} min left" if left >= 60 else f"{line}; {left:.0f} s left"


def _failure(beat: Beat) -> str:
    return f"{beat.who} failed: {beat.error} ({beat.where})"


def _first_terminated(folder: Path, beats: list[Beat]) -> str | None:
    ended = [beat for beat in beats if beat.state == "running"]
    if not ended:
        return None

    def dumped_at(beat: Beat) -> float:
        return (folder / HEARTBEAT_NAME / f"rank-{beat.rank:04d}.stacks.txt").stat().st_mtime

    first = min(ended, key=dumped_at)
    return f"{first.who} was ended from outside by SIGTERM in {first.where}"


def _was_terminated(dump: str) -> bool:
    """Only a signal's dump has a current thread, the timer's has none."""
    return "Current thread" in dump


def _is_since(beat: Beat, since: float) -> bool:
    return bool(beat.time) and datetime.fromisoformat(beat.time).timestamp() > since
