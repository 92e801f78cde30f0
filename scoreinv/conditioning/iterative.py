"""Many data on a large image: conjugate gradients, preconditioned by the circulants nearest to K and H."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from scoreinv.conditioning.base import (
    Conditioned,
    Conditioner,
    FilterMobility,
    Mobility,
    cholesky,
    expansion,
)
from scoreinv.conditioning.lanczos import lanczos_logdet
from scoreinv.gaussian import (
    Covariance,
    Gaussian,
    Scalar,
    conjugate_gradients,
    dot,
    filtered,
    joint,
)
from scoreinv.operators.information import Information


class IterativeConditioner(Conditioner):
    """Conjugate gradients on K^-1 + H, preconditioned by the circulants nearest to both.

    Args:
        tolerance: Relative residual at which a solve stops. The number of iterations of each level
            is found once, on a probe, and then kept, so that a particle's solve never depends on
            its neighbours in the batch.
    """

    determinants = False

    def __init__(
        self,
        information: Information,
        D: Tensor,
        constant: float,
        dtype: torch.dtype,
        tolerance: float,
    ) -> None:
        self.information, self.D, self.constant, self.dtype = information, D, constant, dtype
        self.tolerance = tolerance

    def given(self, K: Covariance, slack: float = 1.0) -> Conditioned:
        return _Iterative(self, K, slack * self.tolerance)

    def noise(self, n: int, generator: torch.Generator) -> Tensor:
        return self.information.draw(n, generator).to(self.dtype)

    def preconditioner(self, K: Covariance) -> Preconditioner:
        """With H replaced by its nearest circulant; by nothing where that does not share a basis with K."""
        h = self.information.nearby
        if h is None or joint(torch.mul, h, K) is None:
            return Preconditioner(K, Scalar(1.0), Scalar(0.0), Scalar(0.0))
        return Preconditioner(
            M=joint(lambda h, k: k / (1 + h * k), h, K),
            free=joint(lambda h, k: 1 / (1 + h * k), h, K),
            pulled=joint(lambda h, k: h * k / (1 + h * k), h, K),
            near=joint(lambda h, k: h / (1 + h * k), h, K),
        )

    def log_evidence(self, prior: Gaussian) -> float:
        H = self.information.apply
        mean, e = expansion(self, prior, H)
        u, _ = conjugate_gradients(
            H, e, self.preconditioner(prior.covariance), tolerance=1e-8, iterations=2000
        )
        return mean + 0.5 * float(dot(e, u)) - 0.5 * self.log_growth(prior.covariance)

    def log_growth(self, C: Covariance) -> float:
        """log det(I + C^1/2 H C^1/2): exactly for small images, by Lanczos quadrature beyond."""
        d, nearby = math.prod(self.information.shape), self.information.nearby
        H = self.information.apply
        root = lambda v: C.sqrt(H(C.sqrt(v)))
        if d <= 1024:
            G = root(
                torch.eye(d, dtype=torch.float64).reshape(d, *self.information.shape)
            ).flatten(1)
            return 2 * float(cholesky(G).diagonal().log().sum())
        circulant = None if nearby is None else joint(lambda h, k: 1 + h * k, nearby, C)
        if circulant is None:
            return lanczos_logdet(lambda v: v + root(v), self.information.shape)[0]
        # the circulant's determinant is exact; only the ratio, close to one, is estimated
        half = circulant.map(torch.rsqrt)
        ratio = lambda v: half.apply(half.apply(v) + root(half.apply(v)))
        estimated, _ = lanczos_logdet(ratio, self.information.shape)
        return circulant.logdet(self.information.shape) + estimated


@dataclass(frozen=True)
class Preconditioner:
    """M = (K^-1 + H_c)^-1 for a circulant H_c near H.

    Attributes:
        M: The operator itself.
        free: K^-1 M, what the data leave alone.
        pulled: M H_c, what the data replace.
        near: H_c K^-1 M.
    """

    M: Covariance
    free: Covariance
    pulled: Covariance
    near: Covariance

    def __call__(self, r: Tensor) -> tuple[Tensor, Tensor]:
        Mr, KMr = filtered(r, self.M, self.free)
        return Mr, KMr


class _Iterative(Conditioned):
    def __init__(self, parent: IterativeConditioner, K: Covariance, tolerance: float) -> None:
        self.parent, self.K, self.H = parent, K, parent.information.apply
        self.preconditioner = parent.preconditioner(K)
        self.known = self._known(parent.D.to(parent.dtype)[None])
        probe = parent.noise(1, torch.Generator().manual_seed(0))
        left = self._circulant(torch.zeros_like(probe), self._known(probe))[1]
        # the tolerance is relative to the probe, of which the circulant has left little
        norm = lambda r: dot(r, self.preconditioner(r)[0]).sqrt()
        share = float(norm(left) / norm(probe))
        self.iterations = conjugate_gradients(
            self.H, left, self.preconditioner, tolerance / max(share, 1e-12)
        )[1]

    def shift(self, m: Tensor, noise: Tensor | None = None) -> Tensor:
        known = self.known
        if noise is not None:
            known = [a + b for a, b in zip(known, self._known(noise), strict=True)]
        u, left = self._circulant(m, known)
        rest, _ = conjugate_gradients(self.H, left, self.preconditioner, 0.0, self.iterations)
        return u + rest

    def log_growth(self) -> float:
        return self.parent.log_growth(self.K)

    def _known(self, D: Tensor) -> list[Tensor]:
        """M D and H_c M D."""
        return filtered(D, self.preconditioner.M, self.preconditioner.pulled)

    def _circulant(self, m: Tensor, known: list[Tensor]) -> tuple[Tensor, Tensor]:
        """The shift if H were its circulant, u = M (D - H_c m), and what is left: (H_c - H)(m + u)."""
        pulled, near = filtered(m, self.preconditioner.pulled, self.preconditioner.near)
        u = known[0] - pulled
        return u, near + known[1] - self.H(m + u)

    def mobility(self, prior_precision: Covariance, slope: Covariance) -> Mobility:
        # any fixed M leaves the target invariant; the circulant one is a filter
        nearby = self.parent.information.nearby
        M = None if nearby is None else joint(
            lambda h, k, q, w: 1 / (q + w**2 * h / (1 + h * k)),
            nearby, self.K, prior_precision, slope,
        )  # fmt: skip
        M = prior_precision.map(torch.reciprocal) if M is None else M
        return FilterMobility(M, self.parent.information.shape, self.parent.dtype)
