"""Inverse problems whose posterior is known in closed form.

A mixture of Gaussians sum_k w_k N(mu_k, C_k) seen through y = A x + N(0, S) has the posterior sum_k w'_k N(mu'_k, C'_k) with
w'_k proportional to w_k N(y; A mu_k, A C_k A^T + S). The grid of 25 modes is the one of Cardoso et al., Monte Carlo Guided
Denoising Diffusion Models (2024, arXiv:2308.07983).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from scoreinv.gaussian import Diagonal, Fourier
from scoreinv.likelihood import Likelihood
from scoreinv.noise import GaussianNoise
from scoreinv.operators import DenseOperator, PSFConvolution
from scoreinv.posterior import Posterior
from scoreinv.priors import GaussianPrior, MixturePrior
from scoreinv.priors.base import stream


@dataclass(frozen=True)
class MixtureProblem:
    """A posterior that is a Gaussian mixture, with its exact answer.

    Attributes:
        name: What it is.
        posterior: For the samplers.
        weights: Exact posterior weights of the components, with shape (K,).
        means: Exact posterior means, with shape (K, d).
        covariances: Exact posterior covariances, with shape (K, d, d), or (K, d) as power at each frequency.
        log_evidence: Exact [nat].
    """

    name: str
    posterior: Posterior
    weights: Tensor
    means: Tensor
    covariances: Tensor
    log_evidence: float

    def draws(self, n: int, seed: int) -> Tensor:
        """Exact posterior draws, with shape (n, d)."""
        generator = stream(seed)
        k = torch.multinomial(self.weights, n, replacement=True, generator=generator)
        z = torch.randn((n, self.means.shape[1]), generator=generator, dtype=torch.float64)
        x = torch.empty_like(z)
        for i in k.unique():
            x[k == i] = self.means[i] + self._root(int(i), z[k == i])
        return x

    def _root(self, k: int, z: Tensor) -> Tensor:
        if self.covariances.ndim == 2:  # power at each frequency
            C = Fourier(self.covariances[k].reshape(self.posterior.shape[-2:]))
            return C.sqrt(z.reshape(-1, *self.posterior.shape)).flatten(1)
        values, vectors = torch.linalg.eigh(self.covariances[k])
        return z @ (vectors * values.clamp_min(0).sqrt()).T

    def radius(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Squared Mahalanobis radius per dimension in every component, and log-density of each, both (B, K)."""
        d, K = x.shape[1], len(self.weights)
        squared, logdet = (
            torch.empty(len(x), K, dtype=torch.float64),
            torch.empty(K, dtype=torch.float64),
        )
        for k in range(K):
            r = x - self.means[k]
            if self.covariances.ndim == 2:
                C = Fourier(self.covariances[k].reshape(self.posterior.shape[-2:]))
                squared[:, k] = (r * C.solve(r.reshape(-1, *self.posterior.shape)).flatten(1)).sum(
                    1
                )
                logdet[k] = C.logdet(self.posterior.shape)
            else:
                L = torch.linalg.cholesky(self.covariances[k])
                squared[:, k] = torch.linalg.solve_triangular(L, r.T, upper=False).square().sum(0)
                logdet[k] = 2 * L.diagonal().log().sum()
        return squared / d, self.weights.log() - 0.5 * (squared + logdet)


def gaussian_psf(fwhm: float, size: int = 19) -> Tensor:
    """A normalised Gaussian PSF, with shape (size, size); `fwhm` [pixel]."""
    i = torch.arange(size, dtype=torch.float64) - size // 2
    psf = torch.exp(-(i[:, None] ** 2 + i**2) / (2 * (fwhm / 2.354820045) ** 2))
    return psf / psf.sum()


def grid_mixture(d: int, m: int, seed: int, noise: float = 0.05) -> MixtureProblem:
    """25 unit-variance modes at 8 (i, j, i, j, ...), m random measurements with singular values in [0.2, 1]."""
    g = stream(seed, d, m)
    points = torch.tensor(
        [[8.0 * i, 8.0 * j] for i in range(-2, 3) for j in range(-2, 3)], dtype=torch.float64
    )
    means = points.repeat(1, d // 2)
    weights = 0.05 + 0.95 * torch.rand(25, generator=g, dtype=torch.float64)
    U = torch.linalg.qr(torch.randn(m, m, generator=g, dtype=torch.float64))[0]
    V = torch.linalg.qr(torch.randn(d, m, generator=g, dtype=torch.float64))[0]
    S = 0.2 + 0.8 * torch.rand(m, generator=g, dtype=torch.float64)
    one = torch.ones(d, dtype=torch.float64)
    return _dense(f"grid, d = {d}, m = {m}", weights, means, one, (U * S) @ V.T, noise, g)


def power_law_mixture(d: int, m: int, seed: int, noise: float = 0.05) -> MixtureProblem:
    """Four large-scale modes on a power-law spectrum (slope 2.5), low-pass measurements along other axes."""
    g = stream(seed, d, m, 1)
    spectrum = (1 + torch.arange(d, dtype=torch.float64) / 4) ** -2.5
    offsets = torch.randn(4, d, generator=g, dtype=torch.float64) * (torch.arange(d) < 8)
    weights = 0.3 + 0.7 * torch.rand(4, generator=g, dtype=torch.float64)
    mix = torch.randn(d, d, generator=g, dtype=torch.float64)
    Q = torch.linalg.qr(torch.eye(d, dtype=torch.float64) + 0.3 * mix / math.sqrt(d))[0]
    A = torch.exp(-torch.arange(m, dtype=torch.float64) / (0.35 * m))[:, None] * Q[:m]
    means = 3 * spectrum.sqrt() * offsets
    return _dense(f"power law, d = {d}, m = {m}", weights, means, spectrum, A, noise, g)


def _dense(
    name: str,
    weights: Tensor,
    means: Tensor,
    variance: Tensor,
    A: Tensor,
    noise: float,
    g: torch.Generator,
) -> MixtureProblem:
    """A mixture with one diagonal covariance under a dense operator; the truth is drawn from the prior."""
    d, shape = means.shape[1], (1, 1, means.shape[1])
    weights = weights / weights.sum()
    components = [
        GaussianPrior(mu.reshape(shape), Diagonal(variance.reshape(shape))) for mu in means
    ]
    k = int(torch.multinomial(weights, 1, generator=g))
    x = means[k] + variance.sqrt() * torch.randn(d, generator=g, dtype=torch.float64)
    y = A @ x + noise * torch.randn(len(A), generator=g, dtype=torch.float64)
    G = (A * variance) @ A.T + noise**2 * torch.eye(len(A), dtype=torch.float64)
    gain = torch.linalg.solve(G, A * variance).T
    r = y - means @ A.T
    C = torch.diag(variance) - gain @ (A * variance)
    evidence = weights.log() + torch.distributions.MultivariateNormal(
        torch.zeros_like(y), G
    ).log_prob(r)
    posterior = Posterior(
        MixturePrior(weights, components),
        Likelihood(DenseOperator(A, shape), GaussianNoise(std=noise)),
        y,
    )
    return MixtureProblem(
        name,
        posterior,
        torch.softmax(evidence, 0),
        means + r @ gain.T,
        (0.5 * (C + C.T)).expand(len(weights), d, d),
        float(torch.logsumexp(evidence, 0)),
    )


def four_fields(
    seed: int, size: int = 64, fwhm: float = 8.0, noise: float = 0.3
) -> MixtureProblem:
    """Four Gaussian fields with different means and slopes, blurred (periodic boundary) with white noise."""
    g = stream(seed, size, 2)
    k = torch.fft.fftfreq(size, dtype=torch.float64) * size
    radius = (k[:, None] ** 2 + k**2).sqrt()
    spectra, means = [], []
    for j in range(4):
        P = (1 + radius) ** -(2.5 + 0.5 * j)
        spectra.append(P / P.mean() * (0.03 + 0.01 * j) ** 2)
        z = torch.randn(1, size, size, generator=g, dtype=torch.float64)
        means.append(0.2 * torch.fft.ifft2(torch.fft.fft2(z) * torch.exp(-(radius**2) / 8)).real)
    components = [GaussianPrior(mu, Fourier(P)) for mu, P in zip(means, spectra, strict=True)]
    psf = gaussian_psf(fwhm, 2 * (size // 4) + 1)
    A = PSFConvolution(psf, (1, size, size), boundary="circular")
    prior = MixturePrior(torch.ones(4), components)
    likelihood = Likelihood(A, GaussianNoise(std=noise))
    true = int(torch.randint(4, (1,), generator=g))
    x = components[true].moments.sample(1, g)
    y = (A(x) + noise * torch.randn(x.shape, generator=g, dtype=torch.float64))[0]
    gain = A.gain()
    evidence, post_means, post_spectra = [], [], []
    for mu, P in zip(means, spectra, strict=True):
        total = Fourier(gain * P + noise**2)
        r = (y - A(mu[None])[0])[None]
        evidence.append(
            -math.log(4)
            - 0.5 * (float((r * total.solve(r)).sum()) + total.logdet((1, size, size)))
            - 0.5 * size**2 * math.log(2 * math.pi)
        )
        u = Fourier(P).apply(A.adjoint(total.solve(r)))[0]
        post_means.append((mu + u).flatten())
        post_spectra.append((P * noise**2 / (gain * P + noise**2)).flatten())
    evidence = torch.tensor(evidence, dtype=torch.float64)
    return MixtureProblem(
        f"four fields, {size} x {size}",
        Posterior(prior, likelihood, y),
        torch.softmax(evidence, 0),
        torch.stack(post_means),
        torch.stack(post_spectra),
        float(torch.logsumexp(evidence, 0)),
    )
