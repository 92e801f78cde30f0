"""One pass of guided steps, without moves or weights: fast, approximate, labelled so in the result.

With D_y the mean of N(D, C_sigma) conditioned on the data, C_sigma the prior's covariance given a noisy image, the particles
follow the ODE

    dx / d sigma = (x - D_y(x, sigma)) / sigma

by Heun's second-order method two levels down, and return one level up with fresh noise, which forgets earlier errors of
D_y. A step of first order would lose a third of the power that trained priors have at high frequencies. Heun's method for
this ODE: Karras et al. (2022, arXiv:2206.00364); D_y: Song et al., Pseudoinverse-Guided Diffusion Models for Inverse
Problems (2023), with the prior's covariance for their white one.

A prior may know the covariance C(x, sigma) of x_0 given a noisy image, by a second head of its network. Local steps follow
it: from level sigma to s,

    x_0 ~ N(D(x, sigma), C(x, sigma)) conditioned on the data,    x' = x_0 + s z,

so that nothing of the last noise is kept. If x_0 was drawn exactly, x' is a draw of p_s(x' given y), whatever the levels;
where it was not, noise forgets it, and the data have their say about all of x_0 again. Zhang et al. (Improving Diffusion
Inverse Problem Solving with Decoupled Noise Annealing, 2024, arXiv:2407.01521) step so, with the end of the ODE for D, one
number for C, and Langevin moves for the draw. x_0 is drawn a little wider than an exact denoiser would need
(`Prior.widening`), and images are turned at random before the network sees them (`scoreinv.priors.turns`). x_0 is as skewed
as the prior says, and where the data doubt that, as at a companion on a sky that the network is sure is blank, the noisy
image alone is believed (`scoreinv.conditioning.local`).

The evidence is what the data say of the draws, less what was learned from them: with u = E[x_0 | x_s, y] - D(x_s, s), by
which the data move the denoised image, the scores of p_s(x given y) and of p_s(x) differ by u / s^2, and

    log p(y)  =  E log p(y given x_0)  -  int E |u|^2 / s^2  d log s,

for the Kullback-Leibler divergence of two distributions falls with noise by half of the Fisher divergence (Lyu,
Interpretation and Generalization of Score Matching, 2009, arXiv:1205.2629, theorem 1).
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from scoreinv.gaussian import Covariance, Modulated, dot
from scoreinv.kernels import noise_levels
from scoreinv.posterior import Posterior
from scoreinv.samplers.path import (
    Descent,
    Island,
    Request,
    Twisted,
    check_counts,
    not_linear,
    path_integral,
)

LOCAL, OTHER = 16, 40  # levels of local steps and of others, if nothing is said
SPARSE = 2  # levels of local steps from one that is counted in the path integral to the next
FINE = 0.1  # of the length that solves of draws leave out may be left out of what the data tell


@dataclass(frozen=True)
class Guided:
    """Guided steps, once.

    Args:
        levels: Noise levels of local steps, at one evaluation each. More of them make draws narrower: these settle on what
            x_0 is taken for, not on what it is. Other steps take twice as many levels, at two evaluations each. 16 of the
            one and 40 of the other if left out.
        local: Follow the error around each particle if the prior knows it: sharper, and faster.
    """

    levels: int | None = None
    local: bool = True

    particles: ClassVar[int] = 1
    effective: ClassVar[float] = 0.0
    label: ClassVar[str] = (
        "not used (one pass, approximate); evidence from a path integral, a few nat off"
    )

    def __post_init__(self) -> None:
        if self.levels is not None:
            check_counts(self.levels)

    def refuses(self, posterior: Posterior) -> str:
        """Why this posterior is not for it; empty if it is."""
        return not_linear(posterior)

    def noise_levels(self, posterior: Posterior) -> list[float]:
        """The levels of a posterior's path, falling."""
        if self._follows(posterior):
            return noise_levels(self.levels or LOCAL, *posterior.sigma_range)
        return noise_levels(2 * self.levels if self.levels else OTHER, *posterior.sigma_range)

    def island(self, posterior: Posterior, n: int, generator: torch.Generator) -> Island:
        """n particles at the start, with their stream."""
        kind = Following if self._follows(posterior) else Pulled
        return kind(posterior, self.noise_levels(posterior), n, generator)

    def _follows(self, posterior: Posterior) -> bool:
        return self.local and posterior.prior.knows_error


class Following(Twisted):
    """Particles whose denoised images are known up to errors of their own, of which the prior knows."""

    covariance: Modulated  # of x_0 about the denoised images
    skewness: Tensor | None
    doubted: Tensor | None = None  # where the data doubted what is known, at the last draw

    def _step(self, i: int) -> Generator[Request, Any, int]:
        if i % SPARSE == 0:
            self._integrate()
        s = self.levels[i + 1]
        self.x = self._drawn(self.posterior.prior.widening(self.s)) + s * self._white()
        yield from self._arrive(s)
        return i + 1

    def _end(self) -> Descent:
        self._integrate()
        self.x = self._drawn()
        levels, told = list(self._slopes), list(self._slopes.values())
        # above the widest level it falls as s^-2
        gained = path_integral(levels, told) + 0.5 * told[0]
        likely = self.posterior.nearby.log_prob(self.posterior.data, self.x)
        self.trace.log_evidence, self.trace.absolute = float(likely.mean()) - gained, True
        yield from ()

    def _arrive(self, s: float, prior: Covariance | None = None) -> Descent:
        self.s = s
        knows = self.posterior.prior
        turns = knows.turns([self.generator] * self.n)
        looked = yield from self._denoise_with_error(turns.there(self.x), s)
        self.denoised, a = (turns.back(v) for v in looked)
        self.covariance = knows.error_covariance(a, s)
        self.skewness = knows.error_skewness(self.denoised / self.covariance.deviation, s)

    def _drawn(self, wider: float = 1.0) -> Tensor:
        """Draws of x_0."""
        around = self.posterior.around(self.s, self.covariance, self.skewness)
        x0, self.doubted = around.draw(self.denoised, self.generator, wider, self.doubted)
        return x0

    def _integrate(self) -> None:
        """How much the data tell of x_0 beyond the noisy image at this level, for the evidence."""
        u = self.posterior.around(self.s, self.covariance).shift(self.denoised, FINE)
        self._slopes[self.s] = float(dot(u, u).mean()) / self.s**2


class Pulled(Twisted):
    """Particles that follow the conditioned denoiser."""

    def _step(self, i: int) -> Generator[Request, Tensor, int]:
        if i % (2 * SPARSE) == 0:
            self._integrate()
        sigma, s, end = (
            self.levels[i],
            self.levels[i + 1],
            self.levels[min(i + 2, len(self.levels) - 1)],
        )
        slope = (self.x - self._conditioned(self.denoised, sigma)) / sigma
        x = self.x + (end - sigma) * slope
        denoised = yield from self._denoise(x, end)
        slope = 0.5 * (slope + (x - self._conditioned(denoised, end)) / end)
        self.x = self.x + (end - sigma) * slope + (s**2 - end**2) ** 0.5 * self._white()
        yield from self._arrive(s)
        return i + 1

    def _conditioned(self, denoised: Tensor, s: float) -> Tensor:
        """D_y: the mean of N(D, C_s) conditioned on the data."""
        return denoised + self.posterior.level(s).conditioned.shift(denoised)
