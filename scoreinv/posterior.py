"""The posterior of one observation, and the path of targets that leads to it.

With the prior's moments (mu, C), W_s = C (C + s^2)^-1, m_s(x) = mu + W_s (x - mu) and C_s = s^2 W_s, the twist

    g_s(x) = N(y; A m_s(x), S + A C_s A^T)

is the likelihood of a noisy image under a Gaussian prior: exact for a Gaussian prior at every s, and for any prior as
s -> 0. The targets pi_s(x) = p_s(x) g_s(x) / Z_s lead from a Gaussian at large s to the posterior at s = 0.
In terms of u_s(x) = (C_s^-1 + H)^-1 (D - H m_s(x)), by which the data would move the denoised image,

    grad log g_s(x) = u_s(x) / s^2.

A likelihood that is not linear and Gaussian has the nearest such one in its place on the path, found by conditioning the
prior's Gaussian on the data a few times, each time around the last draws (expectation maximisation, for Student's noise).
What the two differ by at an image is the business of samplers with weights, `correction`.

Twisted targets: Wu et al., Practical and Asymptotically Exact Conditional Sampling in Diffusion Models (2023,
arXiv:2306.17775).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from scoreinv.conditioning import (
    Conditioned,
    Conditioner,
    LocalConditioned,
    Mobility,
    conditioner,
)
from scoreinv.gaussian import Covariance, Gaussian, Modulated
from scoreinv.kernels import conditional, expectation, inverse
from scoreinv.likelihood import Likelihood
from scoreinv.operators.information import white
from scoreinv.priors.base import Prior
from scoreinv.tensors import as_tensor

ROUNDS = 8  # of conditioning that find the Gaussian likelihood near data that are not Gaussian
SHORT = 0.2  # of the noise of one pixel: what iterative solves for a whole image may leave out under it
LOOSE = 5.0  # times as much at high levels, whose errors fresh noise forgets
HIGH = 10.0  # standard deviations of a pixel: levels above do not let the data doubt a prior
AMPLITUDES = 3  # for which that Gaussian is found
DRAWS = 64  # of the Gaussian posterior, over which each averages
NOISES = 128  # draws of the data's noise, over which its scatter in a pixel is measured
SLACK = 10.0  # on the tolerance of solves in the upper half of the path, whose errors fresh noise forgets


@dataclass(frozen=True)
class Level:
    """The twist at one noise level s, for a Gaussian prior of covariance C.

    Attributes:
        s: Noise level.
        mean: Mean of the prior.
        prior: C.
        slope: W_s, the slope of E[x_0 | x_s].
        covariance: C_s, of x_0 given x_s.
        conditioned: N(., C_s) conditioned on the data.
    """

    s: float
    mean: Tensor
    prior: Covariance
    slope: Covariance
    covariance: Covariance
    conditioned: Conditioned

    def expected(self, x: Tensor) -> Tensor:
        """m_s(x), with shape (B, C, H, W)."""
        return self.mean + self.slope.apply(x - self.mean)

    def shift(self, x: Tensor) -> Tensor:
        """u_s(x) = s^2 grad log g_s(x), with shape (B, C, H, W)."""
        return self.conditioned.shift(self.expected(x))

    @cached_property
    def precision(self) -> Covariance:
        """C_s^-1."""
        return inverse(self.covariance)

    @cached_property
    def prior_precision(self) -> Covariance:
        """C^-1."""
        return inverse(self.prior)

    def mobility(self, prior_precision: Covariance) -> Mobility:
        """Preconditioner of moves at this level, for a prior of this local precision."""
        return self.conditioned.mobility(prior_precision, self.slope)


class Posterior:
    """p(x | y) for one observation y.

    Args:
        prior: The prior, in sky units.
        likelihood: p(y | x).
        y: Data, with shape (*data).
        tolerance: Error of the iterative solves, where those are needed, in standard deviations of the posterior
            and summed over its directions in squares.

    Attributes:
        nearby: The likelihood where it is linear and Gaussian, and the nearest such one where it is not.
        data: What the nearby likelihood takes for y.

    Raises:
        ValueError: Shapes of prior, operator and data that do not fit; data that are not finite.
    """

    def __init__(
        self, prior: Prior, likelihood: Likelihood, y: Tensor, tolerance: float = 0.05
    ) -> None:
        y = as_tensor(y)
        _check(prior, likelihood, y)
        self.prior, self.likelihood, self.y = prior, likelihood, y
        self.tolerance = tolerance
        self.shape, self.dtype = tuple(prior.shape), prior.dtype
        self._levels: dict[float, Level] = {}
        self.nearby, self.data = likelihood.nearby(y, self.moments.mean[None])
        for _ in range(0 if likelihood.gaussian or not likelihood.linear else ROUNDS):
            draws = self.gaussian_draw(DRAWS, torch.Generator().manual_seed(0))
            self.nearby, self.data = likelihood.nearby(y, draws)
            del self.conditioner, self.gaussian

    @property
    def moments(self) -> Gaussian:
        """The Gaussian with the prior's mean and covariance."""
        return self.prior.moments

    @cached_property
    def conditioner(self) -> Conditioner:
        return conditioner(
            self.nearby, self.data, self.moments.covariance, self.dtype, self.tolerance
        )

    def correction(self, x: Tensor, error: Covariance | None = None) -> Tensor:
        """log p(y | x) less that of the nearby likelihood, with shape (B,), in float64; 0 where they are one.

        Args:
            x: Images, with shape (B, C, H, W).
            error: Covariance of what x is known up to; None for an image that is known.
        """
        if self.likelihood.gaussian:
            return torch.zeros(len(x), dtype=torch.float64)
        true = self.likelihood
        log_p = (
            true.log_prob(self.y, x) if error is None else true.log_prob_about(self.y, x, error)
        )
        return log_p - self.nearby.log_prob(self.data, x)

    def level(self, s: float, prior: Covariance | None = None) -> Level:
        """The twist at level s; under the prior's moments it is prepared once.

        Args:
            s: Noise level.
            prior: Covariance of the Gaussian prior, in the basis of the moments'; theirs if not given.
        """
        if prior is None or prior is self.moments.covariance:
            if s not in self._levels:
                self._levels[s] = self._prepare(s, self.moments.covariance)
            return self._levels[s]
        return self._prepare(s, prior)

    def around(
        self, s: float, error: Modulated, skewness: Tensor | None = None
    ) -> LocalConditioned:
        """Gaussians around denoised images, with errors that the prior knows, conditioned on the data.

        Args:
            s: Noise level.
            error: Covariance of x_0 about the denoised images, from `Prior.error_covariance`.
            skewness: Of x_0 about them, from `Prior.error_skewness`, with shape (B, C, H, W); None for Gaussians.
        """
        if s > HIGH * self.prior.deviation:
            return LocalConditioned(self.conditioner, error, s, LOOSE * SHORT * s, skewness)
        return LocalConditioned(self.conditioner, error, s, SHORT * s, skewness, self.noise_image)

    @cached_property
    def noise_image(self) -> Tensor:
        """Standard deviation of A^T S^-1 n in each pixel, with shape (C, H, W), over draws n of the data's noise."""
        nothing = torch.zeros(NOISES, *self.shape, dtype=self.dtype)
        noise = self.conditioner.noise(NOISES, torch.Generator().manual_seed(0))
        seen = self.conditioner.misfit(nothing, noise) - self.conditioner.misfit(nothing[:1])
        return seen.square().mean(0).sqrt()

    def _prepare(self, s: float, prior: Covariance) -> Level:
        covariance = conditional(prior, s)
        return Level(
            s,
            self.moments.mean.to(self.dtype),
            prior,
            expectation(prior, s),
            covariance,
            self.conditioner.given(covariance, SLACK if s > self._middle else 1.0),
        )

    @cached_property
    def gaussian(self) -> Conditioned:
        """The moments conditioned on the data: what the posterior would be for a Gaussian prior."""
        return self.conditioner.given(self.moments.covariance)

    def gaussian_draw(self, n: int, generator: torch.Generator) -> Tensor:
        """Draws of the posterior under the Gaussian prior, with shape (n, C, H, W)."""
        z = white(self.shape, n, generator, self.dtype)
        x = self.moments.mean.to(self.dtype) + self.moments.covariance.sqrt(z)
        return x + self.gaussian.shift(x, self.conditioner.noise(n, generator))

    @cached_property
    def gaussian_log_evidence(self) -> float:
        """log N(y; A mu, S + A C A^T) [nat]."""
        return self.conditioner.log_evidence(self.moments)

    @cached_property
    def sigma_range(self) -> tuple[float, float]:
        """Largest and smallest noise level of the path.

        Three times the widest direction of the prior is noise to any of its structure; the smallest level is the
        prior's own.
        """
        widest = float(self.moments.covariance.eigenvalues(self.shape).max()) ** 0.5
        return min(3 * widest, self.prior.sigma_max), self.prior.sigma_min

    @cached_property
    def _middle(self) -> float:
        """The geometric mean of the largest and the smallest noise level."""
        return math.sqrt(math.prod(self.sigma_range))

    def data_image(self, y: Tensor | None = None) -> Tensor:
        """The data as an image, with shape (C, H, W): A^T S^-1 y over the mean weight of a pixel.

        For visibilities this is the naturally weighted dirty image [Jy/beam], for a cutout with white noise the data
        correlated with the PSF.
        """
        y = self.data if y is None else y
        ones = torch.ones(1, *self.nearby.operator.data_shape, dtype=torch.float64)
        weight = self.nearby.noise.weigh(ones)
        # amplitudes have no linear part to show
        total = max(float(weight.sum()), 1e-300)
        if not self.nearby.operator.complex:
            total /= math.prod(self.shape)
        return self.nearby.projection(y) / total

    def residual_image(self, x: Tensor) -> Tensor:
        """`data_image` of y - A x, with shape (C, H, W), for one image x with shape (C, H, W)."""
        return self.data_image(self.nearby.residual(self.data, x[None])[0])


def amplitude_by_evidence(prior: Prior, likelihood: Likelihood, y: Tensor) -> tuple[float, float]:
    """Sky units per model unit for which the data are most probable under the prior's moments, and their log-evidence [nat].

    Observations of the same data on canvases of other pixel scales are compared by that evidence.

    Maximises log N(y; a A mu, S + a^2 A C A^T) over a, by Brent's method in log a, within a factor of a thousand of the
    least-squares flux; empirical Bayes for the one parameter that a prior in model units leaves open. Noise that is not
    Gaussian has the Gaussian near the data in its place, found anew for each amplitude, three times.

    Args:
        prior: In model units.
        likelihood: In sky units, linear.
        y: Data, with shape (*data).

    Raises:
        ValueError: The data carry no information on the image, or are not linear.
    """
    if not likelihood.linear:
        raise ValueError(
            "the amplitude is found by the evidence of linear data; give a number instead"
        )
    y = as_tensor(y)
    near, data = likelihood.nearby(y, torch.zeros(1, *prior.shape, dtype=torch.float64))
    best = _likeliest(prior, near, data)
    for _ in range(0 if likelihood.gaussian else AMPLITUDES):
        posterior = Posterior(prior.rescaled(best[0]), likelihood, y)
        best = _likeliest(prior, posterior.nearby, posterior.data)
    return best


def _likeliest(prior: Prior, likelihood: Likelihood, y: Tensor) -> tuple[float, float]:
    """The answer of `amplitude_by_evidence` for Gaussian noise."""
    from scipy.optimize import minimize_scalar

    solver = conditioner(likelihood, y, prior.moments.covariance, torch.float64)
    D = likelihood.projection(y)
    # <y, S^-1 y> - chance = a^2 <mu + sqrt(C) z, H (mu + sqrt(C) z)> on average: a first guess of the scale
    H = likelihood.information(torch.float64).apply
    z = prior.moments.sample(8, torch.Generator().manual_seed(0)).double()
    expected = float((z * H(z)).flatten(1).sum(1).mean())
    if not expected > 0:
        raise ValueError("the data carry no information on the image: is every weight zero?")
    dirty = float((D * D).sum()) / max(float((D * H(D[None])[0]).sum()), 1e-300)
    guess = math.sqrt(max(dirty * float((D * D).sum()), 1e-300) / expected)
    curve = solver.evidence_curve(prior.moments, guess)
    best = minimize_scalar(
        lambda t: -curve(math.exp(t)),
        bounds=(math.log(guess) - math.log(1e3), math.log(guess) + math.log(1e3)),
        method="bounded",
        options={"xatol": 0.01},
    )
    amplitude = math.exp(float(best.x))
    return amplitude, solver.log_evidence(prior.moments.rescaled(amplitude))


def _check(prior: Prior, likelihood: Likelihood, y: Tensor) -> None:
    operator = likelihood.operator
    if tuple(prior.shape) != tuple(operator.shape):
        raise ValueError(
            f"the prior makes images of shape {tuple(prior.shape)}, the operator takes {tuple(operator.shape)}; "
            "choose another prior, or build the operator on the prior's canvas (channels, rows, columns)"
        )
    if tuple(y.shape) != tuple(operator.data_shape):
        batch = (
            " (one observation per Posterior: pass y[0]?)"
            if y.shape[1:] == torch.Size(operator.data_shape)
            else ""
        )
        raise ValueError(
            f"data have shape {tuple(y.shape)}, the operator makes {tuple(operator.data_shape)}{batch}"
        )
    if y.is_complex() != operator.complex:
        raise ValueError(
            f"data are {y.dtype}, the operator makes {'complex' if operator.complex else 'real'} data"
        )
    if not bool(torch.isfinite(y).all()):
        raise ValueError(
            f"{int((~torch.isfinite(y)).sum())} of {y.numel()} data are not finite; "
            "drop them, or give them a finite value and infinite noise variance"
        )
    likelihood.noise.check_data(y)
