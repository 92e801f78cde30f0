"""Pseudoinverse-guided diffusion: x_0 given x_sigma is taken to be N(D, r^2) with r^2 = sigma^2 v / (sigma^2 + v).

    m = D + sigma^2 J^T A^T (S + r^2 A A^T)^-1 (y - A D)

with v the mean variance of the prior's pixels; directions that vary far more than that make it unstable. Song et al.,
Pseudoinverse-Guided Diffusion Models for Inverse Problems (2023), eq. 7 with noise. Their algorithm 1 weighs the pull by
r^2 in the place of sigma^2: it stays finite with such directions, but pulls less than a Gaussian would.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass

import torch
from torch import Tensor

from scoreinv.posterior import Posterior
from scoreinv.samplers.baselines.chain import Baseline, Guide
from scoreinv.samplers.path import Request


@dataclass(frozen=True)
class PiGDM(Baseline):
    """A baseline.

    Args:
        levels: Noise levels.
        weighted: Weigh the pull as the paper's algorithm does.
    """

    weighted: bool = False

    def island(self, posterior: Posterior, n: int, generator: torch.Generator) -> Pseudoinverse:
        """n particles at the start, with their stream."""
        return Pseudoinverse(posterior, self, n, generator)


class Pseudoinverse(Guide):
    """Particles under the likelihood of their denoised images, known up to a white error."""

    options: PiGDM

    def _estimate(self, sigma: float) -> Generator[Request, Tensor, Tensor]:
        posterior = self.posterior
        v = float(posterior.moments.covariance.eigenvalues(posterior.shape).mean())
        r2 = sigma**2 * v / (sigma**2 + v)
        at = yield from self._linearised(sigma)
        pull = self._pull(at.denoised, r2) / r2
        weight = r2 if self.options.weighted else sigma**2
        return at.denoised + weight * at.transpose(pull)
