"""A Gaussian of its own for each image, conditioned on the data.

With K = sum_b a_b rho_b a_b, stationary parts that are modulated in each image by standard deviations a_b, the shift

    u = (K^-1 + H)^-1 (D - H m)

comes from conjugate gradients with K itself as the preconditioner, which never meets K^-1. The few directions that the data
see well come first, and that is what they need: the circulant nearest to H, with one number for a, takes more iterations.
"""

from __future__ import annotations

import torch
from torch import Tensor

from scoreinv.conditioning.base import Conditioner
from scoreinv.gaussian import Modulated, conjugate_gradients


class LocalConditioned:
    """N(., K) conditioned on the data.

    Args:
        conditioner: The data.
        K: Covariance of each image.
        length: Updates of a solve that are shorter do not matter [model unit].
    """

    def __init__(self, conditioner: Conditioner, K: Modulated, length: float) -> None:
        self.conditioner, self.K, self.length = conditioner, K, length

    def draw(self, m: Tensor, generator: torch.Generator) -> Tensor:
        """Draws of N(m, K) conditioned on the data, with shape (B, C, H, W) (Matheron's rule)."""
        x = m + self.K.draw(generator)
        return x + self.shift(x, self.conditioner.noise(len(m), generator))

    def shift(self, m: Tensor, noise: Tensor | None = None) -> Tensor:
        """By which the data move means m, with shape (B, C, H, W)."""
        u, _ = conjugate_gradients(
            self.conditioner.inform,
            self.conditioner.misfit(m, noise),
            lambda r: (self.K.apply(r), r),
            error=0.0,
            length=self.length,
        )
        return u
