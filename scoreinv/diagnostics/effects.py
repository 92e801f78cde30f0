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
        m = x.mean(0)
        if x.ndim >= 3:
            error, count = band_power((t - m)[None])
            spread = band_power(x - m)[0].sum(0)
        else:
            error, spread = (t - m).double().square()[None], (x - m).double().square().sum(0)
            count = torch.ones(len(t), dtype=torch.float64)
        expected = (1 + 1 / L) * spread / (L - 1)
        # the inverse of a variance that was estimated from few numbers is too large on average
        free = (L - 1) * count
        unbiased = torch.where(free > 2, (free - 2) / free, 1.0)
        ratios.append(unbiased * error[0] / expected.clamp_min(torch.finfo(torch.float64).tiny))
    return torch.stack(ratios), count


def dispersion(ratio: Tensor, count: Tensor) -> Effect:
    """Width of the posterior over the width it should have, from `squared`, by jackknife over simulations.

    Args:
        ratio: With shape (N, groups).
        count: Numbers of each group.
    """
    each = (ratio * count).sum(1) / count.sum()
    N, total = len(each), float(each.sum())
    if not total > 0:
        return Effect(math.inf, math.inf, math.inf)
    log_f = -0.5 * math.log(total / N)
    left_out = -0.5 * ((total - each) / (N - 1)).clamp_min(1e-300).log()
    error = float(((N - 1) * left_out.var(unbiased=False)).sqrt())
    return Effect(*(math.exp(log_f + v * error) for v in (0.0, -Z, Z)))


def bias(rank: Tensor, members: int) -> Effect:
    """Mean normal score of ranks of truths, with shape (N,): by how many posterior sd truths lie above the draws."""
    scores = normal_scores(rank, members)
    error = Z * float(scores.std()) / math.sqrt(len(scores))
    mean = float(scores.mean())
    return Effect(mean, mean - error, mean + error)


def power(radius: Tensor, factor: float, seed: int, repeats: int = 400) -> float:
    """Probability that posteriors wider by a factor are found out by the rank of a radius.

    Args:
        radius: Squared distances of all members from their mean, with shape (N, L + 1).
        factor: By which the draws are stretched about their mean.
        seed: Of who plays the truth.
        repeats: Simulated tests.
    """
    N, members = radius.shape
    generator = torch.Generator().manual_seed(seed)
    who = torch.randint(members, (repeats, N), generator=generator)
    truth = radius[torch.arange(N), who]
    ordered = radius.sort(1).values
    below = torch.searchsorted(ordered, (truth.T / factor**2).contiguous()).clamp_max(members - 1)
    scores = normal_scores(below, members).mean(0)
    null = normal_scores(torch.arange(members), members).std(unbiased=False) / math.sqrt(N)
    return float((scores.abs() > Z * null).double().mean())


def detectable(radius: Tensor, seed: int) -> tuple[float, float]:
    """Factors below and above 1 by which a width must be off to be detected with `POWER` at `LEVEL`; 0 or inf if none is.

    Args:
        radius: Of all members, with shape (N, L + 1).
        seed: Of the simulated tests.
    """
    found = []
    for sign, none in ((-1, 0.0), (1, math.inf)):
        low, high = 0.0, math.log(8.0)
        if power(radius, math.exp(sign * high), seed) < POWER:
            found.append(none)
            continue
        while high - low > 1e-3:
            middle = 0.5 * (low + high)
            reached = power(radius, math.exp(sign * middle), seed) >= POWER
            low, high = (low, middle) if reached else (middle, high)
        found.append(math.exp(sign * high))
    return found[0], found[1]


def needed(N: int, detectable: tuple[float, float], factor: float = 1.1) -> int:
    """Simulations that would find a factor, if the detectable one falls as 1 / sqrt(N)."""
    worst = max(abs(math.log(v)) if 0 < v < math.inf else math.log(8.0) for v in detectable)
    return math.ceil(N * (worst / math.log(factor)) ** 2)
