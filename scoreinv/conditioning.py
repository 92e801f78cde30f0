"""Conditioning a Gaussian on the data: the one linear-algebra question of every sampler.

If x ~ N(m, K) and y = A x + n, n ~ N(0, S), the posterior mean of x is m + u with

    u = (K^-1 + H)^-1 (D - H m),     H = A^T S^-1 A,  D = A^T S^-1 y

and m + u is a draw of the posterior if m is a draw of the prior and D is perturbed by a draw of
N(0, H) (Matheron's rule; Papandreou & Yuille, Gaussian Sampling by Local Perturbations, 2010).
Three ways to solve: element by element where H and K share a basis, a factorisation in data space
where the data are few, and preconditioned conjugate gradients otherwise.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from scoreinv.gaussian import (
    Covariance,
    Dense,
    Gaussian,
    Scalar,
    conjugate_gradients,
    dot,
    filtered,
    joint,
)
from scoreinv.likelihood import Likelihood
from scoreinv.operators.information import Information, white

FEW_DATA = 512  # data-space factorisations up to this size; beyond, conjugate gradients are faster


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
    def log_evidence(self, prior: Gaussian) -> float:
        """log N(y; A mean, S + A C A^T), in nats."""


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


# ---------------------------------------------------------------- H and K share a basis


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

    def log_evidence(self, prior: Gaussian) -> float:
        mean, e = _expansion(self, prior, self.H.apply)
        given = _Commuting(self, prior.covariance)
        return mean + 0.5 * float(dot(e, given.gain.apply(e))) - 0.5 * given.log_growth()


class _Commuting(Conditioned):
    def __init__(self, parent: CommutingConditioner, K: Covariance) -> None:
        self.parent, self.K = parent, K
        self.D = parent.D.to(parent.dtype)
        self.gain = joint(lambda h, k: k / (1 + h * k), parent.H, K)

    def shift(self, m: Tensor, noise: Tensor | None = None) -> Tensor:
        D = self.D if noise is None else self.D + noise
        return self.gain.apply(D - self.parent.H.apply(m))

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


# ---------------------------------------------------------------- few data: a factorisation


class DataSpaceConditioner(Conditioner):
    """The whitened operator B = S^-1/2 A as a matrix, compressed to at most d rows."""

    def __init__(
        self, B: Tensor, y: Tensor, shape: tuple[int, ...], constant: float, dtype: torch.dtype
    ) -> None:
        self.shape, self.dtype, self.constant = shape, dtype, constant
        rest = 0.0
        if B.shape[0] > B.shape[1]:
            Q, B = torch.linalg.qr(B)
            rest, y = float(y @ y), Q.T @ y
            rest -= float(y @ y)
        self.B, self.y, self.rest = B, y, rest

    def given(self, K: Covariance, slack: float = 1.0) -> Conditioned:
        return _InDataSpace(self, K)

    def noise(self, n: int, generator: torch.Generator) -> Tensor:
        return white((len(self.y),), n, generator, torch.float64)

    def predict(self, x: Tensor) -> Tensor:
        """B x, with shape (B, m)."""
        return x.flatten(1).double() @ self.B.T

    def propagate(self, K: Covariance) -> Tensor:
        """B K, with shape (m, d)."""
        return K.apply(self.B.reshape(-1, *self.shape)).flatten(1)

    def log_evidence(self, prior: Gaussian) -> float:
        r = self.y - self.predict(prior.mean[None])[0]
        L = _cholesky(self.propagate(prior.covariance) @ self.B.T)
        white_r = torch.linalg.solve_triangular(L, r[:, None], upper=False)
        return (
            self.constant
            - 0.5 * (self.rest + float(white_r.square().sum()))
            - float(L.diagonal().log().sum())
        )


class _InDataSpace(Conditioned):
    def __init__(self, parent: DataSpaceConditioner, K: Covariance) -> None:
        self.parent, self.K = parent, K
        self.L = _cholesky(parent.propagate(K) @ parent.B.T)

    def shift(self, m: Tensor, noise: Tensor | None = None) -> Tensor:
        r = self.parent.y - self.parent.predict(m)
        r = r if noise is None else r + noise
        pull = torch.cholesky_solve(r.T, self.L).T @ self.parent.B
        return self.K.apply(pull.reshape(m.shape)).to(m.dtype)

    def log_growth(self) -> float:
        return 2 * float(self.L.diagonal().log().sum())

    def mobility(self, prior_precision: Covariance, slope: Covariance) -> Mobility:
        return _DataSpaceMobility(self, prior_precision.map(torch.reciprocal), slope)


class _DataSpaceMobility(Mobility):
    """M = R - R W B^T (L L^T + B W R W B^T)^-1 B W R with R = Q^-1, where P = B^T (L L^T)^-1 B."""

    def __init__(self, level: _InDataSpace, R: Covariance, slope: Covariance) -> None:
        self.parent, self.R, self.L = level.parent, R, level.L
        self.BW = self.parent.propagate(slope)
        self.BWR = R.apply(self.BW.reshape(-1, *self.parent.shape)).flatten(1)
        self.root = torch.linalg.cholesky(self.L @ self.L.T + self.BWR @ self.BW.T)

    def _remove(self, v: Tensor, seen: Tensor) -> Tensor:
        return v - (torch.cholesky_solve(seen.T, self.root).T @ self.BWR).reshape(v.shape).to(
            v.dtype
        )

    def apply(self, v: Tensor) -> Tensor:
        flat = v.flatten(1).double()
        return self._remove(self.R.apply(v), flat @ self.BWR.T)

    def draw(self, n: int, generator: torch.Generator) -> Tensor:
        x = self.R.sqrt(white(self.parent.shape, n, generator, self.parent.dtype))
        z = white((len(self.L),), n, generator, torch.float64)
        return self._remove(x, x.flatten(1).double() @ self.BW.T + z @ self.L.T)


def _cholesky(G: Tensor) -> Tensor:
    """The Cholesky factor of I + G."""
    return torch.linalg.cholesky(0.5 * (G + G.T) + torch.eye(len(G), dtype=G.dtype))


# ---------------------------------------------------------------- otherwise: conjugate gradients


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
        mean, e = _expansion(self, prior, H)
        u, _ = conjugate_gradients(
            H, e, self.preconditioner(prior.covariance), tolerance=1e-8, iterations=2000
        )
        return mean + 0.5 * float(dot(e, u)) - 0.5 * self.log_growth(prior.covariance)

    def log_growth(self, C: Covariance) -> float:
        """log det(I + C^1/2 H C^1/2): exactly for small images, by Lanczos quadrature beyond.

        Ubaru, Chen & Saad, Fast Estimation of tr(f(A)) via Stochastic Lanczos Quadrature (2017).
        """
        d, nearby = math.prod(self.information.shape), self.information.nearby
        H = self.information.apply
        root = lambda v: C.sqrt(H(C.sqrt(v)))
        if d <= 1024:
            G = root(
                torch.eye(d, dtype=torch.float64).reshape(d, *self.information.shape)
            ).flatten(1)
            return 2 * float(_cholesky(G).diagonal().log().sum())
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


def lanczos_logdet(
    operator: Callable[[Tensor], Tensor],
    shape: tuple[int, ...],
    error: float = 0.5,
    most: int = 16,
) -> tuple[float, float]:
    """log det of a symmetric positive definite operator by Lanczos quadrature, and its standard error [nat].

    Args:
        operator: Acts on (B, *shape).
        shape: Shape of one image.
        error: Standard error at which no more probes are drawn [nat].
        most: Batches of 64 probes at most.
    """
    generator, values = torch.Generator().manual_seed(0), torch.zeros(0, dtype=torch.float64)
    for _ in range(most):
        z = 2.0 * torch.randint(0, 2, (64, *shape), generator=generator).double() - 1
        values = torch.cat([values, lanczos(operator, z)])
        reached = float(values.std()) / len(values) ** 0.5
        if reached < error:
            break
    return float(values.mean()), reached


def lanczos(
    operator: Callable[[Tensor], Tensor], z: Tensor, steps: int = 40, tolerance: float = 1e-3
) -> Tensor:
    """z^T log(operator) z for each probe z, with shape (B,).

    Args:
        operator: Symmetric positive definite, acts on (B, *shape).
        z: Probes, with shape (B, *shape).
        steps: At most so many nodes of the quadrature.
        tolerance: Stops when another node changes the mean by less.
    """
    norm, column = dot(z, z), lambda c: c.reshape(-1, *[1] * (z.ndim - 1))
    q, previous, beta = z / column(norm.sqrt()), torch.zeros_like(z), torch.zeros_like(norm)
    alphas, betas, basis, result = [], [], [q], torch.full_like(norm, math.inf)
    for _ in range(steps):
        w = operator(q) - column(beta) * previous
        alpha = dot(w, q)
        w = w - column(alpha) * q
        for p in basis:  # full reorthogonalisation: rounding would repeat eigenvalues
            w = w - column(dot(w, p)) * p
        alphas.append(alpha)
        result, before = norm * _quadrature(alphas, betas), result
        beta = dot(w, w).sqrt()
        if float((result - before).mean().abs()) < tolerance or float(beta.max()) < 1e-12:
            break
        betas.append(beta)
        previous, q = q, w / column(beta.clamp_min(1e-30))
        basis.append(q)
    return result


def _quadrature(alphas: list[Tensor], betas: list[Tensor]) -> Tensor:
    """e_1^T log(T) e_1 for tridiagonal matrices T, with shape (B,)."""
    T = torch.diag_embed(torch.stack(alphas, 1))
    if betas:
        off = torch.stack(betas, 1)
        T = T + torch.diag_embed(off, 1) + torch.diag_embed(off, -1)
    values, vectors = torch.linalg.eigh(T)
    return (vectors[:, 0].square() * values.clamp_min(1e-300).log()).sum(1)


def _expansion(conditioner, prior: Gaussian, H) -> tuple[float, Tensor]:
    """log N(y; A mean, S), and D - H mean with shape (1, C, H, W)."""
    mean = prior.mean.double()[None]
    D = conditioner.D.double()[None]
    Hm = H(mean)
    return conditioner.constant + float(dot(D, mean) - 0.5 * dot(mean, Hm)), D - Hm


def conditioner(
    likelihood: Likelihood,
    y: Tensor,
    C: Covariance,
    dtype: torch.dtype,
    tolerance: float = 1e-3,
) -> Conditioner:
    """The cheapest exact conditioner for Gaussians whose covariance shares a basis with C.

    Args:
        likelihood: Linear and Gaussian.
        y: Data, with shape (*data).
        C: Covariance of the prior.
        dtype: Precision of the particles.
        tolerance: Of the iterative solves, where those are needed.
    """
    operator, noise = likelihood.operator, likelihood.noise
    constant = float(noise.log_prob(torch.zeros_like(y)[None]))
    whitened = noise.whiten(y[None].to(torch.complex128 if operator.complex else torch.float64))
    misfit = -0.5 * float(whitened.abs().square().sum())
    information = operator.information(noise, dtype)
    D = likelihood.projection(y)
    if (
        information.exact is not None
        and joint(lambda h, c: h + c, information.exact, C) is not None
    ):
        return CommutingConditioner(information.exact, information, D, constant + misfit, dtype)
    rows = math.prod(operator.data_shape) * (2 if operator.complex else 1)
    d = math.prod(operator.shape)
    if min(rows, d) <= FEW_DATA or information.nearby is None or isinstance(C, Dense):
        B = _whitened_matrix(likelihood)
        flat = (torch.view_as_real(whitened) if operator.complex else whitened).reshape(-1)
        return DataSpaceConditioner(B, flat.double(), operator.shape, constant, dtype)
    return IterativeConditioner(information, D, constant + misfit, dtype, tolerance)


def _whitened_matrix(likelihood: Likelihood) -> Tensor:
    """S^-1/2 A, with shape (m, d); real and imaginary parts are rows of their own."""
    operator, whiten = likelihood.operator, likelihood.noise.whiten
    d, parts = math.prod(operator.shape), (2,) if operator.complex else ()
    m = math.prod((*operator.data_shape, *parts))
    if m < d:
        unit = torch.eye(m, dtype=torch.float64).reshape(m, *operator.data_shape, *parts)
        unit = torch.view_as_complex(unit) if operator.complex else unit
        return operator.transpose(whiten(unit)).reshape(m, d)
    columns = whiten(
        operator.forward(torch.eye(d, dtype=torch.float64).reshape(d, *operator.shape))
    )
    columns = torch.view_as_real(columns) if operator.complex else columns
    return columns.reshape(d, m).T.contiguous()
