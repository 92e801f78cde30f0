"""Closed forms that the tests compare with: dense matrices, direct sums and exact posteriors.

Nothing here uses an FFT, a structured covariance or an iterative solver: what the package computes
quickly is computed slowly, straight from its definition. Vectors are flat, with shape (d,).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from scipy import stats
from torch import Tensor
from torch.distributions import MultivariateNormal

ARCSEC = math.pi / 180 / 3600
PIXEL = 0.1  # [arcsec]


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=rng(seed), dtype=dtype)


def uniform(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=rng(seed), dtype=torch.float64)


def spd(d: int, seed: int = 0) -> Tensor:
    """A positive definite matrix, with shape (d, d)."""
    root = normal(d, d, seed=seed)
    return root @ root.T / d + 0.1 * torch.eye(d, dtype=torch.float64)


def baselines(n: int, seed: int = 0) -> Tensor:
    """uv [lambda], with shape (n, 2), up to the longest that pixels of PIXEL sample."""
    return (2 * uniform(n, 2, seed=seed) - 1) / (2 * PIXEL * ARCSEC)


def dense(f: Callable[[Tensor], Tensor], shape: tuple[int, ...]) -> Tensor:
    """The matrix of a linear map of batches, with shape (m, d), by applying it to unit vectors.

    Real and imaginary parts of complex values are rows of their own, one after the other.
    """
    d = math.prod(shape)
    columns = f(torch.eye(d, dtype=torch.float64).reshape(d, *shape))
    columns = torch.view_as_real(columns) if columns.is_complex() else columns
    return columns.reshape(d, -1).T.contiguous()


def flat(y: Tensor) -> Tensor:
    """Data as real numbers, in the order of the rows of `dense`."""
    return (torch.view_as_real(y) if y.is_complex() else y).flatten()


def power_law(H: int, W: int, slope: float = 3.0) -> Tensor:
    """P(k) ~ (k0^2 + k^2)^(-slope / 2) in the order of fft2, of unit variance in each pixel."""
    ky, kx = torch.fft.fftfreq(H).double()[:, None], torch.fft.fftfreq(W).double()
    spectrum = (0.1**2 + ky**2 + kx**2) ** (-slope / 2)
    return spectrum / spectrum.mean()


def visibilities(x: Tensor, uv: Tensor, pixel_scale: float) -> Tensor:
    """V_k = sum_j x_j exp(-2 pi i (u_k l_j + v_k m_j)), with shape (B, N), term by term.

    Args:
        x: Images, with shape (B, 1, H, W).
        uv: Baselines [lambda], with shape (N, 2).
        pixel_scale: Side of a pixel [arcsec].
    """
    H, W = x.shape[-2:]
    l = -(torch.arange(W, dtype=torch.float64) - W // 2) * pixel_scale * ARCSEC
    m = (torch.arange(H, dtype=torch.float64) - H // 2) * pixel_scale * ARCSEC
    phase = uv[:, 0, None, None] * l + uv[:, 1, None, None] * m[:, None]
    return torch.einsum("khw,bchw->bk", torch.exp(-2j * math.pi * phase), x.to(torch.complex128))


@dataclass(frozen=True)
class Mixture:
    """sum_k w_k N(mu_k, C_k); a Gaussian is a mixture of one.

    Args:
        weights: With shape (K,), of sum one.
        means: With shape (K, d).
        covariances: With shape (K, d, d).
    """

    weights: Tensor
    means: Tensor
    covariances: Tensor

    @property
    def mean(self) -> Tensor:
        return self.weights @ self.means

    @property
    def covariance(self) -> Tensor:
        offsets = self.means - self.mean
        within = torch.einsum("k,kij->ij", self.weights, self.covariances)
        return within + torch.einsum("k,ki,kj->ij", self.weights, offsets, offsets)

    def log_prob(self, x: Tensor) -> Tensor:
        """With shape (B,), for x with shape (B, d)."""
        parts = MultivariateNormal(self.means, self.covariances).log_prob(x[:, None])
        return torch.logsumexp(self.weights.log() + parts, 1)

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """Draws, with shape (n, d)."""
        k = torch.multinomial(self.weights, n, replacement=True, generator=generator)
        z = torch.randn((n, self.means.shape[1]), generator=generator, dtype=torch.float64)
        return self.means[k] + torch.einsum(
            "nij,nj->ni", torch.linalg.cholesky(self.covariances)[k], z
        )

    def project(self, direction: Tensor) -> Mixture:
        """The distribution of <direction, x>."""
        variances = torch.einsum("i,kij,j->k", direction, self.covariances, direction)
        return Mixture(self.weights, (self.means @ direction)[:, None], variances[:, None, None])

    def cdf(self, t: Tensor) -> Tensor:
        """P(x <= t) of a mixture in one dimension, with the shape of t."""
        z = (t[..., None] - self.means[:, 0]) / self.covariances[:, 0, 0].sqrt()
        return torch.special.ndtr(z) @ self.weights


def gaussian(mean: Tensor, covariance: Tensor) -> Mixture:
    """N(mean, covariance), for a mean with shape (d,)."""
    return Mixture(torch.ones(1, dtype=torch.float64), mean[None], covariance[None])


def posterior(prior: Mixture, A: Tensor, S: Tensor, y: Tensor) -> tuple[Mixture, float]:
    """The posterior of x given y = A x + n, n ~ N(0, S), and the log-evidence log p(y) [nat].

    Args:
        prior: Of x, with d dimensions.
        A: With shape (m, d).
        S: With shape (m, m); rows and columns of infinite variance are masked data.
        y: With shape (m,).
    """
    seen = S.diagonal().isfinite()
    A, S, y = A[seen], S[seen][:, seen], y[seen]
    predicted = MultivariateNormal(prior.means @ A.T, A @ prior.covariances @ A.T + S)
    gain = torch.linalg.solve(predicted.covariance_matrix, A @ prior.covariances).mT
    means = prior.means + torch.einsum("kij,kj->ki", gain, y - predicted.mean)
    covariances = prior.covariances - gain @ A @ prior.covariances
    log_weights = prior.weights.log() + predicted.log_prob(y)
    evidence = torch.logsumexp(log_weights, 0)
    covariances = 0.5 * (covariances + covariances.mT)
    return Mixture((log_weights - evidence).exp(), means, covariances), float(evidence)


def p_value(draws: Tensor, truth: Mixture, directions: int = 4) -> float:
    """Probability that draws of `truth` look at least as odd as these, with shape (n, d).

    A Gaussian: the mean by chi^2, all entries of the covariance at once by the likelihood ratio
    with Bartlett's correction (Anderson, An Introduction to Multivariate Statistical Analysis,
    2003, section 10.8). Any mixture: Kolmogorov-Smirnov along directions between the components.
    The smallest of the p-values times their number.
    """
    if len(truth.weights) == 1:
        p = _gaussian_p_values(draws, truth.means[0], truth.covariances[0])
    else:
        generator = torch.Generator().manual_seed(0)
        z = torch.randn((directions, len(truth.means)), generator=generator, dtype=torch.float64)
        p = [
            stats.kstest(
                (draws @ a).numpy(), lambda t, a=a: truth.project(a).cdf(torch.tensor(t)).numpy()
            ).pvalue
            for a in z @ (truth.means - truth.mean)
        ]
    return min(1.0, len(p) * min(p))


def _gaussian_p_values(draws: Tensor, mean: Tensor, covariance: Tensor) -> list[float]:
    values, basis = torch.linalg.eigh(covariance)
    alive = values > 1e-10 * values[-1]
    z = (draws.double() - mean) @ basis
    if bool((z[:, ~alive].square().mean(0) > 1e-8 * values[-1]).any()):
        return [0.0]  # power where there can be none
    z = z[:, alive] / values[alive].sqrt()
    n, d = z.shape
    S = torch.cov(z.T).reshape(d, d)
    ratio = (n - 1) * float(S.trace() - torch.logdet(S) - d)
    ratio *= 1 - (2 * d + 1 - 2 / (d + 1)) / (6 * (n - 1))
    return [
        float(stats.chi2.sf(n * float(z.mean(0).square().sum()), d)),
        float(stats.chi2.sf(ratio, d * (d + 1) / 2)),
    ]
