"""Sequential Monte Carlo along the noise levels: the default sampler, exact in the limit of many particles and levels.

But for its start: at three times the prior's widest standard deviation, noisy images are taken for Gaussian. A mode that is
rarer than one in a hundred and ten standard deviations away loses a tenth of its weight there.

Particles target p_s(x) g_s(x), with the likelihood of the denoised image as the twist,

    g_s(x) = N(y; A D(x, s), S + A C_s A^T).

A step (`scoreinv.samplers.path`) is the covariance-aware kernel times N(y; A m', S + A C_s A^T) over g_sigma(x), where
m' = D + W_s (x' - D - a (x - D)) is what a Gaussian prior would denoise x' to. So only what the network says beyond m'
weighs, and neither a gradient of D nor a guidance weight is needed: with u(m) = (C_s^-1 + H)^-1 (A^T S^-1 y - H m) and
D' = D(x', s)

    log w = log g_s(x') / N(y; A m', S + A C_s A^T) = 1/2 <C_s^-1 (D' - m'), u(D') + u(m')>

With D in the place of the linear m_s(x), likelihoods know of modes as soon as the network does. The error C_s should know
of them too: between far modes the global C is too wide. As cov(x_0 | x_s) = s^2 dD/dx, one difference of D along white z
gives its mean over the particles, in bands of directions of similar prior variance, and with it the C of a Gaussian prior
that looks like this one around the particles. Where C becomes C' at a level, g_s changes by the factor

    log w = -1/2 <u'(D), (C'^-1 - C^-1) u(D)> - 1/2 log det(I + H C'_s) + 1/2 log det(I + H C_s)

and only where these determinants are cheap is C measured.

A likelihood that is not linear and Gaussian enters as a factor of the twist, what it is over its Gaussian neighbour
(`scoreinv.posterior`) at the denoised image conditioned on the data; the draws meet it in full, and their weights with it.

With trained priors at image size the weights collapse. Scouts, a few particles on a coarse path, find out; all islands then
take the steps of `Guided`, which is calibrated (`scoreinv bench learned`) but no longer exact, and the result says so.

Twisted targets: Wu et al., Practical and Asymptotically Exact Conditional Sampling in Diffusion Models (2023,
arXiv:2306.17775), whose proposals take the gradient of D; Del Moral, Doucet & Jasra, Sequential Monte Carlo Samplers (2006).
"""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from scoreinv.gaussian import Covariance, dot
from scoreinv.kernels import bridge, noise_levels
from scoreinv.operators.information import white
from scoreinv.posterior import Posterior
from scoreinv.samplers.guided import Guided
from scoreinv.samplers.path import Descent, Island, Request, Twisted, banded, check_counts
from scoreinv.streams import stream

FINER = 4  # steps from one level to the next where the network brings news
QUIET = 0.01  # news between two levels, of the denoised images or in their weights, that one step may carry [nat]
DIFFERENCE = 0.1  # length over the noise of the difference that measures the slope of D
LOST = 5.0  # loss of effective particles over an e-fold of the noise level that weights do not survive [nat]


@dataclass(frozen=True)
class SMC:
    """Weighted particles.

    Args:
        levels: Noise levels; weighted particles take one to four steps from one to the next, at a cost of two to five
            evaluations each. Where weights collapse, `Guided` has levels of its own.
        particles: Weighted ones for each draw; weights cost about half of them.
        resample_below: Resample when ESS / n falls below this.
        drop_above: Weights have collapsed where the variance of d log w / d log sigma over the particles, mean over an
            e-fold of the noise level, exceeds this and few particles carry the weights; all draws take guided steps then,
            and the result says so.
    """

    levels: int = 20
    particles: int = 2
    resample_below: float = 0.5
    drop_above: float = 20.0

    effective: ClassVar[float] = 0.0
    label: ClassVar[str] = "used throughout"

    def __post_init__(self) -> None:
        check_counts(self.levels)
        if self.particles < 1:
            raise ValueError(f"particles is {self.particles}, expected at least one for each draw")
        if not (0 <= self.resample_below <= 1 and self.drop_above > 0):
            raise ValueError(
                f"resample_below is {self.resample_below} and drop_above {self.drop_above}; expected 0 to 1, and above 0"
            )

    def refuses(self, posterior: Posterior) -> str:
        """It takes every posterior."""
        return ""

    @property
    def fallback(self) -> Guided:
        """What samples where the weights collapse."""
        return Guided()

    def noise_levels(self, posterior: Posterior) -> list[float]:
        """The levels of a posterior's path, falling, without those of the finer steps."""
        return self._path(posterior)[::FINER]

    def island(self, posterior: Posterior, n: int, generator: torch.Generator) -> Island:
        """n particles at the start, with their stream."""
        path = self._path(posterior)
        return Weighted(posterior, path, n, generator, FINER, self.resample_below)

    def scout(self, posterior: Posterior, n: int, generator: torch.Generator) -> Island:
        """The same without finer steps, stopping where the weights collapse."""
        path = noise_levels(self.levels, *posterior.sigma_range)
        return Weighted(posterior, path, n, generator, 1, self.resample_below, self.drop_above)

    def dropped(self, collapsed_at: float) -> str:
        """What the result says where the weights collapse at this level."""
        return (
            f"dropped: at sigma = {collapsed_at:.3g} the variance of d log w / d log sigma over the particles rose above "
            f"{self.drop_above:g} (the prior is far from Gaussian there); all draws took guided steps from the start "
            "instead and count equally, evidence from the path integral, a few nat off"
        )

    def _path(self, posterior: Posterior) -> list[float]:
        return noise_levels(FINER * (self.levels - 1) + 1, *posterior.sigma_range)


class Weighted(Twisted):
    """Particles with weights."""

    def __init__(
        self,
        posterior: Posterior,
        levels: list[float],
        n: int,
        generator: torch.Generator,
        stride: int,
        resample_below: float,
        drop_above: float = math.inf,
    ) -> None:
        super().__init__(posterior, levels, n, generator, stride)
        self.news = 0.0  # since the last reported level [nat]
        self.resample_below, self.drop_above = resample_below, drop_above
        self.log_w, self.log_z = torch.zeros(n, dtype=torch.float64), 0.0
        self.correction = torch.zeros(n, dtype=torch.float64)  # part of the twist
        self._passed = [self.levels[0]]
        self._spreads: list[float] = []
        self._losses: list[float] = []

    def _started(self) -> Descent:
        yield from self._weigh(self.level.expected(self.x), measure=True)

    def _step(self, i: int) -> Generator[Request, Tensor, int]:
        reported = i % self.stride == 0
        end = i + self.stride if reported and self.news < QUIET else i + 1
        self.news = 0.0 if reported else self.news
        x, denoised, sigma, prior = self.x, self.denoised, self.level.s, self.level.prior
        s = self.levels[end]
        self.x = self._proposed(s)
        yield from self._arrive(s, prior)
        foreseen = denoised + self.level.slope.apply(self.x - bridge(x, denoised, sigma, s))
        log_w = yield from self._weigh(foreseen, measure=end % self.stride == 0)
        self._passed.append(s)
        self._spreads.append(spread(log_w))
        self._losses.append(-math.log(effective(log_w)))
        self.news += self._losses[-1]
        self.trace.collapsed_at = s if self._collapsed() else 0.0
        self._lowest.append(effective(self.log_w))
        if self._lowest[-1] < self.resample_below:
            self._resample()
        return end

    def _weigh(self, foreseen: Tensor, measure: bool) -> Generator[Request, Tensor, Tensor]:
        """Weigh the denoised images against those foreseen, and measure the prior's covariance anew.

        Returns the logarithms of the factors, with shape (n,).
        """
        shift, delta = self.level.conditioned.shift, self.denoised - foreseen
        beyond = self.level.precision.apply(delta)
        self.news += 0.5 * float(dot(beyond, delta).mean())
        log_w = 0.5 * dot(beyond, shift(self.denoised) + shift(foreseen))
        if measure and self.posterior.conditioner.determinants:
            log_w = log_w + (yield from self._localise())
        if not self.posterior.likelihood.gaussian:
            x0 = self.denoised + shift(self.denoised)
            log_w = log_w + self._corrected(self.posterior.correction(x0, self.level.covariance))
        if not bool(torch.isfinite(log_w).all()):
            raise FloatingPointError("the importance weights are not finite")
        self.log_w += log_w
        return log_w

    def _corrected(self, correction: Tensor) -> Tensor:
        """Take a new correction into the twist; returns what that adds to the log-weights."""
        change, self.correction = correction - self.correction, correction
        return change

    def _localise(self) -> Generator[Request, Tensor, Tensor]:
        """Measure the covariance of the prior around the particles; returns what that adds to their log-weights."""
        before, s, C = self.level, self.level.s, self.posterior.moments.covariance
        z = self._white()
        denoised = yield from self._denoise(self.x + DIFFERENCE * s * z, s)
        local = local_covariance(C, z, (denoised - self.denoised) / (DIFFERENCE * s), s)
        self.level = self.posterior.level(s, local)
        u, v = (level.conditioned.shift(self.denoised) for level in (before, self.level))
        narrower = self.level.prior_precision.apply(u) - before.prior_precision.apply(u)
        growth = self.level.conditioned.log_growth() - before.conditioned.log_growth()
        return -0.5 * dot(v, narrower) - 0.5 * growth

    def _collapsed(self) -> bool:
        """Weights collapse where they vary among most particles, and where few particles carry them all.

        The first alone would be the choice of a mode, the second alone a few stray particles.
        """
        varied = variance_rate(self._spreads, self._passed) > self.drop_above
        return varied and per_e_fold(self._losses, self._passed) > LOST

    def _resample(self) -> None:
        order = in_order(self.denoised, self.posterior.moments.covariance)
        keep = order[systematic(torch.softmax(self.log_w[order], 0), self.n, self.generator)]
        self.log_z += float(torch.logsumexp(self.log_w, 0)) - math.log(self.n)
        self.log_w.zero_()
        self._keep(keep)

    def _keep(self, kept: Tensor) -> None:
        """The particles of these indices take the places of all."""
        self.x, self.denoised = self.x[kept], self.denoised[kept]
        self.correction = self.correction[kept]

    def _end(self) -> Descent:
        self.x = self._informed()
        self.log_w += self._corrected(self.posterior.correction(self.x))
        self._settle()
        yield from ()
        weights = self.log_z + self.log_w
        self._lowest.append(effective(self.log_w))
        self.trace.log_weights = weights.tolist()
        self.trace.log_evidence = float(torch.logsumexp(weights, 0)) - math.log(self.n)


def local_covariance(C: Covariance, z: Tensor, response: Tensor, s: float) -> Covariance:
    """Covariance of the Gaussian prior that denoises like the prior around the particles.

    In bands of directions of similar variance the mean slope of D is a share of the one under C, at most all of it.

    Args:
        C: Covariance of the prior; the result is no wider.
        z: White directions, one for each particle, with shape (B, C, H, W).
        response: (dD/dx) z, with shape (B, C, H, W).
        s: Noise level.
    """
    cross, norm = (C.power(z + response) - C.power(z - response)) / 4, C.power(z)

    def local(v: Tensor) -> Tensor:
        prior = v / (v + s**2)
        share = (banded(cross, v) / banded(norm * prior, v)).clamp(1e-3, 1.0)
        slope = share * prior
        return torch.where(share < 1, s**2 * slope / (1 - slope), v)

    return C.map(local)


def spread(log_w: Tensor) -> float:
    """Standard deviation of log-weights from their quartiles, as for a Gaussian: one stray particle does not count."""
    low, high = torch.quantile(log_w, torch.tensor([0.25, 0.75], dtype=log_w.dtype))
    return float(high - low) / 1.349


def variance_rate(spreads: Sequence[float], levels: Sequence[float]) -> float:
    """Variance of d log w / d log sigma, mean over the last e-fold of the noise level.

    Args:
        spreads: Standard deviation of the log-weights of each step.
        levels: Noise levels; step i leads from level i to the next.
    """
    widths = [math.log(a / b) for a, b in zip(levels[:-1], levels[1:], strict=True)]
    return per_e_fold([v**2 / w for v, w in zip(spreads, widths, strict=True)], levels)


def per_e_fold(losses: Sequence[float], levels: Sequence[float]) -> float:
    """Sum of what each step loses over the last e-fold of the noise level, or over the last step if that is longer."""
    recent = [i for i, level in enumerate(levels[:-1]) if level <= math.e * levels[-2]]
    return sum(losses[i] for i in recent) / max(1.0, math.log(levels[recent[0]] / levels[-1]))


def effective(log_w: Tensor) -> float:
    """Effective sample size over n of these log-weights (Kong 1992)."""
    w = torch.softmax(log_w, 0)
    return float(1 / (w * w).sum() / len(w))


def in_order(x: Tensor, C: Covariance) -> Tensor:
    """Indices of images, with shape (B,), along a random direction in which the prior is wide.

    Systematic resampling in this order keeps the shares of modes that lie apart. Gerber, Chopin & Whiteley, Negative
    Association, Ordering and Convergence of Resampling Methods (2019).
    """
    direction = white(tuple(x.shape[1:]), 1, stream(0), torch.float64)
    return dot(C.apply(x.double()), direction).argsort()


def systematic(w: Tensor, n: int, generator: torch.Generator) -> Tensor:
    """n indices by systematic resampling of the normalised weights w."""
    u = (torch.arange(n) + torch.rand(1, generator=generator, dtype=torch.float64)) / n
    return torch.searchsorted(torch.cumsum(w, 0), u).clamp(max=len(w) - 1)
