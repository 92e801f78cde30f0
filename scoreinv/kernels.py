"""Noise levels and the reverse kernel.

Everything speaks one coordinate, x_sigma = x_0 + sigma n with n ~ N(0, I). With a = (s / sigma)^2
and D = E[x_0 | x_sigma = x], knowing x_0 would make the step from sigma to s < sigma a Gaussian
with mean x_0 + a (x - x_0) and variance s^2 (1 - a). Averaging over x_0 ~ N(D, C_sigma) gives the
covariance-aware kernel

    x_s | x_sigma = x  ~  N(D + a (x - D),  s^2 (1 - a) I + (1 - a)^2 C_sigma)
    C_sigma = sigma^2 C (C + sigma^2)^-1

with C the covariance of the prior. It is exact for a Gaussian prior between any two levels, s = 0
included; with C_sigma = 0 it is the usual ancestral step (Ho et al., Denoising Diffusion
Probabilistic Models, 2020, arXiv:2006.11239).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from scoreinv.gaussian import Covariance


def noise_levels(n: int, sigma_max: float, sigma_min: float, rho: float = 7.0) -> list[float]:
    """n levels from sigma_max down to sigma_min, evenly spaced in sigma^(1 / rho).

    Karras et al., Elucidating the Design Space of Diffusion-Based Generative Models (2022,
    arXiv:2206.00364), eq. 5.
    """
    if not 0 < sigma_min < sigma_max:
        raise ValueError(
            f"expected 0 < sigma_min < sigma_max, got {sigma_min:g} and {sigma_max:g}"
        )
    ramp = torch.linspace(0, 1, n, dtype=torch.float64)
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    return ((high + ramp * (low - high)) ** rho).tolist()


def expectation(C: Covariance, sigma: float) -> Covariance:
    """W_sigma = C (C + sigma^2)^-1, the slope of E[x_0 | x_sigma] under a Gaussian prior."""
    return C.map(lambda v: torch.where(v > 0, v / (v + sigma**2), 0.0))


def conditional(C: Covariance, sigma: float) -> Covariance:
    """C_sigma = sigma^2 C (C + sigma^2)^-1, of x_0 given x_sigma under a Gaussian prior."""
    return C.map(lambda v: torch.where(v > 0, sigma**2 * v / (v + sigma**2), 0.0))


@dataclass(frozen=True)
class ReverseKernel:
    """The Gaussian step from level sigma to s < sigma, in the eigenbasis of the prior's C."""

    sigma: float
    s: float
    covariance: Covariance

    @classmethod
    def between(cls, sigma: float, s: float, C: Covariance) -> ReverseKernel:
        """The covariance-aware kernel for a prior with covariance C."""
        a = (s / sigma) ** 2
        return cls(
            sigma,
            s,
            C.map(lambda v: s**2 * (1 - a) + (1 - a) ** 2 * sigma**2 * v / (v + sigma**2)),
        )

    @property
    def a(self) -> float:
        return (self.s / self.sigma) ** 2

    def mean(self, x: Tensor, denoised: Tensor) -> Tensor:
        """D + a (x - D), with shape (B, C, H, W)."""
        return denoised + self.a * (x - denoised)

    def std(self, z: Tensor) -> Tensor:
        """V^1/2 z for white z, with shape (B, C, H, W)."""
        return self.covariance.sqrt(z)
