"""What a training has brought, on one page: log-weights while it went on, and bounds on the evidence before and after."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from scoreinv.finetune.evidence import Evidence

INK, FAINT, BEFORE, AFTER = "#1b1b1f", "#6f6f78", "#d1495b", "#30638e"
SMOOTH = 20  # iterations over which a curve is averaged


def learning_figure(
    history: Sequence[dict[str, float]], before: Sequence[Evidence], after: Sequence[Evidence]
) -> Figure:
    """A figure with an Agg canvas: `savefig` writes it.

    Args:
        history: Of the training.
        before: Evidence reports for simulated data, without it.
        after: For the same data, with it.
    """
    figure = Figure(figsize=(11, 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    _history(figure.add_subplot(1, 2, 1), history)
    _bounds(figure.add_subplot(1, 2, 2), before, after)
    return figure


def _history(axes: Axes, history: Sequence[dict[str, float]]) -> None:
    _curve(axes, history, "gain", BEFORE, "simulated paths: likelier by")
    _curve(axes, history, "spread", AFTER, "log-weights of one y: sd")
    _curve(axes, history, "promise", INK, "what the twist leaves of them: sd")
    axes.set(xlabel="iteration", ylabel="nat")
    # what the first iterations are off by is not what one wants to see
    shown = [v for h in history[len(history) // 20 :] for k, v in h.items() if k != "log_w"]
    low, high = min(shown), max(shown)
    axes.set_ylim(low - 0.1 * (high - low) - 0.1, high + 0.1 * (high - low) + 0.1)
    axes.legend(frameon=False, fontsize=9)
    axes.set_title("while learning", loc="left", fontsize=10, color=INK)


def _curve(
    axes: Axes, history: Sequence[dict[str, float]], name: str, colour: str, label: str
) -> None:
    found = [(i + 1, h[name]) for i, h in enumerate(history) if name in h]
    if not found:
        return
    at, value = np.array(found).T
    axes.plot(at, value, color=FAINT, lw=0.4, alpha=0.6)
    width = min(SMOOTH, len(value))
    mean = np.convolve(value, np.ones(width) / width, "valid")
    axes.plot(at[: len(mean)] + 0.5 * (width - 1), mean, color=colour, lw=1.5, label=label)


def _bounds(axes: Axes, before: Sequence[Evidence], after: Sequence[Evidence]) -> None:
    for shift, reports, colour, label in (
        (-0.15, before, BEFORE, "before"),
        (0.15, after, AFTER, "after"),
    ):
        # about one number for both, so that the two can be compared
        middle = np.array([e.log_z for e in after])
        low, high = (np.array([getattr(e, k) for e in reports]) for k in ("elbo", "eubo"))
        at = np.arange(len(reports)) + 1 + shift
        gap = float(np.mean(high - low))
        axes.vlines(
            at, low - middle, high - middle, color=colour, lw=4, label=f"{label}: {gap:.1f} nat"
        )
    axes.axhline(0, color=FAINT, lw=0.8)
    axes.set(
        xlabel="simulated data",
        ylabel="ELBO to EUBO, less log Z [nat]",
        xticks=range(1, len(after) + 1),
    )
    # above the axes: bars of any length leave no free corner
    axes.legend(
        frameon=False,
        fontsize=9,
        ncols=2,
        loc="lower right",
        bbox_to_anchor=(1.0, 0.99),
        borderpad=0,
    )
    axes.set_title("evidence", loc="left", fontsize=10, color=INK)
