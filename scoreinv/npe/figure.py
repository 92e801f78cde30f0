"""Pictures of parameters: their marginals, two at a time, and the data that they predict."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

INK, FAINT = "#1b1b1f", "#6f6f78"
COLOURS = ("#30638e", "#d1495b", "#5b8c5a", "#8a5a94")
LEVELS = (0.68, 0.95)  # of the draws within contours
CELLS, SMOOTH = 48, 1.6  # of a histogram on a side, and width of its smoothing [cells]


def corner(
    draws: Mapping[str, Tensor], names: Sequence[str], truth: Tensor | None = None
) -> Figure:
    """Marginals of each parameter, and of each two with 68 % and 95 % of the draws inside; `savefig` writes it.

    Args:
        draws: By label, each with shape (n, d).
        names: Of the parameters.
        truth: If it is known, with shape (d,).

    Raises:
        ValueError: Other numbers of columns than names.
    """
    for label, theta in draws.items():
        if theta.ndim != 2 or theta.shape[1] != len(names):
            raise ValueError(
                f"{label} has shape {tuple(theta.shape)}, expected (n, {len(names)}): {', '.join(names)}"
            )
    d, every = len(names), torch.cat(list(draws.values())).double()
    low, high = every.quantile(0.001, 0), every.quantile(0.999, 0)
    margin = 0.08 * (high - low).clamp_min(1e-12)
    ends = torch.stack([low - margin, high + margin], 1).tolist()
    figure = Figure(figsize=(1.9 * d + 0.6, 1.9 * d + 0.4), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(d, d, squeeze=False)
    for i in range(d):
        for j in range(d):
            ax = grid[i, j]
            if j > i:
                ax.axis("off")
                continue
            for (label, theta), colour in zip(draws.items(), COLOURS, strict=False):
                if i == j:
                    _marginal(ax, theta[:, i], ends[i], colour, label)
                else:
                    _pair(ax, theta[:, [j, i]], ends[j], ends[i], colour)
            _finish(ax, i, j, ends, names, truth)
    if len(draws) > 1:
        handles, labels = grid[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper right", frameon=False, fontsize=9)
    return figure


def predictive(data: Tensor, predicted: Tensor, name: str = "data") -> Figure:
    """One observation beside data that draws of its posterior predict, noise and all; `savefig` writes it.

    Args:
        data: Numbers, a series (C, length), or images (C, H, W).
        predicted: With shape (n, *shape).
        name: Of the data.

    Raises:
        ValueError: Shapes that do not fit.
    """
    if tuple(predicted.shape[1:]) != tuple(data.shape):
        raise ValueError(
            f"predicted data have shape {tuple(predicted.shape)}, expected (n, {', '.join(map(str, data.shape))})"
        )
    figure = Figure(figsize=(9, 5), layout="constrained")
    FigureCanvasAgg(figure)
    y, p = data.double(), predicted.double()
    z = (y - p.mean(0)) / p.std(0).clamp_min(1e-300)
    title = f"{name}, and 68 % and 95 % of what is predicted"
    if data.ndim == 3:
        axes = figure.subplots(1, 3)
        for ax, image, what in ((axes[0], y[0], name), (axes[1], p.mean(0)[0], "mean predicted")):
            ax.imshow(image.numpy(), origin="lower", cmap="inferno")
            ax.set_title(what, fontsize=9, loc="left", color=INK)
        image = axes[2].imshow(z[0].numpy(), origin="lower", cmap="RdBu_r", vmin=-4, vmax=4)
        figure.colorbar(image, ax=axes[2], shrink=0.7)
        axes[2].set_title("difference, in predicted sd", fontsize=9, loc="left", color=INK)
        return figure
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[2, 1])
    y, p, z = y.flatten().numpy(), p.flatten(1), z.flatten().numpy()
    upper.use_sticky_edges = False
    at, edges = np.arange(len(y)), np.arange(len(y) + 1) - 0.5
    for low, high, shade in ((0.025, 0.975, "0.88"), (0.16, 0.84, "0.72")):
        below, above = p.quantile(torch.tensor([low, high], dtype=p.dtype), 0).numpy()
        upper.stairs(above, edges, baseline=below, fill=True, color=shade, lw=0)
    upper.plot(at, y, ".", color=COLOURS[1], ms=4 if len(y) < 100 else 2)
    upper.set_title(title, fontsize=9, loc="left", color=INK)
    lower.plot(at, z, ".", color=COLOURS[0], ms=4 if len(y) < 100 else 2)
    lower.axhline(0, color=FAINT, lw=0.6)
    lower.set_ylim(-5, 5)
    lower.set_title("difference, in predicted sd", fontsize=9, loc="left", color=INK)
    lower.set_xlabel("number of the datum", fontsize=8)
    lower.xaxis.get_major_locator().set_params(integer=True)
    for ax in (upper, lower):
        ax.tick_params(labelsize=7)
    return figure


def _marginal(ax: Axes, v: Tensor, ends: list[float], colour: str, label: str) -> None:
    density, edges = np.histogram(v.numpy(), CELLS, ends, density=True)
    ax.stairs(density, edges, color=colour, lw=1.2, label=label)


def _pair(ax: Axes, v: Tensor, x: list[float], y: list[float], colour: str) -> None:
    from scipy.ndimage import gaussian_filter

    count, xs, ys = np.histogram2d(*v.T.numpy(), CELLS, [x, y])
    smooth = gaussian_filter(count, SMOOTH)
    falling = np.sort(smooth.ravel())[::-1]
    inside = falling.cumsum() / falling.sum()
    levels = sorted({float(falling[np.searchsorted(inside, share)]) for share in LEVELS})
    middle = lambda edges: 0.5 * (edges[1:] + edges[:-1])
    ax.contour(middle(xs), middle(ys), smooth.T, levels, colors=colour, linewidths=1.0)


def _finish(
    ax: Axes, i: int, j: int, ends: list, names: Sequence[str], truth: Tensor | None
) -> None:
    ax.set_xlim(*ends[j])
    if i != j:
        ax.set_ylim(*ends[i])
    if truth is not None:
        ax.axvline(float(truth[j]), color=INK, lw=0.8, ls="--")
        if i != j:
            ax.axhline(float(truth[i]), color=INK, lw=0.8, ls="--")
    ax.tick_params(labelsize=7, labelbottom=i == len(names) - 1, labelleft=j == 0 and i > 0)
    if i == j:
        ax.set_yticks([])
    if i == len(names) - 1:
        ax.set_xlabel(names[j].replace("_", " "), fontsize=8)
    if j == 0 and i > 0:
        ax.set_ylabel(names[i].replace("_", " "), fontsize=8)
