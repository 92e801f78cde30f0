"""Two compact objects that merge, from their gravitational waves in whitened noise.

To leading order the strain before the merger at t_c is

    h = A [(t_c - t) / 1 s]^(-1/4) cos[phi - 2 ((t_c - t) / (5 tau))^(5/8)],    tau = G M / c^3,

of the chirp mass M in the frame of the detector (Maggiore, Gravitational Waves, volume 1, 2008, equations 4.30 to 4.32).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.distributions import ExpTransform, TransformedDistribution, Uniform

from scoreinv.npe.featurizers import ResNet1D
from scoreinv.npe.parameters import ParameterPrior
from scoreinv.npe.simulator import Simulator

RATE, LENGTH = 1024, 512  # [1/s], and samples
TIME = torch.arange(LENGTH, dtype=torch.float64) / RATE  # [s]
SOLAR = 4.925e-6  # G M / c^3 of the sun [s]
LAST = 1 / 256  # before the merger, where the strain ends [s]


def strain(theta: Tensor) -> Tensor:
    """In standard deviations of the noise, with shape (n, 1, 512), for M, A, t_c and phi."""
    mass, amplitude, end, phase = (v[:, None] for v in theta.double().unbind(1))
    left = end - TIME
    before = left.clamp_min(LAST)
    phi = phase - 2 * (before / (5 * SOLAR * mass)) ** (5 / 8)
    h = amplitude * before**-0.25 * phi.cos()
    return torch.where(left >= LAST, h, 0.0)[:, None]


def noisy(h: Tensor, generator: torch.Generator) -> Tensor:
    return h + torch.randn(h.shape, generator=generator, dtype=h.dtype)


def log_likelihood(x: Tensor, theta: Tensor) -> Tensor:
    return -0.5 * (x - strain(theta)).square().flatten(1).sum(1) - 0.5 * LENGTH * math.log(
        math.tau
    )


def featurizer() -> nn.Module:
    return ResNet1D(1, 64, widths=(16, 32, 64, 64), recurrent=True)


def chirp() -> Simulator:
    """Chirp mass [solar masses], amplitude, time of the merger [s] and phase there."""
    loud = TransformedDistribution(Uniform(math.log(0.3), math.log(3.0)), ExpTransform())
    prior = ParameterPrior(
        chirp_mass=Uniform(15.0, 40.0),
        amplitude=loud,
        merger=Uniform(0.4, 0.48),
        phase=Uniform(0.0, math.tau),
    )
    return Simulator(prior, lambda theta, _: strain(theta), noisy, log_likelihood, featurizer)
