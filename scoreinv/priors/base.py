"""A prior over images: a denoiser at every noise level, plus its two moments.

With x_sigma = x_0 + sigma n, n ~ N(0, I), a prior answers D(x, sigma) = E[x_0 | x_sigma = x]; its
score is grad log p_sigma(x) = (D(x, sigma) - x) / sigma^2 (Robbins 1956; Efron, Tweedie's Formula
and Selection Bias, 2011).
"""

from __future__ import annotations

import abc
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from scoreinv.digests import digest
from scoreinv.gaussian import Fourier, Gaussian, Modulated
from scoreinv.kernels import noise_levels
from scoreinv.priors.turns import Turns
from scoreinv.streams import stream

# standard deviations of a pixel: levels between which denoisers lose most detail
DETAIL = (0.15, 1.5)
ABOVE = 1 / 3  # of the excess noise, at levels above


class Prior(abc.ABC):
    """What every sampler needs of a prior.

    Attributes:
        shape: Shape (C, H, W) of an image.
        dtype: The precision in which the denoiser is evaluated and the particles are kept.
        sigma_min: Below this level the denoiser is not used [model unit].
        sigma_max: Above this level the denoiser is not used [model unit].
        moments: The Gaussian with the prior's mean and covariance.
        identity: What the provenance of a result calls this prior: name, hash of the weights.
        excess_noise: Share by which the variance of x_0 in reverse steps is larger than the error of the denoised image,
            at levels that see detail. Trained denoisers lose it from step to step, and this keeps it; an exact one needs
            none.
        symmetric: Whether flipped and rotated images are as likely, which a network knows up to its errors.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    sigma_min: float
    sigma_max: float
    moments: Gaussian
    identity: dict[str, str]
    excess_noise: float = 0.0
    symmetric: bool = False

    @property
    def device(self) -> torch.device:
        """Where its network runs; particles stay where they are."""
        return torch.device("cpu")

    @abc.abstractmethod
    def denoise(self, x: Tensor, sigma: Tensor) -> Tensor:
        """E[x_0 | x_sigma = x].

        Args:
            x: Noisy images, with shape (B, C, H, W).
            sigma: Noise levels, with shape (B,).

        Returns:
            Denoised images, with shape (B, C, H, W).
        """

    def denoise_with_error(self, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """E[x_0 | x_sigma = x] with shape (B, C, H, W), and how far x_0 is from it.

        The second are the standard deviations of the parts of x_0 - D in each pixel, with shape (B, parts, C, H, W).
        """
        raise NotImplementedError(f"{type(self).__name__} does not know its error")

    def correlation(self, sigma: float) -> Fourier | None:
        """How the parts of these errors go together across pixels; None if the prior does not know its error."""
        return None

    def error_covariance(self, a: Tensor, sigma: float) -> Modulated:
        """The covariance of x_0 given x_sigma, for standard deviations a from `denoise_with_error`."""
        return Modulated(a, self.correlation(sigma))

    def error_skewness(self, significance: Tensor, sigma: float) -> Tensor | None:
        """Skewness of x_0 given x_sigma in each pixel, with shape (B, C, H, W); None if the prior does not know it.

        Args:
            significance: E[x_0 | x_sigma] over the standard deviation of x_0 about it, with shape (B, C, H, W).
            sigma: Noise level.
        """
        return None

    @property
    def knows_error(self) -> bool:
        """Whether `denoise_with_error` has an answer."""
        return self.correlation(self.sigma_max) is not None

    @property
    def deviation(self) -> float:
        """Standard deviation of a pixel, averaged over the image [model unit]."""
        return self.moments.covariance.marginal_variance(self.shape) ** 0.5

    def turns(self, generators: Sequence[torch.Generator]) -> Turns:
        """How images are turned before the denoiser sees them, one for each generator."""
        if not self.symmetric:
            return Turns(None)
        kinds = 8 if self.shape[-2] == self.shape[-1] else 4  # without rotations
        return Turns(torch.cat([torch.randint(kinds, (1,), generator=g) for g in generators]))

    def widening(self, s: float) -> float:
        """By how much x_0 is drawn wider than it is known, in a reverse step from level s.

        A little more noise than an exact denoiser needs is how Karras et al. (2022, arXiv:2206.00364, section 4: S_noise)
        keep the detail that trained ones lose. Here x_0 has it, and only where it is not known: more noise on blank sky
        would lower the flux, and noise where the data know x_0 would undo what they say. Most detail is lost at `DETAIL`,
        less above, and none below.
        """
        low, high = DETAIL
        share = ABOVE if s > high * self.deviation else float(s > low * self.deviation)
        return (1 + share * self.excess_noise) ** 0.5

    def score(self, x: Tensor, sigma: Tensor) -> Tensor:
        """grad log p_sigma(x), with shape (B, C, H, W)."""
        variance = sigma.reshape(-1, *[1] * (x.ndim - 1)) ** 2
        return (self.denoise(x, sigma) - x) / variance

    def sample(self, n: int, seed: int, steps: int = 40, churn: float = 0.1) -> Tensor:
        """n draws, with shape (n, C, H, W), by Heun's method on the probability-flow ODE with a little fresh noise.

        The start is the Gaussian N(mean, C + sigma_max^2 I); images of a symmetric prior are turned at random before each
        step. Draw i depends on (seed, i) only.
        Karras et al. (2022, arXiv:2206.00364), algorithm 2.

        Args:
            n: Draws wanted.
            seed: Decides every draw.
            steps: Noise levels; a draw costs nearly twice as many evaluations.
            churn: Share by which noise is raised before every step. The ODE alone (0) carries the errors of a trained
                score from the first levels to the end.
        """
        parts = (range(i, min(i + 64, n)) for i in range(0, n, 64))
        return torch.cat(
            [self._flow([stream(seed, -2, i) for i in part], steps, churn) for part in parts]
        )

    @torch.no_grad()
    def _flow(self, generators: list[torch.Generator], steps: int, churn: float) -> Tensor:
        """One draw from each generator."""
        levels = noise_levels(steps, self.sigma_max, self.sigma_min) + [0.0]

        def white() -> Tensor:
            return torch.stack(
                [torch.randn(self.shape, generator=g, dtype=self.dtype) for g in generators]
            )

        start = self.moments.covariance.map(lambda v: v + levels[0] ** 2)
        x = self.moments.mean.to(self.dtype) + start.sqrt(white())
        for sigma, s in zip(levels[:-1], levels[1:], strict=True):
            x = self.turns(generators).there(x)
            raised = min(sigma * (1 + churn), self.sigma_max)
            x = x + (raised**2 - sigma**2) ** 0.5 * white() if raised > sigma else x
            slope = -raised * self.score(x, x.new_full((len(x),), raised))
            y = x + (s - raised) * slope
            if s > 0:
                slope = 0.5 * (slope - s * self.score(y, y.new_full((len(y),), s)))
                y = x + (s - raised) * slope
            x = y
        return x

    def rescaled(self, amplitude: float) -> Prior:
        """The prior of amplitude * x, amplitude > 0 [sky unit per model unit]."""
        return RescaledPrior(self, amplitude)

    def check(self, x: Tensor) -> None:
        """Raise if x is not a batch of this prior's images."""
        if tuple(x.shape[1:]) != tuple(self.shape):
            raise ValueError(
                f"images have shape {tuple(x.shape)}, "
                f"expected (B, {', '.join(map(str, self.shape))})"
            )


def of_network(network: Any) -> dict[str, str]:
    """The identity of a network without a name: its kind, and a hash of its weights where it has some."""
    name = {"prior": type(network).__name__}
    if not isinstance(network, nn.Module):
        return name
    return {**name, "sha256": digest(network.state_dict().values())}


class RescaledPrior(Prior):
    """The prior of a x, with the denoiser D(x, sigma) = a D_0(x / a, sigma / a)."""

    def __init__(self, prior: Prior, amplitude: float) -> None:
        if not 0 < amplitude < math.inf:
            raise ValueError(
                f"amplitude is {amplitude:g}, expected a finite number > 0 [sky unit per model unit]"
            )
        self.prior, self.amplitude = prior, float(amplitude)
        self.shape, self.dtype = prior.shape, prior.dtype
        self.sigma_min, self.sigma_max = amplitude * prior.sigma_min, amplitude * prior.sigma_max
        self.moments = prior.moments.rescaled(amplitude)
        self.identity = {**prior.identity, "amplitude": f"{amplitude:.9g}"}
        self.excess_noise, self.symmetric = prior.excess_noise, prior.symmetric

    @property
    def device(self) -> torch.device:
        return self.prior.device

    def sample(self, n: int, seed: int, steps: int = 40, churn: float = 0.1) -> Tensor:
        """amplitude times the draws of the prior, with shape (n, C, H, W)."""
        return self.amplitude * self.prior.sample(n, seed, steps, churn)

    def denoise(self, x: Tensor, sigma: Tensor) -> Tensor:
        return self.amplitude * self.prior.denoise(x / self.amplitude, sigma / self.amplitude)

    def denoise_with_error(self, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        denoised, error = self.prior.denoise_with_error(x / self.amplitude, sigma / self.amplitude)
        return self.amplitude * denoised, self.amplitude * error

    def correlation(self, sigma: float) -> Fourier | None:
        return self.prior.correlation(sigma / self.amplitude)

    def error_skewness(self, significance: Tensor, sigma: float) -> Tensor | None:
        return self.prior.error_skewness(significance, sigma / self.amplitude)
