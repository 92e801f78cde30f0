"""How far draws are from an exact posterior: functions of arrays.

All take draws x and exact draws, with shapes (n, d) and (m, d). What depends on the number of draws is stated beside what as
many exact draws would give.
"""

from __future__ import annotations

import torch
from torch import Tensor

from scoreinv.streams import stream


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
