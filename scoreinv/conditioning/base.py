"""What conditioning a Gaussian on data means, whichever way it is solved.

If x ~ N(m, K) and y = A x + n, n ~ N(0, S), the posterior mean of x is m + u with

    u = (K^-1 + H)^-1 (D - H m),     H = A^T S^-1 A,  D = A^T S^-1 y

and m + u is a draw of the posterior if m is a draw of the prior and D is perturbed by a draw of N(0, H) (Matheron's rule;
Papandreou & Yuille, Gaussian Sampling by Local Perturbations, 2010).
"""

from __future__ import annotations

import abc
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from scoreinv.gaussian import Covariance, Gaussian, dot
from scoreinv.operators.information import white


class Mobility(abc.ABC):
    """A covariance M to precondition moves with: M v, and draws of N(0, M)."""

    @abc.abstractmethod
    def apply(self, v: Tensor) -> Tensor:
        """M v, with shape (B, C, H, W)."""

    @abc.abstractmethod
    def draw(self, n: int, generator: torch.Generator) -> Tensor:
        """Draws of N(0, M), with shape (n, C, H, W)."""


class Conditioned(abc.ABC):
    """A Gaussian of covariance K conditioned on the data, for any mean."""

    @abc.abstractmethod
    def shift(self, m: Tensor, noise: Tensor | None = None) -> Tensor:
        """u = (K^-1 + H)^-1 (D - H m), with shape (B, C, H, W).

        Args:
            m: Means, with shape (B, C, H, W).
            noise: From `Conditioner.noise`, to perturb the data for a posterior draw.
        """

    @abc.abstractmethod
    def respond(self, e: Tensor) -> Tensor:
        """(K^-1 + H)^-1 e, with shape (B, C, H, W): the shift for misfits e = A^T S^-1 (y - A m) to any data."""

    def covariance(self) -> Covariance | None:
        """(K^-1 + H)^-1, where it is known direction by direction."""
        return None

    @abc.abstractmethod
    def log_growth(self) -> float:
        """log det(I + H K): how much wider the data are than their noise [nat]."""

    @abc.abstractmethod
    def mobility(self, prior_precision: Covariance, slope: Covariance) -> Mobility:
        """M = (Q + W P W)^-1 with Q the prior's precision, W = `slope`, and P = (K + H^-1)^-1."""


class Conditioner(abc.ABC):
    """The data of one observation, ready to condition Gaussians on.

    Attributes:
        determinants: Whether `Conditioned.log_growth` costs no more than a solve.
    """

    determinants: ClassVar[bool] = True

    @abc.abstractmethod
    def given(self, K: Covariance, slack: float = 1.0) -> Conditioned:
        """Prepare for the covariance K; an iterative solver may stop at `slack` times its tolerance."""

    @abc.abstractmethod
    def noise(self, n: int, generator: torch.Generator) -> Tensor:
        """n draws of the data's noise, as `Conditioned.shift` takes it."""

    @abc.abstractmethod
    def inform(self, x: Tensor) -> Tensor:
        """H x, with shape (B, C, H, W)."""

    @abc.abstractmethod
    def misfit(self, m: Tensor, noise: Tensor | None = None) -> Tensor:
        """D - H m, with shape (B, C, H, W); the data perturbed by noise from `noise`, if given."""

    @abc.abstractmethod
    def log_evidence(self, prior: Gaussian) -> float:
        """log N(y; A mean, S + A C A^T), in nats."""

    def evidence_curve(self, prior: Gaussian, near: float) -> Callable[[float], float]:
        """log N(y; a A mean, S + a^2 A C A^T) as a function of the amplitude a, up to what hardly depends on a.

        Args:
            prior: For a = 1.
            near: Amplitudes of interest are no larger than a few times this.
        """
        return lambda a: self.log_evidence(prior.rescaled(a))


@dataclass(frozen=True)
class FilterMobility(Mobility):
    """M diagonal in the prior's own basis."""

    covariance: Covariance
    shape: tuple[int, ...]
    dtype: torch.dtype

    def apply(self, v: Tensor) -> Tensor:
        return self.covariance.apply(v)

    def draw(self, n: int, generator: torch.Generator) -> Tensor:
        return self.covariance.sqrt(white(self.shape, n, generator, self.dtype))


def expansion(
    conditioner: Conditioner, prior: Gaussian, H: Callable[[Tensor], Tensor]
) -> tuple[float, Tensor]:
    """log N(y; A mean, S), and D - H mean with shape (1, C, H, W)."""
    mean = prior.mean.double()[None]
    D = conditioner.D.double()[None]
    Hm = H(mean)
    return conditioner.constant + float(dot(D, mean) - 0.5 * dot(mean, Hm)), D - Hm


def cholesky(G: Tensor) -> Tensor:
    """The Cholesky factor of I + G."""
    return torch.linalg.cholesky(0.5 * (G + G.T) + torch.eye(len(G), dtype=G.dtype))
