"""A Gaussian of its own for each image, conditioned on the data.

With K = a rho a, standard deviations a of the pixels of each image times one stationary correlation rho, the shift

    u = (K^-1 + H)^-1 (D - H m)

comes from conjugate gradients with K itself as the preconditioner, which never meets K^-1. The few directions that the data
see well come first, and that is what they need: the circulant nearest to H, with one number for a, takes more iterations.
"""

from __future__ import annotations

from torch import Tensor

from scoreinv.conditioning.base import Conditioner
from scoreinv.gaussian import Covariance, conjugate_gradients


class LocalConditioned:
    """N(., a rho a) conditioned on the data.

    Args:
        conditioner: The data.
        a: Standard deviations, with shape (B, C, H, W).
        rho: Correlation of the pixels.
        length: Updates of a solve that are shorter do not matter [model unit].
    """

    def __init__(
        self, conditioner: Conditioner, a: Tensor, rho: Covariance, length: float
    ) -> None:
        self.conditioner, self.a, self.rho, self.length = conditioner, a, rho, length

    def draw(self, m: Tensor, z: Tensor, noise: Tensor) -> Tensor:
        """Draws of N(m, K) conditioned on the data, for white z and noise from `Conditioner.noise` (Matheron's rule)."""
        x = m + self.a * self.rho.sqrt(z)
        return x + self.shift(x, noise)

    def shift(self, m: Tensor, noise: Tensor | None = None) -> Tensor:
        """By which the data move means m, with shape (B, C, H, W)."""
        u, _ = conjugate_gradients(
            self.conditioner.inform,
            self.conditioner.misfit(m, noise),
            lambda r: (self.a * self.rho.apply(self.a * r), r),
            error=0.0,
            length=self.length,
        )
        return u
