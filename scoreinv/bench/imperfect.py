"""Exact problems under a score that a small network learned, or under moments of few images: what that costs a sampler.

The posterior to be met is still that of the true prior, so the rows of a problem and of its twins differ by the error of
the network, or of the moments, alone. The network corrects the Wiener filter of the prior's moments, in white coordinates on
the axes of C,

    D(x, s) = m_s(x) + C_s^1/2 F((C + s^2)^-1/2 (x - mu), ln s)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from scoreinv.averages import follow
from scoreinv.bench.problems import MixtureProblem
from scoreinv.gaussian import Covariance, Dense, Fourier, Gaussian
from scoreinv.kernels import noise_levels
from scoreinv.posterior import Posterior
from scoreinv.priors import Prior
from scoreinv.streams import stream

STEPS, BATCH, RATE, WIDTH, LAYERS = 3000, 512, 2e-3, 256, 3
WAVES = 4  # octaves of ln s, and of each coordinate, that the network sees
AVERAGE = 0.998  # of the weights from step to step


class Perceptron(nn.Module):
    """F(z, ln s) for whitened images z with shape (B, d), by residual layers."""

    def __init__(self, d: int, generator: torch.Generator) -> None:
        super().__init__()
        self.first = nn.Linear(d + 2 * WAVES * (d + 1), WIDTH)
        self.middle = nn.ModuleList(nn.Linear(WIDTH + 2 * WAVES, WIDTH) for _ in range(LAYERS))
        self.last = nn.Linear(WIDTH, d)
        for p in self.parameters():
            bound = 1 / math.sqrt(p.shape[-1]) if p.ndim == 2 else 0.0
            with torch.no_grad():
                p.copy_(bound * (2 * torch.rand(p.shape, generator=generator) - 1))
        nn.init.zeros_(self.last.weight)

    def forward(self, z: Tensor, log_s: Tensor) -> Tensor:
        waves = _waves(log_s[:, None] / 4)
        h = nn.functional.silu(self.first(torch.cat([z, _waves(z), waves], 1)))
        for layer in self.middle:
            h = h + nn.functional.silu(layer(torch.cat([h, waves], 1)))
        return self.last(h)


def _waves(x: Tensor) -> Tensor:
    """Sines and cosines of x, with shape (B, k), at octaves from one radian a unit: with shape (B, 2 WAVES k)."""
    phase = (x[..., None] * 2.0 ** torch.arange(WAVES)).flatten(1)
    return torch.cat([phase.sin(), phase.cos()], 1)


class LearnedPrior(Prior):
    """A prior whose denoiser a small network learned from draws of it.

    Args:
        prior: The true one; its moments stay.
        seed: Decides weights and draws.
        steps: Of the optimiser.
    """

    dtype = torch.float64

    def __init__(self, prior: Prior, seed: int, steps: int = STEPS) -> None:
        self.shape, self.moments = tuple(prior.shape), prior.moments
        widest = float(self.moments.covariance.eigenvalues(self.shape).max()) ** 0.5
        self.sigma_min, self.sigma_max = prior.sigma_min, min(3 * widest, prior.sigma_max)
        self.identity = {"prior": f"learned {prior.identity['prior']}, seed {seed}"}
        d = math.prod(self.shape)
        full = self.moments.covariance.apply(
            torch.eye(d, dtype=self.dtype).reshape(d, *self.shape)
        )
        self.variances, self.basis = torch.linalg.eigh(full.reshape(d, d))
        self.network = Perceptron(d, stream(seed, 10))
        self._learn(prior, seed, steps)

    def denoise(self, x: Tensor, sigma: Tensor) -> Tensor:
        self.check(x)
        q, s = self._coordinates(x), sigma.to(self.dtype)[:, None]
        F = self.network(self._inputs(q, s), s[:, 0].log().float())
        q = self._expected(q, s) + self._width(s) * F
        return self.moments.mean.to(x.dtype) + (q @ self.basis.T).reshape(x.shape)

    def _coordinates(self, x: Tensor) -> Tensor:
        """x - mu on the axes of C, with shape (B, d)."""
        return (x - self.moments.mean.to(x.dtype)).flatten(1) @ self.basis

    def _inputs(self, q: Tensor, s: Tensor) -> Tensor:
        """White, with shape (B, d); s with shape (B, 1) here and below."""
        return (q * (self.variances + s**2).rsqrt()).float()

    def _expected(self, q: Tensor, s: Tensor) -> Tensor:
        """m_s(x) on the axes of C, with shape (B, d)."""
        return q * self.variances / (self.variances + s**2)

    def _width(self, s: Tensor) -> Tensor:
        """Standard deviations C_s^1/2, with shape (B, d)."""
        return s * (self.variances / (self.variances + s**2)).sqrt()

    def _learn(self, prior: Prior, seed: int, steps: int) -> None:
        """Least squares of (x_0 - m_s) in units of C_s^1/2."""
        levels = torch.tensor(noise_levels(BATCH, self.sigma_max, self.sigma_min)).double()
        optimiser = torch.optim.Adam(self.network.parameters(), lr=RATE)
        average = {k: v.clone() for k, v in self.network.state_dict().items()}
        clean = self._coordinates(prior.sample(64 * BATCH, seed))
        for t in range(steps):
            generator, s = stream(seed, 12, t), levels[:, None]
            x0 = clean[torch.randint(len(clean), (BATCH,), generator=generator)]
            q = x0 + s * torch.randn(x0.shape, generator=generator, dtype=x0.dtype)
            target = (x0 - self._expected(q, s)) / self._width(s)
            F = self.network(self._inputs(q, s), levels.log().float())
            loss = (F - target.float()).square().mean()
            for group in optimiser.param_groups:
                group["lr"] = RATE * 0.5 * (1 + math.cos(math.pi * t / steps))
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            follow(average.values(), self.network.state_dict().values(), AVERAGE, 1 + t)
        self.network.load_state_dict(average)
        self.network.requires_grad_(False)


def learned(
    make: Callable[[int], MixtureProblem], seed: int, steps: int = STEPS
) -> MixtureProblem:
    """The problem with a learned score in the place of the exact one."""
    exact = make(seed)
    posterior = exact.posterior
    prior = LearnedPrior(posterior.prior, seed, steps)
    return replace(
        exact,
        name=f"{exact.name}, learned score",
        posterior=Posterior(prior, posterior.likelihood, posterior.y),
    )


class RoughPrior(Prior):
    """A prior with its exact denoiser, whose moments are those of a few of its images.

    Args:
        prior: The true one.
        count: Images.
        seed: Of the images.
    """

    def __init__(self, prior: Prior, count: int, seed: int) -> None:
        images = prior.sample(count, seed)
        self.shape, self.dtype, self.true = tuple(prior.shape), prior.dtype, prior
        self.sigma_min, self.sigma_max = prior.sigma_min, prior.sigma_max
        covariance = sample_covariance(images, prior.moments.covariance)
        self.moments = Gaussian(images.mean(0), covariance)
        self.identity = {**prior.identity, "moments": f"of {count} images, seed {seed}"}

    def denoise(self, x: Tensor, sigma: Tensor) -> Tensor:
        return self.true.denoise(x, sigma)


def sample_covariance(images: Tensor, like: Covariance) -> Covariance:
    """Covariance of images with shape (n, C, H, W): of each frequency alone if `like` is stationary, else of all pixels."""
    r = images.double() - images.double().mean(0)
    if isinstance(like, Fourier):
        power = torch.fft.fft2(r, norm="ortho").abs().square().sum(0)
        return Fourier(power / (len(r) - 1))
    return Dense(r.flatten(1).T @ r.flatten(1) / (len(r) - 1))


def estimated(make: Callable[[int], MixtureProblem], count: int, seed: int) -> MixtureProblem:
    """The problem with moments of so many images in the place of the exact ones."""
    exact = make(seed)
    posterior = exact.posterior
    prior = RoughPrior(posterior.prior, count, seed + 1)
    return replace(
        exact,
        name=f"{exact.name}, moments of {count:,} images",
        posterior=Posterior(prior, posterior.likelihood, posterior.y),
    )
