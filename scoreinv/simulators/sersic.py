"""A galaxy of seven numbers: Sersic's profile, differentiable in them.

    I(r)  =  I_e exp(-b_n ((r / R_e)^(1 / n) - 1)),    flux  =  2 pi n e^b_n b_n^(-2 n) Gamma(2 n) R_e^2 I_e

with r the radius along ellipses of the same area. Sersic, Atlas de galaxias australes (1968); flux and b_n: Graham & Driver,
A Concise Reference to (Projected) Sersic R^(1/n) Quantities (2005); Ciotti & Bertin (1999).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

FINE = 2  # points across a pixel, over which its light is averaged
SOFT = 0.1  # pixels by which the centre is rounded


@dataclass(frozen=True)
class SersicGalaxy:
    """Images of seven numbers that are N(0, 1) a priori.

    Args:
        size: Side of the image [pixel].
        flux: Median of the total flux; a factor of 1.6 is one standard deviation [unit of the image].

    Attributes:
        names: Of the parameters that `parameters` gives.
        shape: (1, 1, 7), of z.
    """

    size: int
    flux: float

    names = ("flux", "radius", "index", "e1", "e2", "x", "y")
    shape = (1, 1, 7)

    def parameters(self, z: Tensor) -> Tensor:
        """Total flux, half-light radius [pixel], n, ellipticity (e1, e2), centre [pixel], with shape (B, 7).

        (e1, e2) = (1 - q) / (1 + q) (cos 2 phi, sin 2 phi) for the axis ratio q and the angle phi of the long axis with the
        rows of pixels; x counts along rows, y across them, both from the pixel in the centre.

        Args:
            z: With shape (B, 1, 1, 7).
        """
        z = z.flatten(1)
        e = 0.3 * z[:, 3:5]
        e = 0.8 * e / (0.64 + e.square().sum(1, keepdim=True)).sqrt()
        scales = [
            self.flux * (0.5 * z[:, 0]).exp(),
            0.1 * self.size * (0.4 * z[:, 1]).exp(),
            (0.4 * z[:, 2]).exp().clamp_min(0.3),
        ]
        return torch.cat([torch.stack(scales, 1), e, z[:, 5:]], 1)

    def __call__(self, z: Tensor) -> Tensor:
        """The galaxies, with shape (B, 1, size, size), for z with shape (B, 1, 1, 7)."""
        flux, radius, n, e1, e2, x0, y0 = self.parameters(z)[:, :, None, None].unbind(1)
        fine = (torch.arange(FINE * self.size, dtype=z.dtype, device=z.device) + 0.5) / FINE
        # the middle of pixel size // 2 is the centre of the canvas
        fine = fine - 0.5 - self.size // 2
        x, y = fine - x0, fine[:, None] - y0
        square = e1.square() + e2.square()
        rr = (1 + square - 2 * e1) * x**2 + (1 + square + 2 * e1) * y**2 - 4 * e2 * x * y
        r = (rr / (1 - square) + SOFT**2).sqrt()
        b = 2 * n - 1 / 3 + 4 / (405 * n) + 46 / (25515 * n.square())
        total = n * (b - 2 * n * b.log() + torch.lgamma(2 * n)).exp()
        peak = flux / (2 * math.pi * radius.square() * total)
        light = peak * (-b * ((r / radius) ** (1 / n) - 1)).exp()
        blocks = light.unflatten(2, (self.size, FINE)).unflatten(1, (self.size, FINE))
        return blocks.mean((2, 4))[:, None]
