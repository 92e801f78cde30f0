"""A Gaussian of its own for each image, conditioned on the data.

With K = sum_b a_b rho_b a_b, stationary parts that are modulated in each image by standard deviations a_b, the shift

    u = (K^-1 + H)^-1 (D - H m)

comes from conjugate gradients with K itself as the preconditioner, which never meets K^-1. The few directions that the data
see well come first, and that is what they need: the circulant nearest to H, with one number for a, takes more iterations.

A network can be sure of blank sky where there is a source, whose like it has rarely seen beside such a galaxy: K is then too
small for the data to pull the source in, and all draws lose it. So the data are asked once more. Where what they still miss,
A^T S^-1 (y - A x), stands out of its own noise, nothing is believed there but the noisy image itself, x_0 ~ N(x_s, s^2): K
is widened to that, and the image drawn again.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from scoreinv.conditioning.base import Conditioner
from scoreinv.gaussian import Modulated, conjugate_gradients

DOUBT = 4.0  # standard deviations of their noise by which the data must miss an image
REACH = 2  # pixels around such a place that are doubted, too


class LocalConditioned:
    """N(., K) conditioned on the data.

    Args:
        conditioner: The data.
        K: Covariance of each image.
        s: Noise level of the images that K is of.
        noise: Standard deviation of A^T S^-1 n in each pixel, with shape (C, H, W), for noise n of the data.
        length: Updates of a solve that are shorter do not matter [model unit].
    """

    def __init__(
        self, conditioner: Conditioner, K: Modulated, s: float, noise: Tensor, length: float
    ) -> None:
        self.conditioner, self.K, self.s, self.noise = conditioner, K, s, noise
        self.length = length

    def draw(self, m: Tensor, generator: torch.Generator) -> Tensor:
        """Draws of N(m, K) conditioned on the data, with shape (B, C, H, W); K is widened where the data doubt it."""
        x, missed = self._drawn(m, self.K, generator)
        # what is missed has the noise of the data and that of the draw
        doubted = (missed.abs() > DOUBT * math.sqrt(2) * self.noise) & (self.noise > 0)
        again = doubted.flatten(1).any(1)
        if bool(again.any()):
            near = F.max_pool2d(doubted[again].to(m.dtype), 2 * REACH + 1, 1, REACH)
            K = Modulated(self.K.a[again], self.K.rho, self.s * near)
            x[again], _ = self._drawn(m[again], K, generator)
        return x

    def _drawn(self, m: Tensor, K: Modulated, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draws (Matheron's rule), and what the data perturbed for them still miss, A^T S^-1 (y + n - A x)."""
        x = m + K.draw(generator)
        noise = self.conditioner.noise(len(m), generator)
        x = x + self._solved(K, self.conditioner.misfit(x, noise))
        return x, self.conditioner.misfit(x, noise)

    def shift(self, m: Tensor) -> Tensor:
        """By which the data move means m, with shape (B, C, H, W)."""
        return self._solved(self.K, self.conditioner.misfit(m))

    def _solved(self, K: Modulated, e: Tensor) -> Tensor:
        u, _ = conjugate_gradients(
            self.conditioner.inform,
            e,
            lambda r: (K.apply(r), r),
            error=0.0,
            length=self.length,
        )
        return u
