"""Priors whose denoiser is known in closed form: a Gaussian, and a mixture of Gaussians."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from scoreinv.gaussian import Covariance, Dense, Diagonal, Fourier, Gaussian, Scalar, blocks
from scoreinv.kernels import expectation
from scoreinv.priors.base import Prior, stream

LARGE = 1024  # pixels up to which the moments of a mixture are a full matrix; half as many for stationary components


def _covariance(C: Covariance | float) -> Covariance:
    return C if isinstance(C, Covariance) else Scalar(float(C))


def _levels(variances: Tensor, widest: float) -> tuple[float, float]:
    """Smallest and largest noise level: the one hides no direction that varies, the other all of them."""
    narrowest = float(variances[variances >= 1e-12 * variances.max()].min()) ** 0.5
    return min(0.1 * narrowest, 0.01 * widest), 100 * widest


class GaussianPrior(Prior):
    """N(mean, C): D(x, sigma) = mean + C (C + sigma^2)^-1 (x - mean).

    Args:
        mean: With shape (C, H, W).
        covariance: A white variance, or one of `scoreinv.gaussian`'s covariances.

    Raises:
        ValueError: A covariance of another shape than the mean's, or with eigenvalues that are
            negative or not finite; a mean that is not finite.
    """

    dtype = torch.float64

    def __init__(self, mean: Tensor, covariance: Covariance | float) -> None:
        self.moments = Gaussian(mean.double(), _covariance(covariance))
        self.shape = tuple(mean.shape)
        if not self.moments.covariance.fits(self.shape):
            raise ValueError(
                f"covariance has shape {self.moments.covariance.shape}, the mean {self.shape}"
            )
        values = self.moments.covariance.eigenvalues(self.shape)
        if not bool(((values >= 0) & values.isfinite()).all() & mean.isfinite().all()):
            raise ValueError(
                f"expected a finite mean and finite eigenvalues >= 0, got a mean between "
                f"{float(mean.min()):g} and {float(mean.max()):g} and eigenvalues between "
                f"{float(values.min()):g} and {float(values.max()):g}"
            )
        self.sigma_min, self.sigma_max = _levels(values, float(values.max()) ** 0.5)
        self.identity = {"prior": "GaussianPrior"}

    def denoise(self, x: Tensor, sigma: Tensor) -> Tensor:
        self.check(x)
        mean = self.moments.mean.to(x.dtype)
        out = torch.empty_like(x)
        for s in sigma.unique():
            at = sigma == s
            out[at] = mean + expectation(self.moments.covariance, float(s)).apply(x[at] - mean)
        return out

    def log_prob(self, x: Tensor, sigma: float = 0.0) -> Tensor:
        """log p_sigma(x), with shape (B,)."""
        C = self.moments.covariance.map(lambda v: v + sigma**2)
        return Gaussian(self.moments.mean, C).log_prob(x)

    def sample(self, n: int, seed: int, steps: int = 0, churn: float = 0.0) -> Tensor:
        """n exact draws, with shape (n, C, H, W)."""
        return self.moments.sample(n, stream(seed))


class MixturePrior(Prior):
    """sum_k w_k N(mu_k, C_k).

    Args:
        weights: Positive, with shape (K,); normalised here.
        components: K Gaussian priors of one shape.

    Raises:
        ValueError: Not one positive weight for each component, components of different shapes.
    """

    dtype = torch.float64

    def __init__(
        self, weights: Tensor | Sequence[float], components: Sequence[GaussianPrior]
    ) -> None:
        w = torch.as_tensor(weights, dtype=torch.float64)
        if len(w) != len(components) or not bool(((w > 0) & w.isfinite()).all()) or not len(w):
            raise ValueError(
                f"{len(w)} weights for {len(components)} components, "
                "expected one positive weight each"
            )
        if len({c.shape for c in components}) > 1:
            raise ValueError(f"components have shapes {sorted({c.shape for c in components})}")
        self.log_weights, self.components = (w / w.sum()).log(), tuple(components)
        self.shape = components[0].shape
        covariances = [c.moments.covariance for c in components]
        self._means = torch.stack([c.moments.mean for c in components])
        self._covariance = blocks(covariances, self.shape)
        self._levels: dict[float, tuple[Covariance, Tensor]] = {}
        self.moments = _mixture_moments(w / w.sum(), self._means, covariances)
        variances = self._covariance.eigenvalues(tuple(self._means.shape))
        widest = float(self.moments.covariance.eigenvalues(self.shape).max()) ** 0.5
        self.sigma_min, self.sigma_max = _levels(variances, widest)
        self.identity = {"prior": f"MixturePrior of {len(w)}"}

    def log_components(self, x: Tensor, sigma: float) -> Tensor:
        """log w_k N(x; mu_k, C_k + sigma^2), with shape (B, K)."""
        return self._components(x, sigma)[0]

    def _components(self, x: Tensor, sigma: float) -> tuple[Tensor, Tensor]:
        """log_components, and (C_k + sigma^2)^-1 (x - mu_k) with shape (B, K, C, H, W)."""
        precision, peak = self._level(sigma)
        r = x.double()[:, None] - self._means
        z = precision.apply(r)
        return peak - 0.5 * (r * z).flatten(2).sum(2), z

    def _level(self, sigma: float) -> tuple[Covariance, Tensor]:
        """(C_k + sigma^2)^-1 of all components, and log w_k N(0; 0, C_k + sigma^2)."""
        if sigma not in self._levels:
            if len(self._levels) == 256:  # samplers return to few levels, training to none
                self._levels.clear()
            C = self._covariance.map(lambda v: v + sigma**2)
            values = C.eigenvalues(tuple(self._means.shape)).reshape(len(self._means), -1)
            peak = self.log_weights - 0.5 * (2 * math.pi * values).log().sum(1)
            self._levels[sigma] = C.map(torch.reciprocal), peak
        return self._levels[sigma]

    def log_prob(self, x: Tensor, sigma: float = 0.0) -> Tensor:
        """log p_sigma(x), with shape (B,)."""
        return torch.logsumexp(self.log_components(x, sigma), dim=1)

    def denoise(self, x: Tensor, sigma: Tensor) -> Tensor:
        self.check(x)
        out = torch.empty_like(x)
        for s in sigma.unique():
            at = sigma == s
            log_components, z = self._components(x[at], float(s))
            share = torch.softmax(log_components, dim=1)
            score = -torch.einsum("bk,bk...->b...", share, z)
            out[at] = x[at] + (float(s) ** 2 * score).to(x.dtype)
        return out

    def sample(self, n: int, seed: int, steps: int = 0, churn: float = 0.0) -> Tensor:
        """n exact draws, with shape (n, C, H, W)."""
        k = torch.multinomial(
            self.log_weights.exp(), n, replacement=True, generator=stream(seed, 0)
        )
        x = torch.empty((n, *self.shape), dtype=self.dtype)
        for i in k.unique().tolist():
            moments, here = self.components[i].moments, k == i
            x[here] = moments.sample(int(here.sum()), stream(seed, 1, i))
        return x


def _mixture_moments(w: Tensor, means: Tensor, covariances: Sequence[Covariance]) -> Gaussian:
    """Mean and covariance of a mixture; the means' spread enters in the components' own basis.

    Small images keep the full covariance. Large stationary components keep a stationary one: the
    power of the means' differences at each frequency.
    """
    shape = tuple(means.shape[1:])
    d, column = math.prod(shape), w.reshape(-1, *[1] * len(shape))
    mean = (column * means).sum(0)
    together = blocks(covariances, shape)
    if d > LARGE and isinstance(together, Diagonal):
        variance = together.variance + (means - mean).square()
        return Gaussian(mean, Diagonal((column * variance).sum(0)))
    if d > LARGE // 2 and isinstance(together, Fourier):
        spectrum = together.spectrum + torch.fft.fft2(means - mean, norm="ortho").abs().square()
        return Gaussian(mean, Fourier((column * spectrum).sum(0)))
    eye = torch.eye(d, dtype=torch.float64).reshape(d, *shape)
    full = sum(wk * C.apply(eye).reshape(d, d) for wk, C in zip(w, covariances, strict=True))
    offsets = (means - mean).reshape(len(w), d)
    return Gaussian(mean, Dense(full + (w[:, None] * offsets).T @ offsets))
