"""Islands of particles on their way from noise to the posterior: the engine of all samplers.

From level sigma to s, a = (s / sigma)^2, with delta = D - m_sigma(x), the covariance-aware kernel proposes
x' ~ N(r, V) g_s(x') and the importance weight is the twist's own prediction over g_sigma(x). For this kernel
C_s + W_s V W_s = C_sigma, so that both Gaussians share one covariance, their determinants cancel, and

    log w = (1 - a) / (2 sigma^2) <(C + sigma^2)(C + s^2)^-1 delta,  u_sigma(m_sigma(x)) + u_sigma(m')>
    m'    = m_sigma(x) + (1 - a) W_s delta                                       (mean of x_0 after the step)
    x'    = x_u + (1 - a) u_sigma(x_0u),   x_u ~ N(r, V),  x_0u ~ N(m_s(x_u), C_s)      (data perturbed: Matheron)

Moves at s are MALA steps with preconditioner M, in the discretisation that is exact for a Gaussian of covariance M. With
the trapezoid of the score along the proposal for the change of log p_s, which no density is needed for,

    x' = x + rho M G(x) + (h M)^1/2 z,     rho = 1 - (1 - h)^1/2,  0 < h < 1,     G = score + u_s / s^2
    log acceptance = (1/2 - rho / h) <G + G', x' - x> + rho^2 / (2 h) (<G, M G> - <G', M G'>)

Where weights have collapsed the twist is far from p(y | x_s). The guided step compares the data with the denoised image
instead: x_0 ~ N(D, C_sigma) conditioned on y, then x_s between x_0 and x_sigma. Both steps are exact for a Gaussian prior.

The mean of the first-order weights integrates to the evidence without an exponential: with u = u_s(x),

    d log Z / d log s = -2 E[<D - m_s(x), u>] / s^2.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from scoreinv.conditioning import Mobility
from scoreinv.gaussian import Covariance, dot
from scoreinv.kernels import ReverseKernel, expectation, noise_levels
from scoreinv.operators.information import white
from scoreinv.posterior import Posterior

Request = tuple[Tensor, float]  # noisy images and their level, to be denoised
Descent = Generator[Request, Tensor, None]
WINDOW = (0.3, 1.5)  # of Posterior.sharpest: where a guided path moves
NEGLIGIBLE = 0.98  # one-step ESS / n above which a step needs no moves
TRUSTED = 10.0  # of Prior.sigma_min: below, a trained score is too uncertain for moves to gain


@dataclass(frozen=True)
class Plan:
    """How an island descends.

    Args:
        levels: Noise levels; the last step goes from the lowest to s = 0.
        moves: MALA steps at each level where they pay.
        weights: Use importance weights; an island whose weights collapse starts again without them.
        guided: Without weights, step by the denoised image conditioned on the data instead of by the twist, and move
            only at the levels near the data's noise.
        resample_below: Resample when ESS / n falls below this.
        drop_above: The weights have collapsed when their relative variance, n / ESS - 1 of each step alone, sums to more
            than this over an e-fold of the noise level, however many steps that takes.
        acceptance: Target acceptance of the moves.
    """

    levels: int
    moves: int
    weights: bool
    guided: bool
    resample_below: float = 0.5
    drop_above: float = 2.0
    acceptance: float = 0.6

    def __post_init__(self) -> None:
        if self.levels < 2 or self.moves < 0:
            raise ValueError(
                f"levels is {self.levels} and moves {self.moves}, expected at least 2 levels and no fewer than 0 moves"
            )

    def without_weights(self) -> Plan:
        """The same descent for where weights are known to collapse."""
        return replace(self, weights=False)

    def noise_levels(self, posterior: Posterior) -> list[float]:
        """The levels of a posterior's path, from the largest to the smallest."""
        return noise_levels(self.levels, *posterior.sigma_range)


@dataclass
class Trace:
    """What happened to one island.

    Attributes:
        ess: Effective sample size over n, before resampling, at each level where weights were tried.
        one_step: The same for the increments of that step alone.
        acceptance: Mean acceptance at each level but the first; nan where nothing moved.
        collapsed_at: Level at which the weights collapsed, and the island started again without; 0 if they did not.
        log_evidence: From the weights, over that of the moments' Gaussian [nat]; None without weights.
        path_evidence: The same from the path integral [nat].
        evaluations: Network evaluations per particle.
    """

    ess: list[float] = field(default_factory=list)
    one_step: list[float] = field(default_factory=list)
    acceptance: list[float] = field(default_factory=list)
    collapsed_at: float = 0.0
    log_evidence: float | None = None
    path_evidence: float = 0.0
    evaluations: int = 0


class Island:
    """Particles that share resampling and step sizes; everything random comes from one generator.

    Args:
        posterior: The target.
        plan: How to descend.
        n: Particles.
        generator: The island's own stream.
    """

    def __init__(
        self, posterior: Posterior, plan: Plan, n: int, generator: torch.Generator
    ) -> None:
        self.posterior, self.plan, self.n, self.streams = posterior, plan, n, [generator]
        self.levels = plan.noise_levels(posterior)
        self.trace = Trace()
        self.weighted = plan.weights
        self.passed = 0
        self.error: FloatingPointError | None = None

    def descend(self) -> Descent:
        """Walk down the levels, asking for every denoised image; the draws are in `x` at the end."""
        while not (yield from self._walk()):
            # where weights collapse the twist has misled the particles: start again without both
            self.weighted = False
        self._finish()

    def _walk(self) -> Generator[Request, Tensor, bool]:
        """From the widest level to the data; False if the weights have collapsed on the way."""
        self.h, self.resampled, self.passed = 0.5, False, 0
        self.log_w, self.log_z = torch.zeros(self.n, dtype=torch.float64), 0.0
        self.slopes: list[float] = []
        self.trace.acceptance = []
        C, sigma = self.posterior.moments.covariance, self.levels[0]
        # at the widest level the target is N(posterior mean, posterior covariance + sigma^2)
        self.x = self.posterior.gaussian_draw(self.streams, self.n) + sigma * self._white()
        yield from self._arrive(sigma)
        for sigma, s in zip(self.levels, [*self.levels[1:], 0.0], strict=True):
            if not self._step(ReverseKernel.between(sigma, s, C)):
                return False
            if s > 0:
                yield from self._arrive(s)
                yield from self._move()
            self.passed += 1
        return True

    def _arrive(self, s: float) -> Descent:
        """The network and the twist at the new level."""
        self.level = self.posterior.level(s)
        self.denoised = yield from self._denoise(self.x, s)
        self.u = self.level.shift(self.x)

    def _denoise(self, x: Tensor, s: float) -> Generator[Request, Tensor, Tensor]:
        self.trace.evaluations += 1
        denoised = yield x, s
        return denoised

    def _white(self) -> Tensor:
        return white(self.posterior.shape, self.streams, self.n, self.posterior.dtype)

    # ------------------------------------------------------------ from level to level

    def _step(self, kernel: ReverseKernel) -> bool:
        """One level down; False, and nothing done, where the weights have collapsed."""
        m = self.level.expected(self.x)
        delta = self.denoised - m
        share = torch.softmax(self.log_w, 0)
        self.slopes.append(2 * float((share * dot(delta, self.u)).sum()) / kernel.sigma**2)
        if self.weighted and not self._weigh(kernel, m, delta):
            return False
        if self.plan.guided and not self.weighted:
            self._guide(kernel)
        else:
            self._propose(kernel)
        return True

    def _propose(self, kernel: ReverseKernel) -> None:
        """The kernel times the twist at s."""
        x = kernel.mean(self.x, self.denoised) + kernel.std(self._white())
        x0 = x
        if kernel.s > 0:
            below = self.posterior.level(kernel.s)
            x0 = below.expected(x) + below.covariance.sqrt(self._white())
        noise = self.posterior.conditioner.noise(self.streams, self.n)
        self.x = x + (1 - kernel.a) * self.level.conditioned.shift(x0, noise)

    def _guide(self, kernel: ReverseKernel) -> None:
        """x_0 from N(D, C_sigma) conditioned on the data, then the bridge to s."""
        x0 = self.denoised + self.level.covariance.sqrt(self._white())
        noise = self.posterior.conditioner.noise(self.streams, self.n)
        x0 = x0 + self.level.conditioned.shift(x0, noise)
        self.x = kernel.bridge(self.x, x0, self._white())

    def _weigh(self, kernel: ReverseKernel, m: Tensor, delta: Tensor) -> bool:
        """Weigh the particles by how well the twist predicts the step, resample if need be; False if that collapses."""
        sigma, s, a = kernel.sigma, kernel.s, kernel.a
        C, n = self.posterior.moments.covariance, self.n
        ahead = self.level.conditioned.shift(m + (1 - a) * expectation(C, s).apply(delta))
        # directions without prior variance carry neither delta nor u: keep their ratio finite
        widened = C.map(lambda v: (v + sigma**2) / (v + s**2).clamp_min(1e-12 * float(v.max())))
        increment = (1 - a) / (2 * sigma**2) * dot(delta, widened.apply(self.u + ahead))
        if not bool(torch.isfinite(increment).all()):
            raise FloatingPointError("the importance weights are not finite")
        self.trace.one_step.append(effective(increment))
        if variance_rate(self.trace.one_step, self.levels) > self.plan.drop_above:
            self.trace.collapsed_at = sigma
            return False
        self.log_w += increment
        self.trace.ess.append(effective(self.log_w))
        self.resampled = self.trace.ess[-1] < self.plan.resample_below or s == 0
        if not self.resampled:
            return True
        # the last proposal depends on the particle it starts from only: resample before it, not after
        keep = systematic(torch.softmax(self.log_w, 0), self.streams[0])
        self.log_z += float(torch.logsumexp(self.log_w, 0)) - math.log(n)
        self.log_w.zero_()
        self.x, self.denoised = self.x[keep], self.denoised[keep]
        return True

    def _finish(self) -> None:
        if self.weighted:
            self.trace.log_evidence = self.log_z
        self.trace.path_evidence = path_integral(self.levels, self.slopes)
        if not bool(torch.isfinite(self.x).all()):
            raise FloatingPointError("the draws are not finite")

    # ------------------------------------------------------------ moves at one level

    def _move(self) -> Descent:
        s, plan = self.level.s, self.plan
        if plan.moves == 0 or not self._moves_pay(s):
            self.trace.acceptance.append(math.nan)
            return
        score = (self.denoised - self.x) / s**2
        M = self._mobility(score)
        G = score + self.u / s**2
        MG = M.apply(G)
        accepted = []
        for _ in range(plan.moves):
            h = self.h
            rho = 1 - math.sqrt(1 - h)
            x = self.x + rho * MG + math.sqrt(h) * M.draw(self.streams, self.n)
            denoised, u = (yield from self._denoise(x, s)), self.level.shift(x)
            G_new = (denoised - x + u) / s**2
            MG_new = M.apply(G_new)
            log_acceptance = (0.5 - rho / h) * dot(G + G_new, x - self.x)
            log_acceptance += rho**2 / (2 * h) * (dot(G, MG) - dot(G_new, MG_new))
            chance = torch.rand(self.n, generator=self.streams[0], dtype=torch.float64)
            ok = (chance.log() < log_acceptance).reshape(-1, *[1] * (x.ndim - 1))
            self.x, self.denoised, self.u, G, MG = (
                torch.where(ok, new, old)
                for new, old in (
                    (x, self.x),
                    (denoised, self.denoised),
                    (u, self.u),
                    (G_new, G),
                    (MG_new, MG),
                )
            )
            rate = float(log_acceptance.clamp(max=0).exp().mean())
            accepted.append(rate)
            self.h = min(0.95, max(1e-4, h * math.exp(0.5 * (rate - plan.acceptance))))
        self.trace.acceptance.append(sum(accepted) / len(accepted))

    def _moves_pay(self, s: float) -> bool:
        """Whether to move at level s.

        Beside weights, where the step needed correcting. On the twist's own path, always. A guided path meets the
        twist's targets only where those are close to the likelihood, s up to the data's noise; far below it the step
        itself is exact, and moves would only add up the errors of a trained score.
        """
        if self.weighted:
            return self.resampled or self.trace.one_step[-1] < NEGLIGIBLE
        if not self.plan.guided:
            return True
        low, high = (w * self.posterior.sharpest for w in WINDOW)
        return max(low, TRUSTED * self.posterior.prior.sigma_min) <= s <= high

    def _mobility(self, score: Tensor) -> Mobility:
        C, s = self.posterior.moments.covariance, self.level.s
        return self.level.mobility(local_precision(C, score, s))


@torch.no_grad()
def descend_together(posterior: Posterior, islands: Sequence[Island]) -> Iterator[Island]:
    """Walk islands down side by side, their images in one call of the network; yields an island at each level it leaves.

    The islands stay independent: each has its own stream, weights and step sizes. One whose draws fail is left behind
    with its `error`.
    """
    walks = {island: island.descend() for island in islands}
    answers: dict[Island, Tensor | None] = dict.fromkeys(islands)
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
            if island.passed > passed:
                yield island
        if requests:
            x = torch.cat([x for x, _ in requests.values()])
            sigma = torch.cat([x.new_full((len(x),), s) for x, s in requests.values()])
            parts = posterior.prior.denoise(x, sigma).split([len(x) for x, _ in requests.values()])
            answers = dict(zip(requests, parts, strict=True))


def local_precision(C: Covariance, score: Tensor, s: float) -> Covariance:
    """The prior's local precision at level s, -E grad^2 log p_s, in bands of directions of similar prior variance.

    Fisher's identity, E[score score^T] = -E grad^2 log p, takes it from the scores of the particles themselves. It
    follows the prior where the global covariance is too wide, as it is between separated modes; it lies between the
    precision of the global Gaussian, 1 / (C + s^2), and that of the noise, 1 / s^2. Titsias, Optimal Preconditioning
    and Fisher Adaptive Langevin Sampling (2023, arXiv:2305.14442).
    """
    power = C.power(score)

    def banded(v: Tensor) -> Tensor:
        band = (v / v.max()).clamp_min(1e-6).log2().round().long().flatten()
        band = band - band.min()
        total = torch.zeros(int(band.max()) + 1, dtype=torch.float64)
        count = total.index_add(0, band, torch.ones_like(power).flatten())
        mean = total.index_add(0, band, power.flatten()) / count.clamp_min(1)
        return (
            mean[band]
            .reshape(v.shape)
            .clamp(1 / (v + s**2), torch.as_tensor(1 / s**2).expand_as(v))
        )

    return C.map(banded)


def variance_rate(one_step: list[float], levels: list[float]) -> float:
    """Sum of n / ESS - 1 over the last e-fold of the noise level, or over what there is of it.

    Args:
        one_step: ESS / n of the first steps.
        levels: Noise levels; step i leads from level i to the next, the last one to s = 0.
    """
    last = len(one_step) - 1
    end = levels[min(last + 1, len(levels) - 1)]
    steps = [i for i in range(last + 1) if levels[i] <= math.e * end or i == last]
    span = max(1.0, math.log(levels[steps[0]] / end))
    return sum(1 / one_step[i] - 1 for i in steps) / span


def effective(log_w: Tensor) -> float:
    """Effective sample size over n of these log-weights (Kong 1992)."""
    w = torch.softmax(log_w, 0)
    return float(1 / (w * w).sum() / len(w))


def systematic(w: Tensor, generator: torch.Generator) -> Tensor:
    """Indices of a systematic resampling of the normalised weights w, with shape (n,)."""
    n = len(w)
    u = (torch.arange(n) + torch.rand(1, generator=generator, dtype=torch.float64)) / n
    return torch.searchsorted(torch.cumsum(w, 0), u).clamp(max=n - 1)


def path_integral(levels: list[float], slopes: list[float]) -> float:
    """The integral of -d log Z / d log s over log s, by trapezoids; below the lowest level the slope falls as s^2."""
    total = 0.5 * slopes[-1]
    for i in range(len(levels) - 1):
        total += 0.5 * (slopes[i] + slopes[i + 1]) * math.log(levels[i] / levels[i + 1])
    return total
