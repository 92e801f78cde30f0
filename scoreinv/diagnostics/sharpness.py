"""What the draws know: a sampler that ignores the data passes every test of coverage, and fails here.

The energy score E|x - t| - 1/2 E|x - x'| rewards draws that are calibrated and close; it is proper (Gneiting & Raftery,
Strictly Proper Scoring Rules, Prediction, and Estimation, 2007). Draws are compared with draws that were made for other
data, which know as much as the prior, and with a point estimate that costs nothing, such as the Wiener filter: a posterior
mean has the least squared error of all, so losing to it is a defect.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from scoreinv.diagnostics.exchange import CHUNK
from scoreinv.diagnostics.quantities import about_mean, band_power
from scoreinv.streams import stream


@dataclass(frozen=True)
class Sharpness:
    """What the draws know of the truth.

    Attributes:
        contraction: 1 less the mean variance of a pixel in a posterior over that of the truths.
        information: By how much draws narrow the prior down, 1/2 log of its variance over theirs, summed over all directions
            as if these were independent and Gaussian [nat].
        energy_score: Mean over simulations, in the unit of the images.
        skill: 1 less the energy score over that of draws for other data; 0 for draws that ignore the data.
        ignorant: p-value of knowing no more than draws for other data, if that is what the draws do; large then.
        behind: p-value of losing to the baseline no more than by chance; small if the posterior mean loses. nan without one.
        gain: 1 less the squared error of the posterior mean over the baseline's; nan without one.
    """

    contraction: float
    information: float
    energy_score: float
    skill: float
    ignorant: float
    behind: float
    gain: float


def sharpness(
    draws: Tensor, truths: Tensor, baseline: Tensor | None, swaps: int, seed: int
) -> Sharpness:
    """Of draws (N, L, *shape) for truths (N, *shape), beside estimates (N, *shape) that they should not lose to."""
    # single precision keeps differences only of numbers that are near zero: so does cdist, by |a|^2 - 2 ab + |b|^2
    middle = truths.mean(0)
    x, t = (draws - middle).flatten(2).float(), (truths - middle).flatten(1).float()
    apart = torch.stack(
        [torch.cdist(t - m, v - m).mean(1) for v, m in zip(x, x.mean(1), strict=True)], 1
    )  # (truth, draws)
    left = x - x.mean(1, keepdim=True)
    within = torch.stack([torch.cdist(v, v).sum() / (len(v) * (len(v) - 1)) for v in left])
    scores = apart.double() - 0.5 * within.double()
    own, N = scores.diagonal().mean(), len(t)
    others = (scores.sum() - scores.diagonal().sum()) / (N * (N - 1))
    generator = stream(seed, 4)
    order = torch.stack([torch.randperm(N, generator=generator) for _ in range(swaps)])
    shuffled = scores[order, torch.arange(N)].mean(1)
    # sums in another order differ in their last bits
    ignorant = (1 + int((shuffled <= own + 1e-9 * own.abs()).sum())) / (swaps + 1)
    behind = gain = float("nan")
    if baseline is not None:
        # the mean of L draws scatters around that of the posterior
        scatter = x.double().var(1).sum(1) / x.shape[1]
        error = (x.mean(1) - t).double().square().sum(1) - scatter
        reference = ((baseline - middle).flatten(1) - t).double().square().sum(1)
        # the mean of squares is what a posterior mean makes least, not that of any other measure of loss
        behind = flipped((error - reference) / reference.mean(), swaps, generator)
        gain = float(1 - error.sum() / reference.sum())
    return Sharpness(
        contraction=float(1 - x.var(1).mean() / t.var(0).mean()),
        information=information(draws, truths),
        energy_score=float(own),
        skill=float(1 - own / others),
        ignorant=ignorant,
        behind=behind,
        gain=gain,
    )


def information(draws: Tensor, truths: Tensor) -> float:
    """The information gain [nat], band by band of spatial frequency for images, by coordinate for vectors.

    Each power is averaged before its logarithm is taken: posteriors of very different widths gain more than this.
    """
    N, L = draws.shape[:2]
    prior, own = about_mean(truths), about_mean(draws, 1).flatten(0, 1)
    if truths.ndim >= 3:
        (before, count), (after, _) = band_power(prior), band_power(own)
        count = count * math.prod(truths.shape[1:-2])
    else:
        before, after = prior.double().square(), own.double().square()
        count = torch.ones(truths.shape[1], dtype=torch.float64)
    before, after = before.sum(0) / (N - 1), after.sum(0) / (N * (L - 1))
    tiny = torch.finfo(torch.float64).tiny
    gain = 0.5 * (before.clamp_min(tiny) / after.clamp_min(tiny)).log()
    return float((count * gain).sum())


def flipped(d: Tensor, swaps: int, generator: torch.Generator) -> float:
    """p-value of a mean as large as that of d, with shape (N,), if signs were random."""
    total = 0
    for n in [CHUNK] * (swaps // CHUNK) + [swaps % CHUNK]:
        sign = 2.0 * torch.randint(2, (n, len(d)), generator=generator) - 1
        total += int(((sign.double() * d).mean(1) >= d.mean() - 1e-12).sum())
    return (1 + total) / (swaps + 1)
