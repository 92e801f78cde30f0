"""The report on one page: rank distributions, coverage, widths, biases, errors in units of sd, p-values, examples."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullFormatter, ScalarFormatter
from torch import Tensor

from scoreinv.diagnostics.effects import Effect
from scoreinv.diagnostics.ranks import ecdf_band

if TYPE_CHECKING:
    from scoreinv.diagnostics.battery import Coverage

INK, FAINT, BAD, GOOD = "#1b1b1f", "#6f6f78", "#d1495b", "#30638e"
COLOURS = ("#30638e", "#d1495b", "#edae49", "#3a7d44", "#7b4b94", "#00798c", "#8d6a3f", "#444444")
MOST = 10  # names beside a panel
CURVES = ("whitened distance", "distance in units of sd", "distance to reference")
TICKS = {  # of widths, by the ratio of the ends of their axis that they are fine enough for
    1.6: (0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.3, 1.4),
    3.0: (0.4, 0.5, 0.6, 0.8, 1.0, 1.2, 1.5, 2.0, 2.5),
    math.inf: (0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0),
}


def page(report: Coverage) -> Figure:
    """A figure with an Agg canvas: `savefig` writes it."""
    rows = 3 if len(report.examples) else 2
    figure = Figure(figsize=(12.5, 3.6 * rows + 0.5), layout="constrained")
    FigureCanvasAgg(figure)
    verdict = report.verdict
    figure.suptitle(
        f"{verdict[0].upper() + verdict[1:]}\n{report.sims} simulations x {report.draws} draws, "
        f"battery's p = {report.p:.2g}, finds a width off by {_percent(report.detectable)}",
        fontsize=12,
        color=INK,
        x=0.01,
        ha="left",
    )
    axes = figure.subplots(rows, 3, squeeze=False)
    _differences(axes[0, 0], report)
    _curve(axes[0, 1], report)
    _widths(axes[0, 2], report)
    _biases(axes[1, 0], report)
    _p_values(axes[1, 1], report)
    _errors(axes[1, 2], report)
    if rows == 3:
        _examples(axes[2], report.examples[0])
    return figure


def _percent(factors: tuple[float, float]) -> str:
    low, high = factors
    return f"{100 * (low - 1):+.1f} or {100 * (high - 1):+.1f} %"


def _distribution(report: Coverage, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Shares of ranks, and of truths at or below them."""
    members = report.draws + 1
    rank = report.ranks[:, report.names.index(name)]
    counts = torch.bincount(rank, minlength=members).double()
    share = torch.arange(members + 1) / members
    return share.numpy(), torch.cat([torch.zeros(1), counts.cumsum(0) / len(rank)]).numpy()


def _band(report: Coverage, share: np.ndarray) -> np.ndarray:
    width = ecdf_band(report.sims, report.draws + 1)
    return width * np.sqrt(share * (1 - share) / report.sims)


def _differences(ax: Axes, report: Coverage) -> None:
    names = [*report.bias, *(n for n in CURVES if n in report.names)][: len(COLOURS)]
    for name, colour in zip(names, COLOURS, strict=False):
        share, below = _distribution(report, name)
        ax.plot(share, below - share, color=colour, lw=1.2, label=name, drawstyle="steps-post")
    band = _band(report, share)
    ax.fill_between(share, -band, band, color="0.88", lw=0, zorder=0)
    ax.axhline(0, color=FAINT, lw=0.6)
    _finish(ax, "ranks of the truth", "rank / draws", "share below, less the uniform one")
    # no corner of it is free of lines
    ax.legend(
        fontsize=6.5, frameon=False, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.14)
    )


def _curve(ax: Axes, report: Coverage) -> None:
    for name, colour in zip(CURVES, COLOURS, strict=False):
        if name in report.names:
            share, below = _distribution(report, name)
            label = "TARP" if name == "distance to reference" else name
            ax.plot(share, below, color=colour, lw=1.2, label=label)
    band = _band(report, share)
    ax.fill_between(share, share - band, share + band, color="0.88", lw=0, zorder=0)
    ax.plot([0, 1], [0, 1], color=FAINT, lw=0.6)
    _finish(ax, "coverage", "credible level", "truths inside")
    ax.legend(fontsize=6.5, frameon=False, loc="upper left")


def _effects(ax: Axes, effects: dict[str, Effect], neutral: float) -> None:
    for i, effect in enumerate(effects.values()):
        colour = GOOD if effect.low <= neutral <= effect.high else BAD
        ax.plot([effect.low, effect.high], [i, i], color=colour, lw=1.6)
        ax.plot(effect.value, i, "o", color=colour, ms=4)
    ax.axvline(neutral, color=FAINT, lw=0.6)
    ax.set_yticks(range(len(effects)), list(effects), fontsize=7)
    ax.invert_yaxis()


def _widths(ax: Axes, report: Coverage) -> None:
    groups = dict(list(report.groups.items())[:MOST])
    _effects(ax, {"all": report.dispersion, **groups}, 1.0)
    ax.set_xscale("log")
    low, high = ax.get_xlim()
    low, high = min(low, 0.88), max(high, 1.13)
    ticks = next(ticks for ratio, ticks in TICKS.items() if high / low <= ratio)
    ax.xaxis.set_major_locator(FixedLocator(ticks))
    ax.xaxis.set_major_formatter(ScalarFormatter())
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.set_xlim(low, high)
    _finish(ax, "width of the posterior", "over the calibrated one (95 %)", "")


def _biases(ax: Axes, report: Coverage) -> None:
    _effects(ax, dict(list(report.bias.items())[:MOST]), 0.0)
    reach = max(0.5, *(abs(v) for v in ax.get_xlim()))
    ax.set_xlim(-reach, reach)
    _finish(ax, "truth above the draws", "posterior standard deviations (95 %)", "")


def _p_values(ax: Axes, report: Coverage) -> None:
    families = list(dict.fromkeys(f.family for f in report.findings))
    least = [min(f.adjusted for f in report.findings if f.family == name) for name in families]
    colours = [BAD if p <= 0.05 else GOOD for p in least]
    ax.barh(range(len(least)), [1 / p for p in least], color=colours, height=0.55)
    ax.set_xscale("log")
    most = report.swaps + 1  # 1 over the least p-value
    ticks = [t for t in (1, 10, 100, 1000, 10_000) if t <= most]
    ax.set_xticks(ticks, [f"{1 / t:g}" for t in ticks])
    ax.set_xlim(1, 1.5 * most)
    ax.axvline(20, color=FAINT, lw=0.8, ls="--")
    ax.set_yticks(range(len(least)), families, fontsize=7)
    ax.invert_yaxis()
    _finish(ax, "tests", "p-value, corrected for all of them", "")


def _errors(ax: Axes, report: Coverage) -> None:
    if report.z.ndim < 2:
        names = list(report.groups)
        ax.barh(range(len(names)), report.z.flatten().numpy(), color=GOOD, height=0.55)
        ax.axvline(1, color=FAINT, lw=0.8)
        if len(names) <= MOST:
            ax.set_yticks(range(len(names)), names, fontsize=7)
        ax.invert_yaxis()
        _finish(ax, "rms error over posterior sd", "over the calibrated one", "")
        return
    z = report.z.flatten(0, -3)[0] if report.z.ndim > 2 else report.z
    image = ax.imshow(z.numpy(), origin="lower", cmap="RdBu_r", vmin=0.5, vmax=1.5)
    ax.figure.colorbar(image, ax=ax, shrink=0.85)
    _bare(ax, f"rms error over posterior sd, mean {float(z.square().mean()) ** 0.5:.2f}")


def _examples(axes: list[Axes], example: Tensor) -> None:
    truth, mean, sd = (v.flatten(0, -3)[0] if v.ndim > 2 else v for v in example)
    top = float(truth.max())
    for ax, image, title in ((axes[0], truth, "a truth"), (axes[1], mean, "mean of its draws")):
        ax.imshow((image / (0.03 * top)).asinh().numpy(), origin="lower", cmap="inferno", vmin=0)
        _bare(ax, title)
    z = (truth - mean) / sd.clamp_min(1e-300)
    image = axes[2].imshow(z.numpy(), origin="lower", cmap="RdBu_r", vmin=-4, vmax=4)
    axes[2].figure.colorbar(image, ax=axes[2], shrink=0.85)
    _bare(axes[2], "truth - mean, in posterior sd")


def _bare(ax: Axes, title: str) -> None:
    ax.set_xticks([])
    ax.set_yticks([])
    ax.set_title(title, fontsize=9, color=INK, loc="left")


def _finish(ax: Axes, title: str, x: str, y: str) -> None:
    ax.set_title(title, fontsize=9, color=INK, loc="left")
    ax.set_xlabel(x, fontsize=8)
    ax.set_ylabel(y, fontsize=8)
    ax.tick_params(labelsize=7)
