"""Console output: short in a log, silent on other ranks."""

import io

from rich.console import Console
from rich.table import Table

from megatron_amrlhf.report.console import RunConsole, format_metric, print_whole
from megatron_amrlhf.run.folder import RunFolder


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def make(rank=0, err=None):
    out, err = io.StringIO(), err or io.StringIO()
    return RunConsole(rank, out, err), out, err


def test_a_terminal_gets_a_bar_of_the_phase_and_one_of_the_whole(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    console, _, err = make(err=Terminal())
    with console.track("scoring", 4):
        console.tick(4)
    assert "scoring" in err.getvalue() and "4/4" in err.getvalue()
    assert "whole" not in err.getvalue()  # no step has been timed
    console.whole(2, 8, 300.0)
    with console.track("scoring", 4):
        pass
    assert "whole" in err.getvalue() and "step 2 of 8, about 5 min left" in err.getvalue()


def test_other_ranks_are_silent(tmp_path):
    console, out, err = make(rank=1)
    with console.track("rollout", 2):
        console.tick(2)
    assert console.progress.done == 1
    console.line("hello")
    console.step_table(1, 2, {"loss/policy": 1.0})
    console.final_summary(RunFolder(tmp_path, 1, True), {}, {"reward/mean": 1.0})
    assert out.getvalue() == "" == err.getvalue()


def test_the_step_table_is_short_and_has_the_main_numbers():
    console, out, _ = make()
    metrics = {
        "loss/policy": 0.123456,
        "reward/mean": -1.5,
        "mask/kept_fraction": 0.25,
        "engine/skipped_steps": 0,
        "time/rollout_seconds": 12.34,
        "throughput/rollout_tokens_per_second": 98765.4,
        "kl/ref_nats": None,
        "internal/unlisted": 7.0,
    }
    console.step_table(3, 10, metrics)
    text = out.getvalue()
    assert text.splitlines()[0] == "step 3/10" and len(text.splitlines()) <= 5
    for part in ("0.1235", "-1.5", "0.25", "12.34 s", "98765 tok/s", "kl/ref "):
        assert part in text
    assert "unlisted" not in text


def test_the_summary_shows_the_change_and_only_paths_that_exist(tmp_path):
    console, out, _ = make()
    folder = RunFolder(tmp_path, 1, True)
    folder.metrics.touch()
    console.final_summary(
        folder, {"eval/reward_mean": 0.25}, {"eval/reward_mean": 0.5, "eval/step_auc": 0.9}
    )
    text = out.getvalue()
    assert "+0.25" in text and "0.9" in text
    assert str(folder.metrics) in text and str(folder.export) not in text


def test_units_follow_the_name():
    assert format_metric("memory/peak_gib", 1.5) == "1.5 GiB"
    assert format_metric("kl/ref_nats", None) == "- nats"
    assert format_metric("engine/skipped_steps", 12345) == "12345"


def test_a_line_does_not_steer_the_terminal():
    out, err = io.StringIO(), io.StringIO()
    console = RunConsole(0, out, err)
    console.line("resumed from \x1b[2J/run\nnext line")
    with console.track("\x1b]0;title\x07", 1):
        pass
    assert out.getvalue() == "resumed from \\x1b[2J/run\nnext line\n"
    assert "\x1b" not in err.getvalue() and "\x07" not in err.getvalue()


def test_a_narrow_terminal_gets_all_figures_of_a_table():
    table, out = Table(title="memory"), io.StringIO()
    for number in range(12):
        table.add_column(f"heading {number}")
    table.add_row(*(f"{number}.12345 GiB" for number in range(12)))
    print_whole(Console(file=out, width=80), table)
    shown = out.getvalue()
    assert all(f"heading {number}" in shown for number in range(12))
    assert all(f"{number}.12345 GiB" in shown for number in range(12)) and "…" not in shown
