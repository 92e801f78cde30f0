"""Moment matching: x_0 given x_sigma is taken to be N(D, sigma^2 J), with the denoiser's own Jacobian.

    m = D + sigma^2 J A^T u,     (S + sigma^2 A J A^T) u = y - A D

by a few steps of conjugate gradients, each at the price of a vector-Jacobian product. Rozet et al., Learning Diffusion
Priors from Observations by Expectation Maximization (2024, arXiv:2405.13712), section 4.2.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass

import torch
from torch import Tensor

from scoreinv.gaussian import conjugate_gradients
from scoreinv.posterior import Posterior
from scoreinv.samplers.baselines.chain import Baseline, Guide
from scoreinv.samplers.path import Request


@dataclass(frozen=True)
class MMPS(Baseline):
    """A baseline.

    Args:
        levels: Noise levels.
        iterations: Of conjugate gradients at each level.
    """

    iterations: int = 5

    def island(self, posterior: Posterior, n: int, generator: torch.Generator) -> Matched:
        """n particles at the start, with their stream."""
        return Matched(posterior, self, n, generator)


class Matched(Guide):
    """Particles under the likelihood of their denoised images, known up to an error of covariance sigma^2 J."""

    options: MMPS

    def _estimate(self, sigma: float) -> Generator[Request, Tensor, Tensor]:
        A, noise = self.posterior.nearby.operator, self.posterior.nearby.noise
        at = yield from self._linearised(sigma)

        def forward(x: Tensor) -> Tensor:
            """B x with B = S^-1/2 A; the real and imaginary parts of complex data side by side."""
            y = noise.whiten(A.forward(x))
            return torch.view_as_real(y) if A.complex else y

        def backward(w: Tensor) -> Tensor:
            return A.transpose(noise.whiten(torch.view_as_complex(w) if A.complex else w))

        r = noise.whiten(self.posterior.nearby.residual(self.posterior.data, at.denoised))
        r = torch.view_as_real(r) if A.complex else r
        # (I + sigma^2 B J B^T) w = S^-1/2 (y - A D)
        spread = lambda w: w + sigma**2 * forward(at.transpose(backward(w)))
        w, _ = conjugate_gradients(spread, r, error=0.0, iterations=self.options.iterations)
        return at.denoised + sigma**2 * at.transpose(backward(w))
