"""The reverse chain of a prior: the reference process that makes images of the prior, told of data or not."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from scoreinv.conditioning import Conditioned, Conditioner, conditioner
from scoreinv.finetune.reference import GaussianStep, LocalStep, Reference
from scoreinv.gaussian import Covariance, Fourier, dot, selected
from scoreinv.kernels import conditional, noise_levels, reverse_covariance
from scoreinv.likelihood import Likelihood
from scoreinv.operators.information import white
from scoreinv.priors.base import Prior
from scoreinv.samplers.smc import DIFFERENCE, local_covariance
from scoreinv.streams import stream

SUREST = 0.05  # of the noise level that pixels scatter by at least, however sure the prior is


class NotKnownError(ValueError):
    """Covariances given data that nothing cheap is known of."""


class PriorChain(Reference):
    """The reverse chain of a prior, with the covariance-aware kernel.

    A prior that knows the error K of each image has that in its steps, as wide as `Guided` draws it: V is of variances
    s^2 (1 - a) + (1 - a)^2 w K_ii, and its correlations are those of s^2 (1 - a) + (1 - a)^2 w K, averaged over the image
    where it is not known. With one C for all images `galaxy32` ends with 0.34 to 0.65 of the power of galaxies after 16
    steps, so with 0.64 to 1.09, most at coarse scales; Heun's method with 0.70 to 0.99.

    Args:
        prior: Its denoiser makes the mean, D + a (x - D).
        steps: T; the last one leads to noise level 0.
        covariance: C of the kernel's V, or one for each step (`measured`), for priors that do not know their error. The
            prior's moments if not given, which makes a Gaussian prior exact at any T; Scalar(v) with a small v and
            Scalar(inf) are the usual small and large variances.
        sigma_max: First level; ten times the widest direction of the prior if not given, or its own if that is less.
        sigma_min: Last level before 0; the prior's own if not given.
        likelihood: Of data that move x_0, too, if it is linear with Gaussian noise.

    Raises:
        ValueError: A covariance that leaves directions without variance, or not one for each step; levels that do not fall.
    """

    def __init__(
        self,
        prior: Prior,
        steps: int,
        covariance: Covariance | Sequence[Covariance] | None = None,
        sigma_max: float | None = None,
        sigma_min: float | None = None,
        likelihood: Likelihood | None = None,
    ) -> None:
        if steps < 2:
            raise ValueError(f"steps is {steps}, expected at least 2")
        self.prior, self.steps = prior, steps
        self.shape, self.dtype = tuple(prior.shape), prior.dtype
        moments = prior.moments
        widest = float(moments.covariance.eigenvalues(self.shape).max()) ** 0.5
        top = min(10 * widest, prior.sigma_max) if sigma_max is None else sigma_max
        self.levels = noise_levels(steps, top, sigma_min or prior.sigma_min)
        self._sigma = torch.tensor([*self.levels, 0.0], dtype=torch.float64)
        given = moments.covariance if covariance is None else covariance
        self.covariances = [given] * steps if isinstance(given, Covariance) else list(given)
        if len(self.covariances) != steps:
            raise ValueError(
                f"{len(self.covariances)} covariances for {steps} steps, expected as many"
            )
        if not all(float(C.eigenvalues(self.shape).min()) > 0 for C in self.covariances):
            raise ValueError(
                "the chain's covariance has directions without variance, in which the last step would have no density; "
                "expected all above 0"
            )
        self._V = [
            reverse_covariance(C, a, b)
            for C, a, b in zip(self.covariances, *self._spans, strict=True)
        ]
        self._steer = [
            C.map(lambda v, a=a, b=b: _lean(v, a, b))
            for C, a, b in zip(self.covariances, *self._spans, strict=True)
        ]
        self._pixel = moments.covariance.marginal_variance(self.shape)
        self.likelihood, C, self._told = likelihood, moments.covariance, None
        if likelihood is not None and likelihood.gaussian:
            self._told = solver(likelihood, C, self.dtype).given(C)
        self._start, self._start_volume = C.map(lambda v: v + self.levels[0] ** 2), 0.0

    @property
    def device(self) -> torch.device:
        return self.prior.device

    def start(self, n: int, y: Tensor | None) -> GaussianStep:
        mean = self.prior.moments.mean.to(self.dtype).expand(n, *self.shape)
        C = self.prior.moments.covariance.map(lambda v: v + self.levels[0] ** 2)
        plain = GaussianStep(mean, C, mean)
        if y is None or self._told is None:
            return plain
        # what a Gaussian prior would make of the data
        mean = mean + self._told.respond(self.likelihood.log_slope(y, mean))
        volume = torch.tensor(self._start_volume, dtype=torch.float64)
        return GaussianStep(mean, self._start, mean, (plain, volume))

    def step(self, x: Tensor, k: Tensor, y: Tensor | None) -> GaussianStep:
        sigma = self._sigma[k].to(x.dtype)
        if not self.prior.knows_error:
            return self.around(x, self.prior.denoise(x, sigma), k, y)
        denoised, error = self.prior.denoise_with_error(x, sigma)
        return self.around(x, denoised, k, y, error)

    def around(
        self,
        x: Tensor,
        denoised: Tensor,
        k: Tensor,
        y: Tensor | None,
        error: Tensor | None = None,
    ) -> GaussianStep:
        """Step k of each state, for images that the prior's network has denoised, and their errors if it knows them."""
        a = (self._sigma[k + 1] / self._sigma[k]).square().to(x.dtype)
        mean = denoised + a.reshape(-1, *[1] * len(self.shape)) * (x - denoised)
        if error is None:
            return GaussianStep(mean, selected(self._V, k, self.shape), denoised)
        deviation, R = self._scatter(error, k)
        return LocalStep(mean, R, denoised, error=error, deviation=deviation)

    def _scatter(self, error: Tensor, k: Tensor) -> tuple[Tensor, Fourier]:
        """M and R of `LocalStep`, for errors of the images, with shape (B, parts, *shape)."""
        deviation = error.new_empty(len(k), *self.shape)
        spectrum = torch.empty(len(k), *self.shape, dtype=torch.float64)
        for i in k.unique().tolist():
            rows, s = k == i, self.levels[i]
            K = self.prior.error_covariance(error[rows], s)
            a = float(self._sigma[i + 1]) ** 2 / s**2
            fresh, share = a * (1 - a) * s**2, (self.prior.widening(s) * (1 - a)) ** 2
            # a step to the image itself has no other noise, and none at all would have no density
            unknown = K.deviation.square().clamp_min((SUREST * s) ** 2)
            variance = fresh + share * unknown
            over = lambda v: v.flatten(1).sum(1)
            where = unknown / variance
            where = where / over(unknown).reshape(-1, *[1] * len(self.shape))
            parts = (where[:, None] * K.a.square()).flatten(2).sum(2)
            known = K.rho.spectrum.expand(K.a.shape[1], *self.shape)
            power = torch.einsum("bp,p...->b...", parts.double(), known.double())
            white = fresh * over(where).double().reshape(-1, *[1] * len(self.shape))
            deviation[rows], spectrum[rows] = variance.sqrt(), white + share * power
        return deviation, Fourier(spectrum)

    @property
    def _spans(self) -> tuple[list[float], list[float]]:
        """Levels from which the steps lead, and to which."""
        return self.levels, [*self.levels[1:], 0.0]

    def steered(self, slope: Tensor, k: Tensor) -> Tensor:
        """V^-1/2 (1 - a) C_sigma g: what reweighing x_0 by exp(g . x_0) does to the step under a Gaussian prior."""
        return selected(self._steer, k, self.shape).apply(slope)

    def followed(self, step: GaussianStep, shift: Tensor, k: Tensor) -> Tensor:
        """u of steps k whose denoised images are moved by a shift, V^-1/2 (1 - a) shift, with shape (B, *shape)."""
        return step.leant(self.share(k).to(shift.dtype) * shift)

    def share(self, k: Tensor) -> Tensor:
        """1 - a, by which steps k follow the denoised image, with shape (B, 1, ...)."""
        a = (self.sigma(k + 1) / self.sigma(k)).square()
        return (1 - a).reshape(-1, *[1] * len(self.shape))

    def noised(self, x: Tensor, k: int, generator: torch.Generator) -> Tensor:
        states = [x]
        for i in range(k - 1, -1, -1):
            more = math.sqrt(float(self._sigma[i] ** 2 - self._sigma[i + 1] ** 2))
            states.append(states[-1] + more * white(self.shape, len(x), generator, x.dtype))
        return torch.stack(states[::-1])

    def towards(self, x: Tensor, end: Tensor, k: Tensor) -> Tensor:
        return x + self.share(k).to(x.dtype) * (end - x)

    def sigma(self, k: Tensor) -> Tensor:
        """Noise level of x_k, with shape (B,)."""
        return self._sigma[k]

    def clock(self, k: Tensor) -> Tensor:
        low, high = math.log(self.levels[-1]), math.log(self.levels[0])
        return 1 - 2 * (self._sigma[k].clamp_min(self.levels[-1]).log() - low) / (high - low)

    def scale(self, k: Tensor) -> Tensor:
        return (self._sigma[k].square() + self._pixel).sqrt()


class TwistedChain(PriorChain):
    """The reverse chain of a prior under the data: its steps times the likelihood that a Gaussian prior foresees.

    x_0 is drawn of N(D, C_sigma) conditioned on y, the proposal of `scoreinv.samplers.path`; so means and covariances are
    both exact for a Gaussian prior, at any T. Steps remember the plain ones that they stand for.

    Args:
        prior: See `PriorChain`.
        steps: T.
        likelihood: Linear, with Gaussian noise, and so few pixels or so simple that covariances given data are known.
        covariance: See `PriorChain`.
        sigma_max: See `PriorChain`.

    Raises:
        ValueError: Another likelihood.
    """

    def __init__(
        self,
        prior: Prior,
        steps: int,
        likelihood: Likelihood,
        covariance: Covariance | Sequence[Covariance] | None = None,
        sigma_max: float | None = None,
    ) -> None:
        super().__init__(prior, steps, covariance, sigma_max, likelihood=likelihood)
        given, C = foreseen(self, likelihood), prior.moments.covariance
        known = [] if given is None else [g.covariance() for g in (*given, self._told)]
        if given is None or any(K is None for K in known):
            raise NotKnownError(
                f"covariances given data of {type(likelihood.operator).__name__} and {type(likelihood.noise).__name__} are "
                f"not known at {self.shape}; take a PriorChain and guidance"
            )
        top = self.levels[0] ** 2
        self._start = known.pop().map(lambda v: v + top)
        self._start_volume = self._volume(C.map(lambda v: v + top), self._start)
        self._given, self._twisted = given, []
        for K, sigma, s in zip(known, *self._spans, strict=True):
            a = (s / sigma) ** 2
            self._twisted.append(K.map(lambda v, a=a, s=s: s**2 * (1 - a) + (1 - a) ** 2 * v))
        volumes = [self._volume(*pair) for pair in zip(self._V, self._twisted, strict=True)]
        self._volumes = torch.tensor(volumes, dtype=torch.float64)

    def _volume(self, plain: Covariance, twisted: Covariance) -> float:
        return 0.5 * (plain.logdet(self.shape) - twisted.logdet(self.shape))

    def around(
        self,
        x: Tensor,
        denoised: Tensor,
        k: Tensor,
        y: Tensor | None,
        error: Tensor | None = None,
    ) -> GaussianStep:
        plain = super().around(x, denoised, k, None)
        if y is None:
            return plain
        given = lambda i, rows, e: self._given[i].respond(e)
        shift = pulled(self.likelihood, given, denoised, k, y)
        mean = plain.mean + self.share(k).to(shift.dtype) * shift
        V = selected(self._twisted, k, self.shape)
        return GaussianStep(mean, V, denoised, (plain, self._volumes[k]))


def _lean(v: Tensor, sigma: float, s: float) -> Tensor:
    """V^-1/2 (1 - a) C_sigma along a direction of prior variance v, for the step from sigma to s."""
    a, error = (s / sigma) ** 2, sigma**2 / (1 + sigma**2 / v)
    return (1 - a) * error / (s**2 * (1 - a) + (1 - a) ** 2 * error).sqrt()


def measured(prior: Prior, levels: Sequence[float], images: Tensor, seed: int) -> list[Covariance]:
    """Covariances C under which a Gaussian prior is, at each level, as sure of x_0 as the prior is on average.

    Around the modes of a prior that has several this is far less than its moments say.

    Args:
        prior: Its denoiser is probed.
        levels: Noise levels.
        images: Of the prior, with shape (n, C, H, W).
        seed: Of the noise and the probes.
    """
    found, generator = [], stream(seed, 7)
    for s in levels:
        x = images + s * white(prior.shape, len(images), generator, images.dtype)
        z = white(prior.shape, len(images), generator, images.dtype)
        at = x.new_full((len(x),), s)
        response = (prior.denoise(x + DIFFERENCE * s * z, at) - prior.denoise(x, at)) / (
            DIFFERENCE * s
        )
        found.append(local_covariance(prior.moments.covariance, z, response, s))
    return found


def measured_chain(prior: Prior, steps: int, images: Tensor, seed: int) -> PriorChain:
    """The reverse chain of a prior with `measured` covariances; see there for the arguments."""
    levels = PriorChain(prior, steps).levels
    return PriorChain(prior, steps, measured(prior, levels, images.to(prior.dtype), seed))


def solver(likelihood: Likelihood, C: Covariance, dtype: torch.dtype) -> Conditioner:
    """Conditions Gaussians on any data of a likelihood, through `Conditioned.respond`."""
    operator = likelihood.operator
    wide = torch.complex128 if operator.complex else torch.float64
    return conditioner(likelihood, torch.zeros(operator.data_shape, dtype=wide), C, dtype)


def foreseen(chain: PriorChain, likelihood: Likelihood) -> list[Conditioned] | None:
    """N(., C_sigma) conditioned on data, for each step; None if the likelihood is not linear and Gaussian."""
    if not likelihood.gaussian:
        return None
    given = solver(likelihood, chain.prior.moments.covariance, chain.dtype).given
    pairs = zip(chain.covariances, chain.levels, strict=True)
    return [given(conditional(C, s)) for C, s in pairs]


def pulled(
    likelihood: Likelihood,
    respond: Callable[[int, Tensor, Tensor], Tensor],
    denoised: Tensor,
    k: Tensor,
    y: Tensor,
) -> Tensor:
    """By which data move denoised images, (K^-1 + H)^-1 grad log p(y | D), with shape (B, *shape).

    Args:
        likelihood: Of the data.
        respond: (K^-1 + H)^-1 e, of a step's number, which images take it, with shape (B,), and their e.
        denoised: D, with shape (B, *shape).
        k: Steps, with shape (B,).
        y: Data, with shape (B, *data).
    """
    e = likelihood.log_slope(y, denoised)
    shift = torch.empty_like(denoised)
    for i in k.unique().tolist():
        rows = k == i
        shift[rows] = respond(i, rows, e[rows])
    return shift


def foreseen_log_prob(
    likelihood: Likelihood, given: Conditioned, denoised: Tensor, y: Tensor
) -> Tensor:
    """log N(y; A D, S + A C A^T) up to a constant, with shape (B,), in float64, for N(., C) conditioned on data.

    By the matrix inversion lemma the misfit is that of D, less what (C^-1 + H)^-1 A^T S^-1 (y - A D) takes away.
    """
    e = likelihood.log_slope(y, denoised)
    return 0.5 * (dot(e, given.respond(e)) - likelihood.chi2(y, denoised.double()))
