"""Coverage of the true pixels of one image by the intervals of its posterior draws.

Pixels of one image are correlated, so the coverage of a single image scatters around its nominal value by more than
binomial counting says; it shows gross errors. Calibration is tested over many simulations.
"""

from __future__ import annotations

import torch
from torch import Tensor

from scoreinv.streams import stream


def pixel_coverage(
    draws: Tensor,
    truth: Tensor,
    levels: tuple[float, ...] = (0.5, 0.68, 0.9, 0.95),
    seed: int = 0,
) -> dict[float, float]:
    """Fraction of the pixels whose central interval at each level holds the true value.

    Among few draws a rank stands for a range of levels, and among equal values for a range of ranks: the place in it is
    random, so that the fractions are the levels on average for any number of draws.

    Args:
        draws: With shape (n, *shape).
        truth: With shape (*shape).
        levels: Probability of the intervals, between 0 and 1.
        seed: Of the places.

    Raises:
        ValueError: Shapes that do not fit, no draws, values that are not finite, levels that are no probabilities.
    """
    if tuple(draws.shape[1:]) != tuple(truth.shape):
        raise ValueError(
            f"draws have shape {tuple(draws.shape)}, truth {tuple(truth.shape)}; expected (n, *shape) and (*shape)"
        )
    if not len(draws) or not truth.numel():
        raise ValueError(
            f"draws have shape {tuple(draws.shape)}; expected one draw and one pixel at least"
        )
    for name, v in (("draws", draws), ("truth", truth)):
        if bad := int((~torch.isfinite(v)).sum()):
            raise ValueError(
                f"{bad} of {v.numel()} values of the {name} are not finite; find out why first"
            )
    if wrong := [p for p in levels if not 0 < p < 1]:
        raise ValueError(f"levels has {wrong[0]:g}, expected probabilities between 0 and 1")
    # the rank of an exchangeable value among n draws is uniform on 0 .. n
    below, equal = (draws < truth).double().sum(0), (draws == truth).double().sum(0)
    place = torch.rand(truth.shape, generator=stream(seed), dtype=torch.float64)
    position = (below + place * (equal + 1)) / (len(draws) + 1)
    return {p: float(((position - 0.5).abs() <= p / 2).double().mean()) for p in levels}
