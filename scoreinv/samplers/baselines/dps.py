"""Diffusion posterior sampling: an ancestral step, then one against the gradient of the misfit of D.

    x' = ancestral(D) + zeta J^T A^T e / |e|,     e = y - A D(x, sigma)

with the norm of each particle's own misfit. Chung et al. (2023, arXiv:2209.14687), algorithm 1 with the step size of its
section 3.3, which is constant here in the coordinate x_0 + sigma n; theirs is in a coordinate that shrinks with the noise.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass

import torch
from torch import Tensor

from scoreinv.kernels import bridge
from scoreinv.posterior import Posterior
from scoreinv.samplers.baselines.chain import Baseline, Chain
from scoreinv.samplers.path import Request


@dataclass(frozen=True)
class DPS(Baseline):
    """A baseline.

    Args:
        levels: Noise levels.
        zeta: Step against the misfit, in units of the gradient.
    """

    levels: int = 1000
    zeta: float = 1.0

    def refuses(self, posterior: Posterior) -> str:
        """It takes every posterior."""
        return ""

    def island(self, posterior: Posterior, n: int, generator: torch.Generator) -> Misfit:
        """n particles at the start, with their stream."""
        return Misfit(posterior, self, n, generator)


class Misfit(Chain):
    """Particles that step against their misfit."""

    options: DPS

    def _next(self, sigma: float, s: float) -> Generator[Request, Tensor, Tensor]:
        posterior, A = self.posterior, self.posterior.likelihood.operator
        at = yield from self._linearised(sigma)
        if posterior.likelihood.linear:  # of counts the background is taken away
            e = posterior.nearby.residual(posterior.data, at.denoised)
        else:
            e = posterior.likelihood.residual(posterior.y, at.denoised)
        length = e.abs().square().flatten(1).sum(1).sqrt().clamp_min(1e-300)
        e = e / length.reshape(-1, *[1] * (e.ndim - 1))
        x = bridge(self.x, at.denoised, sigma, s, self._white())
        return x + self.options.zeta * at.transpose(A.pull(at.denoised, e))
