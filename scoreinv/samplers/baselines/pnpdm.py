"""Plug-and-play diffusion: Gibbs steps between the data and the prior, tied to each other ever more closely.

    z ~ N(y; A z, S) N(z; x, rho^2),     x ~ p(x) N(z; x, rho^2) by a reverse diffusion from (z, rho)

with rho falling geometrically, then kept. Wu et al., Principled Probabilistic Imaging Using Diffusion Models as
Plug-and-Play Priors (2024, arXiv:2405.18782), algorithms 1 and 3.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass

import torch
from torch import Tensor

from scoreinv.kernels import bridge, noise_levels
from scoreinv.posterior import Posterior
from scoreinv.samplers.baselines.chain import Baseline, Chain
from scoreinv.samplers.path import Request

KEPT = 0.3  # share of the Gibbs steps at the smallest rho


@dataclass(frozen=True)
class PnPDM(Baseline):
    """A baseline.

    Args:
        levels: Gibbs steps.
        steps: Noise levels of each reverse diffusion.
    """

    levels: int = 200
    steps: int = 20

    def noise_levels(self, posterior: Posterior) -> list[float]:
        """The values of rho; the last ones repeat."""
        high, low = posterior.sigma_range
        falling = max(2, round((1 - KEPT) * self.levels))
        ratio = (low / high) ** (1 / (falling - 1))
        return [high * ratio ** min(i, falling - 1) for i in range(self.levels)]

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps < 1:
            raise ValueError(f"steps is {self.steps}, expected at least 1")

    def island(self, posterior: Posterior, n: int, generator: torch.Generator) -> Split:
        """n particles at the start, with their stream."""
        return Split(posterior, self, n, generator)


class Split(Chain):
    """Particles that answer to the data and to the prior in turn."""

    options: PnPDM

    def _next(self, sigma: float, s: float) -> Generator[Request, Tensor, Tensor]:
        x = self._drawn(self.x, sigma**2)
        ladder = noise_levels(self.options.steps, sigma, min(self.levels[-1], sigma) / 2)
        for high, low in zip(ladder, [*ladder[1:], 0.0], strict=True):
            denoised = yield from self._denoise(x, high)
            x = bridge(x, denoised, high, low, self._white())
        return x
