"""The convolved likelihood: the prior is taken to be flat where the noise is wide.

    m = D + sigma^2 grad log N(y; A x, S + sigma^2 A A^T)

Remy et al., Probabilistic Mass-Mapping with Neural Score Estimation (2023, arXiv:2201.05561), eq. 14; Adam et al., Posterior
Samples of Source Galaxies in Strong Gravitational Lenses with Score-Based Priors (2022, arXiv:2211.03812).
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
class ConvolvedLikelihood(Baseline):
    """A baseline.

    Args:
        levels: Noise levels.
    """

    def island(self, posterior: Posterior, n: int, generator: torch.Generator) -> Convolved:
        """n particles at the start, with their stream."""
        return Convolved(posterior, self, n, generator)


class Convolved(Guide):
    """Particles under the likelihood of their noisy images."""

    def _estimate(self, sigma: float) -> Generator[Request, Tensor, Tensor]:
        denoised = yield from self._denoise(self.x, sigma)
        return denoised + self._pull(self.x, sigma**2)
