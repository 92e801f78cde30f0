"""Decoupled annealing: a draw of x_0 given the data at every level, and fresh noise of the next.

    x_0 ~ N(y; A x_0, S) N(x_0; D_ode, sigma^2),     x' = x_0 + s z

with D_ode the end of the probability-flow ODE from x. The draw is exact here, in place of the paper's Langevin steps.
Zhang et al., Improving Diffusion Inverse Problem Solving with Decoupled Noise Annealing (2024, arXiv:2407.01521).
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass

import torch
from torch import Tensor

from scoreinv.kernels import noise_levels
from scoreinv.posterior import Posterior
from scoreinv.samplers.baselines.chain import Baseline, Chain
from scoreinv.samplers.path import Request


@dataclass(frozen=True)
class DAPS(Baseline):
    """A baseline.

    Args:
        levels: Noise levels.
        steps: Of Euler's method at each level.
    """

    steps: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps < 1:
            raise ValueError(f"steps is {self.steps}, expected at least 1")

    def island(self, posterior: Posterior, n: int, generator: torch.Generator) -> Decoupled:
        """n particles at the start, with their stream."""
        return Decoupled(posterior, self, n, generator)


class Decoupled(Chain):
    """Particles that forget all but their level."""

    options: DAPS

    def _next(self, sigma: float, s: float) -> Generator[Request, Tensor, Tensor]:
        end = min(self.levels[-1], sigma / 2)
        ladder, x = noise_levels(self.options.steps + 1, sigma, end), self.x
        for high, low in zip(ladder[:-1], ladder[1:], strict=True):
            denoised = yield from self._denoise(x, high)
            x = x + (low / high - 1) * (x - denoised)
        return self._drawn(x, sigma**2) + s * self._white()
