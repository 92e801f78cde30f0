"""Two compact objects that merge, from their gravitational waves in whitened noise.

To leading order the strain before the merger at t_c is

    h = [(t_c - t) / 1 s]^(-1/4) (a cos Phi + b sin Phi),    Phi = 2 (d_0^(5/8) - d^(5/8)),    d = (t_c - t) / (5 tau),

with tau = G M / c^3 of the chirp mass M in the frame of the detector (Maggiore, Gravitational Waves, volume 1, 2008,
equations 4.30 to 4.32). The phase is counted from a time in the middle of the data, where they know it best, as d_0 is, and
a and b, its two quadratures, do not wrap around.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.distributions import Normal, Uniform

from scoreinv.npe.featurizers import ResNet1D
from scoreinv.npe.parameters import ParameterPrior
from scoreinv.npe.simulator import Simulator

RATE, LENGTH = 1024, 512  # [1/s], and samples
TIME = torch.arange(LENGTH, dtype=torch.float64) / RATE  # [s]
MIDDLE = 0.3  # where the phase is counted from [s]
SOLAR = 4.925e-6  # G M / c^3 of the sun [s]
LAST = 1 / 256  # before the merger, where the strain ends [s]


def strain(theta: Tensor) -> Tensor:
    """In standard deviations of the noise, with shape (n, 1, 512), for M, t_c, a and b."""
    mass, end, cosine, sine = (v[:, None] for v in theta.double().unbind(1))
    left = end - TIME
    before = left.clamp_min(LAST)
    until = lambda left: 2 * (left / (5 * SOLAR * mass)) ** (5 / 8)  # the merger [rad]
    phase = until(end - MIDDLE) - until(before)
    h = before**-0.25 * (cosine * phase.cos() + sine * phase.sin())
    return torch.where(left >= LAST, h, 0.0)[:, None]


def noisy(h: Tensor, generator: torch.Generator) -> Tensor:
    return h + torch.randn(h.shape, generator=generator, dtype=h.dtype)


def log_likelihood(x: Tensor, theta: Tensor) -> Tensor:
    return -0.5 * (x - strain(theta)).square().flatten(1).sum(1) - 0.5 * LENGTH * math.log(
        math.tau
    )


def featurizer() -> nn.Module:
    return ResNet1D(1, 64, widths=(32, 64, 64), length=LENGTH, stride=8)


def chirp() -> Simulator:
    """Chirp mass [solar masses], time of the merger [s], and both quadratures of the wave.

    Nine of ten have a signal-to-noise ratio of 2 to 18.
    """
    prior = ParameterPrior(
        chirp_mass=Uniform(20.0, 35.0),
        merger=Uniform(0.43, 0.47),
        cosine=Normal(0.0, 0.3),
        sine=Normal(0.0, 0.3),
    )
    return Simulator(prior, lambda theta, _: strain(theta), noisy, log_likelihood, featurizer)
