"""How large a miscalibration is, not only how certain.

With t the truth, m and v the mean and the variance of L draws, a calibrated posterior has E (t - m)^2 = (1 + 1 / L) E v. The
dispersion compares them, each image in units of its own width: in bands of spatial frequency for images, by coordinate for
vectors. Below 1 the posterior is too narrow.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from scoreinv.diagnostics.quantities import band_power
from scoreinv.diagnostics.ranks import normal_scores
from scoreinv.streams import stream

POWER, LEVEL = 0.8, 0.05  # with which a factor counts as detectable
Z = 1.959964  # two-sided, 95 %


class Effect(NamedTuple):
    """An estimate with its 95 % interval."""

    value: float
    low: float
    high: float


def squared(draws: Tensor, truths: Tensor) -> tuple[Tensor, Tensor]:
    """Squared errors of the draws' mean over what calibration expects of them, in groups.

    Args:
        draws: With shape (N, L, *shape).
        truths: With shape (N, *shape).

    Returns:
        Ratios with shape (N, groups), 1 on average, and the numbers of each group, with shape (groups,). Groups are bands of
        spatial frequency, or coordinates.
    """
    L, ratios = draws.shape[1], []
    for x, t in zip(draws, truths, strict=True):
        # of equal numbers that number, which their mean may miss by its rounding
        m = x[0] + (x - x[0]).mean(0)
        if x.ndim >= 3:
            error, count = band_power((t - m)[None])
            spread = band_power(x - m)[0].sum(0)
        else:
            error, spread = (t - m).double().square()[None], (x - m).double().square().sum(0)
            count = torch.ones(len(t), dtype=torch.float64)
        expected = (1 + 1 / L) * spread / (L - 1)
        # the inverse of a variance that was estimated from few numbers is too large on average
        free = (L - 1) * count * math.prod(x.shape[1:-2])
        unbiased = torch.where(free > 2, (free - 2) / free, 1.0)
        ratios.append(unbiased * error[0] / expected.clamp_min(torch.finfo(torch.float64).tiny))
    return torch.stack(ratios), count


def dispersion(ratio: Tensor, count: Tensor) -> Effect:
    """Width of the posterior over the width it should have, from `squared`, by jackknife over simulations.

    Groups without any error, such as coordinates that are known, do not count.

    Args:
        ratio: With shape (N, groups).
        count: Numbers of each group.
    """
    count = count * (ratio > 0).any(0)
    each = (ratio * count).sum(1) / count.sum()
    N, total = len(each), float(each.sum())
    if not total > 0:
        return Effect(math.inf, math.inf, math.inf)
    log_f = -0.5 * math.log(total / N)
    left_out = -0.5 * ((total - each) / (N - 1)).clamp_min(1e-300).log()
    error = float(((N - 1) * left_out.var(unbiased=False)).sqrt())
    return Effect(*(math.exp(log_f + v * error) for v in (0.0, -Z, Z)))


def bias(values: Tensor) -> Effect:
    """By how many posterior standard deviations truths lie above the mean of their draws.

    Args:
        values: Of truth and draws, with shape (N, L + 1).
    """
    left = (values - values[:, 1:2]).double()  # of equal draws nothing, without rounding
    draws = left[:, 1:]
    sd = draws.std(1)
    z = (left[:, 0] - draws.mean(1)) / sd.clamp_min(torch.finfo(torch.float64).tiny)
    z = z[sd > 0]
    if len(z) < 2:
        return Effect(math.nan, math.nan, math.nan)
    error, mean = Z * float(z.std()) / math.sqrt(len(z)), float(z.mean())
    return Effect(mean, mean - error, mean + error)


def power(radius: Tensor, factor: float, critical: float, seed: int, repeats: int = 400) -> float:
    """Probability that posteriors wider by a factor are found out by the rank of a radius.

    Args:
        radius: Squared distances of all members from their mean, with shape (N, L + 1).
        factor: By which the draws are stretched about their mean.
        critical: Standard deviations of its null from which the statistic rejects.
        seed: Of who plays the truth.
        repeats: Simulated tests.
    """
    N, members = radius.shape
    generator = stream(seed, 3)
    who = torch.randint(members, (repeats, N), generator=generator)
    truth = radius[torch.arange(N), who]
    ordered = radius.sort(1).values
    below = torch.searchsorted(ordered, (truth.T / factor**2).contiguous())
    # a truth that moves up leaves its own place below
    scores = normal_scores(below - int(factor < 1), members).mean(0)
    null = normal_scores(torch.arange(members), members).std(unbiased=False) / math.sqrt(N)
    return float((scores.abs() > critical * null).double().mean())


def detectable(radius: Tensor, critical: float, seed: int) -> tuple[float, float]:
    """Factors below and above 1 by which a width must be off to be found with probability `POWER`; 0 or inf if none is.

    By the rank of one radius alone, held against what the whole battery asks of a statistic: other statistics can only help.

    Args:
        radius: Of all members, with shape (N, L + 1).
        critical: See `power`.
        seed: Of the simulated tests.
    """
    found = []
    for sign, none in ((-1, 0.0), (1, math.inf)):
        low, high = 0.0, math.log(8.0)
        if power(radius, math.exp(sign * high), critical, seed) < POWER:
            found.append(none)
            continue
        while high - low > 1e-3:
            middle = 0.5 * (low + high)
            reached = power(radius, math.exp(sign * middle), critical, seed) >= POWER
            low, high = (low, middle) if reached else (middle, high)
        found.append(math.exp(sign * high))
    return found[0], found[1]


def needed(N: int, detectable: tuple[float, float], factor: float = 1.1) -> int:
    """Simulations that would find a factor, if the detectable one falls as 1 / sqrt(N)."""
    worst = max(abs(math.log(v)) if 0 < v < math.inf else math.log(8.0) for v in detectable)
    return math.ceil(N * (worst / math.log(factor)) ** 2)
