"""Amplitudes of complex data whose phases are lost: y = |v + n|, with independent Gaussian noise n of both parts of v.

    p(y | c) = y / s^2 exp(-(y^2 + c^2) / (2 s^2)) I_0(y c / s^2),    c = |v|

Rice, Mathematical Analysis of Random Noise (1945). Far above the noise y is Gaussian about c; near it y is too large, by
1.25 s where there is nothing.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from scoreinv.noise.base import Noise
from scoreinv.noise.gaussian import GaussianNoise
from scoreinv.tensors import as_tensor


class RiceNoise(Noise):
    """Noise of the amplitudes that `scoreinv.Amplitude` makes.

    Args:
        std: Standard deviation s of the real and of the imaginary part, a number or the data's shape [data unit].

    Raises:
        ValueError: A standard deviation that is not positive and finite.
    """

    def __init__(self, std: float | Tensor) -> None:
        if bool(as_tensor(std).isinf().any()):
            raise ValueError("an amplitude without weight has an infinite std; drop it")
        self.parts = GaussianNoise(std=std)

    def observe(self, clean: Tensor, generator: torch.Generator) -> Tensor:
        return self.parts.observe(torch.complex(clean, torch.zeros_like(clean)), generator).abs()

    def log_density(self, y: Tensor, clean: Tensor) -> Tensor:
        nothing = torch.zeros_like(clean)
        return self.log_density_about(y, clean, nothing, nothing)

    def log_density_about(self, y: Tensor, clean: Tensor, along: Tensor, across: Tensor) -> Tensor:
        y, c = y.double(), clean.double()
        v = self._variance(clean) + 0.5 * (along + across)
        # I_0(t) = exp(t) i0e(t)
        each = (y / v).log() - 0.5 * (y - c).square() / v + torch.special.i0e(y * c / v).log()
        return each.flatten(1).sum(1)

    def misfit(self, y: Tensor, clean: Tensor) -> Tensor:
        mean, variance = self.expected(clean)
        return ((y - mean).square() / variance).flatten(1).sum(1)

    def expected(self, clean: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance of y, both with shape (B, *data_shape), in float64."""
        v, c = self._variance(clean), clean.double()
        t = c.square() / (4 * v)
        bessel = (1 + 2 * t) * torch.special.i0e(t) + 2 * t * torch.special.i1e(t)
        mean = (0.5 * math.pi * v).sqrt() * bessel
        variance = 2 * v + c.square() - mean.square()
        # between that of nothing but noise and that of one part, which rounding must not leave far above the noise
        return mean, torch.minimum(torch.maximum(variance, (2 - 0.5 * math.pi) * v), v)

    def mean(self, clean: Tensor) -> Tensor:
        return self.expected(clean)[0]

    def nearby(self, y: Tensor, clean: Tensor) -> tuple[GaussianNoise, Tensor]:
        return self.parts, y

    def equivalent(self, clean: Tensor) -> GaussianNoise:
        # what it is far above the noise, and too much near it, where clean is too uncertain to say by how much
        return self.parts

    def check(self, shape: tuple[int, ...], complex: bool) -> None:
        if complex:
            raise ValueError("amplitudes are real; the operator makes complex data")
        self.parts.check(shape, complex)

    def check_data(self, y: Tensor) -> None:
        if bool((y <= 0).any()):
            raise ValueError(
                f"{int((y <= 0).sum())} of {y.numel()} amplitudes are not above 0 (least: {float(y.min()):g}); "
                "give |V| as it was measured, without its noise taken off, and drop data that are missing"
            )

    def _variance(self, clean: Tensor) -> Tensor:
        shape = tuple(clean.shape[1:])
        return self.parts.covariance.eigenvalues(shape).reshape(shape)
