"""Dust from the colours of a galaxy.

Young stars and old ones, two black bodies, shine through dust:

    f(lambda)  =  [y B(lambda; 15,000 K) + (1 - y) B(lambda; 4,500 K)] 10^(-0.4 A_V k(lambda) / k(V)),

both normalised to a bolometric flux of 1, and k of Calzetti et al., The Dust Content and Opacity of Actively Star-forming
Galaxies (2000, arXiv:astro-ph/9911459, equation 4). Data are magnitudes in ten bands, from the near ultraviolet to 2.2
microns.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.distributions import Normal, Uniform

from scoreinv.npe.parameters import ParameterPrior
from scoreinv.npe.simulator import Simulator

# GALEX NUV, SDSS u g r i z, 2MASS J H K and PanSTARRS y [micron]
BANDS = torch.tensor([0.231, 0.355, 0.469, 0.617, 0.748, 0.893, 0.962, 1.24, 1.66, 2.16]).double()
ERROR = 0.05  # [mag]
YOUNG, OLD = 15_000.0, 4_500.0  # [K]
WIEN = 14_388.0  # h c / k [micron K]
R_V = 4.05


def black_body(wavelength: Tensor, temperature: float) -> Tensor:
    """Of a bolometric flux of 1 [1/micron]."""
    x = WIEN / (wavelength * temperature)
    # the integral over wavelengths of lambda^-5 / (e^x - 1) is (pi T / WIEN)^4 / 15
    return 15 * (WIEN / (math.pi * temperature)) ** 4 / (wavelength**5 * torch.expm1(x))


def attenuation(wavelength: Tensor) -> Tensor:
    """k(lambda) / k(V), not below zero."""
    inverse = 1 / wavelength
    blue = 2.659 * (-2.156 + 1.509 * inverse - 0.198 * inverse**2 + 0.011 * inverse**3) + R_V
    red = 2.659 * (-1.857 + 1.040 * inverse) + R_V
    return torch.where(wavelength < 0.63, blue, red).clamp_min(0) / R_V


def magnitudes(theta: Tensor) -> Tensor:
    """In each band, with shape (n, 10), for A_V, log10 y, z and a zero point."""
    dust, log_young, z, bright = (v[:, None] for v in theta.double().unbind(1))
    emitted = BANDS / (1 + z)
    young = 10**log_young
    stars = young * black_body(emitted, YOUNG) + (1 - young) * black_body(emitted, OLD)
    # per frequency, as AB magnitudes are
    flux = stars * emitted**2 * (1 + z)
    return bright - 2.5 * flux.log10() + dust * attenuation(emitted)


def noisy(m: Tensor, generator: torch.Generator) -> Tensor:
    return m + ERROR * torch.randn(m.shape, generator=generator, dtype=m.dtype)


def log_likelihood(x: Tensor, theta: Tensor) -> Tensor:
    z = (x - magnitudes(theta)) / ERROR
    return -0.5 * z.square().sum(1) - len(BANDS) * math.log(ERROR * math.tau**0.5)


def dust() -> Simulator:
    """Attenuation in V [mag], log10 of the young share of the light, redshift, and a zero point [mag]."""
    prior = ParameterPrior(
        attenuation=Uniform(0.0, 3.0),
        log_young=Uniform(-3.0, 0.0),
        redshift=Uniform(0.0, 1.0),
        zero_point=Normal(20.0, 1.0),
    )
    return Simulator(prior, lambda theta, _: magnitudes(theta), noisy, log_likelihood)
