"""The mass of a galaxy cluster from its X-ray photons in eight bands.

Hot gas of a cluster of mass M at redshift z has the temperature and the luminosity of self-similar relations that scatter,

    k T = 5 keV (M / M0)^(2/3) E(z)^(2/3) e^(0.1 a),    L = 5e44 erg/s (M / M0)^(4/3) E(z)^(7/3) e^(0.4 b),

with M0 = 5e14 solar masses, a and b of N(0, 1), and an energy spectrum of thermal bremsstrahlung, E^-0.4 exp(-E / k T). A
telescope counts its photons, redshifted, above a background. Scaling relations: Kaiser (1986); the scatter is of the size
that samples of clusters have, and the luminosity of the order of that of a cluster of this mass.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.distributions import Normal, Uniform

from scoreinv.npe.parameters import ParameterPrior
from scoreinv.npe.simulator import Simulator

EDGES = torch.tensor([0.5, 0.8, 1.2, 1.7, 2.3, 3.0, 4.0, 5.5, 7.5], dtype=torch.float64)  # [keV]
EXPOSURE = 2e4  # [s]
AREA = 400.0  # effective [cm^2]
BACKGROUND = 1e-3  # of each band [1/s]
OMEGA_M, HUBBLE_LENGTH = 0.3, 1.32e28  # flat; c / H0 for 70 km/s/Mpc [cm]
KEV = 1.602e-9  # [erg]
FINE = 16  # points of an integral


def gas(theta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """k T [keV], luminosity [erg/s] and redshift, each with shape (n,), for log10 M, z, a and b."""
    log_mass, z, a, b = theta.double().unbind(1)
    mass = 10 ** (log_mass - math.log10(5e14))
    growth = (OMEGA_M * (1 + z) ** 3 + 1 - OMEGA_M).sqrt()
    kT = 5 * (mass * growth) ** (2 / 3) * (0.1 * a).exp()
    return kT, 5e44 * mass ** (4 / 3) * growth ** (7 / 3) * (0.4 * b).exp(), z


def energy_flux(theta: Tensor) -> Tensor:
    """Of all energies [erg/s/cm^2], with shape (n,)."""
    _, luminosity, z = gas(theta)
    return luminosity / (4 * math.pi * ((1 + z) * distance(z)) ** 2)


def photons(theta: Tensor, E: Tensor) -> Tensor:
    """At observed energies [keV], with shape (n, *E) [1/s/cm^2/keV]."""
    kT, _, z = (v.reshape(-1, *[1] * E.ndim) for v in gas(theta))
    flux = energy_flux(theta).reshape(kT.shape)
    at_source = E * (1 + z)
    # an energy spectrum whose integral is kT^0.6 Gamma(0.6); an observed keV is 1 + z keV at the source
    spectrum = at_source**-0.4 * (-at_source / kT).exp() / (kT**0.6 * math.gamma(0.6))
    return flux * spectrum * (1 + z) / (KEV * E)


def expected(theta: Tensor) -> Tensor:
    """Counts in each band, with shape (n, 8)."""
    share = torch.linspace(0, 1, FINE, dtype=torch.float64)
    E = EDGES[:-1, None] + (EDGES[1:] - EDGES[:-1])[:, None] * share
    return EXPOSURE * (AREA * torch.trapezoid(photons(theta, E), E, dim=2) + BACKGROUND)


def distance(z: Tensor) -> Tensor:
    """Comoving, of a flat universe [cm], with shape (n,)."""
    at = z[:, None] * torch.linspace(0, 1, 64, dtype=torch.float64)
    return HUBBLE_LENGTH * torch.trapezoid((OMEGA_M * (1 + at) ** 3 + 1 - OMEGA_M).rsqrt(), at)


def counted(rate: Tensor, generator: torch.Generator) -> Tensor:
    """Counts, as square roots, whose noise is nearly the same everywhere."""
    return torch.poisson(rate, generator=generator).sqrt()


def log_likelihood(x: Tensor, theta: Tensor) -> Tensor:
    rate, counts = expected(theta), x.double().square()
    return (counts * rate.log() - rate - (counts + 1).lgamma()).sum(1)


def cluster() -> Simulator:
    """log10 of the mass [solar masses], redshift, scatter of temperature and of luminosity."""
    prior = ParameterPrior(
        log_mass=Uniform(14.0, 15.3),
        redshift=Uniform(0.05, 0.6),
        temperature_scatter=Normal(0.0, 1.0),
        luminosity_scatter=Normal(0.0, 1.0),
    )
    return Simulator(prior, lambda theta, _: expected(theta), counted, log_likelihood)
