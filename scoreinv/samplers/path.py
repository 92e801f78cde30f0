"""Islands of particles on their way from noise to the posterior: the engine of all samplers.

The data pull the denoised image D, known up to the error C_sigma that a Gaussian prior leaves. In `SMC` and `Anneal` a draw
x_0 of N(D, C_sigma) conditioned on y and fresh noise make the step from level sigma to s, with a = (s / sigma)^2:

    x' = x_0 + a (x - x_0) + s (1 - a)^1/2 z

It is the covariance-aware kernel (`scoreinv.kernels`) times the likelihood that a Gaussian prior foresees at the end of the
step, and the last step, to s = 0, meets the true likelihood. What corrects for the rest is the business of each sampler.

Where particles follow the targets of `scoreinv.posterior` the evidence is a path integral too: with u = u_s(x),

    d log Z / d log s = -2 E[<D - m_s(x), u>] / s^2.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from scoreinv.gaussian import Covariance, dot
from scoreinv.kernels import bridge
from scoreinv.operators.information import white
from scoreinv.posterior import Level, Posterior
from scoreinv.priors import Prior


class Request(NamedTuple):
    """What an island asks of the network.

    Attributes:
        x: Noisy images, with shape (B, C, H, W).
        s: Their level.
        error: Whether it asks for the errors of the denoised images too.
    """

    x: Tensor
    s: float
    error: bool = False


Descent = Generator[Request, Any, None]


class Sampler(Protocol):
    """A frozen dataclass of options that sends islands down.

    Attributes:
        particles: For each draw.
        effective: Share of the draws that weighted particles must be worth: more islands are sent down until they are.
        label: What the result says of weights and evidence.
    """

    @property
    def particles(self) -> int: ...

    @property
    def effective(self) -> float: ...

    @property
    def label(self) -> str: ...

    def refuses(self, posterior: Posterior) -> str:
        """Why this posterior is not for it; empty if it is."""
        ...

    def noise_levels(self, posterior: Posterior) -> list[float]:
        """The levels that a result reports, falling."""
        ...

    def island(self, posterior: Posterior, n: int, generator: torch.Generator) -> Island:
        """n particles at the start, with their stream."""
        ...


@dataclass
class Trace:
    """What happened to one island.

    Attributes:
        ess: Smallest effective sample size over n, before resampling, between each level and the next; where weights are
            used on the way.
        acceptance: Mean acceptance between each level and the next; nan where nothing moved.
        collapsed_at: Level at which the weights collapsed; 0 if they did not.
        log_evidence: Over that of the moments' Gaussian, or absolute [nat]; without weights from a path integral.
        absolute: Whether it is log p(y) itself.
        log_weights: Of the particles, whose mean weight is the evidence [nat]; None without weights.
        even: Whether the draws have been chosen by these weights already, and count alike.
        evaluations: Network evaluations per draw of the island; the first island pays for the scouts.
        vjps: Vector-Jacobian products of the network per draw of the island.
    """

    ess: list[float] = field(default_factory=list)
    acceptance: list[float] = field(default_factory=list)
    collapsed_at: float = 0.0
    log_evidence: float = 0.0
    absolute: bool = False
    log_weights: list[float] | None = None
    even: bool = False
    evaluations: float = 0
    vjps: float = 0


class Island(abc.ABC):
    """Particles that go down together; everything random comes from one generator.

    Args:
        posterior: The target.
        levels: Noise levels, falling; the last step goes from the lowest to s = 0.
        n: Particles.
        generator: The island's own stream.
        stride: Levels from one that the trace reports to the next.

    Attributes:
        x: Noisy images at the present level, with shape (n, C, H, W); the draws in the end.
        passed: Reported levels left behind.
        error: Why the island failed, if it did.
    """

    def __init__(
        self,
        posterior: Posterior,
        levels: Sequence[float],
        n: int,
        generator: torch.Generator,
        stride: int = 1,
    ) -> None:
        self.posterior, self.levels, self.n = posterior, list(levels), n
        self.generator, self.stride = generator, stride
        self.trace, self.passed = Trace(), 0
        self.error: FloatingPointError | None = None
        self.x: Tensor
        self._lowest: list[float] = []
        self._accepted: list[float] = []

    def descend(self) -> Descent:
        """Walk down the levels, asking for every denoised image.

        Where the weights collapse it stops, and `trace.collapsed_at` says where.
        """
        yield from self._begin()
        i = 0
        while i < len(self.levels) - 1:
            i = yield from self._step(i)
            if self.trace.collapsed_at > 0:
                return
            if i % self.stride == 0:
                self._record()
        yield from self._end()
        self._record()
        if not bool(torch.isfinite(self.x).all()):
            raise FloatingPointError("the draws are not finite")

    @abc.abstractmethod
    def _begin(self) -> Descent:
        """Draw the particles at the widest level."""

    @abc.abstractmethod
    def _step(self, i: int) -> Generator[Request, Tensor, int]:
        """From level i to a lower one; returns which."""

    @abc.abstractmethod
    def _end(self) -> Descent:
        """From the lowest level to the draws, with their evidence."""

    def _denoise(self, x: Tensor, s: float) -> Generator[Request, Tensor, Tensor]:
        self.trace.evaluations += 1
        denoised = yield Request(x, s)
        return denoised

    def _denoise_with_error(
        self, x: Tensor, s: float
    ) -> Generator[Request, tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        self.trace.evaluations += 1
        answer = yield Request(x, s, error=True)
        return answer

    def _white(self) -> Tensor:
        return white(self.posterior.shape, self.n, self.generator, self.posterior.dtype)

    def _record(self) -> None:
        """Close the account of the steps from one reported level to the next."""
        self.passed += 1
        if self._lowest:
            self.trace.ess.append(min(self._lowest))
        accepted = self._accepted
        self.trace.acceptance.append(sum(accepted) / len(accepted) if accepted else math.nan)
        self._lowest, self._accepted = [], []


class Twisted(Island):
    """Particles under the twist of `scoreinv.posterior`, drawn to the data at every level.

    Attributes:
        denoised: What the network makes of the particles.
        s: The present level.
        level: The twist there.
    """

    denoised: Tensor
    s: float
    level: Level

    def _begin(self) -> Descent:
        # at the widest level the target is N(posterior mean, posterior covariance + sigma^2)
        self._slopes: dict[float, float] = {}
        self.x = self.posterior.gaussian_draw(self.n, self.generator)
        self.x = self.x + self.levels[0] * self._white()
        yield from self._arrive(self.levels[0])
        yield from self._started()

    def _started(self) -> Descent:
        """At the widest level, before the first step."""
        yield from ()

    def _end(self) -> Descent:
        self._settle()
        self.x = self._informed()
        yield from ()

    def _settle(self) -> None:
        """At the lowest level, before the draws: settle the evidence."""
        self._integrate()
        self.trace.log_evidence = path_integral(list(self._slopes), list(self._slopes.values()))

    def _arrive(self, s: float, prior: Covariance | None = None) -> Descent:
        """The twist and the network at a new level."""
        self.s, self.level = s, self.posterior.level(s, prior)
        self.denoised = yield from self._denoise(self.x, s)

    def _informed(self) -> Tensor:
        """Draws of N(D, C_sigma) conditioned on the data, by perturbing both (Matheron)."""
        x0 = self.denoised + self.level.covariance.sqrt(self._white())
        noise = self.posterior.conditioner.noise(self.n, self.generator)
        return x0 + self.level.conditioned.shift(x0, noise)

    def _proposed(self, s: float) -> Tensor:
        """Where the particles step from the present level."""
        return bridge(self.x, self._informed(), self.s, s, self._white())

    def _integrate(self) -> None:
        """The slope of the evidence at this level, for the path integral."""
        delta = self.denoised - self.level.expected(self.x)
        slope = 2 * float(dot(delta, self.level.shift(self.x)).mean()) / self.level.s**2
        self._slopes[self.level.s] = slope


@torch.no_grad()
def descend_together(prior: Prior, islands: Sequence[Island]) -> Iterator[Island]:
    """Walk islands down side by side, their images in one call of the network; yields an island at each level it leaves.

    The islands stay independent: each has its own stream, weights and step sizes. One whose draws fail is left behind
    with its `error`.
    """
    walks = {island: island.descend() for island in islands}
    answers: dict[Island, Any] = dict.fromkeys(islands)
    while walks:
        requests: dict[Island, Request] = {}
        for island in list(walks):
            passed = island.passed
            try:
                requests[island] = walks[island].send(answers[island])
            except StopIteration:
                del walks[island]
            except FloatingPointError as error:
                island.error = error
                del walks[island]
            for _ in range(island.passed - passed):
                yield island
        if requests:
            answers = dict(zip(requests, _answered(prior, list(requests.values())), strict=True))


def _answered(prior: Prior, requests: Sequence[Request]) -> Sequence[Any]:
    """The answers to requests, which all ask for the same, in one call of the network."""
    x = torch.cat([r.x for r in requests])
    sigma = torch.cat([r.x.new_full((len(r.x),), r.s) for r in requests])
    counts = [len(r.x) for r in requests]
    if not requests[0].error:
        return prior.denoise(x, sigma).split(counts)
    denoised, error = prior.denoise_with_error(x, sigma)
    return list(zip(denoised.split(counts), error.split(counts), strict=True))


def banded(power: Tensor, v: Tensor) -> Tensor:
    """Means of `power` over bands of directions with similar eigenvalues v, with the shape of v."""
    band = (v / v.max()).clamp_min(1e-6).log2().round().long().flatten()
    band = band - band.min()
    total = torch.zeros(int(band.max()) + 1, dtype=torch.float64)
    count = total.index_add(0, band, torch.ones_like(power).flatten())
    mean = total.index_add(0, band, power.flatten()) / count.clamp_min(1)
    return mean[band].reshape(v.shape)


def path_integral(levels: list[float], slopes: list[float]) -> float:
    """The integral of a slope over -log s, between levels by monotone cubics; below the lowest it falls as s^2."""
    from scipy.interpolate import PchipInterpolator

    if not all(map(math.isfinite, slopes)):
        raise FloatingPointError("the slope of the evidence is not finite")
    below, at = 0.5 * slopes[-1], [-math.log(s) for s in levels]
    if len(at) == 1:
        return below
    return float(PchipInterpolator(at, slopes).integrate(at[0], at[-1])) + below


def not_linear(posterior: Posterior) -> str:
    """Why samplers that go by the Gaussian near the data refuse a posterior; empty if they do not."""
    if posterior.likelihood.linear:
        return ""
    kind = type(posterior.likelihood.operator).__name__
    return f"{kind} is not linear, and the Gaussian near its data knows nothing; take SMC"


def check_counts(levels: int, moves: int = 0) -> None:
    """Raise if a sampler of so many levels and moves could not run."""
    if levels < 2 or moves < 0:
        raise ValueError(
            f"levels is {levels} and moves {moves}, expected at least 2 levels and no fewer than 0 moves"
        )
