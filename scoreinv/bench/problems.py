"""Inverse problems whose posterior is known in closed form.

A mixture of Gaussians sum_k w_k N(mu_k, C_k) seen through y = A x + N(0, S) has the posterior sum_k w'_k N(mu'_k, C'_k) with

    mu'_k = mu_k + C_k A^T G_k^-1 (y - A mu_k),   C'_k = C_k - C_k A^T G_k^-1 A C_k,   G_k = A C_k A^T + S,
    w'_k proportional to w_k N(y; A mu_k, G_k)

Every problem is drawn anew for each seed: the prior, the operator where it is random, the truth and its data. The grid of 25
modes is the one of Cardoso et al., Monte Carlo Guided Denoising Diffusion Models (2024, arXiv:2308.07983).
"""

from __future__ import annotations

import abc
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from scoreinv.conditioning import whitened_matrix
from scoreinv.gaussian import Covariance, Diagonal, Fourier
from scoreinv.likelihood import Likelihood
from scoreinv.noise import GaussianNoise
from scoreinv.operators import (
    NUFFT,
    DenseOperator,
    LinearOperator,
    Mask,
    PSFConvolution,
    gaussian_psf,
)
from scoreinv.operators.fourier import ARCSEC
from scoreinv.posterior import Posterior
from scoreinv.priors import GaussianPrior, MixturePrior
from scoreinv.simulators.arrays import alma_track
from scoreinv.streams import stream


@dataclass(frozen=True)
class Problem(abc.ABC):
    """A posterior of which exact draws are known.

    Attributes:
        name: What it is.
        posterior: For the samplers.
        truth: What the data are of, with shape (d,).
        log_evidence: Exact [nat]; nan where it is not known.
    """

    name: str
    posterior: Posterior
    truth: Tensor
    log_evidence: float

    @abc.abstractmethod
    def draws(self, n: int, seed: int) -> Tensor:
        """Exact posterior draws, with shape (n, d)."""

    @abc.abstractmethod
    def inside(self, x: Tensor) -> tuple[float, float]:
        """Total variation between shares and weights of the modes, and squared radius inside them per dimension (1: exact);
        nan where there are none."""


@dataclass(frozen=True)
class Component:
    """One Gaussian of an exact posterior.

    Attributes:
        mean: With shape (d,).
        colour: Draws of N(0, C') from white z, both with shape (B, d).
        whiten: White residuals of r, both with shape (B, d).
        logdet: log det C'.
    """

    mean: Tensor
    colour: Callable[[Tensor], Tensor]
    whiten: Callable[[Tensor], Tensor]
    logdet: float


@dataclass(frozen=True)
class MixtureProblem(Problem):
    """A posterior that is a Gaussian mixture, with its exact answer.

    Attributes:
        weights: Exact posterior weights of the components, with shape (K,).
        components: What they are.
    """

    weights: Tensor
    components: Sequence[Component]

    def draws(self, n: int, seed: int) -> Tensor:
        """Exact posterior draws, with shape (n, d)."""
        generator = stream(seed)
        k = torch.multinomial(self.weights, n, replacement=True, generator=generator)
        d = math.prod(self.posterior.shape)
        x = torch.randn((n, d), generator=generator, dtype=torch.float64)
        for i in k.unique().tolist():
            x[k == i] = self.components[i].mean + self.components[i].colour(x[k == i])
        return x

    def radius(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Squared Mahalanobis radius per dimension in every component, and log-density of each, both (B, K)."""
        squared = torch.stack(
            [c.whiten(x - c.mean).square().sum(1) for c in self.components], dim=1
        )
        logdet = torch.tensor([c.logdet for c in self.components], dtype=torch.float64)
        return squared / x.shape[1], self.weights.log() - 0.5 * (squared + logdet)

    def inside(self, x: Tensor) -> tuple[float, float]:
        radius, density = self.radius(x)
        mode = density.argmax(1)
        share = torch.bincount(mode, minlength=len(self.weights)) / len(x)
        variation = 0.5 * float((share - self.weights).abs().sum())
        return variation, float(radius.gather(1, mode[:, None]).mean())


# ---------------------------------------------------------------- problems


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
    one = Diagonal(torch.ones(1, 1, d, dtype=torch.float64))
    prior = mixture(weights, means.reshape(25, 1, 1, d), [one] * 25)
    A = DenseOperator((U * S) @ V.T, (1, 1, d))
    return _drawn(f"grid, d = {d}, m = {m}", prior, Likelihood(A, GaussianNoise(std=noise)), g)


def power_law_mixture(d: int, m: int, seed: int, noise: float = 0.05) -> MixtureProblem:
    """Four large-scale modes on a power-law spectrum (slope 2.5), low-pass measurements along other axes."""
    g = stream(seed, d, m, 1)
    spectrum = (1 + torch.arange(d, dtype=torch.float64) / 4) ** -2.5
    offsets = torch.randn(4, d, generator=g, dtype=torch.float64) * (torch.arange(d) < 8)
    weights = 0.3 + 0.7 * torch.rand(4, generator=g, dtype=torch.float64)
    mix = torch.randn(d, d, generator=g, dtype=torch.float64)
    Q = torch.linalg.qr(torch.eye(d, dtype=torch.float64) + 0.3 * mix / math.sqrt(d))[0]
    A = torch.exp(-torch.arange(m, dtype=torch.float64) / (0.35 * m))[:, None] * Q[:m]
    means = (3 * spectrum.sqrt() * offsets).reshape(4, 1, 1, d)
    prior = mixture(weights, means, [Diagonal(spectrum.reshape(1, 1, d))] * 4)
    likelihood = Likelihood(DenseOperator(A, (1, 1, d)), GaussianNoise(std=noise))
    return _drawn(f"power law, d = {d}, m = {m}", prior, likelihood, g)


def four_fields(
    seed: int, kind: str = "blur", size: int = 64, noise: float = 0.3
) -> MixtureProblem:
    """Four Gaussian fields with different means and slopes.

    Args:
        seed: Of the means, the truth and its noise.
        kind: "blur" (periodic, an eighth of the image wide), "mask" (half of the pixels seen) or "Fourier" (random
            frequencies of the grid, low ones more often).
        size: Pixels on a side.
        noise: Of a pixel; the fields vary by 0.03 to 0.06 around means that vary by 0.2.
    """
    g = stream(seed, size, 2)
    radius = _frequency(size)
    spectra, means = [], []
    for j in range(4):
        P = (1 + radius) ** -(2.5 + 0.5 * j)
        spectra.append(Fourier(P / P.mean() * (0.03 + 0.01 * j) ** 2))
        z = torch.randn(1, size, size, generator=g, dtype=torch.float64)
        means.append(0.2 * torch.fft.ifft2(torch.fft.fft2(z) * torch.exp(-(radius**2) / 8)).real)
    prior = mixture(torch.ones(4), torch.stack(means), spectra)
    A = FIELD_OPERATORS[kind](size, g)
    likelihood = Likelihood(A, GaussianNoise(std=noise * (size if A.complex else 1)))
    return _drawn(f"four fields, {size} x {size}, {kind}", prior, likelihood, g)


def gaussian_field(seed: int, kind: str, size: int = 64) -> MixtureProblem:
    """One Gaussian field, seen through a PSF (dark beyond the edge) or by ALMA at two moments, three hours apart."""
    g = stream(seed, size, 3)
    P = (1 + _frequency(size)) ** -3.0
    prior = GaussianPrior(torch.ones(1, size, size).double(), Fourier(P / P.mean()))
    if kind == "PSF":
        A: LinearOperator = PSFConvolution(gaussian_psf(3.8), prior.shape)
        noise = GaussianNoise(std=0.1)
    else:
        uv = torch.from_numpy(alma_track(-23.0, 230e9, np.linspace(-1.5, 1.5, 2)))
        A = NUFFT(uv, prior.shape, 1 / (3 * float(uv.abs().max()) * ARCSEC))
        noise = GaussianNoise(std=0.1 * size)
    name = f"Gaussian field, {size} x {size}, {kind}"
    return _drawn(name, prior, Likelihood(A, noise), g)


def _blur(size: int, g: torch.Generator) -> LinearOperator:
    psf = gaussian_psf(size / 8, 2 * (size // 4) + 1)
    return PSFConvolution(psf, (1, size, size), boundary="circular")


def _mask(size: int, g: torch.Generator) -> LinearOperator:
    return Mask(torch.rand(1, size, size, generator=g) < 0.5)


def _sparse_fourier(size: int, g: torch.Generator) -> LinearOperator:
    k = torch.fft.fftfreq(size, dtype=torch.float64) * size
    grid = torch.stack(torch.meshgrid(k, k[k >= 0], indexing="ij"), -1).reshape(-1, 2)
    chance = torch.exp(-grid.norm(dim=1) / (size / 4))
    seen = torch.rand(len(grid), generator=g, dtype=torch.float64) < chance
    return NUFFT(grid[seen] / (size * ARCSEC), (1, size, size), 1.0)


FIELD_OPERATORS = {"blur": _blur, "mask": _mask, "Fourier": _sparse_fourier}


def _frequency(size: int) -> Tensor:
    k = torch.fft.fftfreq(size, dtype=torch.float64) * size
    return (k[:, None] ** 2 + k**2).sqrt()


def mixture(weights: Tensor, means: Tensor, covariances: Sequence[Covariance]) -> MixturePrior:
    """sum_k w_k N(mu_k, C_k), for means with shape (K, C, H, W)."""
    pairs = zip(means, covariances, strict=True)
    return MixturePrior(weights, [GaussianPrior(mu, C) for mu, C in pairs])


# ---------------------------------------------------------------- answers


def _drawn(
    name: str,
    prior: GaussianPrior | MixturePrior,
    likelihood: Likelihood,
    generator: torch.Generator,
) -> MixtureProblem:
    """The problem of a truth drawn from the prior, with its answer."""
    one, two = torch.randint(2**31, (2,), generator=generator).tolist()
    truth = prior.sample(1, one)
    return answered(name, prior, likelihood, likelihood.simulate(truth, two)[0], truth)


def answered(
    name: str,
    prior: GaussianPrior | MixturePrior,
    likelihood: Likelihood,
    y: Tensor,
    truth: Tensor,
) -> MixtureProblem:
    """The problem of these data, with its answer.

    Args:
        name: What it is.
        prior: Gaussian, or a mixture of such.
        likelihood: Linear and Gaussian.
        y: Data, with shape (*data).
        truth: What they are of, with shape (1, C, H, W).
    """
    parts = prior.components if isinstance(prior, MixturePrior) else (prior,)
    log_w = prior.log_weights if isinstance(prior, MixturePrior) else torch.zeros(1).double()
    gain = likelihood.operator.gain() if likelihood.operator.stationary else None
    solve = _dense_answer if gain is None else _stationary_answer
    components, evidence = solve(parts, likelihood, y)
    evidence = log_w + evidence
    return MixtureProblem(
        name,
        Posterior(prior, likelihood, y),
        truth.flatten(),
        float(torch.logsumexp(evidence, 0)),
        torch.softmax(evidence, 0),
        components,
    )


def _stationary_answer(
    parts: Sequence[GaussianPrior], likelihood: Likelihood, y: Tensor
) -> tuple[list[Component], Tensor]:
    """Frequency by frequency, for white noise and periodic convolution; with the log-evidence of each component."""
    A, gain, d = likelihood.operator, likelihood.operator.gain(), y.numel()
    variance = float(likelihood.noise.covariance.eigenvalues(A.data_shape)[0])
    components, evidence = [], []
    for part in parts:
        mu, P = part.moments.mean, part.moments.covariance.spectrum
        G = Fourier(gain * P + variance)
        r = (y - A(mu[None])[0])[None]
        chi2 = float((r * G.solve(r)).sum())
        evidence.append(-0.5 * (chi2 + G.logdet(part.shape) + d * math.log(2 * math.pi)))
        mean = mu + part.moments.covariance.apply(A.adjoint(G.solve(r)))[0]
        C = Fourier(P * variance / (gain * P + variance))
        images = lambda f, shape=part.shape: lambda z: f(z.reshape(-1, *shape)).flatten(1)
        components.append(
            Component(
                mean.flatten(),
                images(C.sqrt),
                images(C.map(torch.rsqrt).apply),
                C.logdet(part.shape),
            )
        )
    return components, torch.tensor(evidence, dtype=torch.float64)


def _dense_answer(
    parts: Sequence[GaussianPrior], likelihood: Likelihood, y: Tensor
) -> tuple[list[Component], Tensor]:
    """By matrices in units of the noise; components that share a covariance share its factors."""
    B = whitened_matrix(likelihood)
    constant = float(likelihood.noise.log_prob(torch.zeros_like(y)[None]))
    data = likelihood.noise.whiten(
        y[None].to(torch.complex128 if y.is_complex() else torch.float64)
    )
    data = (torch.view_as_real(data) if y.is_complex() else data).reshape(-1)
    factors: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
    components, evidence = [], []
    for part in parts:
        C = part.moments.covariance
        if id(C) not in factors:
            factors[id(C)] = _factors(B, C, part.shape)
        BC, L, root = factors[id(C)]
        r = data - B @ part.moments.mean.flatten()
        z = torch.linalg.solve_triangular(L, r[:, None], upper=False)
        evidence.append(constant - 0.5 * float(z.square().sum()) - float(L.diagonal().log().sum()))
        mean = part.moments.mean.flatten() + torch.cholesky_solve(r[:, None], L)[:, 0] @ BC
        components.append(
            Component(
                mean,
                lambda z, root=root: z @ root.T,
                lambda r, root=root: torch.linalg.solve_triangular(root, r.T, upper=False).T,
                2 * float(root.diagonal().log().sum()),
            )
        )
    return components, torch.tensor(evidence, dtype=torch.float64)


def _factors(B: Tensor, C: Covariance, shape: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """B C, the Cholesky factor of I + B C B^T, and that of the posterior's covariance."""
    d = B.shape[1]
    BC = C.apply(B.reshape(-1, *shape)).flatten(1)
    L = torch.linalg.cholesky(torch.eye(len(B), dtype=torch.float64) + BC @ B.T)
    full = C.apply(torch.eye(d, dtype=torch.float64).reshape(d, *shape)).reshape(d, d)
    seen = torch.linalg.solve_triangular(L, BC, upper=False)
    rest = full - seen.T @ seen
    return BC, L, torch.linalg.cholesky(0.5 * (rest + rest.T))
