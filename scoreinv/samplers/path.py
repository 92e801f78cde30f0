"""Islands of particles on their way from noise to the posterior: the engine of all samplers.

The data pull the denoised image D, known up to the error C_sigma that a Gaussian prior leaves. A draw x_0 of
N(D, C_sigma) conditioned on y and fresh noise make the step from level sigma to s, with a = (s / sigma)^2:

    x' = x_0 + a (x - x_0) + s (1 - a)^1/2 z

It is the covariance-aware kernel (`scoreinv.kernels`) times the likelihood N(y; A m', S + A C_s A^T) that a Gaussian prior
foresees at the end of the step, over g_sigma(x), where

    g_s(x) = N(y; A D(x, s), S + A C_s A^T),     m' = D + W_s (x' - D - a (x - D))

Weighted particles target p_s(x) g_s(x), so that only what the network says beyond m' weighs, and no gradient of D is
needed. With u(m) = (C_s^-1 + H)^-1 (A^T S^-1 y - H m) and D' = D(x', s)

    log w = log g_s(x') / N(y; A m', S + A C_s A^T) = 1/2 <C_s^-1 (D' - m'), u(D') + u(m')>

With D in the place of the linear m_s(x), likelihoods know of modes as soon as the network does. The error C_s should know
of them too: between far modes the global C is too wide. As cov(x_0 | x_s) = s^2 dD/dx, one difference of D along white z
gives its mean over the particles, in bands of directions of similar prior variance, and with it the C of a prior that looks
like this one around the particles. Where C becomes C' at a level, g_s changes by the factor

    log w = -1/2 <u'(D), (C'^-1 - C^-1) u(D)> - 1/2 log det(I + H C'_s) + 1/2 log det(I + H C_s)

and only where these determinants are cheap is C measured. Twisted targets: Wu et al., Practical and Asymptotically Exact
Conditional Sampling in Diffusion Models (2023, arXiv:2306.17775), whose proposals take the gradient of D.

Moves at s, for particles without weights, are MALA steps that leave p_s(x) N(y; A m_s(x), S + A C_s A^T) invariant, with
preconditioner M, in the discretisation that is exact for a Gaussian of covariance M. With the trapezoid of the score along
the proposal for the change of log p_s, which no density is needed for,

    x' = x + rho M G(x) + (h M)^1/2 z,     rho = 1 - (1 - h)^1/2,  0 < h < 1,     G = score + u_s / s^2
    log acceptance = (1/2 - rho / h) <G + G', x' - x> + rho^2 / (2 h) (<G, M G> - <G', M G'>)

Guided particles, for priors on which weights collapse, follow the ODE of the mean D_y of N(D, C_sigma) conditioned on y,

    dx / d sigma = (x - D_y(x, sigma)) / sigma

by Heun's second-order method two levels down, and return one level up with fresh noise, which forgets earlier errors of
D_y. A step of first order would lose a third of the power that trained priors have at high frequencies. Heun's method for
this ODE: Karras et al. (2022, arXiv:2206.00364); D_y: Song et al., Pseudoinverse-Guided Diffusion Models for Inverse
Problems (2023), with the prior's covariance for their white one.

Without weights the evidence is a path integral: for the targets of the moves, with u = u_s(x),

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
from scoreinv.kernels import bridge, noise_levels
from scoreinv.operators.information import white
from scoreinv.posterior import Posterior

Request = tuple[Tensor, float]  # noisy images and their level, to be denoised
Descent = Generator[Request, Tensor, None]
FINER = 4  # steps with weights from one level of the plan to the next
DIFFERENCE = 0.1  # length over the noise of the difference that measures the slope of D
LOST = 5.0  # loss of effective particles over an e-fold of the noise level that weights do not survive [nat]
SPARSE = 4  # levels of a guided path from one that is counted in the path integral to the next


@dataclass(frozen=True)
class Plan:
    """How an island descends.

    Args:
        levels: Noise levels; the last step goes from the lowest to s = 0.
        moves: MALA steps at each level of particles without weights.
        weights: Use importance weights, and finer steps.
        guided: Without weights, step by the denoised image conditioned on the data instead of by the twist.
        resample_below: Resample when ESS / n falls below this.
        drop_above: Stop where the variance of d log w / d log sigma over the particles, mean over an e-fold of the noise
            level, exceeds this and few particles carry the weights: they have collapsed.
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
        """A cheap descent that stops where the weights collapse: half the levels, no finer steps."""
        return replace(self, levels=max(2, self.levels // 2), finer=1)

    def decided(self, keep_weights: bool) -> Plan:
        """The descent of every island once it is known whether the weights collapse."""
        if keep_weights:
            return replace(self, drop_above=math.inf)
        return replace(self, weights=False)

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
        log_evidence: Over that of the moments' Gaussian [nat]; without weights from the path integral.
        log_weights: Of the draws, whose mean weight is the evidence [nat]; None without weights.
        evaluations: Network evaluations per particle; the first island pays for the scouts.
    """

    ess: list[float] = field(default_factory=list)
    acceptance: list[float] = field(default_factory=list)
    collapsed_at: float = 0.0
    log_evidence: float = 0.0
    log_weights: list[float] | None = None
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
        self.h = 0.5
        self.log_w, self.log_z = torch.zeros(self.n, dtype=torch.float64), 0.0
        self.slopes: dict[float, float] = {}
        self.spreads: list[float] = []
        self.losses: list[float] = []
        self.lowest: list[float] = []
        self.accepted: list[float] = []
        # at the widest level the target is N(posterior mean, posterior covariance + sigma^2)
        self.x = self.posterior.gaussian_draw(self.n, self.generator)
        self.x = self.x + self.levels[0] * self._white()
        yield from self._arrive(self.levels[0])
        if self.plan.weights:
            yield from self._weigh(self.level.expected(self.x))
        for i in range(len(self.levels)):
            s = self._level(i + 1)
            if not self.plan.weights and (not self.guided or i % SPARSE == 0 or s == 0):
                self._integrate()
            if s == 0:
                self.x = self._informed()
            elif self.guided:
                yield from self._guide(s, self._level(i + 2) or s)
            elif self.plan.weights:
                yield from self._follow(s)
            else:
                self.x = self._propose(s)
                yield from self._arrive(s)
                yield from self._move()
            if self.trace.collapsed_at > 0:
                return
            if (i + 1) % self.plan.stride == 0 or s == 0:
                self._record()
        self._finish()

    def _level(self, i: int) -> float:
        """The noise level of this index; 0 behind the last one."""
        return self.levels[i] if i < len(self.levels) else 0.0

    def _arrive(self, s: float, prior: Covariance | None = None) -> Descent:
        """The network at the new level."""
        self.level = self.posterior.level(s, prior)
        self.denoised = yield from self._denoise(self.x, s)

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

    def _informed(self) -> Tensor:
        """Draws of N(D, C_sigma) conditioned on the data, by perturbing both (Matheron)."""
        x0 = self.denoised + self.level.covariance.sqrt(self._white())
        noise = self.posterior.conditioner.noise(self.n, self.generator)
        return x0 + self.level.conditioned.shift(x0, noise)

    def _propose(self, s: float) -> Tensor:
        """The kernel times the likelihood that is foreseen at s."""
        return bridge(self.x, self._informed(), self.level.s, s, self._white())

    def _follow(self, s: float) -> Descent:
        """Down to s, with weights for what the network says there beyond what was foreseen."""
        x, denoised, sigma, prior = self.x, self.denoised, self.level.s, self.level.prior
        self.x = self._propose(s)
        yield from self._arrive(s, prior)
        news = self.x - bridge(x, denoised, sigma, s)
        log_w = yield from self._weigh(denoised + self.level.slope.apply(news))
        self.spreads.append(spread(log_w))
        self.losses.append(-math.log(effective(log_w)))
        self.trace.collapsed_at = s if self._collapsed() else 0.0
        self.lowest.append(effective(self.log_w))
        if self.lowest[-1] < self.plan.resample_below:
            self._resample()

    def _collapsed(self) -> bool:
        """Weights collapse where they vary among most particles, and where few particles carry them all.

        The first alone would be the choice of a mode, the second alone a few stray particles.
        """
        levels = self.levels[: len(self.spreads) + 1]
        varied = variance_rate(self.spreads, levels) > self.plan.drop_above
        return varied and per_e_fold(self.losses, levels) > LOST

    def _weigh(self, foreseen: Tensor) -> Generator[Request, Tensor, Tensor]:
        """Weigh the denoised images against those foreseen; returns the logarithms of the factors, with shape (n,).

        At every level of the plan the covariance of the prior is measured anew, where determinants are cheap.
        """
        shift = self.level.conditioned.shift
        u = shift(foreseen)
        log_w = 0.5 * dot(
            self.level.precision.apply(self.denoised - foreseen), shift(self.denoised) + u
        )
        if self.posterior.conditioner.determinants and len(self.spreads) % self.plan.stride == 0:
            log_w = log_w + (yield from self._localise())
        if not bool(torch.isfinite(log_w).all()):
            raise FloatingPointError("the importance weights are not finite")
        self.log_w += log_w
        return log_w

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

    def _resample(self) -> None:
        keep = systematic(torch.softmax(self.log_w, 0), self.n, self.generator)
        self.log_z += float(torch.logsumexp(self.log_w, 0)) - math.log(self.n)
        self.log_w.zero_()
        self.x, self.denoised = self.x[keep], self.denoised[keep]

    def _guide(self, s: float, end: float) -> Descent:
        """Down the ODE to the level `end` and up to s with fresh noise."""
        sigma = self.level.s
        slope = (self.x - self._pulled(self.denoised, sigma)) / sigma
        x = self.x + (end - sigma) * slope
        denoised = yield from self._denoise(x, end)
        slope = 0.5 * (slope + (x - self._pulled(denoised, end)) / end)
        self.x = self.x + (end - sigma) * slope + (s**2 - end**2) ** 0.5 * self._white()
        yield from self._arrive(s)

    def _pulled(self, denoised: Tensor, s: float) -> Tensor:
        """D_y: the mean of N(D, C_s) conditioned on the data."""
        return denoised + self.posterior.level(s).conditioned.shift(denoised)

    def _integrate(self) -> None:
        """The slope of the evidence at this level, for the path integral."""
        delta = self.denoised - self.level.expected(self.x)
        slope = 2 * float(dot(delta, self.level.shift(self.x)).mean()) / self.level.s**2
        self.slopes[self.level.s] = slope

    def _finish(self) -> None:
        if self.plan.weights:
            weights = self.log_z + self.log_w
            self.trace.log_weights = weights.tolist()
            self.trace.log_evidence = float(torch.logsumexp(weights, 0)) - math.log(self.n)
        else:
            self.trace.log_evidence = path_integral(list(self.slopes), list(self.slopes.values()))
        if not bool(torch.isfinite(self.x).all()):
            raise FloatingPointError("the draws are not finite")

    # ------------------------------------------------------------ moves at one level

    def _move(self) -> Descent:
        s, plan = self.level.s, self.plan
        if plan.moves == 0:
            return
        score = (self.denoised - self.x) / s**2
        M = self._mobility(score)
        G = score + self.level.shift(self.x) / s**2
        MG = M.apply(G)
        for _ in range(plan.moves):
            h = self.h
            rho = 1 - math.sqrt(1 - h)
            x = self.x + rho * MG + math.sqrt(h) * M.draw(self.n, self.generator)
            denoised = yield from self._denoise(x, s)
            G_new = (denoised - x + self.level.shift(x)) / s**2
            MG_new = M.apply(G_new)
            log_acceptance = (0.5 - rho / h) * dot(G + G_new, x - self.x)
            log_acceptance += rho**2 / (2 * h) * (dot(G, MG) - dot(G_new, MG_new))
            chance = torch.rand(self.n, generator=self.generator, dtype=torch.float64)
            ok = (chance.log() < log_acceptance).reshape(-1, *[1] * (x.ndim - 1))
            self.x, self.denoised, G, MG = (
                torch.where(ok, new, old)
                for new, old in (
                    (x, self.x),
                    (denoised, self.denoised),
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
    return C.map(
        lambda v: banded(power, v).clamp(1 / (v + s**2), torch.as_tensor(1 / s**2).expand_as(v))
    )


def local_covariance(C: Covariance, z: Tensor, response: Tensor, s: float) -> Covariance:
    """Covariance of the Gaussian prior that denoises like the prior around the particles, in bands of directions.

    Args:
        C: Covariance of the prior; the result is narrower.
        z: White directions, one for each particle, with shape (B, C, H, W).
        response: (dD/dx) z, with shape (B, C, H, W).
        s: Noise level.
    """
    cross, norm = (C.power(z + response) - C.power(z - response)) / 4, C.power(z)

    def local(v: Tensor) -> Tensor:
        prior = v / (v + s**2)
        slope = (banded(cross, v) / banded(norm, v)).clamp(1e-3 * prior, prior)
        return torch.where(slope < prior, s**2 * slope / (1 - slope), v)

    return C.map(local)


def banded(power: Tensor, v: Tensor) -> Tensor:
    """Means of `power` over bands of directions with similar eigenvalues v, with the shape of v."""
    band = (v / v.max()).clamp_min(1e-6).log2().round().long().flatten()
    band = band - band.min()
    total = torch.zeros(int(band.max()) + 1, dtype=torch.float64)
    count = total.index_add(0, band, torch.ones_like(power).flatten())
    mean = total.index_add(0, band, power.flatten()) / count.clamp_min(1)
    return mean[band].reshape(v.shape)


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
