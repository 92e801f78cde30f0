"""Priors whose denoiser is known in closed form: a Gaussian, and a mixture of Gaussians."""

from __future__ import annotations

import abc
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from numpy.typing import ArrayLike
from torch import Tensor

from scoreinv.digests import digest_of_json, rounded
from scoreinv.gaussian import Covariance, Dense, Diagonal, Fourier, Gaussian, Scalar, blocks
from scoreinv.kernels import expectation
from scoreinv.priors.base import Prior
from scoreinv.streams import stream
from scoreinv.tensors import as_tensor

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

    def __init__(self, mean: Tensor | ArrayLike, covariance: Covariance | float) -> None:
        mean = as_tensor(mean)
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
        means = torch.stack([c.moments.mean for c in components])
        self._terms = terms(self.log_weights, means, blocks(covariances, self.shape))
        self.moments = _mixture_moments(w / w.sum(), means, covariances)
        widest = float(self.moments.covariance.eigenvalues(self.shape).max()) ** 0.5
        self.sigma_min, self.sigma_max = _levels(self._terms.variances, widest)
        ramp = torch.linspace(-1, 1, means[0].numel(), dtype=torch.float64).reshape(
            means[:1].shape
        )
        known = [rounded(v) for v in (w / w.sum(), means, *(C.apply(ramp) for C in covariances))]
        self.identity = {"prior": f"MixturePrior of {len(w)}", "sha256": digest_of_json(*known)}

    def log_components(self, x: Tensor, sigma: float) -> Tensor:
        """log w_k N(x; mu_k, C_k + sigma^2), with shape (B, K)."""
        return self._terms.at(x.double(), sigma)[0]

    def log_prob(self, x: Tensor, sigma: float = 0.0) -> Tensor:
        """log p_sigma(x), with shape (B,)."""
        return torch.logsumexp(self.log_components(x, sigma), dim=1)

    def denoise(self, x: Tensor, sigma: Tensor) -> Tensor:
        self.check(x)
        out = torch.empty_like(x)
        for s in sigma.unique():
            at = sigma == s
            log_components, pull = self._terms.at(x[at].double(), float(s))
            score = pull(torch.softmax(log_components, dim=1))
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


Pull = Callable[[Tensor], Tensor]


class Terms(abc.ABC):
    """The components of a mixture, at any noise level.

    Attributes:
        variances: Eigenvalues of all covariances.
    """

    variances: Tensor

    def __init__(self) -> None:
        self._levels: dict[float, Any] = {}

    def at(self, x: Tensor, sigma: float) -> tuple[Tensor, Pull]:
        """log w_k N(x; mu_k, C_k + sigma^2), with shape (B, K), and what makes a score of shares with shape (B, K)."""
        if sigma not in self._levels:
            if len(self._levels) == 256:  # samplers return to few levels, training to none
                self._levels.clear()
            self._levels[sigma] = self._prepare(sigma)
        return self._evaluate(x, self._levels[sigma])

    @abc.abstractmethod
    def _prepare(self, sigma: float) -> Any:
        """What all images at this level share."""

    @abc.abstractmethod
    def _evaluate(self, x: Tensor, level: Any) -> tuple[Tensor, Pull]:
        """The answer of `at`."""


class SharedBasis(Terms):
    """Components whose covariances are diagonal in one basis: four matrix products, whatever their number.

    With coordinates q of x, precisions P and b = P mu, all (K, d), the log-densities are -q^2 P / 2 + q b up to constants
    and the score of shares w is w b - (w P) q.
    """

    def __init__(self, log_weights: Tensor, means: Tensor, C: Diagonal | Fourier) -> None:
        super().__init__()
        self.C, self.log_weights, self.shape = C, log_weights, tuple(means.shape[1:])
        # about their middle, where the squares do not cancel
        self.middle = means.mean(0)
        self.mu = C.coordinates(means - self.middle).flatten(1)
        self.variances = C.eigenvalues(tuple(means.shape)).reshape(len(means), -1)

    def _prepare(self, sigma: float) -> tuple[Tensor, Tensor, Tensor]:
        total = self.variances + sigma**2
        P, b = 1 / total, self.mu / total
        misfit = (b * self.mu).sum(1) + (2 * math.pi * total).log().sum(1)
        return P, b, self.log_weights - 0.5 * misfit

    def _evaluate(self, x: Tensor, level: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Pull]:
        P, b, constant = level
        q = self.C.coordinates(x - self.middle).flatten(1)

        def pull(share: Tensor) -> Tensor:
            return self.C.image((share @ b - (share @ P) * q).reshape(x.shape))

        return constant - 0.5 * (q.square() @ P.T) + q @ b.T, pull


class SeparateBases(Terms):
    """Components with a basis each."""

    def __init__(self, log_weights: Tensor, means: Tensor, C: Covariance) -> None:
        super().__init__()
        self.C, self.log_weights, self.means = C, log_weights, means
        self.variances = C.eigenvalues(tuple(means.shape)).reshape(len(means), -1)

    def _prepare(self, sigma: float) -> tuple[Covariance, Tensor]:
        peak = (2 * math.pi * (self.variances + sigma**2)).log().sum(1)
        return self.C.map(lambda v: 1 / (v + sigma**2)), self.log_weights - 0.5 * peak

    def _evaluate(self, x: Tensor, level: tuple[Covariance, Tensor]) -> tuple[Tensor, Pull]:
        precision, peak = level
        r = x[:, None] - self.means
        z = precision.apply(r)

        def pull(share: Tensor) -> Tensor:
            return -torch.einsum("bk,bk...->b...", share, z)

        return peak - 0.5 * (r * z).flatten(2).sum(2), pull


def terms(log_weights: Tensor, means: Tensor, C: Covariance) -> Terms:
    """The components N(mu_k, C_k) with weights w_k, means with shape (K, C, H, W) and covariances from `blocks`."""
    if isinstance(C, Diagonal | Fourier):
        return SharedBasis(log_weights, means, C)
    return SeparateBases(log_weights, means, C)


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
