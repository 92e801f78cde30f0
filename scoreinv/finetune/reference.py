"""Reference processes: Markov chains, from which a control departs.

A chain x_0, x_1, ..., x_T is drawn in the order of generation: x_0 is noise, x_T the image. Step k draws a z that knows
nothing of the control, and takes x_k to x_{k+1}; a control u tilts the density of z by exp(u . z). Here

    x_{k+1}  =  mean_k(x_k) + V_k^1/2 z,      z  ~  N(0, 1),

and the tilt moves the mean by V_k^1/2 u. The reverse chain of a prior makes images of the prior; processes that know
nothing are in `scoreinv.finetune.free`, those of characters in `scoreinv.finetune.absorbing`.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from scoreinv.conditioning import Conditioned, Conditioner, conditioner
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


class Step(abc.ABC):
    """The law of x_{k+1} for each state of a batch, by a z that a control tilts.

    Attributes:
        denoised: What x is known to become, with shape (B, *shape).
        error: How far from that it may end, as `Prior.denoise_with_error` says; None where a prior does not.
    """

    denoised: Tensor
    error: Tensor | None = None

    @abc.abstractmethod
    def drawn(self, u: Tensor | float, generator: torch.Generator, spread: float = 1.0) -> Tensor:
        """z under a control, with shape (B, *shape); 0 for none. With spread > 1 it strays further."""

    @abc.abstractmethod
    def taken(self, z: Tensor) -> Tensor:
        """x_{k+1} of z, with shape (B, *shape)."""

    @abc.abstractmethod
    def noise(self, x: Tensor) -> Tensor:
        """z of the states that a step has led to, with shape (B, *shape)."""

    @staticmethod
    @abc.abstractmethod
    def log_density(u: Tensor, z: Tensor) -> Tensor:
        """log p_u - log p of steps at their z, with shape (B,), in float64."""

    @abc.abstractmethod
    def log_ratio(self, x: Tensor, z: Tensor) -> Tensor:
        """log-density of the step that this one stands for over this one's, at states x with their z, with shape (B,)."""


@dataclass(frozen=True)
class GaussianStep(Step):
    """N(mean, V) for each image of a batch.

    Attributes:
        mean: With shape (B, *shape).
        covariance: V, one for each image.
        denoised: What x is known to become, with shape (B, *shape): E[x_T | x_k] of a prior, x itself where nothing is
            known.
        plain: The step of the chain that this one stands for, and 1/2 log det of its covariance over this one's; None if
            it stands for itself.
        error: See `Step`, with shape (B, parts, *shape).
    """

    mean: Tensor
    covariance: Covariance
    denoised: Tensor
    plain: tuple[GaussianStep, Tensor] | None = None
    error: Tensor | None = None

    def drawn(self, u: Tensor | float, generator: torch.Generator, spread: float = 1.0) -> Tensor:
        n, *shape = self.mean.shape
        return u + spread * white(tuple(shape), n, generator, self.mean.dtype)

    def taken(self, z: Tensor) -> Tensor:
        return self.mean + self.covariance.sqrt(z)

    def noise(self, x: Tensor) -> Tensor:
        return self.leant(x - self.mean)

    def leant(self, shift: Tensor) -> Tensor:
        """u that moves the mean by a shift, V^-1/2 shift, with shape (B, *shape)."""
        return self.covariance.map(torch.rsqrt).apply(shift)

    @staticmethod
    def log_density(u: Tensor, z: Tensor) -> Tensor:
        """u . z - |u|^2 / 2."""
        u, z = u.flatten(1).double(), z.flatten(1).double()
        return (u * (z - 0.5 * u)).sum(1)

    def log_ratio(self, x: Tensor, z: Tensor) -> Tensor:
        if self.plain is None:
            return torch.zeros(len(x), dtype=torch.float64)
        step, log_volume = self.plain
        square = lambda v: v.double().flatten(1).square().sum(1)
        return 0.5 * (square(z) - square(step.noise(x))) - log_volume


@dataclass(frozen=True)
class LocalStep(GaussianStep):
    """N(mean, V) with V^1/2 = M R^1/2: pixels that scatter as they do in each image, and go together as they do where it is.

    Attributes:
        covariance: R, stationary, of mean variance 1.
        deviation: M, standard deviations of the pixels, with shape (B, *shape).
    """

    deviation: Tensor = field(kw_only=True)

    def taken(self, z: Tensor) -> Tensor:
        return self.mean + self.deviation * self.covariance.sqrt(z)

    def leant(self, shift: Tensor) -> Tensor:
        return super().leant(shift / self.deviation)


class Reference(abc.ABC):
    """A Markov chain.

    Attributes:
        law: Of its steps.
        steps: T.
        shape: Of an image.
        dtype: Of the states.
    """

    law: type[Step] = GaussianStep
    steps: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def device(self) -> torch.device:
        """Where its network runs, and where those of controls are to; states and data stay on the CPU."""
        return torch.device("cpu")

    @abc.abstractmethod
    def start(self, n: int, y: Tensor | None) -> Step:
        """The law of n states x_0, given data (n, *data) if there are any."""

    @abc.abstractmethod
    def step(self, x: Tensor, k: Tensor, y: Tensor | None) -> Step:
        """Step k of each state, for x with shape (B, *shape), k with shape (B,) and data (B, *data), if there are any."""

    @abc.abstractmethod
    def noised(self, x: Tensor, k: int, generator: torch.Generator) -> Tensor:
        """States x_0, ..., x_k that lead to states x_k = x, with shape (k + 1, B, *shape)."""

    def towards(self, x: Tensor, end: Tensor, k: Tensor) -> Tensor | None:
        """E[x_{k+1} | x_k, x_T] of paths from `noised`, for states, images (B, *shape), steps (B,); None if not known."""
        return None

    @abc.abstractmethod
    def clock(self, k: Tensor) -> Tensor:
        """A time for the control's network, rising from -1 to 1 or so, with shape (B,)."""

    @abc.abstractmethod
    def scale(self, k: Tensor) -> Tensor:
        """Standard deviation of a pixel of x_k, with shape (B,)."""

    def steered(self, slope: Tensor, k: Tensor) -> Tensor:
        """u of steps k that a log-reward with the gradient g asks for, with the shape (B, *shape) of g: V^1/2 g."""
        return self.step(slope, k, None).covariance.sqrt(slope)

    def log_terminal(self, x: Tensor) -> Tensor:
        """log-density of x_T that a reward must be freed of, with shape (B,); 0 for a prior, which is part of the target."""
        return torch.zeros(len(x), dtype=torch.float64)


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
