"""Annealed moves without weights: right for posteriors with one mode, of any size.

Every particle goes its own way. At each level it is moved by MALA steps that leave p_s(x) g_s(x) of `scoreinv.posterior`
invariant, with preconditioner M, in the discretisation that is exact for a Gaussian of covariance M. With the trapezoid of
the score along the proposal for the change of log p_s, which no density is needed for,

    x' = x + rho M G(x) + (h M)^1/2 z,     rho = 1 - (1 - h)^1/2,  0 < h < 1,     G = score + u_s / s^2
    log acceptance = (1/2 - rho / h) <G + G', x' - x> + rho^2 / (2 h) (<G, M G> - <G', M G'>)

The evidence comes from the path integral.
"""

from __future__ import annotations

import math
from collections.abc import Generator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from scoreinv.gaussian import Covariance, dot
from scoreinv.kernels import noise_levels
from scoreinv.posterior import Posterior
from scoreinv.samplers.path import (
    Descent,
    Island,
    Request,
    Twisted,
    banded,
    check_counts,
    not_linear,
)

ACCEPTANCE = 0.6  # what the step size is steered to


@dataclass(frozen=True)
class Anneal:
    """Moves at every level, never weights.

    Args:
        levels: Noise levels.
        moves: MALA steps at each level; a draw costs levels * (1 + moves) evaluations.
    """

    levels: int = 50
    moves: int = 3

    particles: ClassVar[int] = 1
    effective: ClassVar[float] = 0.0
    label: ClassVar[str] = "not used (moves only); evidence from the path integral"

    def __post_init__(self) -> None:
        check_counts(self.levels, self.moves)

    def refuses(self, posterior: Posterior) -> str:
        """Why this posterior is not for it; empty if it is."""
        return not_linear(posterior)

    def noise_levels(self, posterior: Posterior) -> list[float]:
        """The levels of a posterior's path, falling."""
        return noise_levels(self.levels, *posterior.sigma_range)

    def island(self, posterior: Posterior, n: int, generator: torch.Generator) -> Island:
        """n particles at the start, with their stream."""
        return Annealed(posterior, self.noise_levels(posterior), n, generator, self.moves)


class Annealed(Twisted):
    """Particles that are moved at each level."""

    def __init__(
        self,
        posterior: Posterior,
        levels: list[float],
        n: int,
        generator: torch.Generator,
        moves: int,
    ) -> None:
        super().__init__(posterior, levels, n, generator)
        self.moves, self.h = moves, 0.5

    def _step(self, i: int) -> Generator[Request, Tensor, int]:
        self._integrate()
        s = self.levels[i + 1]
        self.x = self._proposed(s)
        yield from self._arrive(s)
        if self.moves:
            yield from self._move()
        return i + 1

    def _move(self) -> Descent:
        s = self.level.s
        score = (self.denoised - self.x) / s**2
        M = self.level.mobility(local_precision(self.posterior.moments.covariance, score, s))
        G = score + self.level.shift(self.x) / s**2
        MG = M.apply(G)
        for _ in range(self.moves):
            h = self.h
            rho = 1 - math.sqrt(1 - h)
            x = self.x + rho * MG + math.sqrt(h) * M.draw(self.n, self.generator)
            denoised = yield from self._denoise(x, s)
            G_new = (denoised - x + self.level.shift(x)) / s**2
            MG_new = M.apply(G_new)
            log_acceptance = (0.5 - rho / h) * dot(G + G_new, x - self.x)
            log_acceptance += rho**2 / (2 * h) * (dot(G, MG) - dot(G_new, MG_new))
            chance = torch.rand(self.n, generator=self.generator, dtype=torch.float64)
            ok = (chance.log() < log_acceptance).reshape(-1, *[1] * (x.ndim - 1))
            self.x, self.denoised, G, MG = (
                torch.where(ok, new, old)
                for new, old in (
                    (x, self.x),
                    (denoised, self.denoised),
                    (G_new, G),
                    (MG_new, MG),
                )
            )
            rate = float(log_acceptance.clamp(max=0).exp().mean())
            self._accepted.append(rate)
            self.h = min(0.95, max(1e-4, h * math.exp(0.5 * (rate - ACCEPTANCE))))


def local_precision(C: Covariance, score: Tensor, s: float) -> Covariance:
    """The prior's local precision at level s, -E grad^2 log p_s, in bands of directions of similar prior variance.

    Fisher's identity, E[score score^T] = -E grad^2 log p, takes it from the scores of the particles themselves. It
    follows the prior where the global covariance is too wide, as it is between separated modes; it lies between the
    precision of the global Gaussian, 1 / (C + s^2), and that of the noise, 1 / s^2. Titsias, Optimal Preconditioning
    and Fisher Adaptive Langevin Sampling (2023, arXiv:2305.14442).
    """
    power = C.power(score)
    noise = torch.as_tensor(1 / s**2)
    return C.map(lambda v: banded(power, v).clamp(1 / (v + s**2), noise.expand_as(v)))
