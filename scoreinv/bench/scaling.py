"""How the cost of a draw grows with pixels, data, draws and noise levels, beside the network's own forward passes.

Other canvases take the same network, which is convolutional, and moments stretched over them: enough to time it.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from scoreinv.bench.learned import psf_problem, uv_problem
from scoreinv.bench.memory import peak_memory
from scoreinv.bench.speed import one_thread, timed
from scoreinv.gaussian import Fourier, Gaussian
from scoreinv.likelihood import Likelihood
from scoreinv.noise import GaussianNoise
from scoreinv.operators import NUFFT
from scoreinv.operators.fourier import ARCSEC
from scoreinv.posterior import Posterior
from scoreinv.priors import ScorePrior
from scoreinv.samplers import SMC, Guided, sample
from scoreinv.samplers.figure import FAINT, INK, TRUE
from scoreinv.samplers.path import Sampler
from scoreinv.streams import stream

SIZES = (32, 64, 128)
VISIBILITIES = (300, 3_000, 30_000, 300_000)
DRAWS = (16, 64, 256)
LEVELS = (5, 10, 20, 40)
FEW = 10  # levels where they do not vary
SAMPLERS = {
    "guided": lambda levels: Guided(levels),
    "weights": lambda levels: SMC(levels, drop_above=math.inf),
}
AXES = ("pixels on a side", "visibilities", "draws", "levels")
LINES = {"guided PSF": "o-", "guided uv": "s-", "weights PSF": "o--", "weights uv": "s--"}


def scaling(prior: ScorePrior) -> Iterator[dict[str, Any]]:
    """Rows of cost, one axis after another; see `cost`."""
    psf = psf_problem(prior, 0.03)
    for title, make in SAMPLERS.items():
        for size in SIZES:
            wide = stretched(prior, size)
            for name, problem in (("PSF", psf_problem), ("uv", uv_problem)):
                found = cost(wide, problem(wide, 0.03), make(FEW), 16)
                yield {"axis": AXES[0], "value": size, "line": f"{title} {name}", **found}
        for count in VISIBILITIES:
            found = cost(prior, many_visibilities(prior, count), make(FEW), 16)
            yield {"axis": AXES[1], "value": count, "line": f"{title} uv", **found}
        for n in DRAWS:
            found = cost(prior, psf, make(FEW), n)
            yield {"axis": AXES[2], "value": n, "line": f"{title} PSF", **found}
        for levels in LEVELS:
            found = cost(prior, psf, make(levels), 16)
            yield {"axis": AXES[3], "value": levels, "line": f"{title} PSF", **found}


@one_thread()
def cost(prior: ScorePrior, likelihood: Likelihood, sampler: Sampler, n: int) -> dict[str, float]:
    """Wall time over bare forward passes, and peak memory over what was there and what the draws take, of one run.

    All on one thread, with forward passes before and after it, so that a drift of the machine's speed cancels.
    """
    y = likelihood.simulate(prior.sample(1, seed=0, steps=8), seed=1)[0]
    island = 16
    x = torch.randn(island, *prior.shape, generator=stream(0))
    sigma = torch.full((island,), 0.1)
    found = []
    with torch.no_grad():
        prior.denoise(x, sigma)
        bare = [timed(lambda: prior.denoise(x, sigma)) for _ in range(10)]
        posterior = Posterior(prior, likelihood, y)
        with peak_memory() as peak:
            wall = timed(
                lambda: found.append(
                    sample(posterior, n, sampler, seed=0, island=island, evidence=False)
                )
            )
        bare += [timed(lambda: prior.denoise(x, sigma)) for _ in range(10)]
    draws = found[0]
    forward = statistics.median(bare) / island
    return {
        "evaluations": draws.evaluations,
        "forward [ms/image]": 1e3 * forward,
        "wall / forward passes": wall / (forward * draws.evaluations * n),
        "MB beyond the draws": max(0.0, peak.megabytes - draws.x.nbytes / 1e6),
    }


def many_visibilities(prior: ScorePrior, count: int) -> Likelihood:
    """Visibilities at random baselines, the longest resolved by three pixels."""
    r = torch.rand(count, generator=stream(1), dtype=torch.float64).sqrt()
    angle = 2 * math.pi * torch.rand(count, generator=stream(2), dtype=torch.float64)
    uv = 3e5 * torch.stack([r * angle.cos(), r * angle.sin()], 1)
    A = NUFFT(uv, prior.shape, 1 / (3 * 3e5 * ARCSEC))
    return Likelihood(A, GaussianNoise(std=math.sqrt(count)))


def stretched(prior: ScorePrior, size: int) -> ScorePrior:
    """The same network on a canvas of another size, to time it."""
    if prior.shape[-1] == size:
        return prior
    mean = F.interpolate(prior.moments.mean[None], (size, size), mode="bilinear")[0]
    error = prior.error
    if error is not None:
        error = replace(error, power=_spectrum(error.power, size))
    return ScorePrior(
        prior.network,
        prior.sigma_data,
        Gaussian(mean, Fourier(_spectrum(prior.moments.covariance.spectrum, size))),
        prior.sigma_min,
        prior.sigma_max,
        autocast=prior.autocast,
        error=error,
        symmetric=prior.symmetric,
    )


def _spectrum(power: Tensor, size: int) -> Tensor:
    """Spectra with shape (..., H, W) by cycles per pixel on a canvas of another size, from their first row."""
    k = torch.fft.fftfreq(size, dtype=torch.float64)
    radius = (k[:, None] ** 2 + k**2).sqrt().clamp(max=0.5)
    profile = power[..., 0, : power.shape[-1] // 2 + 1]
    at = radius * 2 * (profile.shape[-1] - 1)
    low = at.floor().long().clamp(max=profile.shape[-1] - 2)
    return torch.lerp(profile[..., low], profile[..., low + 1], (at - low).to(profile.dtype))


def scaling_figure(rows: Sequence[dict[str, Any]]) -> Figure:
    """Cost and memory along each axis, with an Agg canvas.

    Args:
        rows: From `scaling`.
    """
    figure = Figure(figsize=(13, 5.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, len(AXES), sharey="row", sharex="col")
    for i, axis in enumerate(AXES):
        chosen = sorted((r for r in rows if r["axis"] == axis), key=lambda r: r["line"])
        for ax, key in zip(
            axes[:, i], ("wall / forward passes", "MB beyond the draws"), strict=True
        ):
            for line, group in itertools.groupby(chosen, key=lambda r: r["line"]):
                points = [(r["value"], r[key]) for r in group]
                colour = TRUE if line.startswith("guided") else FAINT
                ax.plot(*zip(*points, strict=True), LINES[line], color=colour, label=line)
            ax.set_xscale("log")
            ax.set_xticks(sorted({r["value"] for r in chosen}))
            ax.xaxis.set_major_formatter("{x:g}")
            ax.minorticks_off()
        axes[0, i].axhline(1.0, color=INK, linewidth=0.8, linestyle=":")
        axes[1, i].set_xlabel(axis)
    axes[0, 0].set_ylabel("wall / forward passes")
    axes[1, 0].set_ylabel("memory beyond the draws [MB]")
    axes[0, 0].legend(fontsize=8)
    return figure
