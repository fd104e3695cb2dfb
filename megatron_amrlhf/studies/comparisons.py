"""Pictures of comparisons: error of a segmentation (eq. 12), best-of-n (figure 2), update cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from megatron_amrlhf.report.plots import save_picture

DPI = 90
PANEL_INCHES = (5.2, 3.9)
CUT_MARKERS = {"sequence": "s", "step": "^", "token": "v", "message": "o", "optimum": "*"}
CLAIMED_RATIO = 1.15  # "within 15 % of the optimum"
RATIO_TICKS = (1, 1.5, 2, 3, 5, 8)
Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class ErrorPicture:
    """What the error plot shows; errors and K are means an answer.

    Attributes:
        title: where the left panel's rewards come from.
        cuts: name to (K, error).
        frontier: (K, least error) in the order of K.
        adaptive: (K, error) of the adaptive cut at rising delta.
        ratios: name of a cut to (SNR, its error over the optimum's); empty: no right panel.
    """

    title: str
    cuts: Mapping[str, tuple[float, float]]
    frontier: Points
    adaptive: Points
    ratios: Mapping[str, Points]


def plot_errors(picture: ErrorPicture, path: Path) -> None:
    """Draws error against K and, where there is one, the distance to the optimum against SNR."""
    panels = 2 if picture.ratios else 1
    figure = _figure(panels)
    axes = figure.add_subplot(1, panels, 1)
    axes.plot(*zip(*_dense(picture.frontier), strict=True), color="0.6", label="least error at K")
    axes.plot(*zip(*picture.adaptive, strict=True), color="tab:orange", lw=1, label="any delta")
    for name, (count, error) in picture.cuts.items():
        axes.plot(count, error, CUT_MARKERS[name], markersize=8, ls="none", label=name)
    axes.set(xscale="log", yscale="log", xlabel="units K an answer", ylabel="error, eq. 12")
    _finish(axes, picture.title)
    if picture.ratios:
        axes = figure.add_subplot(1, panels, 2)
        for name, points in picture.ratios.items():
            style = "o-" if name.startswith("delta") else "--"
            axes.plot(*zip(*points, strict=True), style, markersize=4, label=name)
        axes.axhline(CLAIMED_RATIO, color="0.3", ls=":", label="15 % above")
        ticks = sorted({x for points in picture.ratios.values() for x, _ in points})
        axes.set(yscale="log", xlabel="SNR (amplitude)", ylabel="error / optimum", xticks=ticks)
        axes.set_yticks(RATIO_TICKS, labels=[f"{ratio:g}" for ratio in RATIO_TICKS])
        axes.minorticks_off()
        _finish(axes, "distance to the optimum")
    save_picture(figure, path, DPI)


def plot_best_of_n(
    table: Mapping[str, Sequence[float]], sizes: Sequence[int], path: Path, title: str
) -> None:
    """Draws accuracy against n, one curve a way to choose."""
    figure = _figure(1)
    axes = figure.add_subplot(1, 1, 1)
    for name, accuracies in table.items():
        style = "o-" if name.startswith(("ORM", "PRM")) else "--"
        color = None if style == "o-" else "0.5"
        axes.plot(sizes, accuracies, style, color=color, markersize=4, label=name)
    axes.set(xscale="log", xlabel="n answers to choose from", ylabel="best-of-n accuracy")
    axes.set_xticks(sizes, labels=[str(n) for n in sizes])
    axes.minorticks_off()
    _finish(axes, title)
    save_picture(figure, path, DPI)


def plot_costs(ratios: Mapping[str, Points], path: Path) -> None:
    """Draws the time of K passes over that of one masked pass, against K, beside K itself."""
    figure = _figure(1)
    axes = figure.add_subplot(1, 1, 1)
    sizes = sorted({steps for points in ratios.values() for steps, _ in points})
    for name, points in ratios.items():
        axes.plot(*zip(*points, strict=True), "o-", markersize=4, label=name)
    axes.plot(sizes, sizes, "--", color="0.5", label="K")
    axes.axhline(1, color="0.3", ls=":", label="one masked pass")
    axes.set(xlabel="steps K an answer", ylabel="update time / masked pass", xticks=sizes)
    _finish(axes, "step-wise DPO against one masked pass")
    save_picture(figure, path, DPI)


def _figure(panels: int) -> Figure:
    figure = Figure(figsize=(PANEL_INCHES[0] * panels, PANEL_INCHES[1]), layout="tight")
    FigureCanvasAgg(figure)
    return figure


def _finish(axes: Axes, title: str) -> None:
    axes.set_title(title, fontsize=10)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)


def _dense(corners: Points) -> list[tuple[float, float]]:
    """Straight lines between corners, with points enough to look right on logarithmic axes."""
    points = [corners[0]]
    for (x0, y0), (x1, y1) in zip(corners, corners[1:], strict=False):
        points += [(x0 + (x1 - x0) * i / 30, y0 + (y1 - y0) * i / 30) for i in range(1, 31)]
    return points
