"""Many data on a large image: conjugate gradients, preconditioned by the circulants nearest to K and H."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

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
from scoreinv.conditioning.lanczos import lanczos_logdet, quadrature
from scoreinv.gaussian import (
    Covariance,
    Gaussian,
    Scalar,
    conjugate_gradients,
    dot,
    filtered,
    joint,
)
from scoreinv.operators.information import Information, white

SMALL = 1024  # pixels up to which determinants are exact
PROBES = 16  # of determinants, shared by all amplitudes
FORM = 0.02  # error of what Krylov spaces say of an evidence [nat]


class IterativeConditioner(Conditioner):
    """Conjugate gradients on K^-1 + H, preconditioned by the circulants nearest to both.

    The circulants also give the first guess, of what is left to explain once an image near the data is taken away.

    Args:
        C: Covariance of the prior.
        tolerance: Error of a solve, in standard deviations of the posterior, summed over its directions in squares. The
            number of iterations of each level is found once, on a probe, and then kept, so that a particle's solve never
            depends on its neighbours in the batch.
    """

    determinants = False

    def __init__(
        self,
        information: Information,
        D: Tensor,
        C: Covariance,
        constant: float,
        dtype: torch.dtype,
        tolerance: float,
    ) -> None:
        self.information, self.D, self.C, self.constant = information, D, C, constant
        self.dtype, self.tolerance = dtype, tolerance

    def given(self, K: Covariance, slack: float = 1.0) -> Conditioned:
        return _Iterative(self, K, slack * self.tolerance)

    def noise(self, n: int, generator: torch.Generator) -> Tensor:
        return self.information.draw(n, generator).to(self.dtype)

    @cached_property
    def known(self) -> Known:
        """The data of the observation."""
        return self._known(self.D.double()[None])

    @cached_property
    def probe(self) -> tuple[Known, Tensor]:
        """Data of a draw of N(0, C), to count iterations with, and that draw."""
        generator = torch.Generator().manual_seed(0)
        x = self.C.sqrt(white(self.information.shape, 1, generator, self.dtype))
        return self._known((self.information.apply(x) + self.noise(1, generator)).double()), x

    def _known(self, D: Tensor) -> Known:
        H = self.information.apply
        near, _ = conjugate_gradients(
            H, D, self.preconditioner(self.C), error=0.1, iterations=2000
        )
        return Known(near.to(self.dtype), (D - H(near)).to(self.dtype))

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

    def inform(self, x: Tensor) -> Tensor:
        return self.information.apply(x)

    def misfit(self, m: Tensor, noise: Tensor | None = None) -> Tensor:
        D = self.D.to(m.dtype)
        return (D if noise is None else D + noise) - self.inform(m)

    def log_evidence(self, prior: Gaussian) -> float:
        H = self.information.apply
        mean, e = expansion(self, prior, H)
        u, _ = conjugate_gradients(
            H, e, self.preconditioner(prior.covariance), error=1e-3, iterations=2000
        )
        return mean + 0.5 * float(dot(e, u)) - 0.5 * self.log_growth(prior.covariance)

    def evidence_curve(self, prior: Gaussian, near: float) -> Callable[[float], float]:
        # with G = C^1/2 H C^1/2 all amplitudes share one set of Krylov spaces
        C, shape = prior.covariance, self.information.shape
        H = self.information.apply
        nearby = self.information.nearby
        g = None if nearby is None else joint(torch.mul, nearby, C)
        if g is None or math.prod(shape) <= SMALL:
            return super().evidence_curve(prior, near)
        D, mean = self.D.double()[None], prior.mean.double()[None]
        Hm = H(mean)
        linear, square = float(dot(D, mean)), float(dot(mean, Hm))
        b, c = C.sqrt(D), C.sqrt(Hm)
        generator = torch.Generator().manual_seed(0)
        z = 2.0 * torch.randint(0, 2, (PROBES, *shape), generator=generator).double() - 1
        root = lambda v: C.sqrt(H(C.sqrt(v)))
        widest = (3 * near) ** 2
        forms = quadrature(
            root, torch.cat([b, c, b + c]), lambda v: 0.5 * widest / (1 + widest * v), FORM
        )
        traces = quadrature(root, z, lambda v: torch.log1p(widest * v), FORM)

        def curve(a: float) -> float:
            bb, cc, both = forms.form(lambda v: 1 / (1 + a**2 * v)).tolist()
            bc = 0.5 * (both - bb - cc)
            misfit = self.constant + a * linear - 0.5 * a**2 * square
            misfit += 0.5 * a**2 * (bb - 2 * a * bc + a**2 * cc)
            # the circulant's determinant is exact; only what it leaves out is estimated
            log1p = g.map(lambda v: torch.log1p(a**2 * v))
            left = traces.form(lambda v: torch.log1p(a**2 * v)) - dot(z, log1p.apply(z))
            return misfit - 0.5 * (float(log1p.eigenvalues(shape).sum()) + float(left.mean()))

        return curve

    def log_growth(self, C: Covariance) -> float:
        """log det(I + C^1/2 H C^1/2): exactly for small images, by Lanczos quadrature beyond."""
        d, nearby = math.prod(self.information.shape), self.information.nearby
        H = self.information.apply
        root = lambda v: C.sqrt(H(C.sqrt(v)))
        if d <= SMALL:
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
class Known:
    """Data as an image near them and the rest.

    Attributes:
        near: (C^-1 + H)^-1 D, with shape (1, C, H, W).
        rest: D - H near, with the same shape.
    """

    near: Tensor
    rest: Tensor


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
        self.rest = self._filtered(parent.known.rest)
        # an image that is as far from the truth as K allows
        generator, (known, truth) = torch.Generator().manual_seed(1), parent.probe
        m = truth + K.sqrt(white(parent.information.shape, 1, generator, parent.dtype))
        _, left = self._circulant(m - known.near, self._filtered(known.rest))
        _, self.iterations = conjugate_gradients(self.H, left, self.preconditioner, tolerance)

    def shift(self, m: Tensor, noise: Tensor | None = None) -> Tensor:
        rest = self.rest
        if noise is not None:
            rest = [a + b for a, b in zip(rest, self._filtered(noise), strict=True)]
        u, left = self._circulant(m - self.parent.known.near, rest)
        more, _ = conjugate_gradients(self.H, left, self.preconditioner, 0.0, self.iterations)
        return u + more

    def respond(self, e: Tensor) -> Tensor:
        u, _ = conjugate_gradients(self.H, e, self.preconditioner, 0.0, self.iterations)
        return u

    def log_growth(self) -> float:
        return self.parent.log_growth(self.K)

    def _filtered(self, D: Tensor) -> list[Tensor]:
        """M D and H_c M D."""
        return filtered(D, self.preconditioner.M, self.preconditioner.pulled)

    def _circulant(self, m: Tensor, D: list[Tensor]) -> tuple[Tensor, Tensor]:
        """The shift if H were its circulant, u = M (D - H_c m), and what is left: (H_c - H)(m + u).

        Args:
            m: Means, with shape (B, C, H, W).
            D: From `_filtered`.
        """
        pulled, near = filtered(m, self.preconditioner.pulled, self.preconditioner.near)
        u = D[0] - pulled
        return u, near + D[1] - self.H(m + u)

    def mobility(self, prior_precision: Covariance, slope: Covariance) -> Mobility:
        # any fixed M leaves the target invariant; the circulant one is a filter
        nearby = self.parent.information.nearby
        M = None if nearby is None else joint(
            lambda h, k, q, w: 1 / (q + w**2 * h / (1 + h * k)),
            nearby, self.K, prior_precision, slope,
        )  # fmt: skip
        M = prior_precision.map(torch.reciprocal) if M is None else M
        return FilterMobility(M, self.parent.information.shape, self.parent.dtype)
