"""Error against cost: one panel a problem, one point a sampler."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from scoreinv.samplers.figure import FAINT, INK, TRUE

OURS = {"SMC", "Anneal", "Guided"}
COLUMNS = 4
BACKWARD = 2  # forward passes that a vector-Jacobian product costs


def error_figure(rows: Sequence[dict[str, Any]]) -> Figure:
    """Sliced Wasserstein distance over its floor against network passes per draw.

    Args:
        rows: From `scoreinv.bench.exact.row`, those of one problem after another.

    Returns:
        A figure with an Agg canvas.
    """
    groups = [list(g) for _, g in itertools.groupby(rows, key=lambda row: row["problem"])]
    lines = math.ceil(len(groups) / COLUMNS)
    columns = min(COLUMNS, len(groups))
    figure = Figure(figsize=(3.3 * columns, 2.7 * lines + 0.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(lines, columns, squeeze=False, sharex=True).flatten()
    for ax, group in zip(axes, groups, strict=False):
        _panel(ax, group)
    for ax in axes[len(groups) :]:
        ax.set_axis_off()
    figure.supxlabel(f"network passes per draw (a vector-Jacobian product counts {BACKWARD})")
    figure.supylabel("sliced Wasserstein distance over its floor")
    return figure


def _panel(ax: Axes, rows: Sequence[dict[str, Any]]) -> None:
    ax.axhline(1.0, color=FAINT, linewidth=0.8, linestyle="--")
    for row in rows:
        ours = row["method"] in OURS
        cost = row["evaluations"] + BACKWARD * row["VJPs"]
        ax.plot(cost, row["SW / floor"], "o", color=TRUE if ours else FAINT, markersize=5)
        ax.annotate(
            row["method"],
            (cost, row["SW / floor"]),
            xytext=(4, 3),
            textcoords="offset points",
            fontsize=7,
            color=TRUE if ours else INK,
        )
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set_title(f"{rows[0]['problem']}, {rows[0]['n']} draws", fontsize=9, color=INK)
    ax.tick_params(labelsize=7)
