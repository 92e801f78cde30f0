"""How far draws are from an exact posterior: functions of arrays.

All take draws x and exact draws, with shapes (n, d) and (m, d). What depends on the number of draws is stated beside what as
many exact draws would give.
"""

from __future__ import annotations

import torch
from torch import Tensor

from scoreinv.priors.base import stream

NEIGHBOURS = 10
PERMUTATIONS = 200


def sliced_wasserstein(x: Tensor, reference: Tensor, directions: int = 400) -> float:
    """Root mean square of the 2-Wasserstein distances of random one-dimensional projections.

    Args:
        x: Draws, with shape (n, d).
        reference: Exact draws, with shape (k n, d).
    """
    theta = torch.randn((x.shape[1], directions), generator=stream(0), dtype=torch.float64)
    theta = theta / theta.norm(dim=0)
    a, b = (x @ theta).sort(0).values, (reference @ theta).sort(0).values
    b = b.reshape(len(x), -1, directions)
    return float((a[:, None] - b).square().mean().sqrt())


def mean_error(x: Tensor, reference: Tensor) -> float:
    """Error of the mean in posterior standard deviations, rms over pixels; (1 / n + 1 / m)^1/2 for exact draws."""
    off = (x.mean(0) - reference.mean(0)) / reference.std(0)
    return float(off.square().mean().sqrt())


def variance_ratio(x: Tensor, reference: Tensor) -> float:
    """Total variance over that of exact draws."""
    return float(x.var(0).sum() / reference.var(0).sum())


def c2st(x: Tensor, reference: Tensor, seed: int) -> tuple[float, float]:
    """Accuracy of a classifier that tells draws from exact ones (0.5: it cannot), and how often chance does as well.

    The classifier is the majority of the nearest neighbours, left-one-out, in units of the exact standard deviation of each
    pixel. Repeated draws are taken once, and as many exact ones. The null is exact: labels are permuted, neighbours stay.
    Lopez-Paz & Oquab, Revisiting Classifier Two-Sample Tests (2017, arXiv:1610.06545); Schilling, Multivariate Two-Sample
    Tests Based on Nearest Neighbors (1986).
    """
    x = x.unique(dim=0)
    n = min(len(x), len(reference))
    both = torch.cat([x[:n], reference[:n]]) / reference.std(0)
    label = (torch.arange(2 * n) < n).double()
    distance = torch.cdist(both, both).fill_diagonal_(torch.inf)
    near = distance.topk(min(NEIGHBOURS, 2 * n - 1), largest=False).indices

    def accuracy(label: Tensor) -> float:
        votes = label[near].mean(1) - 0.5
        right = (votes * (label - 0.5) > 0).double() + 0.5 * (votes == 0).double()
        return float(right.mean())

    found, generator = accuracy(label), stream(seed)
    null = [
        accuracy(label[torch.randperm(2 * n, generator=generator)]) for _ in range(PERMUTATIONS)
    ]
    return found, (1 + sum(a >= found for a in null)) / (1 + PERMUTATIONS)
