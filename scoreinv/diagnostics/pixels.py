"""Coverage of the true pixels of one image by the intervals of its posterior draws.

Pixels of one image are correlated, so the coverage of a single image scatters around its nominal value by more than
binomial counting says; it shows gross errors. Calibration is tested over many simulations.
"""

from __future__ import annotations

from torch import Tensor


def pixel_coverage(
    draws: Tensor, truth: Tensor, levels: tuple[float, ...] = (0.5, 0.68, 0.9, 0.95)
) -> dict[float, float]:
    """Fraction of the pixels whose central interval at each level holds the true value.

    Args:
        draws: With shape (n, *shape).
        truth: With shape (*shape).
        levels: Probability of the intervals, between 0 and 1.

    Raises:
        ValueError: Shapes that do not fit.
    """
    if tuple(draws.shape[1:]) != tuple(truth.shape):
        raise ValueError(
            f"draws have shape {tuple(draws.shape)}, truth {tuple(truth.shape)}; expected (n, *shape) and (*shape)"
        )
    n = len(draws)
    # the rank of an exchangeable value among n draws is uniform on 0 .. n
    rank = (draws < truth).double().sum(0)
    position = (rank + 0.5) / (n + 1)
    return {p: float(((position - 0.5).abs() <= p / 2).double().mean()) for p in levels}
