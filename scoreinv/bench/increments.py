"""Processes with heavy-tailed increments, whose posterior Gibbs sampling knows.

The image x holds the increments, independent and each a scale mixture of Gaussians; what is seen are values of their
running sum with white noise:

    p(x) = prod_i sum_k w_k N(x_i; 0, v_k),     y_a = x_1 + ... + x_j(a) + N(0, sigma^2)

The variances are spaced evenly in their logarithm, with the weights of the distribution that makes the marginal Laplace
(exponential variances) or Student's t (inverse-gamma ones; Andrews & Mallows, Scale Mixtures of Normal Distributions, 1974).
With finitely many of them the denoiser is exact, and so are both conditionals that Gibbs sampling draws in turn: the
variances given x, pixel by pixel, and x given the variances and y, a Gaussian (Geman & Geman 1984).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from scoreinv.bench.problems import Problem
from scoreinv.gaussian import Gaussian, Scalar
from scoreinv.likelihood import Likelihood
from scoreinv.noise import GaussianNoise
from scoreinv.operators import DenseOperator
from scoreinv.posterior import Posterior
from scoreinv.priors import Prior
from scoreinv.streams import stream

NODES = 24  # variances of the scale mixture
TAIL = 0.002  # probability beyond them, on either side
SWEEPS = 25  # of Gibbs sampling from a start at the prior; half of them gives the same moments
VARIANCES = {
    "Laplace": stats.expon(scale=1.0),
    "Student": stats.invgamma(1.5, scale=0.5),
}


class ScaleMixturePrior(Prior):
    """Independent pixels, each sum_k w_k N(0, v_k).

    Args:
        weights: w_k, with shape (K,); normalised here.
        variances: v_k, with shape (K,).
        shape: Shape (C, H, W) of an image.
    """

    dtype = torch.float64

    def __init__(self, weights: Tensor, variances: Tensor, shape: tuple[int, ...]) -> None:
        self.variances, self.shape = variances.double(), tuple(shape)
        self.weights = weights.double() / weights.double().sum()
        self.moments = Gaussian(
            torch.zeros(self.shape, dtype=torch.float64),
            Scalar(float(self.weights @ self.variances)),
        )
        self.sigma_min = 0.1 * float(variances.min()) ** 0.5
        self.sigma_max = 100 * float(variances.max()) ** 0.5
        self.identity = {"prior": f"ScaleMixturePrior of {len(variances)}"}

    def shares(self, x: Tensor, sigma: Tensor) -> Tensor:
        """Probability of each variance given x_sigma, with shape (*x.shape, K)."""
        total = self.variances + sigma.reshape(-1, *[1] * x.ndim) ** 2
        log_p = self.weights.log() - 0.5 * (x[..., None] ** 2 / total + total.log())
        return torch.softmax(log_p, dim=-1)

    def denoise(self, x: Tensor, sigma: Tensor) -> Tensor:
        self.check(x)
        total = self.variances + sigma.reshape(-1, *[1] * x.ndim) ** 2
        return x * (self.shares(x, sigma) * self.variances / total).sum(-1)

    def sample(self, n: int, seed: int, steps: int = 0, churn: float = 0.0) -> Tensor:
        """n exact draws, with shape (n, C, H, W)."""
        g = stream(seed)
        k = torch.multinomial(self.weights, n * math.prod(self.shape), True, generator=g)
        z = torch.randn((n, *self.shape), generator=g, dtype=torch.float64)
        return self.variances[k].sqrt().reshape(z.shape) * z


@dataclass(frozen=True)
class IncrementProblem(Problem):
    """A posterior known by Gibbs sampling.

    Attributes:
        B: The operator in units of the noise, with shape (m, d).
        data: The data in units of the noise, with shape (m,).
    """

    B: Tensor
    data: Tensor

    def draws(self, n: int, seed: int, sweeps: int = SWEEPS) -> Tensor:
        """n independent chains after so many sweeps, with shape (n, d)."""
        prior, g = self.posterior.prior, stream(seed)
        m, d = self.B.shape
        x = prior.sample(n, seed + 1).flatten(1)
        for _ in range(sweeps):
            below = prior.shares(x, torch.zeros(1, dtype=torch.float64)).cumsum(-1)
            chance = torch.rand(n, d, 1, generator=g, dtype=torch.float64)
            v = prior.variances[torch.searchsorted(below, chance).clamp_max(NODES - 1)[..., 0]]
            # a draw of N(0, v), drawn to the data (Matheron's rule)
            x = v.sqrt() * torch.randn(n, d, generator=g, dtype=torch.float64)
            noise = torch.randn(n, m, generator=g, dtype=torch.float64)
            BV = self.B * v[:, None, :]
            G = BV @ self.B.T + torch.eye(m, dtype=torch.float64)
            r = torch.linalg.solve(G, (self.data - x @ self.B.T - noise)[..., None])
            x = x + (BV.mT @ r)[..., 0]
        return x

    def inside(self, x: Tensor) -> tuple[float, float]:
        """Neither is defined without modes."""
        return math.nan, math.nan


def increments(kind: str, d: int, m: int, seed: int, noise: float = 0.1) -> IncrementProblem:
    """d increments of unit scale, m values of their sum at random places.

    Args:
        kind: "Laplace" or "Student" (three degrees of freedom).
        d: Increments.
        m: Values seen.
        seed: Of the places, the truth and its noise.
        noise: Of a value.
    """
    g = stream(seed, d, m, 4)
    law = VARIANCES[kind]
    v = np.geomspace(law.ppf(TAIL), law.ppf(1 - TAIL), NODES)
    prior = ScaleMixturePrior(torch.from_numpy(v * law.pdf(v)), torch.from_numpy(v), (1, 1, d))
    seen = torch.randperm(d, generator=g)[:m].sort().values
    A = (torch.arange(d) <= seen[:, None]).double()
    likelihood = Likelihood(DenseOperator(A, prior.shape), GaussianNoise(std=noise))
    one, two = torch.randint(2**31, (2,), generator=g).tolist()
    truth = prior.sample(1, one)
    y = likelihood.simulate(truth, two)[0]
    return IncrementProblem(
        f"{kind} increments, d = {d}, m = {m}",
        Posterior(prior, likelihood, y),
        truth.flatten(),
        math.nan,
        A / noise,
        y / noise,
    )
