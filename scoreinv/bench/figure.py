"""Error against cost: one panel a problem, one point a sampler, a line where one ran at several numbers of levels."""

from __future__ import annotations

import itertools
import math
import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from scoreinv.bench.learned import BANDS
from scoreinv.samplers.figure import FAINT, INK, TRUE

OURS = ("SMC", "Anneal", "Guided")
MARKERS = {
    "SMC": "o",
    "Anneal": "^",
    "Guided": "s",
    "TDS": "*",
    "MMPS": "s",
    "PiGDM": "D",
    "DPS": "v",
    "DiffPIR": "^",
    "DAPS": "P",
    "PnP-DM": "X",
    "convolved": "o",
    "local covariance": "D",
    "finer steps": "v",
    "skipping": "P",
    "network's twist": "*",
    "spare particles": "X",
}
PACKAGES = {"scoreinv": "o", "sbi": "s", "lampe": "^"}
HOLLOW = {"azula-": "tab:blue", "deepinv-": "tab:orange", "SMC without ": TRUE}
COLUMNS = 4
COARSE, FINE = (
    (1, 2, 5),
    (0.8, 1, 1.2, 1.5, 2, 3, 5),
)  # ticks of wide axes and of narrow ones
LEAST = (0.78, 1.28)  # that an axis of distances covers
TITLE = 36  # letters in a line
AIM_TOTAL, AIM_BAND = 0.05, 0.08  # by which errors and predictions may differ
BOUNDS = ("ELBO", "log Z", "EUBO")
BACKWARD = 2  # forward passes that a vector-Jacobian product costs


def error_figure(rows: Sequence[dict[str, Any]]) -> Figure:
    """Sliced Wasserstein distance over its floor against network passes per draw.

    Args:
        rows: From `scoreinv.bench.exact.row`, those of one problem after another.

    Returns:
        A figure with an Agg canvas.
    """
    ran = [row for row in rows if not math.isnan(row["SW / floor"])]
    groups = [list(g) for _, g in itertools.groupby(ran, key=lambda row: row["problem"])]
    lines = math.ceil(len(groups) / COLUMNS)
    columns = min(COLUMNS, len(groups))
    figure = Figure(figsize=(3.3 * columns, 2.7 * lines + 0.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(lines, columns, squeeze=False, sharex=True).flatten()
    for ax, group in zip(axes, groups, strict=False):
        _panel(ax, group)
    for ax in axes[max(0, len(groups) - columns) : len(groups)]:
        ax.tick_params(labelbottom=True)  # nothing is below it
    for ax in axes[len(groups) :]:
        ax.set_axis_off()
    cost = f"network passes per draw (a vector-Jacobian product counts {BACKWARD})"
    figure.supxlabel(cost, fontsize=9, color=INK)
    figure.supylabel("Wasserstein distance / floor", fontsize=9, color=INK)
    known = {h.get_label(): h for ax in axes for h in ax.get_legend_handles_labels()[0]}
    figure.legend(known.values(), known.keys(), loc="outside upper center", ncols=8, fontsize=8)
    return figure


def estimates_figure(rows: Sequence[dict[str, Any]]) -> Figure:
    """How well a classifier tells estimates from posteriors, against the cost of the fit, one panel a problem.

    Args:
        rows: From `scoreinv.bench.npe.npe`.

    Returns:
        A figure with an Agg canvas.
    """
    known = [row for row in rows if "C2ST" in row]
    groups = [list(g) for _, g in itertools.groupby(known, key=lambda row: row["problem"])]
    columns = max(len(groups), 1)
    figure = Figure(figsize=(2.8 * columns + 0.4, 2.9), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, columns, squeeze=False, sharex=True, sharey=True)[0]
    for ax, group in zip(axes, groups, strict=False):
        for row in group:
            ours = row["package"] == "scoreinv"
            style = {"color": TRUE if ours else FAINT, "marker": PACKAGES[row["package"]]}
            x = row["training [CPU s]"]
            ax.plot(x, row["C2ST"], linestyle="", label=row["package"], **style)
            if not math.isnan(row.get("C2ST weighted", math.nan)):
                label = f"{row['package']}, weighted"
                ax.plot(x, row["C2ST weighted"], ls="", label=label, fillstyle="none", **style)
        ax.axhline(0.5, color=FAINT, linewidth=0.8, linestyle="--")
        ax.set_title(group[0]["problem"], fontsize=8, color=INK)
        ax.set_xscale("log")
        ax.xaxis.set_major_formatter("{x:g}")
        ax.xaxis.set_minor_formatter("")
        ax.margins(0.1)
        ax.tick_params(labelsize=7)
    figure.supxlabel("fit [CPU s]", fontsize=9, color=INK)
    figure.supylabel("C2ST", fontsize=9, color=INK)
    named = {h.get_label(): h for ax in axes for h in ax.get_legend_handles_labels()[0]}
    figure.legend(named.values(), named.keys(), loc="outside upper center", ncols=5, fontsize=8)
    return figure


def bounds_figure(rows: Sequence[dict[str, Any]]) -> Figure:
    """What the weights of paths say of the evidence, over what is known, one line a case.

    Args:
        rows: From `scoreinv.bench.rtb.row`.

    Returns:
        A figure with an Agg canvas.
    """
    figure = Figure(figsize=(7.0, 0.3 * len(rows) + 1.3), layout="constrained")
    FigureCanvasAgg(figure)
    ax = figure.subplots()
    at = -np.arange(len(rows))
    value = {k: np.array([row[k] for row in rows]) for k in ("untrained", *BOUNDS)}
    low, middle, high = (value[k] for k in BOUNDS)
    ax.axvline(0.0, color=FAINT, linewidth=0.8, linestyle="--", zorder=0)
    ax.hlines(at, low, high, color=TRUE, linewidth=4, alpha=0.4, label="ELBO to EUBO")
    ax.plot(middle, at, "o", color=TRUE, markersize=5, label="log Z")
    ax.plot(value["untrained"], at, "|", color=INK, markersize=9, label="ELBO, untrained")
    ax.set_xscale("symlog", linthresh=1.0, linscale=0.8)
    ax.xaxis.set_major_formatter("{x:g}")
    ax.set_yticks(at, [row["case"] for row in rows])
    ax.tick_params(labelsize=8)
    ax.set_xlabel("over the known evidence [nat]", fontsize=9, color=INK)
    figure.legend(loc="outside upper center", ncols=3, fontsize=8)
    return figure


def calibration_figure(rows: Sequence[dict[str, Any]]) -> Figure:
    """Error over predicted standard deviation, in total and by band, one panel a problem, one colour a method and noise.

    Args:
        rows: From `scoreinv bench learned`.

    Returns:
        A figure with an Agg canvas.
    """
    groups = [list(g) for _, g in itertools.groupby(rows, key=lambda row: row["problem"])]
    named = [_parts(row) for row in rows]
    varied = [i for i, part in enumerate(zip(*named, strict=True)) if len(set(part)) > 1] or [0]
    colours = list(dict.fromkeys((method, noise) for method, noise, _ in named))
    columns = len(groups) + 1
    lines = math.ceil(len(set(named)) / columns)
    figure = Figure(figsize=(4.2 * len(groups) + 0.4, 3.2 + 0.18 * lines), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(groups), squeeze=False, sharey=True)[0]
    inner = [f"k {low} to {high}" for low, high in BANDS[1:-1]]
    names = ["total", f"k < {BANDS[0][1]}", *inner, f"k > {BANDS[-1][0]}"]
    aims = np.array([AIM_TOTAL, *[AIM_BAND] * len(BANDS)])
    for ax, group in zip(axes, groups, strict=True):
        for i, row in enumerate(group):
            ratio, error = (
                np.array([row[f"total{end}"], *row[f"bands{end}"]]) for end in ("", "_error")
            )
            x = np.arange(len(names)) + 0.6 * ((i + 0.5) / len(group) - 0.5)
            own, parts = row["truths from"] == "prior", _parts(row)
            style = {"color": f"C{colours.index(parts[:2])}", "fmt": "o" if own else "s"}
            label = ", ".join(parts[i] for i in varied)
            face = None if own else "none"
            ax.errorbar(x, ratio, error, label=label, ms=4, mfc=face, lw=0.9, **style)
        x = np.arange(len(names))
        ax.bar(x, 2 * aims, 0.8, 1 - aims, color=FAINT, alpha=0.2, linewidth=0)
        ax.axhline(1.0, color=FAINT, linewidth=0.8, linestyle="--")
        ax.set_xticks(x, names)
        ax.set_title(group[0]["problem"], fontsize=9, color=INK)
        ax.tick_params(labelsize=8)
    figure.supylabel("error / predicted standard deviation", fontsize=9, color=INK)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=columns, fontsize=8)
    return figure


def _parts(row: dict[str, Any]) -> tuple[str, str, str]:
    """A row's method, noise and truths, as the legend names them."""
    own = row["truths from"] == "prior"
    method = row["method"].split(",")[0]  # without the count of what failed
    return method, f"noise {row['noise']:g}", "of the prior" if own else row["truths from"]


def _panel(ax: Axes, rows: Sequence[dict[str, Any]]) -> None:
    ax.axhline(1.0, color=FAINT, linewidth=0.8, linestyle="--")
    # without what went wrong, and how many levels there were
    by_name = lambda row: row["method"].split(",")[0].rstrip("0123456789")
    for name, group in itertools.groupby(rows, key=by_name):
        points = sorted((r["evaluations"] + BACKWARD * r["VJPs"], r["SW / floor"]) for r in group)
        ax.plot(*zip(*points, strict=True), markersize=6, label=name, **_style(name))
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.margins(x=0.08, y=0.12)
    low, high = ax.get_ylim()
    ax.set_ylim(min(low, LEAST[0]), max(high, LEAST[1]))
    for axis in (ax.xaxis, ax.yaxis):
        low, high = sorted(axis.get_view_interval())
        axis.set_major_locator(LogLocator(subs=COARSE if high / low > 5 else FINE))
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter(NullFormatter())
    title = textwrap.fill(f"{rows[0]['problem']}, {rows[0]['n']} draws", TITLE)
    ax.set_title(title, fontsize=8, color=INK)
    ax.tick_params(labelsize=7)


def _style(name: str) -> dict[str, Any]:
    """Line and marker: the method decides the shape, whose code it is the colour."""
    for prefix, colour in HOLLOW.items():
        if name.startswith(prefix):
            marker = MARKERS.get(name.removeprefix(prefix), "o")
            return {"marker": marker, "linestyle": "", "color": colour, "fillstyle": "none"}
    ours = name in OURS
    line = {"linestyle": "-", "linewidth": 1.2} if ours else {"linestyle": ""}
    style = {"marker": MARKERS.get(name, "o"), "color": TRUE if ours else FAINT}
    return {**style, **line, "zorder": 3 if ours else 2}
