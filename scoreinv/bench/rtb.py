"""Learned controls on small problems with known answers, each with the numbers that it should reach.

Reweighting and measuring a prior of 25 modes in the plane, any data of a mixture in 8 dimensions, and sampling from
densities without a prior: 25 modes, a funnel, many wells. Cases, floors and published numbers: Venkatraman et al. (2024,
arXiv:2405.20971), Sendera et al. (2024, arXiv:2402.05098), Blessing et al. (2024, arXiv:2406.07423).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.distributions import MultivariateNormal

from scoreinv.bench.scores import sliced_wasserstein
from scoreinv.bench.speed import one_thread
from scoreinv.finetune.amortised import PROBES, Amortised, finetune
from scoreinv.finetune.chain import measured_chain
from scoreinv.finetune.control import VectorControl, guidance_by_gradient
from scoreinv.finetune.evidence import evidence
from scoreinv.finetune.free import Brownian
from scoreinv.finetune.objectives import ForwardKL, LogVariance
from scoreinv.finetune.paths import Engine
from scoreinv.finetune.proposals import Given, OnPolicy
from scoreinv.finetune.sdes import SamplerControl
from scoreinv.finetune.training import Plan, Recipe, train_control
from scoreinv.gaussian import Dense
from scoreinv.likelihood import Likelihood
from scoreinv.noise import GaussianNoise
from scoreinv.operators import DenseOperator
from scoreinv.posterior import Posterior
from scoreinv.priors import GaussianPrior, MixturePrior
from scoreinv.samplers.baselines import DPS, PiGDM
from scoreinv.samplers.guided import Guided
from scoreinv.samplers.tempering import Propose, temper
from scoreinv.streams import stream

PLANE = (1, 1, 2)
SIMULATED = 20  # data sets that a control for any data, or a sampler, is judged on
PATHS = 4000  # over which controls are judged
AXIS = torch.tensor([-10.0, -5.0, 0.0, 5.0, 10.0], dtype=torch.float64)
MODES = torch.cartesian_prod(AXIS, AXIS)
VARIANCE = 0.3  # of each mode
NINE = torch.tensor(
    [[-10, -5], [-5, -10], [-5, 0], [10, -5], [0, 0], [0, 5], [5, -5], [5, 0], [5, 10]]
)
NINE_WEIGHTS = (4.0, 10.0, 4.0, 5.0, 10.0, 5.0, 4.0, 15.0, 4.0)
CHAINS = 10_000  # whose ends a control imitates
SOME = 8  # steps of a path that count in an iteration of that
WELLS = 16
WELL = math.log(11784.50927) + 0.5 * math.log(
    2 * math.pi
)  # log of a well's mass (Sendera et al. 2024)


@dataclass(frozen=True)
class Case:
    """A problem, how it is learned, and what should come of it.

    Attributes:
        run: Gives the row's numbers for a seed, those of `COLUMNS` that are known.
        targets: For each number the range that it should fall in.
        quick: Whether it belongs to the quick set.
    """

    run: Callable[[int], dict[str, float]]
    targets: dict[str, tuple[float, float]] = field(default_factory=dict)
    quick: bool = True


def row(name: str, seed: int) -> dict[str, Any]:
    """A row of the table: numbers of a case, in nats over the known evidence, and which targets it misses."""
    case, began = CASES[name], time.process_time()
    found = case.run(seed)
    missed = [k for k, (low, high) in case.targets.items() if not low <= found[k] <= high]
    return {
        "case": name,
        "seed": seed,
        **{k: found.get(k, math.nan) for k in COLUMNS},
        "all [CPU s]": time.process_time() - began,
        "wanted": ", ".join(f"{k} {_range(*v)}" for k, v in case.targets.items()) or "-",
        "missed": ", ".join(missed) or "-",
    }


TRAINING = "training [CPU s]"
COLUMNS = (
    "untrained",
    "ELBO",
    "log Z",
    "EUBO",
    "ESS",
    "apart",
    "modes",
    "weighed",
    "SW2",
    "SW2 exact",
    TRAINING,
)


def _range(low: float, high: float) -> str:
    if math.isinf(low):
        return f"< {high:g}"
    return f"> {low:g}" if math.isinf(high) else f"{low:g}..{high:g}"


def grid() -> MixturePrior:
    """25 modes in the plane."""
    return MixturePrior(torch.ones(25), [GaussianPrior(m.reshape(PLANE), VARIANCE) for m in MODES])


@dataclass(frozen=True)
class Modes:
    """A mixture of Gaussians of one covariance.

    Attributes:
        weights: With shape (K,).
        means: With shape (K, d).
        covariance: With shape (d, d).
    """

    weights: Tensor
    means: Tensor
    covariance: Tensor

    def draws(self, n: int, generator: torch.Generator) -> Tensor:
        """With shape (n, d)."""
        k = torch.multinomial(self.weights, n, replacement=True, generator=generator)
        z = torch.randn(n, self.means.shape[1], generator=generator, dtype=torch.float64)
        return self.means[k] + z @ torch.linalg.cholesky(self.covariance).T

    def log_prob(self, x: Tensor) -> Tensor:
        """With shape (n,), for x with shape (n, d)."""
        each = MultivariateNormal(self.means, self.covariance).log_prob(x[:, None])
        return torch.logsumexp(each + (self.weights / self.weights.sum()).log(), 1)

    def variation(self, x: Tensor, w: Tensor) -> float:
        """Total variation of the modes' weights, for draws with shape (n, d) of weights w."""
        near = torch.cdist(x, self.means).argmin(1)
        share = torch.zeros(len(self.means), dtype=torch.float64).index_add(0, near, w)
        return 0.5 * float((share - self.weights / self.weights.sum()).abs().sum())


def judged(
    engine: Engine, y: Tensor | None, log_z: float, exact: Tensor | None, seed: int
) -> dict[str, float]:
    """Bounds and weights of a trained control, over the known evidence."""
    many = None if y is None else y.expand(PATHS, *y.shape)
    paths, log_w = engine.paths(PATHS, many, stream(seed, 11))
    target = None
    if exact is not None:
        x = exact[:PATHS].reshape(-1, *engine.reference.shape).to(engine.reference.dtype)
        _, target = engine.through(x, many, stream(seed, 12))
    found = evidence(log_w, target)
    row = {
        "ELBO": found.elbo - log_z,
        "log Z": found.log_z - log_z,
        "EUBO": found.eubo - log_z,
        "ESS": found.ess,
    }
    if exact is not None:
        x, w = paths.x.flatten(1).double(), torch.softmax(log_w, 0)
        again = torch.multinomial(w, PATHS, replacement=True, generator=stream(seed, 13))
        row["SW2"] = sliced_wasserstein(x[again], exact[PATHS:])
        row["SW2 exact"] = sliced_wasserstein(exact[:PATHS], exact[PATHS:])
    return row


def measurement(matrix: Tensor, y: Tensor, std: float, iterations: int, steps: int) -> Callable:
    """Data of the grid, y = A x + noise."""

    def run(seed: int) -> dict[str, float]:
        S = VARIANCE * matrix @ matrix.T + std**2 * torch.eye(len(matrix), dtype=torch.float64)
        seen = MultivariateNormal(MODES @ matrix.T, S).log_prob(y)
        gain = VARIANCE * matrix.T @ torch.linalg.inv(S)
        posterior = Modes(
            torch.softmax(seen, 0),
            MODES + (y - MODES @ matrix.T) @ gain.T,
            VARIANCE * (torch.eye(2, dtype=torch.float64) - gain @ matrix),
        )
        log_z = float(torch.logsumexp(seen, 0)) - math.log(25)
        likelihood = Likelihood(DenseOperator(matrix, PLANE), GaussianNoise(std=std))
        options = {"seed": seed, "steps": steps, "y": y}
        first = finetune(grid(), likelihood, **options, plan=Plan(iterations=1, rate=1e-12))
        before = first.condition().evidence(5 * PATHS, seed)
        began = time.process_time()
        plan = Plan(iterations=iterations, seed=seed)
        learned = finetune(grid(), likelihood, **options, plan=plan)
        spent = {TRAINING: time.process_time() - began}
        exact = posterior.draws(5 * PATHS, stream(seed, 10))
        row = judged(learned.engine, y, log_z, exact, seed) | spent
        row["untrained"] = before.elbo - log_z
        row["apart"] = abs(row["log Z"] - (before.log_z - log_z))
        return {**row, **_modes(learned.engine, y, posterior, seed)}

    return run


def _modes(engine: Engine, y: Tensor | None, posterior: Modes, seed: int) -> dict[str, float]:
    """Total variation of the modes' weights, of paths as they are and as they weigh."""
    many = None if y is None else y.expand(PATHS, *y.shape)
    paths, log_w = engine.paths(PATHS, many, stream(seed, 14))
    x = paths.x.flatten(1).double()
    return {
        "modes": posterior.variation(x, torch.full((PATHS,), 1 / PATHS, dtype=torch.float64)),
        "weighed": posterior.variation(x, torch.softmax(log_w, 0)),
    }


def nine(seed: int) -> dict[str, float]:
    """9 of the 25 modes with new weights: the published toy, by the forward divergence on paths through exact draws."""
    prior, eye = grid(), VARIANCE * torch.eye(2, dtype=torch.float64)
    before = Modes(torch.ones(25, dtype=torch.float64), MODES, eye)
    after = Modes(torch.tensor(NINE_WEIGHTS, dtype=torch.float64), NINE.double(), eye)

    def reward(x: Tensor, _: Tensor | None) -> Tensor:
        x = x.flatten(1)
        return (after.log_prob(x) - before.log_prob(x)).clamp_min(-30.0)

    chain = measured_chain(prior, 50, prior.sample(PROBES, seed), seed)
    engine = Engine(chain, VectorControl(chain, seed=seed), reward)
    images = after.draws(5000, stream(seed, 15)).reshape(-1, *PLANE)
    plan = Plan(iterations=2500, steps=SOME, seed=seed)
    spent = {TRAINING: _trained(engine, plan, _imitation(Given(images)))}
    row = judged(engine, None, 0.0, after.draws(5 * PATHS, stream(seed, 10)), seed) | spent
    return {**row, **_modes(engine, None, after, seed)}


def mixture(seed: int) -> tuple[MixturePrior, Likelihood]:
    """Six components in 8 dimensions, of which 3 are measured."""
    d, m, modes, g = 8, 3, 6, torch.Generator().manual_seed(seed)
    means = 2.0 * torch.randn(modes, d, generator=g)
    root = 0.5 * torch.randn(modes, d, d, generator=g) / math.sqrt(d) * 1.2
    covariance = (root @ root.transpose(1, 2)).double() + 0.1 * torch.eye(d, dtype=torch.float64)
    weights = torch.rand(modes, generator=g) + 0.5
    parts = [
        GaussianPrior(mu.reshape(1, 1, d), Dense(C))
        for mu, C in zip(means, covariance, strict=True)
    ]
    matrix = torch.linalg.qr(torch.randn(d, d, generator=g))[0][:m].double()
    return MixturePrior(weights, parts), Likelihood(
        DenseOperator(matrix, (1, 1, d)), GaussianNoise(std=0.3)
    )


def amortised(steps: int, plan: Plan) -> Callable:
    """Any data of the mixture: numbers are means over new data sets."""

    def run(seed: int) -> dict[str, float]:
        prior, likelihood = mixture(1)
        began = time.process_time()
        with one_thread():  # two would spend half as many seconds more on small networks
            learned = finetune(prior, likelihood, seed=seed, steps=steps, plan=plan)
        spent = {TRAINING: time.process_time() - began}
        untrained = finetune(
            prior, likelihood, seed=seed, steps=steps, plan=Plan(1, groups=2, paths=2, rate=1e-12)
        )
        rows = [
            _one_of_many(prior, likelihood, learned.engine, seed, i, untrained)
            for i in range(SIMULATED)
        ]
        return {k: sum(r[k] for r in rows) / len(rows) for k in rows[0]} | spent

    return run


def sde(sampler: Guided | PiGDM | DPS, steps: int) -> Callable:
    """A sampler on the same data and the same chain, as the control that it is."""

    def run(seed: int) -> dict[str, float]:
        prior, likelihood = mixture(1)
        chain = measured_chain(prior, steps, prior.sample(PROBES, seed), seed)
        control = SamplerControl(chain, likelihood, sampler)
        engine = Engine(chain, control, lambda x, y: likelihood.log_prob(y, x))
        rows = [_one_of_many(prior, likelihood, engine, seed, i) for i in range(SIMULATED)]
        return {k: sum(r[k] for r in rows) / len(rows) for k in rows[0]}

    return run


def _one_of_many(
    prior: MixturePrior,
    likelihood: Likelihood,
    engine: Engine,
    seed: int,
    i: int,
    untrained: Amortised | None = None,
) -> dict[str, float]:
    x = prior.sample(1, 1000 * seed + i + 1)
    y = likelihood.simulate(x, 1000 * seed + i + 1)[0]
    parts = [Posterior(c, likelihood, y) for c in prior.components]
    log_w = prior.log_weights + torch.tensor([p.gaussian_log_evidence for p in parts])
    log_z = float(torch.logsumexp(log_w, 0))
    counts = torch.multinomial(
        torch.softmax(log_w, 0), 5 * PATHS, replacement=True, generator=stream(seed, 16, i)
    ).bincount(minlength=len(parts))
    draws = [
        p.gaussian_draw(int(n), stream(seed, 17, i, j))
        for j, (p, n) in enumerate(zip(parts, counts, strict=True))
        if n
    ]
    exact = torch.cat(draws).flatten(1).double()
    exact = exact[torch.randperm(len(exact), generator=stream(seed, 18, i))]
    row = judged(engine, y, log_z, exact, seed)
    row["log Z"] = abs(row["log Z"])
    if untrained is not None:
        row["untrained"] = untrained.condition(y).evidence(PATHS, seed).elbo - log_z
    return row


def _imitation(found: Given) -> Recipe:
    """Paths through draws of the density, by the forward divergence."""
    return Recipe(ForwardKL(), [(1.0, found)])


def _trained(engine: Engine, plan: Plan, recipe: Recipe) -> float:
    """Train a control without data; returns the seconds of the processor that it took."""
    nothing = lambda n, _: (torch.zeros(n, *engine.reference.shape, dtype=torch.float64), None)
    began = time.process_time()
    train_control(engine, nothing, plan, recipe)
    return time.process_time() - began


@dataclass(frozen=True)
class Density:
    """A density without a prior, to be sampled by Brownian motion that is steered towards it.

    Attributes:
        log_p: With shape (n,), for x with shape (n, d).
        d: Dimensions.
        log_z: Of the density.
        draws: So many exact ones, with shape (n, d), for those who judge.
        motion: Steps, variance and last of `Brownian`.
        moves: Of the tempered chains whose ends are imitated, at each temperature.
        forward: Iterations that imitate them.
        balance: Iterations of the log-variance after that, if any.
        width: Of the control's layers.
    """

    log_p: Callable[[Tensor], Tensor]
    d: int
    log_z: float
    draws: Callable[[int, torch.Generator], Tensor]
    motion: tuple[int, float, float]
    moves: int
    forward: int
    balance: int = 0
    width: int = 128

    def __call__(self, seed: int) -> dict[str, float]:
        shape = (1, 1, self.d)
        reference = Brownian(shape, *self.motion)
        reward = lambda x, _: self.log_p(x.flatten(1))
        guide = guidance_by_gradient(reference, reward)
        control = VectorControl(reference, None, guide, self.width, seed=seed)
        engine = Engine(reference, control, reward)
        began = time.process_time()
        found = Given(self.chains(stream(seed, 19)).reshape(-1, *shape))
        plan = Plan(self.forward, paths=128, rate=3e-3, steps=SOME, seed=seed)
        spent = time.process_time() - began + _trained(engine, plan, _imitation(found))
        if self.balance:
            plan = Plan(self.balance, paths=256, rate=1e-3, seed=seed)
            recipe = Recipe(LogVariance(), [(0.5, OnPolicy()), (0.5, found)])
            spent += _trained(engine, plan, recipe)
        exact = self.draws(5 * PATHS, stream(seed, 10))
        return judged(engine, None, self.log_z, exact, seed) | {TRAINING: spent}

    def chains(self, generator: torch.Generator) -> Tensor:
        """Ends of chains from the motion's own end to the density, with shape (`CHAINS`, d)."""
        d, v = self.d, self.motion[1]

        def log_q(x: Tensor) -> Tensor:
            return -0.5 * (x.square().sum(1) / v + d * math.log(2 * math.pi * v))

        def aim(x: Tensor) -> Propose:
            root = 2.4 / math.sqrt(d) * torch.linalg.cholesky(torch.cov(x.T))

            def propose(x: Tensor, h: float, g: torch.Generator) -> tuple[Tensor, Tensor]:
                # long and short moves, for densities that are wide here and narrow there
                length = h * (1.5 * torch.randn(len(x), 1, generator=g, dtype=x.dtype)).exp()
                z = torch.randn(x.shape, generator=g, dtype=x.dtype)
                new = x + length * z @ root.T
                return new, log_q(new) - log_q(x)

            return propose

        start = math.sqrt(v) * torch.randn(CHAINS, d, generator=generator, dtype=torch.float64)
        log_f = lambda x: self.log_p(x) - log_q(x)
        return temper(start, log_f, aim, self.moves, generator)[0]


def funnel(x: Tensor) -> Tensor:
    """x_1 ~ N(0, 9), the other nine N(0, exp(x_1))."""
    v = x[:, 0]
    log_2pi = math.log(2 * math.pi)
    first = -0.5 * v.square() / 9 - math.log(3) - 0.5 * log_2pi
    return first - 0.5 * (x[:, 1:].square() * (-v[:, None]).exp() + v[:, None] + log_2pi).sum(1)


def funnel_draws(n: int, generator: torch.Generator) -> Tensor:
    v = 3 * torch.randn(n, 1, generator=generator, dtype=torch.float64)
    z = torch.randn(n, 9, generator=generator, dtype=torch.float64)
    return torch.cat([v, (v / 2).exp() * z], 1)


def wells(x: Tensor) -> Tensor:
    """16 pairs of a double well and a Gaussian, not normalised."""
    a, b = x[:, 0::2], x[:, 1::2]
    return (0.5 * a + 6 * a.square() - a.pow(4) - 0.5 * b.square()).sum(1)


def wells_draws(n: int, generator: torch.Generator) -> Tensor:
    at = torch.linspace(-4, 4, 8001, dtype=torch.float64)
    p = (-at.pow(4) + 6 * at.square() + 0.5 * at - 9.5).exp()
    a = at[torch.multinomial(p, n * WELLS, replacement=True, generator=generator)]
    b = torch.randn(n * WELLS, generator=generator, dtype=torch.float64)
    return torch.stack([a, b], 1).reshape(n, 2 * WELLS)


ALL = Modes(
    torch.ones(25, dtype=torch.float64), MODES, VARIANCE * torch.eye(2, dtype=torch.float64)
)
INF = math.inf
LINE = torch.tensor([[1.0, 1.0]], dtype=torch.float64), torch.tensor([5.0], dtype=torch.float64)
FAR = torch.eye(2, dtype=torch.float64), torch.tensor([12.5, 2.5], dtype=torch.float64)
CASES = {
    "line": Case(measurement(*LINE, 1.0, 1000, 40), {"ELBO": (-1.6, INF), "weighed": (0, 0.04)}),
    "far": Case(
        measurement(*FAR, 1.0, 1000, 20),
        {"ELBO": (-0.6, INF), "apart": (0, 0.15), "weighed": (0, 0.05)},
    ),
    "nine": Case(
        nine,
        {"log Z": (-0.05, 0.05), "EUBO": (-INF, 0.3), "weighed": (0, 0.05)},
    ),
    "amortised, T = 20": Case(
        amortised(20, Plan(50, simulated=600, groups=32, paths=8)),
        {"ELBO": (-1.6, INF), "log Z": (0, 0.25), TRAINING: (0, 40)},
    ),
    "amortised, T = 50": Case(
        amortised(50, Plan(50, simulated=1000, groups=32, paths=8, steps=10)),
        {"SW2": (0, 0.2), "log Z": (0, 0.15)},
    ),
    "Guided, T = 20": Case(sde(Guided(), 20)),
    "PiGDM, T = 20": Case(sde(PiGDM(), 20)),
    "DPS, T = 20": Case(sde(DPS(zeta=0.1), 20)),
    "25 modes": Case(
        Density(ALL.log_prob, 2, 0.0, ALL.draws, (60, 50.0, 0.05), 50, 3000),
        {"ELBO": (-0.21, INF), "log Z": (-0.02, 0.02)},
        quick=False,
    ),
    "funnel": Case(
        Density(funnel, 10, 0.0, funnel_draws, (200, 3.0, 0.001), 800, 8000),
        {"ELBO": (-0.7, INF), "log Z": (-0.3, 0.3)},
        quick=False,
    ),
    "wells": Case(
        Density(wells, 32, WELLS * WELL, wells_draws, (60, 1.0, 0.01), 250, 5000, 600, 256),
        {"ELBO": (-4.7, INF), "log Z": (-0.2, 0.2)},
        quick=False,
    ),
}
QUICK = tuple(name for name, case in CASES.items() if case.quick)
