"""What the published samplers share: particles that each go their own way from level to level.

Their papers' equations are restated in the coordinate x_sigma = x_0 + sigma n. Most take ancestral steps (Ho et al.,
Denoising Diffusion Probabilistic Models, 2020, arXiv:2006.11239) with an estimate m of x_0 that knows of the data; with
a = (s / sigma)^2,

    x' = m + a (x - m) + s (1 - a)^1/2 z

All start at N(mu, C + sigma^2) with the prior's moments, and none knows the evidence.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Generator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from scoreinv.gaussian import Scalar
from scoreinv.kernels import bridge, noise_levels
from scoreinv.posterior import Posterior
from scoreinv.samplers.path import Descent, Island, Request, Trace, check_counts, not_linear


@dataclass(frozen=True)
class Baseline(abc.ABC):
    """A sampler to compare with.

    Args:
        levels: Noise levels.
    """

    levels: int = 100

    particles: ClassVar[int] = 1
    effective: ClassVar[float] = 0.0
    label: ClassVar[str] = "not used (a baseline, approximate); evidence unknown"

    def __post_init__(self) -> None:
        check_counts(self.levels)

    def refuses(self, posterior: Posterior) -> str:
        """Why this posterior is not for it; empty if it is."""
        return not_linear(posterior)

    def noise_levels(self, posterior: Posterior) -> list[float]:
        """The levels of a posterior's path, falling."""
        return noise_levels(self.levels, *posterior.sigma_range)

    @abc.abstractmethod
    def island(self, posterior: Posterior, n: int, generator: torch.Generator) -> Island:
        """n particles at the start, with their stream."""


class Chain(Island):
    """Particles that each go their own way.

    Args:
        posterior: The target.
        options: Of the sampler.
        n: Particles.
        generator: The island's own stream.
    """

    def __init__(
        self, posterior: Posterior, options: Baseline, n: int, generator: torch.Generator
    ) -> None:
        super().__init__(posterior, options.noise_levels(posterior), n, generator)
        self.options = options

    def _begin(self) -> Descent:
        moments, s = self.posterior.moments, self.levels[0]
        wide = moments.covariance.map(lambda v: v + s**2)
        self.x = moments.mean.to(self.posterior.dtype) + wide.sqrt(self._white())
        self.trace.log_evidence = math.nan
        yield from ()

    def _step(self, i: int) -> Generator[Request, Tensor, int]:
        self.x = yield from self._next(self.levels[i], self.levels[i + 1])
        return i + 1

    def _end(self) -> Descent:
        self.x = yield from self._next(self.levels[-1], 0.0)

    @abc.abstractmethod
    def _next(self, sigma: float, s: float) -> Generator[Request, Tensor, Tensor]:
        """The particles at level s, with shape (n, C, H, W), from those at level sigma."""

    def _linearised(self, sigma: float) -> Generator[Request, Tensor, Linearised]:
        """The denoiser at the particles, with its Jacobian; computed here, for the graph stays with the island."""
        with torch.enable_grad():
            x = self.x.detach().requires_grad_()
            denoised = self.posterior.prior.denoise(x, x.new_full((len(x),), sigma))
        self.trace.evaluations += 1
        yield from ()
        return Linearised(x, denoised, self.trace)

    def _pull(self, m: Tensor, variance: float) -> Tensor:
        """v A^T (S + v A A^T)^-1 (y - A m): what the data add to the mean of N(m, v)."""
        return self.posterior.conditioner.given(Scalar(variance)).shift(m)

    def _drawn(self, m: Tensor, variance: float) -> Tensor:
        """Draws of N(m, v) conditioned on the data."""
        x = m + variance**0.5 * self._white()
        noise = self.posterior.conditioner.noise(self.n, self.generator)
        return x + self.posterior.conditioner.given(Scalar(variance)).shift(x, noise)


class Guide(Chain):
    """Ancestral steps with an estimate of x_0 that knows of the data."""

    def _next(self, sigma: float, s: float) -> Generator[Request, Tensor, Tensor]:
        m = yield from self._estimate(sigma)
        return bridge(self.x, m, sigma, s, self._white())

    @abc.abstractmethod
    def _estimate(self, sigma: float) -> Generator[Request, Tensor, Tensor]:
        """Estimates of x_0 from the particles and the data, with shape (n, C, H, W)."""


@dataclass(frozen=True)
class Linearised:
    """A denoiser around noisy images x.

    Attributes:
        x: Noisy images, with shape (B, C, H, W).
        tracked: Denoised images with the graph that leads to them.
        trace: Where vector-Jacobian products are counted.
    """

    x: Tensor
    tracked: Tensor
    trace: Trace

    @property
    def denoised(self) -> Tensor:
        """D, with shape (B, C, H, W)."""
        return self.tracked.detach()

    def transpose(self, v: Tensor) -> Tensor:
        """J^T v with J = dD / dx, which is symmetric for an exact denoiser; shape (B, C, H, W)."""
        self.trace.vjps += 1
        return torch.autograd.grad(self.tracked, self.x, v.to(self.tracked), retain_graph=True)[0]
