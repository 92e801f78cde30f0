"""Inverse problems that are not linear and Gaussian, whose posterior is known by tempering.

The posterior is a mixture q of Gaussians in closed form times a factor f(x): for counts and for noise with outliers q is the
posterior under the Gaussian noise near the data, for amplitudes it is the prior. Chains go from q to q f
(`scoreinv.samplers.tempering`). A move takes a component k of q in proportion to its share at x, and proposes

    x' = mu_k + (1 - h^2)^1/2 (x - mu_k) + h C_k^1/2 z

which leaves q alone at any h (preconditioned Crank-Nicolson: Cotter, Roberts, Stuart & White, MCMC Methods for Functions,
2013), and is accepted by f^beta alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from scoreinv.bench.problems import (
    MixtureProblem,
    Problem,
    answered,
    mixture,
    power_law_mixture,
)
from scoreinv.gaussian import Dense, Diagonal
from scoreinv.likelihood import Likelihood
from scoreinv.noise import GaussianNoise, PoissonNoise, StudentNoise
from scoreinv.operators import Amplitude, DenseOperator
from scoreinv.posterior import Posterior
from scoreinv.priors import MixturePrior
from scoreinv.samplers.tempering import temper
from scoreinv.streams import stream

MOVES = 20  # at each temperature; four times as many at the last
CHAINS = 4000  # at least, whatever number of draws is asked for


@dataclass(frozen=True)
class TemperedProblem(Problem):
    """A posterior known by tempering.

    Attributes:
        start: q, an exact posterior or the prior as one.
    """

    start: MixtureProblem

    def draws(self, n: int, seed: int) -> Tensor:
        """n chains, with shape (n, d)."""
        return self.run(n, seed)[0]

    def run(self, n: int, seed: int) -> tuple[Tensor, float]:
        """n chains, with shape (n, d), and log Z over that of q [nat]."""
        generator, chains = stream(seed, -5), max(n, CHAINS)
        x, log_z = temper(
            self.start.draws(chains, seed),
            self._factor,
            lambda _: self._proposal,
            MOVES,
            generator,
        )
        order = torch.randperm(chains, generator=generator)
        return x[order[:n]], log_z

    def inside(self, x: Tensor) -> tuple[float, float]:
        """Neither is defined without modes."""
        return math.nan, math.nan

    def _factor(self, x: Tensor) -> Tensor:
        """log f, with shape (B,)."""
        return self.posterior.correction(x.reshape(-1, *self.posterior.shape))

    def _proposal(self, x: Tensor, h: float, generator: torch.Generator) -> tuple[Tensor, float]:
        """Which leaves q as it is."""
        share = torch.softmax(self.start.radius(x)[1], dim=1)
        k = torch.multinomial(share, 1, generator=generator)[:, 0]
        z = torch.randn(x.shape, generator=generator, dtype=torch.float64)
        new = torch.empty_like(x)
        for i in k.unique().tolist():
            here, part = k == i, self.start.components[i]
            away = math.sqrt(1 - h**2) * (x[here] - part.mean)
            new[here] = part.mean + away + h * part.colour(z[here])
        return new, 0.0


def counts(d: int, m: int, seed: int) -> TemperedProblem:
    """A positive signal of four modes as counts, about two a datum, on a background of half a count."""
    g = stream(seed, d, m, 5)
    i = torch.arange(d, dtype=torch.float64)
    smooth = torch.exp(-0.5 * ((i[:, None] - i) / (d / 16)) ** 2)
    C = 0.04 * (smooth + 0.05 * torch.eye(d, dtype=torch.float64))
    # the slow modulations by which the four differ
    phase = 2 * math.pi * torch.rand(4, 1, generator=g, dtype=torch.float64)
    means = 1 + 0.6 * torch.cos(2 * math.pi * torch.arange(1, 5)[:, None] * i / d + phase)
    prior = mixture(torch.ones(4), means.reshape(4, 1, 1, d), [Dense(C)] * 4)
    seen = torch.linspace(0, d - 1, m).double()
    blur = torch.exp(-0.5 * ((seen[:, None] - i) / 1.5) ** 2)
    A = 2 * blur / blur.sum(1, keepdim=True)
    return _tempered(
        f"counts, d = {d}, m = {m}",
        prior,
        Likelihood(DenseOperator(A, (1, 1, d)), PoissonNoise(0.5)),
        g,
    )


def outliers(d: int, m: int, seed: int) -> TemperedProblem:
    """The power-law fields under noise with outliers, Student's t of two degrees of freedom."""
    exact = power_law_mixture(d, m, seed)
    A = exact.posterior.likelihood.operator
    return _tempered(
        f"outliers, d = {d}, m = {m}",
        exact.posterior.prior,
        Likelihood(A, StudentNoise(0.05, 2.0)),
        stream(seed, d, m, 6),
    )


def amplitudes(d: int, seed: int, noise: float = 0.3) -> TemperedProblem:
    """Five modes of unit width seen through the amplitudes of their Fourier transform, whose phases are lost."""
    g = stream(seed, d, 7)
    means = 3 * torch.randn(5, 1, 1, d, generator=g, dtype=torch.float64)
    weights = 0.3 + 0.7 * torch.rand(5, generator=g, dtype=torch.float64)
    prior = mixture(weights, means, [Diagonal(torch.ones(1, 1, d, dtype=torch.float64))] * 5)
    F = torch.fft.fft(torch.eye(d, dtype=torch.complex128), norm="ortho")[: d // 2 + 1]
    A = Amplitude(DenseOperator(F, (1, 1, d)))
    return _tempered(f"amplitudes, d = {d}", prior, Likelihood(A, GaussianNoise(std=noise)), g)


def _tempered(
    name: str, prior: MixturePrior, likelihood: Likelihood, g: torch.Generator
) -> TemperedProblem:
    """The problem of a truth drawn from the prior."""
    one, two, three = torch.randint(2**31, (3,), generator=g).tolist()
    truth = prior.sample(1, one)
    posterior = Posterior(prior, likelihood, likelihood.simulate(truth, two)[0])
    start = answered(name, prior, posterior.nearby, posterior.data, truth)
    problem = TemperedProblem(name, posterior, truth.flatten(), math.nan, start)
    evidence = start.log_evidence + problem.run(CHAINS, three)[1]
    return replace(problem, log_evidence=evidence)
