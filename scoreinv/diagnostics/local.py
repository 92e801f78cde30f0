"""Whether draws are right at one observation, from simulations elsewhere: a local classifier two-sample test.

A classifier learns to tell pairs (s(y_i), theta_i) of simulations from pairs (s(y_i), theta'_i) with one draw each. If it
cannot, it says 1/2 everywhere; at the observation in hand, its mean squared departure from that on the draws made there is
the statistic. Its null comes from classifiers that were trained after truth and draw changed places at random.
Linhart, Gramfort & Rodrigues, L-C2ST: Local Diagnostics for Posterior Approximations in Simulation-Based Inference (2023,
arXiv:2306.03580). The classifier here is ridge regression on quadratic features, which needs no training.
"""

from __future__ import annotations

import torch
from torch import Tensor

from scoreinv.streams import stream

RIDGE = 1e-2  # of the mean squared feature
SWAPS = 499


def lc2st(
    draws: Tensor, truths: Tensor, summaries: Tensor, at: Tensor, observed: Tensor, seed: int
) -> float:
    """p-value that draws at one observation are wrong, from simulations of others.

    Args:
        draws: Scalars of one draw of each simulation, with shape (N, k).
        truths: The same of the truths, with shape (N, k).
        summaries: Of the data of each, with shape (N, m).
        at: Scalars of the draws of the observation, with shape (n, k).
        observed: Summary of its data, with shape (m,).
        seed: Of the swaps.

    Raises:
        ValueError: Shapes that do not fit, values that are not finite.
    """
    flat = truths.ndim == draws.ndim == summaries.ndim == at.ndim == 2 and observed.ndim == 1
    if (
        not flat
        or draws.shape != truths.shape
        or at.shape[1:] != truths.shape[1:]
        or len(summaries) != len(truths)
        or observed.shape != summaries.shape[1:]
        or min(len(truths), len(at)) < 1
    ):
        raise ValueError(
            f"draws have shape {tuple(draws.shape)}, truths {tuple(truths.shape)}, summaries {tuple(summaries.shape)}, "
            f"draws at the observation {tuple(at.shape)}, its summary {tuple(observed.shape)}; expected (N, k), (N, k), "
            "(N, m), (n, k), (m,): one number is v[:, None]"
        )
    N = len(truths)
    for name, v in (
        ("draws", draws),
        ("truths", truths),
        ("summaries", summaries),
        ("at", at),
        ("observed", observed),
    ):
        if not bool(torch.isfinite(v).all()):
            raise ValueError(f"{name} has values that are not finite; find out why first")
    generator = stream(seed, 7)
    raw = torch.cat([torch.cat([truths, draws]), summaries.repeat(2, 1)], 1).double()
    mean, sd = raw.mean(0), raw.std(0).clamp_min(1e-300)
    here = torch.cat([at, observed.expand(len(at), -1)], 1).double()
    X, H = (_quadratic((v - mean) / sd) for v in (raw, here))
    gram = X.T @ X
    gram += RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
    # half the difference between truth and draw is all that a swap changes
    readout = torch.linalg.solve(gram, (X[:N] - X[N:]).T)
    sign = 2.0 * torch.randint(2, (SWAPS, N), generator=generator).double() - 1
    sign = torch.cat([torch.ones(1, N, dtype=torch.float64), sign])
    values = (H @ (readout @ sign.T)).square().mean(0)
    return float((values >= values[0] - 1e-12).double().mean())


def _quadratic(z: Tensor) -> Tensor:
    """1, all numbers, and all their products."""
    i, j = torch.triu_indices(z.shape[1], z.shape[1])
    return torch.cat([torch.ones(len(z), 1, dtype=z.dtype), z, z[:, i] * z[:, j]], 1)
