"""The curves picture is drawn from metrics.jsonl alone."""

from megatron_amrlhf.report.files import append_jsonl
from megatron_amrlhf.report.plots import plot_run

PNG_START = b"\x89PNG\r\n"


def test_curves_are_drawn_also_with_gaps(tmp_path):
    lines = [
        {"step": 1, "time": "t", "loss/policy": 1.0, "reward/mean": None, "other": "text"},
        {"step": 2, "time": "t", "loss/policy": float("nan"), "reward/mean": 0.5},
        {"step": 3, "time": "t", "loss/policy": 0.25, "loss/value": 2},
    ]
    append_jsonl(tmp_path / "metrics.jsonl", lines)
    picture = plot_run(tmp_path)
    assert picture == tmp_path / "curves.png"
    assert picture.read_bytes().startswith(PNG_START)


def test_without_metrics_there_is_no_picture(tmp_path):
    assert plot_run(tmp_path) is None
    append_jsonl(tmp_path / "metrics.jsonl", [{"step": 1, "time": "t"}])
    assert plot_run(tmp_path) is None
