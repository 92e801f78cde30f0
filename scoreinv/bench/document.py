"""Tables as pages to keep: Markdown, with the command, the version and the date."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from datetime import date
from importlib.metadata import version
from typing import Any

COLUMNS = (
    "method",
    "SW / floor",
    "mode TV",
    "mean / floor",
    "var seen",
    "unseen",
    "Mahalanobis",
    "chi",
    "C2ST",
    "log Z rms error",
    "evaluations",
    "VJPs",
    "seconds",
    "MB",
    "least ESS / n",
)
LEGEND = """\
Draws against posteriors that are known in closed form. Exact draws have 1 in every column but these: C2ST, the accuracy
of a classifier against exact draws, is 0.5; mode TV, the total variation between shares and weights of the modes, and the
error of log Z [nat] are near 0. `SW / floor` is the sliced Wasserstein distance over that of as many exact draws, which
itself scatters by up to a half on one problem with far modes; `var seen` and `unseen` are the variances of what the data
see of an image and of the rest; `Mahalanobis` is the squared radius inside the modes (< 1: too narrow). Evaluations and
vector-Jacobian products (VJPs) are per draw; seconds (of one thread) and memory (by how much the process grew: what an
earlier run freed is used again and does not show) are for all draws; `least ESS / n` is the smallest effective sample size
between two resamplings, mean over islands, where weights are used.
TDS, PiGDM, DiffPIR, DAPS, PnP-DM and the convolved likelihood solve with a white covariance; they are left out of Gaussian
fields of 64 x 64, on which that takes hundreds of iterations a level.
Of what is known by tempering (counts, outliers, amplitudes) two references lie 0.6 to 1.3 floors from one another.
Samplers of other packages run by their own code, at its defaults."""
PEERS = ("azula", "deepinv")
COSTS = (
    "line",
    "value",
    "evaluations",
    "forward [ms/image]",
    "wall / forward passes",
    "MB beyond the draws",
)
COST_LEGEND = """\
Wall time of sampling over that of the network's bare forward passes, measured before and after it on one thread: 1 is the
floor. `guided` is `Guided`, without weights and with a covariance that follows the image where the prior's error is known;
`weights` is `SMC` with its weights kept to the end. What an observation needs once counts, as the gridding of its
visibilities. Memory is by how much the process grew, less the draws themselves. Ten levels and 16 draws where they do not
vary."""

ESTIMATE_LEGEND = """\
Estimates of scalar parameters from 10,000 pairs: medians over the published observations, each of which judges one of the
`fits`. `C2ST` is the accuracy of a classifier that tells draws of the estimate from draws of the posterior, 0.5 where it
cannot; `weighted`: after weights by the known likelihood, with `n_eff / n` of the draws effective, and Pareto's `k-hat` of
the weights; these draws are made anew up to eight times, nearer to the posterior, until half of them count; `before` that
fewer did. The sine is met in rounds, each with rounds of its own: `n_eff of a round` counts, of 2,560 draws, those of its
estimate and of a mixture fitted to the weighted draws of rounds before. `geometry` compares estimates of flux, radius and
shape of a galaxy behind a PSF with draws of its image, `disc geometry` those of a disc from its visibilities. Seconds are of
the processor, all threads together; an epoch's are the least of five; where its target was set, one of sbi's took 0.47 s,
and beside sbi it is judged by the ratio. sbi runs by its defaults, lampe's flows, of three layers where ours have five, and
without a featurizer, by the plan of ours with the last weights and twice the patience, nbi by the networks of its example.
Our flow of gaussian_linear_uniform is small, a size that was chosen with other seeds. `missed` names the targets that ours
did not meet."""

CONTROLS_LEGEND = """\
Controls of a chain of few steps, each learned on one core in the seconds of the processor that are given; `all` is with the
judgement. In nats over the known evidence: `ELBO`, the mean log-weight of 4,000 paths of the control, `untrained` before it
has learned anything; `log Z`, the log of their mean weight, absolute where it is a mean over data sets; `EUBO`, the mean
log-weight of exact draws that are noised. The chain's own evidence is not that of the posterior; the ELBO is below it, and
the EUBO above it only as far as the chain is the reverse of noising, which at `far` it is not. `apart`: from the log Z of
20,000 paths of the untrained control. `ESS`: effective share of the paths. `modes`, `weighed`: total variation of the modes'
weights, of paths as they are and as they weigh. `SW2`: sliced Wasserstein distance of weighted paths to exact draws, beside
that of as many exact ones. The amortised control, Guided, PiGDM and DPS serve any data of a mixture in 8 dimensions: means
over 20 data sets; a sampler is a control like any other. `missed` names the numbers that are not as `wanted`."""

CALIBRATION = {
    "noise": "noise / peak",
    "truths from": "truths from",
    "method": "method",
    "total": "total",
    "bands": "bands",
    "flux": "flux scores: mean, sd",
    "likelier": "likelier by [nat]",
    "normalised_error": "squared error",
    "evaluations": "evaluations",
    "VJPs": "VJPs",
    "seconds": "seconds a truth",
}
CALIBRATION_LEGEND = """\
Posteriors of images, one for each truth. `total`: error of the posterior mean over its predicted standard deviation, rms
over truths, with its jackknife error; 1 is calibrated, more is too narrow. `bands`: the same in bands of spatial frequency,
below 3, 8 and 16 cycles per image, and above. Normal scores of the true total flux have mean 0 and standard deviation 1 if
it is calibrated, with errors of {mean:.2f} and {sd:.2f}. Truths are `likelier` by so much than draws are on average.
`squared error` is that of the posterior mean over the truth's sum of squares, median; evaluations and vector-Jacobian
products (VJPs) of the network are for each draw, seconds for all of a truth. Truths are draws of the prior, which test the
inference alone, or simulated images that the prior was not trained on, which test the prior with it."""


def document(rows: Sequence[dict[str, Any]], command: str, picture: str, suite: int) -> str:
    """The page.

    Args:
        rows: From `scoreinv.bench.exact.row`, those of one problem after another.
        command: What made them.
        picture: File of the figure, beside the page.
        suite: Problems that there are.
    """
    run = len({row["problem"] for row in rows})
    parts = [
        "# The exact-posterior benchmark",
        f"`{command}`, {', '.join(_versions(rows))}, {date.today().isoformat()}",
        f"![Error against cost, one panel a problem]({picture})",
        LEGEND,
        *([f"Of the suite's {suite} problems, {run} were run."] if run < suite else []),
    ]
    for problem, group in itertools.groupby(rows, key=lambda row: row["problem"]):
        lines = list(group)
        seeds, n = lines[0]["seeds"], lines[0]["n"]
        parts.append(f"## {problem}\n\n{n} draws, {seeds} problem{'s' if seeds > 1 else ''}")
        few = lambda row, of=seeds: "" if row["seeds"] == of else f", {row['seeds']} of these"
        parts.append(_table([row | {"method": row["method"] + few(row)} for row in lines]))
    return "\n\n".join(parts) + "\n"


def costs(rows: Sequence[dict[str, Any]], command: str, picture: str) -> str:
    """The page of `scoreinv.bench.scaling.scaling`, with arguments as those of `document`."""
    parts = [
        "# What a draw costs",
        f"`{command}`, scoreinv {version('scoreinv')}, {date.today().isoformat()}",
        f"![Cost and memory along each axis]({picture})",
        COST_LEGEND,
    ]
    for axis in dict.fromkeys(row["axis"] for row in rows):
        parts.append(f"## {axis.capitalize()}")
        parts.append(_table([row for row in rows if row["axis"] == axis], COSTS))
    return "\n\n".join(parts) + "\n"


def estimates(rows: Sequence[dict[str, Any]], command: str, picture: str) -> str:
    """The page of `scoreinv.bench.npe.npe`, with arguments as those of `document`."""
    packages = dict.fromkeys(row.get("package", "scoreinv") for row in rows)
    parts = [
        "# Estimates of scalar parameters",
        f"`{command}`, {', '.join(f'{p} {version(p)}' for p in packages)}, {date.today().isoformat()}",
        f"![How far estimates are off against what they cost]({picture})",
        ESTIMATE_LEGEND,
    ]
    for problem, group in itertools.groupby(rows, key=lambda row: row["problem"]):
        lines = list(group)
        columns = dict.fromkeys(k for row in lines for k in row if k not in ("problem", "seed"))
        empty = dict.fromkeys(columns, math.nan)
        parts.append(f"## {problem}, seed {lines[0]['seed']}")
        parts.append(_table([empty | row for row in lines], list(columns)))
    return "\n\n".join(parts) + "\n"


def controls(rows: Sequence[dict[str, Any]], command: str, picture: str) -> str:
    """The page of rows of `scoreinv.bench.rtb.row`, with arguments as those of `document`."""
    parts = [
        "# Learned controls",
        f"`{command}`, scoreinv {version('scoreinv')}, {date.today().isoformat()}",
        f"![From the mean log-weight of the control's paths to that of the target's]({picture})",
        CONTROLS_LEGEND,
        _table(rows, list(rows[0])),
    ]
    return "\n\n".join(parts) + "\n"


def calibration(rows: Sequence[dict[str, Any]], command: str, picture: str) -> str:
    """The page of rows of `scoreinv bench learned`, with arguments as those of `document`."""
    n = rows[0]["truths"]
    parts = [
        "# Calibration with a trained prior",
        f"`{command}`, scoreinv {version('scoreinv')}, {date.today().isoformat()}",
        f"![Error over predicted standard deviation, in total and by band]({picture})",
        CALIBRATION_LEGEND.format(mean=1 / math.sqrt(n), sd=1 / math.sqrt(2 * n)),
    ]
    for problem, group in itertools.groupby(rows, key=lambda row: row["problem"]):
        lines = [
            row
            | {
                "total": f"{row['total']:.3f} +- {row['total_error']:.3f}",
                "flux": f"{row['flux_mean']:+.2f}, {row['flux_std']:.2f}",
                "likelier": f"{row['likelier']:+.1f} +- {row['likelier_error']:.1f}",
            }
            for row in group
        ]
        parts.append(f"## {problem}, {lines[0]['truths']} truths")
        parts.append(_table(lines, CALIBRATION))
    return "\n\n".join(parts) + "\n"


def _versions(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Of the packages whose samplers are in the table, ours first."""
    used = [p for p in PEERS if any(str(row["method"]).startswith(f"{p}-") for row in rows)]
    return [f"{name} {version(name)}" for name in ("scoreinv", *used)]


def _table(
    rows: Sequence[dict[str, Any]], columns: Sequence[str] | Mapping[str, str] = COLUMNS
) -> str:
    """A table of these keys; a mapping says how to name them."""
    heads = list(columns.values()) if isinstance(columns, Mapping) else list(columns)
    lines = [heads, ["---"] * len(heads), *([cell(row[c]) for c in columns] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def cell(value: Any) -> str:
    """A number as a table shows it; lists in one cell."""
    if isinstance(value, list):
        return " ".join(f"{v:.2f}" for v in value)
    if not isinstance(value, float):
        return str(value)
    if math.isnan(value):
        return "-"
    if abs(value) >= 1e4:
        return f"{value:.0e}"
    if abs(value) >= 100:
        return f"{value:.0f}"
    return "<1e-4" if 0 < abs(value) < 1e-4 else f"{value:.3g}"
