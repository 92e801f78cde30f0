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
    return C.map(lambda v: torch.where(v > 0, sigma**2 / (1 + sigma**2 / v), 0.0))


def reverse_covariance(C: Covariance, sigma: float, s: float) -> Covariance:
    """V = s^2 (1 - a) I + (1 - a)^2 C_sigma of the step from sigma to s < sigma.

    A white C in the place of the prior's gives the two usual choices of Ho et al. (2020): a variance of 0 the small one,
    s^2 (1 - a), an infinite one the large, sigma^2 - s^2.
    """
    a = (s / sigma) ** 2
    return C.map(lambda v: s**2 * (1 - a) + (1 - a) ** 2 * sigma**2 / (1 + sigma**2 / v))


def inverse(C: Covariance) -> Covariance:
    """C^-1, and 0 in directions without variance, which nothing pulls on."""
    return C.map(lambda v: torch.where(v > 1e-12 * v.max(), 1 / v, 0.0))


def bridge(x: Tensor, x0: Tensor, sigma: float, s: float, z: Tensor | float = 0.0) -> Tensor:
    """x_s given x_sigma = x and x_0, for white z; its mean for z = 0. Shape (B, C, H, W)."""
    a = (s / sigma) ** 2
    return x0 + a * (x - x0) + s * (1 - a) ** 0.5 * z
