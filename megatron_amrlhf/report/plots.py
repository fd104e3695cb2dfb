"""The main curves of a run as one picture."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from megatron_amrlhf.files import write_atomic
from megatron_amrlhf.report.files import read_jsonl
from megatron_amrlhf.run.way import METRICS_NAME, PICTURE_NAME

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
    lines = read_jsonl(folder / METRICS_NAME)
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
    save_picture(figure, picture, dpi=110)
    return picture


def save_picture(figure: Figure, path: Path, dpi: int) -> None:
    """Writes a figure as a PNG file, whole or not at all.

    Raises:
        OSError: it cannot be written.
    """
    content = io.BytesIO()
    figure.savefig(content, dpi=dpi, format="png")
    write_atomic(path, content.getvalue())


def _draw(axes: Axes, title: str, names: list[str], lines: list[dict[str, Any]]) -> None:
    for name in names:
        points = [(x["step"], x[name]) for x in lines if _drawn(name, x.get(name))]
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
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return "/" in name and is_number
