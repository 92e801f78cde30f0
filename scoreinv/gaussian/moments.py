"""A Gaussian over images."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from scoreinv.gaussian.covariances import Covariance


@dataclass(frozen=True)
class Gaussian:
    """N(mean, covariance) over images; `mean` has shape (C, H, W)."""

    mean: Tensor
    covariance: Covariance

    def log_prob(self, x: Tensor) -> Tensor:
        """log N(x; mean, C), with shape (B,), in float64, for x with shape (B, C, H, W)."""
        r = x.double() - self.mean.double()
        misfit = (r * self.covariance.solve(r)).flatten(1).sum(1)
        shape = tuple(self.mean.shape)
        return -0.5 * (
            misfit + self.covariance.logdet(shape) + math.prod(shape) * math.log(2 * math.pi)
        )

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """n draws, with shape (n, C, H, W)."""
        z = torch.randn((n, *self.mean.shape), generator=generator, dtype=self.mean.dtype)
        return self.mean + self.covariance.sqrt(z)

    def rescaled(self, amplitude: float) -> Gaussian:
        """The distribution of amplitude * x."""
        return Gaussian(amplitude * self.mean, self.covariance.map(lambda v: amplitude**2 * v))
