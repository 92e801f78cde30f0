"""The twisted diffusion sampler: ancestral steps guided by the gradient of the twist, and weights that correct for it.

    g_s(x) = N(y; A D(x, s), S + r_s^2 A A^T),     r_s^2 = s^2 v / (s^2 + v)

With a = (s / sigma)^2 and G = grad log g_sigma(x), a particle moves by

    x' ~ N(D + a (x - D) + (1 - a) sigma^2 G, s^2 (1 - a))

and is weighted by g_s(x') / g_sigma(x) times the ratio of the unguided to the guided kernel; in the end the likelihood takes
the place of the twist. Asymptotically exact in the number of particles. Wu et al., Practical and Asymptotically Exact
Conditional Sampling in Diffusion Models (2023, arXiv:2306.17775), algorithm 1, with the variance of PiGDM in the twist.
"""

from __future__ import annotations

import math
from collections.abc import Generator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from scoreinv.gaussian import Scalar, dot
from scoreinv.kernels import bridge
from scoreinv.posterior import Posterior
from scoreinv.samplers.baselines.chain import Baseline, Chain
from scoreinv.samplers.path import Descent, Request
from scoreinv.samplers.smc import effective, systematic

RESAMPLE_BELOW = 0.5


@dataclass(frozen=True)
class TDS(Baseline):
    """A baseline.

    Args:
        levels: Noise levels.
    """

    label: ClassVar[str] = "used throughout (a baseline)"

    def island(self, posterior: Posterior, n: int, generator: torch.Generator) -> TwistedDiffusion:
        """n particles at the start, with their stream."""
        return TwistedDiffusion(posterior, self, n, generator)


class TwistedDiffusion(Chain):
    """Particles with weights, under a twist that they climb."""

    def _begin(self) -> Descent:
        yield from super()._begin()
        self.log_w, self.log_z = torch.zeros(self.n, dtype=torch.float64), 0.0
        yield from self._arrive(self.levels[0])
        self._weigh(self.log_g)

    def _next(self, sigma: float, s: float) -> Generator[Request, Tensor, Tensor]:
        if effective(self.log_w) < RESAMPLE_BELOW:
            self._resample()
        a, z, before = (s / sigma) ** 2, self._white(), self.log_g
        climb = (1 - a) * sigma**2 * self.gradient
        self.x = bridge(self.x, self.denoised, sigma, s, z) + climb
        # log N(x'; r, v) - log N(x'; r + climb, v)
        kernels = -0.5 * dot(climb, climb) / (s**2 * (1 - a)) - dot(climb, z) / (
            s * (1 - a) ** 0.5
        )
        yield from self._arrive(s)
        self._weigh(self.log_g - before + kernels)
        return self.x

    def _end(self) -> Descent:
        # what is left of the noise is narrow beside the prior
        self._weigh(self.posterior.likelihood.log_prob(self.posterior.y, self.x) - self.log_g)
        weights = self.log_z + self.log_w - self.posterior.gaussian_log_evidence
        self.trace.log_weights = weights.tolist()
        self.trace.log_evidence = float(torch.logsumexp(weights, 0)) - math.log(self.n)
        yield from ()

    def _arrive(self, s: float) -> Descent:
        """The twist at a new level, with its gradient."""
        posterior = self.posterior
        v = float(posterior.moments.covariance.eigenvalues(posterior.shape).mean())
        r2 = s**2 * v / (s**2 + v)
        at = yield from self._linearised(s)
        conditioned = posterior.conditioner.given(Scalar(r2))
        u, likelihood = conditioned.shift(at.denoised), posterior.nearby
        e = likelihood.residual(posterior.data, at.denoised)
        rest = likelihood.operator.transpose(likelihood.noise.weigh(e))
        self.denoised, self.gradient = at.denoised, at.transpose(u / r2)
        # but for the determinant, which all particles share: of every level it is first added, then taken away
        self.log_g = likelihood.noise.log_prob(e) + 0.5 * dot(rest, u)

    def _weigh(self, log_w: Tensor) -> None:
        self.log_w = self.log_w + log_w
        self._lowest.append(effective(self.log_w))

    def _resample(self) -> None:
        keep = systematic(torch.softmax(self.log_w, 0), self.n, self.generator)
        self.log_z += float(torch.logsumexp(self.log_w, 0)) - math.log(self.n)
        self.log_w = torch.zeros_like(self.log_w)
        self.x, self.denoised = self.x[keep], self.denoised[keep]
        self.gradient, self.log_g = self.gradient[keep], self.log_g[keep]
