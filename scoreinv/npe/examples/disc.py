"""How a disc is inclined, from its visibilities.

A disc of Gaussian profile, seen at inclination i with its major axis at the position angle p from north to east, has the
visibilities

    V(u, v) = F exp(-2 pi^2 s^2 (a^2 + b^2 cos^2 i)) exp(-2 pi i (u x + v y)),
    a = u sin p + v cos p,    b = u cos p - v sin p,

along and across the major axis [lambda], with x and y to the east and to the north [rad]. A track of the dozen innermost
pads of ALMA measures them with noise; the network sees real and imaginary parts, for the baselines are always the same.
"""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import torch
from torch import Tensor
from torch.distributions import Normal, Uniform

from scoreinv.npe.parameters import ParameterPrior
from scoreinv.npe.simulator import Simulator
from scoreinv.simulators.arrays import ALMA_LATITUDE, alma_pads, uv_track

ARCSEC = math.pi / 180 / 3600
NOISE = 0.02  # of each visibility, real and imaginary part [Jy]
PADS = 12


@cache
def baselines() -> Tensor:
    """With shape (N, 2) [lambda]."""
    pads = alma_pads()
    near = np.linalg.norm(pads - np.median(pads, 0), axis=1).argsort()[:PADS]
    hours = np.array([-1.0, 0.0, 1.0])
    return torch.as_tensor(uv_track(pads[near], -30.0, ALMA_LATITUDE, 230e9, hours)).double()


def visibilities(theta: Tensor) -> Tensor:
    """Real and imaginary parts [Jy], with shape (n, 2 N), for F, s, cos i, p, x and y."""
    flux, size, cos_i, p, x, y = (v[:, None] for v in theta.double().unbind(1))
    u, v = baselines().unbind(1)
    along, across = u * p.sin() + v * p.cos(), u * p.cos() - v * p.sin()
    radius = along.square() + (across * cos_i).square()
    V = flux * (-2 * (math.pi * ARCSEC * size) ** 2 * radius).exp()
    angle = -math.tau * ARCSEC * (u * x + v * y)
    return torch.cat([V * angle.cos(), V * angle.sin()], 1)


def noisy(V: Tensor, generator: torch.Generator) -> Tensor:
    return V + NOISE * torch.randn(V.shape, generator=generator, dtype=V.dtype)


def log_likelihood(x: Tensor, theta: Tensor) -> Tensor:
    z = (x - visibilities(theta)) / NOISE
    return -0.5 * z.square().sum(1) - z.shape[1] * math.log(NOISE * math.tau**0.5)


def disc() -> Simulator:
    """Flux [Jy], radius s [arcsec], cosine of the inclination, position angle [rad], and offsets [arcsec]."""
    prior = ParameterPrior(
        flux=Uniform(0.05, 0.5),
        radius=Uniform(0.1, 0.6),
        cos_inclination=Uniform(0.1, 1.0),
        position_angle=Uniform(0.0, math.pi),
        east=Normal(0.0, 0.1),
        north=Normal(0.0, 0.1),
    )
    return Simulator(prior, lambda theta, _: visibilities(theta), noisy, log_likelihood)
