"""Ranks of truths among their draws, and what a calibrated posterior makes of them.

The rank of the truth among L draws, by any number computed from an image, is uniform on 0 .. L. Directed statistics look
for what goes wrong most often: the mean of the normal scores for a bias, their mean square for a wrong width. The largest
distance between the ranks' distribution and the uniform one looks for anything; bands that hold for all ranks at once:
Saeilynoja, Buerkner & Vehtari, Graphical Test for Discrete Uniformity and its Applications in Goodness-of-Fit Evaluation
and Multiple Sample Comparison (2022, arXiv:2103.10522).
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from scoreinv.streams import stream

STATISTICS = ("bias", "dispersion", "shape")
LEAST = 50  # draws below which ranks of weighted ones say little
SIMULATIONS = 10  # below which nothing is judged


def ranks(q: Tensor, seed: int) -> Tensor:
    """Rank of every member among all of its simulation, 0 .. L, ties broken at random.

    Args:
        q: Quantities of truth and draws, with shape (N, L + 1, K).
        seed: Of the ties.

    Returns:
        Integers with the shape of q.
    """
    generator = stream(seed, 1)
    shuffle = torch.rand(q.shape, generator=generator).argsort(1)
    order = q.gather(1, shuffle).argsort(dim=1, stable=True)
    return shuffle.gather(1, order).argsort(1)


def normal_scores(rank: Tensor, members: int) -> Tensor:
    """Standard normal quantiles of ranks among so many members; mean 0 and variance near 1 if ranks are uniform."""
    return torch.special.ndtri((rank.double() + 0.5) / members)


def pooled(rank: Tensor, who: Tensor) -> Tensor:
    """Statistics of the ranks of those who play the truth, with shape (B, 3 K), in the order of `STATISTICS`.

    Args:
        rank: Of every member, with shape (N, L + 1, K).
        who: Plays the truth, with shape (B, N).
    """
    N, members, K = rank.shape
    chosen = rank[torch.arange(N), who]
    scores = normal_scores(torch.arange(members), members)[chosen]
    counts = torch.zeros(len(who), members, K).scatter_add_(1, chosen, torch.ones(chosen.shape))
    share = torch.arange(1, members) / members
    away = (counts.cumsum(1)[:, :-1] / N - share[:, None]).abs()
    shape = (away / (share * (1 - share) / N).sqrt()[:, None]).max(1).values
    return torch.cat([scores.mean(1), scores.square().mean(1), shape.double()], 1)


def conditional(rank: Tensor, who: Tensor, covariate: Tensor) -> Tensor:
    """Covariance of the scores and of their squares with a covariate, with shape (B, 2 K).

    Args:
        rank: Of every member, with shape (N, L + 1, K).
        who: Plays the truth, with shape (B, N).
        covariate: With shape (N,); its ranks count, the same for equal values.
    """
    N, members, _ = rank.shape
    _, group, count = covariate.unique(return_inverse=True, return_counts=True)
    middle = count.cumsum(0) - 0.5 * (count + 1)  # mean rank of equal values
    weight = normal_scores(middle[group], N)
    scores = normal_scores(torch.arange(members), members)[rank[torch.arange(N), who]]
    along = lambda v: (weight[:, None] * v).mean(1)
    return torch.cat([along(scores), along(scores.square())], 1)


@lru_cache
def ecdf_band(sims: int, members: int, level: float = 0.95, seed: int = 0) -> float:
    """By how many standard deviations the distribution of uniform ranks strays anywhere from the uniform one.

    Args:
        sims: Ranks N.
        members: Values they can take, L + 1.
        level: Probability that all of it stays inside, of 4,000 simulated sets.
        seed: Of the sets.
    """
    generator = torch.Generator().manual_seed(seed)
    rank = torch.randint(members, (sims, 1, 4000), generator=generator)
    shape = pooled(rank.expand(-1, members, -1), torch.zeros(1, sims, dtype=torch.long))
    return float(shape[0, -4000:].quantile(level))


def unweighted(weights: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Which draws to keep of weighted ones so that those kept count alike: each with probability w / max w.

    None is kept twice, unlike in resampling: a truth is never a copy of a draw, and copies would give it away.

    Args:
        weights: With shape (N, L), of any normalisation.
        seed: Decides which.

    Returns:
        The simulations that are judged, indices with shape (n,), and the draws of each that are kept, with shape (n, m), m
        the least number among them. Simulations that keep fewer than 50 are not judged.

    Raises:
        ValueError: Weights that are negative, not finite, or all zero; fewer than 10 simulations that can be judged.
    """
    total = weights.double().sum(1)
    if not bool(((weights >= 0).all(1) & (total > 0) & torch.isfinite(total)).all()):
        raise ValueError(
            "weights are negative, not finite or all zero in a simulation; expected w >= 0"
        )
    generator = stream(seed, 2)
    w = weights.double() / weights.double().max(1, keepdim=True).values
    kept = torch.rand(w.shape, generator=generator, dtype=torch.float64) < w
    count = kept.sum(1)
    judged = torch.nonzero(count >= LEAST).flatten()
    if len(judged) < SIMULATIONS:
        raise ValueError(
            f"weights leave {LEAST} draws or more in {len(judged)} of {len(w)} simulations (at most {int(count.max())}), "
            f"expected {SIMULATIONS} such simulations; take more draws, or a sampler with even weights"
        )
    m = int(count[judged].min())
    # a random m of those that are kept: the others sort behind them
    order = torch.rand(w.shape, generator=generator) + (~kept)
    return judged, order[judged].argsort(1)[:, :m]
