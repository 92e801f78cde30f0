"""Mixtures that are fitted to weighted draws, and drawn from in their place.

Draws of a rough proposal, weighted, tell where a better one is: adaptive importance sampling by populations (Cappe, Douc,
Guillin, Marin & Robert 2008, arXiv:0710.4242). Components are fitted as Gaussians and drawn as Student's t, so that no
weight is large for want of a tail.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from scoreinv.samplers.tempering import rise

COMPONENTS = 32  # at most
EACH = 10  # effective draws for each number of a component's mean, at least
ROUNDS = 20  # of expectation and maximisation
LEAST = 0.05  # of the draws that must count: the weights are tempered until they do
FREEDOM = 5  # of Student's t
WORTH = 0.2  # of the most effective draws, which others must be worth to count beside them
FORGOTTEN = 14.0  # below the largest log-weight [nat]


@dataclass(frozen=True)
class Mixture:
    """sum_j p_j t(mean_j, R_j R_j^T), of `FREEDOM` degrees.

    Attributes:
        log_p: With shape (J,).
        means: With shape (J, d).
        roots: R, lower triangular, with shape (J, d, d).
    """

    log_p: Tensor
    means: Tensor
    roots: Tensor

    @classmethod
    def fitted(cls, u: Tensor, log_w: Tensor, generator: torch.Generator) -> Mixture:
        """By expectation and maximisation of Gaussians, as many as the draws are worth.

        Covariances count d + 2 draws of all components' own width before any other, so that few draws make none too narrow.

        Args:
            u: Draws, with shape (n, d).
            log_w: Their log-weights, with shape (n,).
            generator: Chooses where components start.
        """
        w = torch.softmax(rise(log_w, 1.0, LEAST) * log_w, 0)
        d, effective = u.shape[1], float(1 / w.square().sum())
        J = max(1, min(COMPONENTS, int(effective / (EACH * d)), int((w > 0).sum())))
        width = _covariance(u, w[:, None], (w @ u)[None])[0] * J ** (-2 / d)
        width = width + 1e-10 * torch.eye(d, dtype=u.dtype)
        at = torch.multinomial(w, J, generator=generator)
        found = cls(
            torch.full((J,), -math.log(J), dtype=u.dtype),
            u[at],
            torch.linalg.cholesky(width).expand(J, d, d),
        )
        for _ in range(ROUNDS):
            log_each = (found.log_p - found._log_volume)[:, None] - 0.5 * found._square(u)
            share = w[:, None] * torch.softmax(log_each, 0).T
            p = share.sum(0)
            means = (share.T @ u) / p.clamp_min(1e-300)[:, None]
            count = (effective * p)[:, None, None]
            spread = _covariance(u, share / p.clamp_min(1e-300), means)
            covariance = (count * spread + (d + 2) * width) / (count + d + 2)
            found = cls(p.clamp_min(1e-300).log(), means, torch.linalg.cholesky(covariance))
        return found

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """n draws, with shape (n, d)."""
        j = torch.multinomial(self.log_p.exp(), n, replacement=True, generator=generator)
        normal = lambda m: torch.randn(n, m, generator=generator, dtype=self.means.dtype)
        z = normal(self.means.shape[1])
        z = z / normal(FREEDOM).square().mean(1, keepdim=True).sqrt()
        return self.means[j] + (self.roots[j] @ z[:, :, None])[..., 0]

    def log_prob(self, u: Tensor) -> Tensor:
        """With shape (n,), for u with shape (n, d)."""
        d, half = u.shape[1], (FREEDOM + u.shape[1]) / 2
        constant = (
            math.lgamma(half) - math.lgamma(FREEDOM / 2) - d / 2 * math.log(math.pi * FREEDOM)
        )
        log_each = -half * torch.log1p(self._square(u) / FREEDOM)
        return constant + torch.logsumexp((self.log_p - self._log_volume)[:, None] + log_each, 0)

    def _square(self, u: Tensor) -> Tensor:
        """|R_j^-1 (u - mean_j)|^2, with shape (J, n)."""
        off = (u - self.means[:, None]).transpose(1, 2)
        return torch.linalg.solve_triangular(self.roots, off, upper=False).square().sum(1)

    @property
    def _log_volume(self) -> Tensor:
        """log det R_j, with shape (J,)."""
        return self.roots.diagonal(dim1=1, dim2=2).log().sum(1)


@dataclass
class Population:
    """Weighted draws of one posterior, of several proposals, each of which counts by what its draws are worth.

    Attributes:
        known: Effective draws, draws u, and log-weights, of each proposal.
    """

    known: list[tuple[float, Tensor, Tensor]] = field(default_factory=list)

    def add(self, u: Tensor, log_w: Tensor) -> None:
        """Draws with shape (n, d) and their log-weights with shape (n,), up to a constant."""
        log_w = torch.log_softmax(log_w, 0)
        log_n_eff = -torch.logsumexp(2 * log_w, 0)
        log_w = log_w + log_n_eff
        some = log_w > log_w.max() - FORGOTTEN
        self.known.append((float(log_n_eff.exp()), u[some], log_w[some]))

    def fitted(self, generator: torch.Generator) -> Mixture:
        """A mixture fitted to all of them."""
        best = max(n_eff for n_eff, *_ in self.known)
        counted = [one for one in self.known if one[0] >= WORTH * best]
        _, u, log_w = zip(*counted, strict=True)
        return Mixture.fitted(torch.cat(u), torch.cat(log_w), generator)


def _covariance(u: Tensor, share: Tensor, means: Tensor) -> Tensor:
    """About each mean, with shape (J, d, d), of draws (n, d) by their shares (n, J)."""
    off = u - means[:, None]
    return torch.einsum("nj,jna,jnb->jab", share, off, off)
