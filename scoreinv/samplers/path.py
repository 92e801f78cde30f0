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

Weights collapse where the twist is far from p(y | x_s). The guided step compares the data with the denoised image instead:
with D_y the mean of N(D, C_sigma) conditioned on y, it follows the ODE

    dx / d sigma = (x - D_y(x, sigma)) / sigma

by Heun's second-order method two levels down, and returns one level up with fresh noise, which forgets earlier errors of
D_y. A step of first order would lose a third of the power that trained priors have at high frequencies. Heun's method for
this ODE: Karras et al. (2022, arXiv:2206.00364); D_y: Song et al., Pseudoinverse-Guided Diffusion Models for Inverse
Problems (2023), with the prior's covariance for their white one.

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
FINER = 4  # steps with weights from one level of the plan to the next
SPARSE = 4  # levels of a guided path from one that is counted in the path integral to the next
NEGLIGIBLE = 0.98  # one-step ESS / n above which a step needs no moves


@dataclass(frozen=True)
class Plan:
    """How an island descends.

    Args:
        levels: Noise levels; the last step goes from the lowest to s = 0.
        moves: MALA steps at each level; beside weights where these vary.
        weights: Use importance weights, and finer steps.
        guided: Without weights, step by the denoised image conditioned on the data instead of by the twist.
        resample_below: Resample when ESS / n falls below this.
        drop_above: Stop where the variance of d log w / d log sigma over the particles, mean over an e-fold of the noise
            level, exceeds this: the weights have collapsed.
        finer: Steps with weights from one level to the next.
        acceptance: Target acceptance of the moves.
    """

    levels: int
    moves: int
    weights: bool
    guided: bool
    resample_below: float = 0.5
    drop_above: float = math.inf
    finer: int = FINER
    acceptance: float = 0.6

    def __post_init__(self) -> None:
        if self.levels < 2 or self.moves < 0:
            raise ValueError(
                f"levels is {self.levels} and moves {self.moves}, expected at least 2 levels and no fewer than 0 moves"
            )

    def scout(self) -> Plan:
        """A cheap descent that stops where the weights collapse: half the levels, no finer steps, no moves."""
        return replace(self, levels=max(2, self.levels // 2), moves=0, finer=1)

    def decided(self, keep_weights: bool) -> Plan:
        """The descent of every island once it is known whether the weights collapse."""
        if keep_weights:
            return replace(self, drop_above=math.inf)
        return replace(self, weights=False, moves=0 if self.guided else self.moves)

    @property
    def stride(self) -> int:
        """Steps from one level to the next."""
        return self.finer if self.weights else 1

    def noise_levels(self, posterior: Posterior) -> list[float]:
        """The levels of a posterior's path, from the largest to the smallest."""
        return self.path(posterior)[:: self.stride]

    def path(self, posterior: Posterior) -> list[float]:
        """The levels with those between them where weights take finer steps."""
        return noise_levels(self.stride * (self.levels - 1) + 1, *posterior.sigma_range)


@dataclass
class Trace:
    """What happened to one island.

    Attributes:
        ess: Smallest effective sample size over n, before resampling, between each level and the next; where weights are
            used.
        acceptance: Mean acceptance between each level and the next; nan where nothing moved.
        collapsed_at: Level at which the weights collapsed; 0 if they did not.
        log_evidence: From the weights, over that of the moments' Gaussian [nat]; None without weights.
        log_weights: Of the draws, with a mean weight of the evidence [nat]; None without weights.
        path_evidence: The same from the path integral [nat].
        evaluations: Network evaluations per particle; the first island pays for the scouts.
    """

    ess: list[float] = field(default_factory=list)
    acceptance: list[float] = field(default_factory=list)
    collapsed_at: float = 0.0
    log_evidence: float | None = None
    log_weights: list[float] | None = None
    path_evidence: float = 0.0
    evaluations: float = 0


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
        self.posterior, self.plan, self.n, self.generator = posterior, plan, n, generator
        self.levels, self.guided = plan.path(posterior), plan.guided and not plan.weights
        self.trace = Trace()
        self.passed = 0
        self.error: FloatingPointError | None = None

    def descend(self) -> Descent:
        """Walk down the levels, asking for every denoised image; the draws are in `x` at the end.

        Where the weights collapse it stops, and `trace.collapsed_at` says where.
        """
        self.h, self.rough = 0.5, False
        self.log_w, self.log_z = torch.zeros(self.n, dtype=torch.float64), 0.0
        self.slopes: dict[float, float] = {}
        self.spreads: list[float] = []
        self.lowest: list[float] = []
        self.accepted: list[float] = []
        # at the widest level the target is N(posterior mean, posterior covariance + sigma^2)
        sigma = self.levels[0]
        self.x = self.posterior.gaussian_draw(self.n, self.generator) + sigma * self._white()
        yield from self._arrive(sigma)
        for i in range(len(self.levels)):
            s = self._level(i + 1)
            if not self.guided or i % SPARSE == 0 or s == 0:
                self._account(s)
            if self.trace.collapsed_at > 0:
                return
            if self.guided:
                yield from self._guide(s, self._level(i + 2) or s)
            else:
                self._propose(s)
            if s > 0:
                yield from self._arrive(s)
                yield from self._move()
            if (i + 1) % self.plan.stride == 0 or s == 0:
                self._record()
        self._finish()

    def _level(self, i: int) -> float:
        """The noise level of this index; 0 behind the last one."""
        return self.levels[i] if i < len(self.levels) else 0.0

    def _arrive(self, s: float) -> Descent:
        """The network and the twist at the new level."""
        self.level = self.posterior.level(s)
        self.denoised = yield from self._denoise(self.x, s)
        self.u = None if self.guided else self.level.shift(self.x)

    def _denoise(self, x: Tensor, s: float) -> Generator[Request, Tensor, Tensor]:
        self.trace.evaluations += 1
        denoised = yield x, s
        return denoised

    def _white(self) -> Tensor:
        return white(self.posterior.shape, self.n, self.generator, self.posterior.dtype)

    def _record(self) -> None:
        """Close the account of the steps from one level of the plan to the next."""
        self.passed += 1
        if self.lowest:
            self.trace.ess.append(min(self.lowest))
        self.trace.acceptance.append(
            sum(self.accepted) / len(self.accepted) if self.accepted else math.nan
        )
        self.lowest, self.accepted = [], []

    # ------------------------------------------------------------ from level to level

    def _account(self, s: float) -> None:
        """What the step to s adds to the evidence; weigh the particles for it, and resample them if need be.

        Those of the last step are left to whoever pools the islands: resampling twice would cost draws.
        """
        m = self.level.expected(self.x)
        delta = self.denoised - m
        share = torch.softmax(self.log_w, 0)
        u = self.level.shift(self.x) if self.guided else self.u
        self.slopes[self.level.s] = 2 * float((share * dot(delta, u)).sum()) / self.level.s**2
        if not self.plan.weights:
            return
        log_w = self._weigh(s, m, delta)
        if s > 0:
            self.spreads.append(spread(log_w))
            rate = variance_rate(self.spreads, self.levels[: len(self.spreads) + 1])
            self.trace.collapsed_at = self.level.s if rate > self.plan.drop_above else 0.0
        self.log_w += log_w
        self.lowest.append(effective(self.log_w))
        resample = s > 0 and self.lowest[-1] < self.plan.resample_below
        self.rough = resample or effective(log_w) < NEGLIGIBLE
        if resample:
            self._resample()

    def _weigh(self, s: float, m: Tensor, delta: Tensor) -> Tensor:
        """How well the twist has predicted the step to s: the log-weights of this step alone, with shape (n,)."""
        C, sigma = self.posterior.moments.covariance, self.level.s
        a = (s / sigma) ** 2
        ahead = self.level.conditioned.shift(m + (1 - a) * expectation(C, s).apply(delta))
        # directions without prior variance carry neither delta nor u: keep their ratio finite
        widened = C.map(lambda v: (v + sigma**2) / (v + s**2).clamp_min(1e-12 * float(v.max())))
        log_w = (1 - a) / (2 * sigma**2) * dot(delta, widened.apply(self.u + ahead))
        if not bool(torch.isfinite(log_w).all()):
            raise FloatingPointError("the importance weights are not finite")
        return log_w

    def _resample(self) -> None:
        # the proposal depends on the particle it starts from only: resample before it, not after
        keep = systematic(torch.softmax(self.log_w, 0), self.n, self.generator)
        self.log_z += float(torch.logsumexp(self.log_w, 0)) - math.log(self.n)
        self.log_w.zero_()
        self.x, self.denoised = self.x[keep], self.denoised[keep]

    def _propose(self, s: float) -> None:
        """The kernel times the twist at s."""
        kernel = ReverseKernel.between(self.level.s, s, self.posterior.moments.covariance)
        x = kernel.mean(self.x, self.denoised) + kernel.std(self._white())
        x0 = x
        if s > 0:
            below = self.posterior.level(s)
            x0 = below.expected(x) + below.covariance.sqrt(self._white())
        noise = self.posterior.conditioner.noise(self.n, self.generator)
        self.x = x + (1 - kernel.a) * self.level.conditioned.shift(x0, noise)

    def _guide(self, s: float, end: float) -> Descent:
        """Down the ODE to the level `end` and up to s with fresh noise; to s = 0 a draw of x_0 given the data."""
        if s == 0:
            x0 = self.denoised + self.level.covariance.sqrt(self._white())
            noise = self.posterior.conditioner.noise(self.n, self.generator)
            self.x = x0 + self.level.conditioned.shift(x0, noise)
            return
        sigma = self.level.s
        slope = (self.x - self._pulled(self.denoised, sigma)) / sigma
        x = self.x + (end - sigma) * slope
        denoised = yield from self._denoise(x, end)
        slope = 0.5 * (slope + (x - self._pulled(denoised, end)) / end)
        self.x = self.x + (end - sigma) * slope + (s**2 - end**2) ** 0.5 * self._white()

    def _pulled(self, denoised: Tensor, s: float) -> Tensor:
        """D_y: the mean of N(D, C_s) conditioned on the data."""
        return denoised + self.posterior.level(s).conditioned.shift(denoised)

    def _finish(self) -> None:
        if self.plan.weights:
            weights = self.log_z + self.log_w
            self.trace.log_weights = weights.tolist()
            self.trace.log_evidence = float(torch.logsumexp(weights, 0)) - math.log(self.n)
        self.trace.path_evidence = path_integral(list(self.slopes), list(self.slopes.values()))
        if not bool(torch.isfinite(self.x).all()):
            raise FloatingPointError("the draws are not finite")

    # ------------------------------------------------------------ moves at one level

    def _move(self) -> Descent:
        s, plan = self.level.s, self.plan
        if plan.moves == 0 or self.guided or (plan.weights and not self.rough):
            return
        score = (self.denoised - self.x) / s**2
        M = self._mobility(score)
        G = score + self.u / s**2
        MG = M.apply(G)
        for _ in range(plan.moves):
            h = self.h
            rho = 1 - math.sqrt(1 - h)
            x = self.x + rho * MG + math.sqrt(h) * M.draw(self.n, self.generator)
            denoised, u = (yield from self._denoise(x, s)), self.level.shift(x)
            G_new = (denoised - x + u) / s**2
            MG_new = M.apply(G_new)
            log_acceptance = (0.5 - rho / h) * dot(G + G_new, x - self.x)
            log_acceptance += rho**2 / (2 * h) * (dot(G, MG) - dot(G_new, MG_new))
            chance = torch.rand(self.n, generator=self.generator, dtype=torch.float64)
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
            self.accepted.append(rate)
            self.h = min(0.95, max(1e-4, h * math.exp(0.5 * (rate - plan.acceptance))))

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


def spread(log_w: Tensor) -> float:
    """Standard deviation of log-weights from their quartiles, as for a Gaussian: one stray particle does not count."""
    low, high = torch.quantile(log_w, torch.tensor([0.25, 0.75], dtype=log_w.dtype))
    return float(high - low) / 1.349


def variance_rate(spreads: Sequence[float], levels: Sequence[float]) -> float:
    """Variance of d log w / d log sigma, mean over the last e-fold of the noise level, or over what there is of it.

    Args:
        spreads: Standard deviation of the log-weights of each step.
        levels: Noise levels; step i leads from level i to the next.
    """
    widths = [math.log(a / b) for a, b in zip(levels[:-1], levels[1:], strict=True)]
    recent = [i for i, level in enumerate(levels[:-1]) if level <= math.e * levels[-2]]
    return sum(spreads[i] ** 2 / widths[i] for i in recent) / sum(widths[i] for i in recent)


def effective(log_w: Tensor) -> float:
    """Effective sample size over n of these log-weights (Kong 1992)."""
    w = torch.softmax(log_w, 0)
    return float(1 / (w * w).sum() / len(w))


def systematic(w: Tensor, n: int, generator: torch.Generator) -> Tensor:
    """n indices by systematic resampling of the normalised weights w."""
    u = (torch.arange(n) + torch.rand(1, generator=generator, dtype=torch.float64)) / n
    return torch.searchsorted(torch.cumsum(w, 0), u).clamp(max=len(w) - 1)


def path_integral(levels: list[float], slopes: list[float]) -> float:
    """The integral of -d log Z / d log s over log s, by trapezoids; below the lowest level the slope falls as s^2."""
    total = 0.5 * slopes[-1]
    for i in range(len(levels) - 1):
        total += 0.5 * (slopes[i] + slopes[i + 1]) * math.log(levels[i] / levels[i + 1])
    return total
