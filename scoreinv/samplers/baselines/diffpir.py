"""Plug-and-play restoration: the denoised image, drawn to the data, with some of the old noise and some fresh.

    x_0 = argmin |y - A x|_S^2 + (lambda / sigma^2) |x - D|^2
    x'  = x_0 + s ((1 - zeta)^1/2 (x - x_0) / sigma + zeta^1/2 z)

Zhu et al., Denoising Diffusion Models for Plug-and-Play Image Restoration (2023, arXiv:2305.08995), algorithm 1.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass

import torch
from torch import Tensor

from scoreinv.posterior import Posterior
from scoreinv.samplers.baselines.chain import Baseline, Chain
from scoreinv.samplers.path import Request


@dataclass(frozen=True)
class DiffPIR(Baseline):
    """A baseline.

    Args:
        levels: Noise levels.
        lam: Weight of the prior over that of the data.
        zeta: Share of the noise that is fresh at each level.
    """

    lam: float = 1.0
    zeta: float = 0.3

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.lam > 0 and 0 <= self.zeta <= 1):
            raise ValueError(
                f"lam is {self.lam} and zeta {self.zeta}, expected lam > 0 and 0 <= zeta <= 1"
            )

    def island(self, posterior: Posterior, n: int, generator: torch.Generator) -> Restored:
        """n particles at the start, with their stream."""
        return Restored(posterior, self, n, generator)


class Restored(Chain):
    """Particles that are restored and made noisy again."""

    options: DiffPIR

    def _next(self, sigma: float, s: float) -> Generator[Request, Tensor, Tensor]:
        denoised = yield from self._denoise(self.x, sigma)
        x0 = denoised + self._pull(denoised, sigma**2 / self.options.lam)
        zeta = self.options.zeta
        old, fresh = (self.x - x0) / sigma, self._white()
        return x0 + s * ((1 - zeta) ** 0.5 * old + zeta**0.5 * fresh)
