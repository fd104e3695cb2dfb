"""The main curves of a run as one picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from megatron_amrlhf.report.files import read_jsonl

PICTURE_NAME = "curves.png"
COLUMNS = 3
PANEL_INCHES = (4.2, 2.8)
# Title, then the metrics drawn together; "/" or "_" at the end: all that begin like that.
PANELS = (
    ("reward", ("reward/mean", "reward/chosen", "reward/rejected", "eval/reward_mean")),
    ("loss", ("loss/",)),
    ("reward model", ("prm/accuracy", "orm/accuracy", "eval/step_", "eval/pair_accuracy")),
    ("kept tokens", ("mask/kept_fraction",)),
    ("messages an answer", ("mask/num_messages",)),
    ("KL to the reference, nats", ("kl/ref_nats",)),
    ("policy", ("policy/approx_kl", "policy/clipfrac")),
    ("entropy, nats", ("policy/entropy_nats",)),
    ("gradient norm", ("engine/grad_norm",)),
    ("seconds a phase", ("time/",)),
    ("memory peak, GiB", ("memory/peak_gib",)),
)


def plot_run(folder: Path) -> Path | None:
    """Draws ``curves.png`` from a run's ``metrics.jsonl``. Call it on one rank.

    Args:
        folder: the run's folder.

    Returns:
        The picture's path, or None where there is nothing to draw yet.
    """
    lines = read_jsonl(folder / "metrics.jsonl")
    names = sorted({name for line in lines for name, value in line.items() if _drawn(name, value)})
    panels = [
        (title, chosen)
        for title, wanted in PANELS
        if (chosen := [n for n in names if any(_matches(n, pattern) for pattern in wanted)])
    ]
    if not panels:
        return None
    rows = -(-len(panels) // COLUMNS)
    figure = Figure(figsize=(PANEL_INCHES[0] * COLUMNS, PANEL_INCHES[1] * rows), layout="tight")
    FigureCanvasAgg(figure)
    for place, (title, chosen) in enumerate(panels, start=1):
        _draw(figure.add_subplot(rows, COLUMNS, place), title, chosen, lines)
    picture = folder / PICTURE_NAME
    figure.savefig(picture, dpi=110)
    return picture


def _draw(axes: Axes, title: str, names: list[str], lines: list[dict[str, Any]]) -> None:
    for name in names:
        points = [(line["step"], line[name]) for line in lines if line.get(name) is not None]
        marker = "o" if len(points) < 20 else None
        axes.plot(*zip(*points, strict=True), label=name, marker=marker, markersize=3)
    axes.set_title(title, fontsize=10)
    axes.set_xlabel("step", fontsize=8)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)


def _matches(name: str, pattern: str) -> bool:
    return name.startswith(pattern) if pattern.endswith(("/", "_")) else name == pattern


def _drawn(name: str, value: Any) -> bool:
    return "/" in name and isinstance(value, (int, float))
