"""H and K share a basis: everything element by element."""

from __future__ import annotations

import torch
from torch import Tensor

from scoreinv.conditioning.base import (
    Conditioned,
    Conditioner,
    FilterMobility,
    Mobility,
    expansion,
)
from scoreinv.gaussian import Covariance, Gaussian, dot, joint
from scoreinv.operators.information import Information, white


class CommutingConditioner(Conditioner):
    """H is diagonal where K is: everything element by element."""

    def __init__(
        self,
        H: Covariance,
        information: Information,
        D: Tensor,
        constant: float,
        dtype: torch.dtype,
    ):
        self.H, self.information, self.dtype = H, information, dtype
        self.D, self.constant = D, constant

    def given(self, K: Covariance, slack: float = 1.0) -> Conditioned:
        return _Commuting(self, K)

    def noise(self, n: int, generator: torch.Generator) -> Tensor:
        return self.H.sqrt(white(self.information.shape, n, generator, self.dtype))

    def inform(self, x: Tensor) -> Tensor:
        return self.H.apply(x)

    def misfit(self, m: Tensor, noise: Tensor | None = None) -> Tensor:
        D = self.D.to(m.dtype)
        return (D if noise is None else D + noise) - self.inform(m)

    def log_evidence(self, prior: Gaussian) -> float:
        mean, e = expansion(self, prior, self.H.apply)
        given = _Commuting(self, prior.covariance)
        return mean + 0.5 * float(dot(e, given.gain.apply(e))) - 0.5 * given.log_growth()


class _Commuting(Conditioned):
    def __init__(self, parent: CommutingConditioner, K: Covariance) -> None:
        self.parent, self.K = parent, K
        self.gain = joint(lambda h, k: k / (1 + h * k), parent.H, K)

    def shift(self, m: Tensor, noise: Tensor | None = None) -> Tensor:
        return self.respond(self.parent.misfit(m, noise))

    def respond(self, e: Tensor) -> Tensor:
        return self.gain.apply(e)

    def covariance(self) -> Covariance:
        return self.gain

    def log_growth(self) -> float:
        growth = joint(lambda h, k: 1 + h * k, self.parent.H, self.K)
        return growth.logdet(self.parent.information.shape)

    def mobility(self, prior_precision: Covariance, slope: Covariance) -> Mobility:
        M = joint(
            lambda h, k, q, w: 1 / (q + w**2 * h / (1 + h * k)),
            self.parent.H,
            self.K,
            prior_precision,
            slope,
        )
        return FilterMobility(M, self.parent.information.shape, self.parent.dtype)
