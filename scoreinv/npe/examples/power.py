"""Cosmology from the power spectrum of matter in a box.

    P(k) = A k^n T(k)^2,    T(q) = ln(1 + 2.34 q) / (2.34 q) [1 + 3.89 q + (16.1 q)^2 + (5.46 q)^3 + (6.71 q)^4]^(-1/4),

with q = k / Gamma, Gamma = Omega_m h, and A such that the density in spheres of 8 Mpc/h scatters by sigma_8 (Bardeen, Bond,
Kaiser & Szalay, 1986, equation G3; k in h/Mpc). The mean power of N modes, shot noise and all, is a Gamma variable of shape
N / 2.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.distributions import Uniform

from scoreinv.npe.parameters import ParameterPrior
from scoreinv.npe.simulator import Simulator

SIDE = 1000.0  # of the box [Mpc/h]
DENSITY = 3e-4  # of galaxies [(h/Mpc)^3]
EDGES = torch.linspace(0.01, 0.3, 31, dtype=torch.float64)  # [h/Mpc]
K = 0.5 * (EDGES[1:] + EDGES[:-1])
MODES = (4 * math.pi / 3 * (EDGES[1:] ** 3 - EDGES[:-1] ** 3) * (SIDE / math.tau) ** 3).round()
HUBBLE = 0.68
FINE = torch.logspace(-4, 2, 600, dtype=torch.float64)  # [h/Mpc]


def shape(k: Tensor, theta: Tensor) -> Tensor:
    """k^n T^2, with shape (n, len(k)), for Omega_m, sigma_8 and n."""
    q = k / (theta[:, :1] * HUBBLE)
    T = torch.log1p(2.34 * q) / (2.34 * q)
    T = T * (1 + 3.89 * q + (16.1 * q) ** 2 + (5.46 * q) ** 3 + (6.71 * q) ** 4) ** -0.25
    return k ** theta[:, 2:] * T**2


def expected(theta: Tensor) -> Tensor:
    """Power in each bin, shot noise and all, with shape (n, 30) [(Mpc/h)^3]."""
    theta = theta.double()
    r = 8 * FINE
    window = 3 * (r.sin() - r * r.cos()) / r**3
    # below this, differences of nearly equal numbers
    window = torch.where(r < 0.02, 1 - r**2 / 10, window)
    integrand = shape(FINE, theta) * (FINE**1.5 * window) ** 2 / (2 * math.pi**2)
    variance = torch.trapezoid(integrand, FINE.log())
    return shape(K, theta) * (theta[:, 1] ** 2 / variance)[:, None] + 1 / DENSITY


def measured(P: Tensor, generator: torch.Generator) -> Tensor:
    """log of the mean power of the modes."""
    half = (MODES / 2).expand_as(P).contiguous()
    return (P * torch._standard_gamma(half, generator=generator) / half).log()


def log_likelihood(x: Tensor, theta: Tensor) -> Tensor:
    a = MODES / 2
    scaled = a * (x - expected(theta).log()).exp()
    # of the logarithm of a Gamma variable
    return (a * (a.log() + x - expected(theta).log()) - scaled - a.lgamma()).sum(1)


def power() -> Simulator:
    """Matter density, amplitude and slope."""
    prior = ParameterPrior(
        omega_m=Uniform(0.1, 0.5), sigma_8=Uniform(0.6, 1.0), slope=Uniform(0.8, 1.2)
    )
    return Simulator(prior, lambda theta, _: expected(theta), measured, log_likelihood)
