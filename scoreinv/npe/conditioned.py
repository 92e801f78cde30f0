"""The posterior of one observation, as an estimator knows it.

In the space of the parameters where the prior is N(0, 1), an estimate is a ratio

    r(u)  =  q(u | x) / N(u; 0, 1),

known in full for a posterior that was learned, up to a constant for a likelihood or a ratio. Draws of the first come at
once; the others are tempered from the prior (`scoreinv.samplers.tempering`), and chains move by the differences of others,

    u' = u + g (u_a - u_b) + small noise,

which has their covariance, whatever its shape, and with g = 1 carries them from mode to mode (ter Braak, A Markov Chain
Monte Carlo version of the genetic algorithm Differential Evolution, 2006).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from scoreinv.finetune.evidence import HEAVY, Evidence, evidence
from scoreinv.npe.data import Inputs
from scoreinv.npe.mixture import Mixture, Population
from scoreinv.samplers.tempering import Propose, temper
from scoreinv.streams import integer, stream
from scoreinv.tensors import as_tensor

if TYPE_CHECKING:
    from scoreinv.npe.estimator import Estimator
    from scoreinv.npe.parameters import ParameterPrior

NOTHING = 700.0  # below the largest log-weight [nat]
CHAINS = 2000  # for draws at least
MOVES = 15  # at each temperature
LEAPS = 0.1  # of the moves, from mode to mode
JITTER = 1e-3  # of a standard deviation of the chains
LOG_TWO_PI = math.log(2 * math.pi)
LEAST = 10  # draws that prove an evidence
ENOUGH = 0.5  # of the draws that must count, to draw no more
OWN = 0.1  # of draws that are refined, those of the estimate itself
FARTHEST = 8.0  # of draws that count, in widths of the prior; one in 10^15 of it lies beyond


@dataclass(frozen=True)
class Weighted:
    """Draws of an estimate, weighted to the exact posterior.

    Attributes:
        theta: With shape (n, d).
        log_w: Log-weights, with shape (n,); the mean of the weights is the evidence.
        evidence: What they prove: log Z, effective size, Pareto's k-hat (above 0.7 they are not to be trusted).
    """

    theta: Tensor
    log_w: Tensor
    evidence: Evidence

    @property
    def n_eff(self) -> float:
        """1 / sum w^2 - 1 of the normalised weights."""
        return float(1 / torch.softmax(self.log_w, 0).square().sum()) - 1


@dataclass(frozen=True)
class Estimated(ABC):
    """The posterior of one observation.

    Attributes:
        estimator: Fitted.
        x: The observation, in a batch of one.
    """

    estimator: Estimator
    x: Inputs

    @property
    def prior(self) -> ParameterPrior:
        """Of theta."""
        return self.estimator.prior

    def sample(self, n: int, seed: int) -> Tensor:
        """n draws of theta, with shape (n, d), in float64; all of them in the prior's support.

        Raises:
            ValueError: No draws.
        """
        if n < 1:
            raise ValueError(f"n is {n}, expected 1 draw or more")
        return self.prior.from_normal(self._draw(n, seed)[0])

    @abstractmethod
    def log_evidence(self, n: int = CHAINS, seed: int = 0) -> float:
        """log of the integral of r over the prior [nat], from n chains; 0 where r is known in full.

        Of a learned likelihood the evidence of the data; of a learned ratio how far it is from one that is normalised.
        """

    @torch.no_grad()
    def log_prob(self, theta: Tensor) -> Tensor:
        """log q(theta | x), with shape (B,), in float64; -inf outside of the prior's support.

        Of a learned likelihood or ratio up to a constant, `log_evidence`.

        Raises:
            ValueError: Another shape, or nan.
        """
        log_p = self.prior.log_prob(theta)
        found, inside = torch.full_like(log_p, -math.inf), log_p > -math.inf
        if not bool(inside.any()):
            return found
        u = self.prior.to_normal(theta[inside])
        found[inside] = self.log_ratio(u) + log_p[inside]
        return found

    @torch.no_grad()
    def log_ratio(self, u: Tensor) -> Tensor:
        """log r(u), with shape (B,), in float64: of several members log of the mean, by their weights."""
        return self.estimator.mixed([m.log_ratio(u, self.x) for m in self.estimator.members])

    def reweighted(
        self, log_likelihood: Callable[[Tensor], Tensor], n: int, seed: int, refine: int = 0
    ) -> Weighted:
        """n draws, weighted by log p(x | theta), which takes theta with shape (n, d) and answers with shape (n,) [nat].

        Args:
            log_likelihood: Of the observation.
            n: Draws.
            seed: Of them.
            refine: How often they are drawn anew at most, until half of them count and their largest weights are to be
                trusted; all but a tenth of them of a mixture fitted to those before, by their weights
                (`scoreinv.npe.mixture`). Only the last ones are kept, so that the weights stay exact.

        Raises:
            ValueError: Too few draws; a log-likelihood of another shape, nan, +inf, or -inf for all draws.
        """
        if n < LEAST or refine < 0:
            raise ValueError(
                f"n is {n} and refine {refine}, expected {LEAST} draws or more, better thousands, and 0 or more times"
            )
        u, log_z = self._draw(n, seed)
        found = self.weighed(u, self.log_ratio(u) - log_z, log_likelihood)
        population = Population()
        for i in range(refine):
            if found.n_eff > ENOUGH * n and found.evidence.k_hat <= HEAVY:
                break
            population.add(u, found.log_w)
            mixture = population.fitted(stream(seed, 1, i))
            u, log_q = self.drawn_beside(mixture, n, integer(seed, 2, i))
            found = self.weighed(u, log_q, log_likelihood)
        return found

    @torch.no_grad()
    def drawn_beside(self, mixture: Mixture, n: int, seed: int) -> tuple[Tensor, Tensor]:
        """n draws u, with shape (n, d), a tenth of them of the estimate, and their `log_ratio_beside`."""
        own = math.ceil(OWN * n)
        u, log_z = self._draw(own, seed)
        u = torch.cat([u, mixture.sample(n - own, stream(seed, 1))])
        return u, self.log_ratio_beside(mixture, u, own / n, log_z)

    @torch.no_grad()
    def log_ratio_beside(
        self, mixture: Mixture, u: Tensor, own: float = OWN, log_z: float = 0.0
    ) -> Tensor:
        """log of a share of r, normalised, and the rest of a mixture over N(u; 0, 1), with shape (B,)."""
        log_base = -0.5 * (u.square() + LOG_TWO_PI).sum(1)
        estimate = self.log_ratio(u) - log_z + math.log(own)
        return torch.logaddexp(estimate, mixture.log_prob(u) - log_base + math.log(1 - own))

    def weighed(
        self, u: Tensor, log_q: Tensor, log_likelihood: Callable[[Tensor], Tensor]
    ) -> Weighted:
        """Draws u with shape (n, d) that were made with q, of which log q(u) / N(u; 0, 1) is given, with shape (n,).

        Raises:
            ValueError: A log-likelihood of another shape, nan, +inf, or -inf for all draws.
        """
        # a mixture has tails where the prior has nothing, and nobody wrote the likelihood for
        n, nowhere = len(u), (u.abs() > FARTHEST).any(1)
        theta = self.prior.from_normal(u.clamp(-FARTHEST, FARTHEST))
        log_l = as_tensor(log_likelihood(theta)).double()
        if tuple(log_l.shape) != (n,):
            raise ValueError(f"the log-likelihood has shape {tuple(log_l.shape)}, expected ({n},)")
        wrong = log_l.isnan() | (log_l == math.inf)
        if bool(wrong.any()):
            raise ValueError(
                f"the log-likelihood of {int(wrong.sum())} of {n} draws is {float(log_l[wrong][0]):g} (first: theta = "
                f"{theta[wrong][0].tolist()}); expected a number, or -inf where data cannot be"
            )
        log_w = (log_l - log_q).masked_fill(nowhere, -math.inf)
        if not bool((log_w > -math.inf).any()):
            raise ValueError(f"the log-likelihood of all {n} draws is -inf")
        # draws that the likelihood forbids count as almost nothing
        return Weighted(theta, log_w, evidence(log_w.clamp_min(float(log_w.max()) - NOTHING)))

    def strangeness(self) -> float:
        """Distance of the data's features from those of simulations, over that within which 99 of 100 of these lie.

        Above 1 the data are stranger than all but one in a hundred simulations; far above, the estimate means nothing. Of
        several members the median.
        """
        e = self.estimator
        each = [
            u.distance(m.many_features(self.x)) for u, m in zip(e.usual, e.members, strict=True)
        ]
        return float(torch.cat(each).median())

    @abstractmethod
    def _draw(self, n: int, seed: int) -> tuple[Tensor, float]:
        """n draws of u, with shape (n, d), in float64, and log of the integral of r N."""


class Tempered(Estimated):
    """The posterior of one observation whose density is known up to a constant."""

    def log_evidence(self, n: int = CHAINS, seed: int = 0) -> float:
        return self._run(n, stream(seed))[1]

    def _draw(self, n: int, seed: int) -> tuple[Tensor, float]:
        generator, chains = stream(seed), max(n, CHAINS)
        u, log_z = self._run(chains, generator)
        return u[torch.randperm(chains, generator=generator)[:n]], log_z

    def _run(self, chains: int, generator: torch.Generator) -> tuple[Tensor, float]:
        u = torch.randn(chains, len(self.prior), generator=generator, dtype=torch.float64)
        return temper(u, self.log_ratio, _differences, MOVES, generator)


def _differences(cloud: Tensor) -> Propose:
    """Moves by the differences of chains as they are now, under the prior N(0, 1)."""
    return partial(_moved, cloud)


def _moved(
    cloud: Tensor, u: Tensor, h: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    n, d = u.shape
    a, b = (torch.randint(n, (n,), generator=generator) for _ in range(2))
    leap = torch.rand(n, 1, generator=generator, dtype=u.dtype) < LEAPS
    g = torch.where(leap, 1.0, 2 * h * 2.38 / math.sqrt(2 * d))
    z = torch.randn(u.shape, generator=generator, dtype=u.dtype)
    new = u + g * (cloud[a] - cloud[b]) + JITTER * cloud.std(0) * z
    return new, 0.5 * (u.square() - new.square()).sum(1)
