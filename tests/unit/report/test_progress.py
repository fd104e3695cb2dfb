"""A log gets at most a line a minute, and what is left is the time of what is left."""

import io

import pytest
from rich.console import Console

from megatron_amrlhf.report.progress import FOLLOWS_VARIABLE, ProgressView, in_minutes


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def make() -> tuple[ProgressView, Clock, io.StringIO]:
    out, clock = io.StringIO(), Clock()
    return ProgressView(Console(file=out, width=110), clock), clock, out


def test_a_log_gets_a_line_a_minute():
    view, clock, out = make()
    with view.phase("update", 400) as advance:
        for _ in range(100):
            clock.now += 2.0  # 200 s
            advance(4)
    lines = out.getvalue().splitlines()
    assert lines == ["update: 120/400", "update: 240/400", "update: 360/400"]


def test_a_line_tells_what_is_left_of_the_run_and_of_what_follows(monkeypatch):
    monkeypatch.setenv(FOLLOWS_VARIABLE, "240")
    view, clock, out = make()
    view.whole(0, 50, None)
    clock.now += 60
    view.whole(10, 50, 360.0)
    clock.now += 60
    with view.phase("update", 4) as advance:
        advance(1)
    lines = out.getvalue().splitlines()
    assert lines == [
        "step 10 of 50, about 10 min left, the run after this one included",
        "update: 1/4, step 10 of 50, about 9 min left, the run after this one included",
    ]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(-3.0, "0 s"), (59.6, "60 s"), (100.0, "2 min"), (5940.0, "99 min"), (7500.0, "2 h 5 min")],
)
def test_times_are_told_in_a_persons_units(seconds, text):
    assert in_minutes(seconds) == text
