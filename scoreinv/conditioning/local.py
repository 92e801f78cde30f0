"""A Gaussian of its own for each image, conditioned on the data.

With K = a rho a, standard deviations a of the pixels of each image times one stationary correlation rho = R R, and
x = m + a R z of white z, the mean of z given the data solves

    (1 + R a H a R) z = R a (D - H m)

by conjugate gradients. The few directions that the data see well come first, and that is what they need: the circulant
nearest to H as a preconditioner, with one number for a, takes more iterations.
"""

from __future__ import annotations

import torch
from torch import Tensor

from scoreinv.conditioning.base import Conditioner
from scoreinv.gaussian import Covariance, conjugate_gradients


class LocalConditioned:
    """N(., a rho a) conditioned on the data.

    Args:
        conditioner: The data.
        a: Standard deviations, with shape (B, C, H, W).
        rho: Correlation of the pixels.
        tolerance: Error of the solves in standard deviations of the posterior, summed over its directions in squares.
    """

    def __init__(
        self, conditioner: Conditioner, a: Tensor, rho: Covariance, tolerance: float
    ) -> None:
        self.conditioner, self.a, self.tolerance = conditioner, a, tolerance
        self.root = rho.map(torch.sqrt)

    def draw(self, m: Tensor, z: Tensor, noise: Tensor) -> Tensor:
        """Draws of N(m, K) conditioned on the data, for white z and noise from `Conditioner.noise` (Matheron's rule)."""
        x = m + self.a * self.root.apply(z)
        return x + self.shift(x, noise)

    def shift(self, m: Tensor, noise: Tensor | None = None) -> Tensor:
        """By which the data move means m, with shape (B, C, H, W)."""
        pull = self.root.apply(self.a * self.conditioner.misfit(m, noise))

        def seen(z: Tensor) -> Tensor:
            x = self.a * self.root.apply(z)
            return z + self.root.apply(self.a * self.conditioner.inform(x))

        z, _ = conjugate_gradients(seen, pull, error=self.tolerance)
        return self.a * self.root.apply(z)
