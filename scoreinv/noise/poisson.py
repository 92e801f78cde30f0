"""Counts: y ~ Poisson(A x + b), with A x in counts and b the background.

Near the data they are Gaussian, y - b = A x + n, and the variance of n is the rate, whose Fisher information is 1 / rate.
"""

from __future__ import annotations

import torch
from torch import Tensor

from scoreinv.noise.base import Noise
from scoreinv.noise.gaussian import GaussianNoise, positive

DARKEST = 0.1  # of the background: what rates do not fall below where an image dips under zero


class PoissonNoise(Noise):
    """Counts on a background.

    Args:
        background: Expected counts that are not of the sky, a number or the data's shape, > 0 [count]. Images that dip below
            zero take at most nine tenths of it away.

    Raises:
        ValueError: A background that is not positive and finite.
    """

    def __init__(self, background: float | Tensor) -> None:
        self.background = positive(background, "background")

    def rate(self, clean: Tensor) -> Tensor:
        """A x + b [count]."""
        return torch.maximum(clean.double() + self.background, DARKEST * self.background)

    def observe(self, clean: Tensor, generator: torch.Generator) -> Tensor:
        return torch.poisson(self.rate(clean), generator=generator)

    def log_density(self, y: Tensor, clean: Tensor) -> Tensor:
        rate = self.rate(clean)
        return (y * rate.log() - rate - torch.lgamma(y.double() + 1)).flatten(1).sum(1)

    def misfit(self, y: Tensor, clean: Tensor) -> Tensor:
        rate = self.rate(clean)
        return ((y - rate).square() / rate).flatten(1).sum(1)

    def nearby(self, y: Tensor, clean: Tensor) -> tuple[GaussianNoise, Tensor]:
        return GaussianNoise(variance=self.rate(clean).mean(0)), y.double() - self.background

    def equivalent(self, clean: Tensor) -> GaussianNoise:
        return GaussianNoise(variance=self.rate(clean))

    def check(self, shape: tuple[int, ...], complex: bool) -> None:
        if complex:
            raise ValueError("counts are real; the operator makes complex data")
        if self.background.ndim and tuple(self.background.shape) != tuple(shape):
            raise ValueError(
                f"background has shape {tuple(self.background.shape)}, the data have shape {tuple(shape)}"
            )

    def check_data(self, y: Tensor) -> None:
        if bool((y < 0).any() or (y != y.round()).any()):
            raise ValueError(
                f"counts go from {float(y.min()):g} to {float(y.max()):g} and "
                f"{int((y != y.round()).sum())} of {y.numel()} are not whole; expected 0, 1, 2, ... Rates, or counts "
                "with the background taken away? Give the counts themselves, and the background to PoissonNoise"
            )
