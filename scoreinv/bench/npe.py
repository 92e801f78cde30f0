"""Neural posterior estimates of scalar parameters beside posteriors that are known.

The problems are those of Lueckmann, Boelts, Greenberg, Goncalves & Macke, Benchmarking Simulation-Based Inference (2021,
arXiv:2101.04653), with observations drawn afresh, and references that are computed here: exact draws of the first three, and
of slcp weighted ones. C2ST is the accuracy of a perceptron that tells estimate and reference apart, in five parts, as there.

A sine in noise is met in rounds, as in the example of Zhang et al. (nbi, 2023, arXiv:2312.03824): amplitude, phase and
frequency of 50 points, 2,560 simulations a round. sbi and lampe may estimate from the same pairs, nbi the same sines. Flux,
radius and shape of galaxies behind a PSF are estimated beside draws of the posteriors of their images.
"""

from __future__ import annotations

import math
import os
import statistics
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Uniform

from scoreinv.bench.learned import psf_problem
from scoreinv.bench.peers.estimates import (
    ESTIMATES,
    Draws,
    cpu_seconds,
    missing,
    rounds_by_nbi,
)
from scoreinv.npe import NPE, Clipped, Fitting, ParameterPrior, sequential
from scoreinv.npe.images import geometry, geometry_prior, image_pairs
from scoreinv.posterior import Posterior
from scoreinv.priors import load_prior, shipped_priors
from scoreinv.samplers import Guided, sample
from scoreinv.samplers.smc import systematic
from scoreinv.streams import stream
from scoreinv.training import fresh_images

INF = math.inf
PAIRS = 10_000
DRAWS = 2000  # of estimate and reference, that are told apart
WEIGHTED = 10_000  # draws of an estimate that are weighted by the likelihood
SHAPES = 2_000_000  # of the noise of slcp, which its reference weighs


@dataclass(frozen=True)
class Task:
    """A simulator whose posteriors are known.

    Attributes:
        prior: Of its parameters.
        simulate: x of theta, with shape (n, d), and a generator.
        reference: n draws of the posterior of one x, for a generator.
        log_likelihood: log p(x | theta) of one x for many theta; None where it has no closed form.
        flow: That suits it.
        decay: Of the weights of its fit.
    """

    prior: ParameterPrior
    simulate: Callable[[Tensor, torch.Generator], Tensor]
    reference: Callable[[Tensor, int, torch.Generator], Tensor]
    log_likelihood: Callable[[Tensor, Tensor], Tensor] | None = None
    flow: str = "nsf"
    decay: float = 0.0


@dataclass(frozen=True)
class Rows:
    """What was found of one problem.

    Attributes:
        key: All that decides it.
        rows: From `npe`, of one package each.
    """

    key: str
    rows: tuple[dict[str, Any], ...]


def box(d: int, half: float) -> ParameterPrior:
    """d parameters, uniform within half on both sides of zero."""
    ends = torch.tensor([-half, half], dtype=torch.float64)
    return ParameterPrior(**{f"theta{i + 1}": Uniform(*ends) for i in range(d)})


def normal(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def accepted(draw: Callable[[int], Tensor], inside: Callable[[Tensor], Tensor], n: int) -> Tensor:
    """n of the draws that are inside."""
    found: list[Tensor] = []
    while sum(map(len, found)) < n:
        some = draw(2 * n)
        found.append(some[inside(some)])
    return torch.cat(found)[:n]


def _two_moons() -> Task:
    prior, shift = box(2, 1.0), torch.tensor([0.25, 0.0], dtype=torch.float64)

    def crescent(n: int, generator: torch.Generator) -> Tensor:
        a = math.pi * (torch.rand(n, generator=generator, dtype=torch.float64) - 0.5)
        r = 0.1 + 0.01 * normal((n,), generator)
        return torch.stack([r * a.cos(), r * a.sin()], 1) + shift

    def simulate(theta: Tensor, generator: torch.Generator) -> Tensor:
        a, b = theta[:, 0] + theta[:, 1], theta[:, 1] - theta[:, 0]
        return crescent(len(theta), generator) + torch.stack([-a.abs(), b], 1) / math.sqrt(2)

    def reference(x: Tensor, n: int, generator: torch.Generator) -> Tensor:
        def draw(k: int) -> Tensor:
            q = math.sqrt(2) * (x - crescent(k, generator))
            sign = torch.randint(2, (k,), generator=generator).double() * 2 - 1
            a = torch.where(q[:, 0] <= 0, -sign * q[:, 0], math.nan)
            return torch.stack([0.5 * (a - q[:, 1]), 0.5 * (a + q[:, 1])], 1)

        return accepted(draw, lambda t: (t.abs() <= 1).all(1), n)

    return Task(prior, simulate, reference)


def _gaussian_linear_uniform() -> Task:
    prior, spread = box(10, 1.0), math.sqrt(0.1)

    def simulate(theta: Tensor, generator: torch.Generator) -> Tensor:
        return theta + spread * normal(theta.shape, generator)

    def reference(x: Tensor, n: int, generator: torch.Generator) -> Tensor:
        low, high = (torch.special.ndtr((end - x) / spread) for end in (-1.0, 1.0))
        share = low + (high - low) * torch.rand(n, 10, generator=generator, dtype=torch.float64)
        return (x + spread * torch.special.ndtri(share)).clamp(-1, 1)

    def log_likelihood(x: Tensor, theta: Tensor) -> Tensor:
        return -0.5 * ((x - theta) / spread).square().sum(1) - 5 * math.log(math.tau * 0.1)

    return Task(prior, simulate, reference, log_likelihood, "coupling", decay=1.0)


def _gaussian_mixture() -> Task:
    prior, scales = box(2, 10.0), torch.tensor([1.0, 0.1], dtype=torch.float64)

    def scattered(middle: Tensor, n: int, generator: torch.Generator) -> Tensor:
        which = torch.randint(2, (n,), generator=generator)
        return middle + scales[which][:, None] * normal((n, 2), generator)

    def reference(x: Tensor, n: int, generator: torch.Generator) -> Tensor:
        return accepted(lambda k: scattered(x, k, generator), lambda t: (t.abs() <= 10).all(1), n)

    def log_likelihood(x: Tensor, theta: Tensor) -> Tensor:
        square = (x - theta).square().sum(1)
        each = [-0.5 * square / s**2 - 2 * math.log(s) for s in scales.tolist()]
        return torch.logsumexp(torch.stack(each), 0) - math.log(2 * math.tau)

    return Task(prior, lambda theta, g: scattered(theta, len(theta), g), reference, log_likelihood)


def _slcp() -> Task:
    prior = box(5, 3.0)

    def scales(theta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return theta[:, 2].square(), theta[:, 3].square(), theta[:, 4].tanh()

    def simulate(theta: Tensor, generator: torch.Generator) -> Tensor:
        s1, s2, rho = (v[:, None] for v in scales(theta))
        z = normal((len(theta), 4, 2), generator)
        first = theta[:, :1] + s1 * z[..., 0]
        second = theta[:, 1:2] + s2 * (rho * z[..., 0] + (1 - rho.square()).sqrt() * z[..., 1])
        return torch.stack([first, second], 2).flatten(1)

    def log_likelihood(x: Tensor, theta: Tensor) -> Tensor:
        s1, s2, rho = (v[:, None] for v in scales(theta))
        a = (x[0::2] - theta[:, :1]) / s1
        b = (x[1::2] - theta[:, 1:2]) / s2
        left = (1 - rho.square()).clamp_min(1e-12)
        square = (a.square() - 2 * rho * a * b + b.square()) / left
        return (-0.5 * square - (math.tau * s1 * s2 * left.sqrt()).log()).sum(1)

    def reference(x: Tensor, n: int, generator: torch.Generator) -> Tensor:
        # the noise has a covariance S of the inverse Wishart distribution with three degrees of freedom about the scatter of
        # the four points, and their centre is a Gaussian about their mean, but for the weights, and for the box
        points = x.reshape(4, 2)
        left = points - points.mean(0)
        z = normal((SHAPES, 10), generator)
        T = torch.zeros(SHAPES, 2, 2, dtype=torch.float64)
        T[:, 0, 0], T[:, 1, 0], T[:, 1, 1] = z[:, :3].norm(dim=1), z[:, 3], z[:, 4:6].norm(dim=1)
        T = torch.linalg.cholesky(torch.linalg.inv(left.T @ left)) @ T
        S = torch.linalg.inv(T @ T.mT)
        s1, s2 = S[:, 0, 0].sqrt(), S[:, 1, 1].sqrt()
        centre = points.mean(0) + 0.5 * (torch.linalg.cholesky(S) @ z[:, 6:8, None])[..., 0]
        signs = z[:, 8:].sign()
        shape = [signs[:, 0] * s1.sqrt(), signs[:, 1] * s2.sqrt(), (S[:, 0, 1] / s1 / s2).atanh()]
        theta = torch.cat([centre, torch.stack(shape, 1)], 1)
        w = torch.where((theta.abs() <= 3).all(1), (torch.det(S) / (s1 * s2)).sqrt(), 0.0)
        w = w / w.sum()
        effective = float(1 / w.square().sum())
        if not effective > n:
            raise FloatingPointError(
                f"the reference of slcp has {effective:.0f} effective draws, expected {n} or more"
            )
        return theta[systematic(w, n, generator)]

    return Task(prior, simulate, reference, log_likelihood)


TASKS: dict[str, Callable[[], Task]] = {
    "two_moons": _two_moons,
    "gaussian_linear_uniform": _gaussian_linear_uniform,
    "gaussian_mixture": _gaussian_mixture,
    "slcp": _slcp,
}
SINE, ROUNDS, A_ROUND = "sine", 3, 2560
OURS, NBI = "scoreinv", "nbi"
GEOMETRY, GALAXIES, IMAGES, WORKERS = "geometry", "galaxy32", 6000, 2
SPEED, EPOCHS = "speed", 5
PROBLEMS = (*TASKS, SINE, SPEED, GEOMETRY)
AVERAGE = 0.99  # of the weights of an estimate
QUICK = ("two_moons", "gaussian_linear_uniform")
TARGETS: dict[str, dict[str, tuple[float, float]]] = {
    "two_moons": {"C2ST": (0, 0.56)},
    "gaussian_linear_uniform": {"C2ST": (0, 0.54), "C2ST weighted": (0, 0.53)},
    "gaussian_mixture": {"C2ST": (0, 0.60), "C2ST weighted": (0, 0.53), "n_eff / n": (0.2, INF)},
    "slcp": {"C2ST": (0, 0.87), "C2ST weighted": (0, 0.53), "n_eff / n": (0.2, INF)},
    "sine": {
        "n_eff of a round": (1000, INF),
        "n_eff / n": (0.4, INF),
        "training [CPU s]": (0, 35),
    },
    "speed": {"an epoch [CPU s]": (0, 0.30), f"{WEIGHTED} draws [CPU s]": (0, 0.5)},
}


def npe(
    seed: int,
    names: Sequence[str] | None = None,
    observations: int = 5,
    members: int = 1,
    plan: Fitting | None = None,
    peers: bool = False,
) -> Iterator[dict[str, Any]]:
    """A row of each problem: medians over observations.

    Args:
        seed: Of the simulations, the fit and the observations.
        names: Of `PROBLEMS`; all if not given.
        observations: Of each.
        members: Of the ensemble.
        plan: Of the fits.
        peers: Rows of sbi, lampe and nbi, too, where they are installed.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for name in names or PROBLEMS:
            yield from _rows(name, seed, observations, members, plan, peers)
    finally:
        torch.set_num_threads(threads)


def _rows(
    name: str, seed: int, observations: int, members: int, plan: Fitting | None, peers: bool
) -> Iterator[dict[str, Any]]:
    """Those of one problem."""
    if name == SPEED:
        yield speed(seed)
    elif name == GEOMETRY:
        yield of_images(seed, 2 * observations, plan or Fitting(epochs=60, batch=100))
    elif name == SINE:
        plan = plan or Fitting(epochs=60, batch=256)
        yield sine(seed, OURS, lambda s: _rounds(s, plan))
        if peers and present(NBI):
            yield sine(seed, NBI, lambda s: _rounds_by_nbi(s, plan))
    else:
        yield from estimates(name, seed, observations, members, plan, peers)


def present(package: str) -> bool:
    """Whether a package can be used here; warns if not."""
    if reason := missing(package):
        warnings.warn(f"left out: {reason}", stacklevel=2)
    return not reason


def estimates(
    name: str, seed: int, observations: int, members: int, plan: Fitting | None, peers: bool
) -> Iterator[dict[str, Any]]:
    """The rows of one of `TASKS`: ours, and of the same pairs and observations those of sbi and lampe."""
    task = TASKS[name]()
    plan = plan or Fitting(average=AVERAGE, decay=task.decay)
    theta = task.prior.sample(PAIRS, seed)
    x = task.simulate(theta, stream(seed, 1))
    seen = task.simulate(task.prior.sample(observations, seed + 1), stream(seed, 2))

    def row(package: str, judge: Callable[[int, Tensor], dict[str, float]]) -> dict[str, Any]:
        found = [judge(i, one) for i, one in enumerate(seen)]
        median = {k: statistics.median(f[k] for f in found) for k in found[0]}
        known = {"problem": name, "package": package, "flow": task.flow}
        return {**known, **median, "observations": observations, "seed": seed}

    estimator = NPE(task.prior, flow=task.flow, members=members)
    began = cpu_seconds()
    estimator.fit(theta, x, seed=seed, plan=plan)
    trained = cpu_seconds() - began
    ours = row(OURS, lambda i, one: judged(task, estimator, one, stream(seed, 3, i), i))
    ours |= {"members": members, "epochs": len(estimator.history[0])}
    yield {**ours, "training [CPU s]": trained, "missed": _missed(name, ours)}
    for package in filter(present, ESTIMATES if peers else ()):
        began = cpu_seconds()
        draws = ESTIMATES[package](task.prior, task.flow, theta, x, seed)
        trained = cpu_seconds() - began
        theirs = row(package, partial(_told, task, draws, seed))
        yield {**theirs, "training [CPU s]": trained, "missed": "-"}


def speed(seed: int) -> dict[str, Any]:
    """What an epoch of a flow of masked networks costs, of 9,000 pairs in 10 dimensions, and its draws."""
    task = TASKS["gaussian_linear_uniform"]()
    theta = task.prior.sample(PAIRS, seed)
    x, estimator = task.simulate(theta, stream(seed, 1)), NPE(task.prior, "maf")
    took = []
    # the first of all fits imports and compiles
    for epochs in (1, 1, 1 + EPOCHS):
        began = cpu_seconds()
        estimator.fit(theta, x, seed, Fitting(epochs=epochs))
        took.append(cpu_seconds() - began)
    began = cpu_seconds()
    estimator.condition(x[0]).sample(WEIGHTED, seed)
    found = {
        "an epoch [CPU s]": (took[2] - took[1]) / EPOCHS,
        f"{WEIGHTED} draws [CPU s]": cpu_seconds() - began,
    }
    row = {"problem": SPEED, "package": OURS, "flow": "maf", **found, "seed": seed}
    return {**row, "missed": _missed(SPEED, found)}


def sine(
    seed: int,
    package: str,
    one: Callable[[int], dict[str, float]],
    observations: int = 3,
) -> dict[str, Any]:
    """The row of rounds for one observation: medians over a few, each with rounds of its own."""
    found = [one(seed + i) for i in range(observations)]
    row = {k: statistics.median(f[k] for f in found) for k in found[0]}
    row |= {"observations": observations, "seed": seed}
    missed = _missed(SINE, row) if package == OURS else "-"
    return {"problem": SINE, "package": package, "flow": "maf", **row, "missed": missed}


def curve(theta: Tensor) -> Tensor:
    """Sines without noise, with shape (n, 50)."""
    t = torch.linspace(0, 1, 50, dtype=torch.float64)
    return theta[:, :1].exp() * (theta[:, 2:] * t + theta[:, 1:2]).sin()


def _sine(seed: int) -> tuple[ParameterPrior, Tensor]:
    """The prior of amplitude, phase and frequency, and a sine in noise of variance 1."""
    prior = ParameterPrior(
        log_amplitude=Uniform(0.0, math.log(10.0)),
        phase=Uniform(0.0, math.tau),
        frequency=Uniform(math.tau, 10 * math.tau),
    )
    return prior, (curve(prior.sample(1, seed)) + normal((1, 50), stream(seed, 1)))[0]


def _rounds_by_nbi(seed: int, plan: Fitting) -> dict[str, float]:
    """What rounds of nbi for one sine come to."""
    prior, x = _sine(seed)
    return rounds_by_nbi(prior, curve, x, ROUNDS, A_ROUND, WEIGHTED, plan.epochs, seed)


def _rounds(seed: int, plan: Fitting) -> dict[str, float]:
    """What rounds for one sine come to; draws of the estimates are its proposals, as in the example."""
    prior, x = _sine(seed)
    noise = lambda x, generator: x + normal(x.shape, generator)
    known = lambda theta: -0.5 * (x - curve(theta)).square().sum(1) - 25 * math.log(math.tau)
    began = cpu_seconds()
    found = sequential(
        lambda: NPE(prior, "maf"),
        lambda theta, _: curve(theta),
        x,
        rounds=ROUNDS,
        n=A_ROUND,
        seed=seed,
        proposal=Clipped(),
        log_likelihood=known,
        noise=noise,
        plan=plan,
    )
    trained = cpu_seconds() - began
    weighted = found.given.reweighted(known, WEIGHTED, seed)
    return {
        "rounds": len(found.weighted),
        "n_eff of a round": max(w.n_eff for w in found.weighted),
        "n_eff / n": weighted.n_eff / WEIGHTED,
        "k-hat": weighted.evidence.k_hat,
        "training [CPU s]": trained,
    }


def of_images(seed: int, observations: int, plan: Fitting, n: int = IMAGES) -> dict[str, Any]:
    """The row of galaxies' flux, radius and shape, estimated at once beside draws of the images' posteriors."""
    prior, n_draws = load_prior(GALAXIES), 64
    data = shipped_priors()[GALAXIES]["training"]["data"]
    images = fresh_images(
        data["kind"], data["size"], n + observations, seed, (1.0, 1.0), workers=WORKERS
    )
    likelihood = psf_problem(prior, 0.05)
    theta, x = image_pairs(images[:n], likelihood, seed)
    began = cpu_seconds()
    estimator = NPE(geometry_prior(images[:n]), "nsf").fit(theta, x, seed, plan)
    trained = cpu_seconds() - began

    def compared(image: Tensor, i: int) -> Tensor:
        """How far apart both are, how wide one is beside the other, and how far the truth is off, squared, by either."""
        y = likelihood.simulate(image, seed + i)[0]
        given = estimator.condition(likelihood.projection(y))
        drawn = sample(Posterior(prior, likelihood, y), n_draws, Guided(), seed=i, island=n_draws)
        both = [given.sample(WEIGHTED, i), geometry(drawn.x)]
        truth, spread = geometry(image)[0], both[1].std(0)
        apart = ((both[0].mean(0) - both[1].mean(0)) / spread).square().mean()
        off = [((b.mean(0) - truth) / b.std(0)).square().mean() for b in both]
        return torch.stack([apart, (both[0].std(0) / spread).log().mean(), *off])

    sources = images[n:], prior.sample(observations, seed)
    galaxies, own = (
        torch.stack([compared(v, i) for i, v in enumerate(source[:, None])]).mean(0)
        for source in sources
    )
    return {
        "problem": GEOMETRY,
        "flow": "nsf",
        "apart [sd]": float(galaxies[0].sqrt()),
        "width over that of images": float(galaxies[1].exp()),
        "error over sd": float(galaxies[2].sqrt()),
        "that of images": float(galaxies[3].sqrt()),
        "that of the prior's own": float(own[3].sqrt()),
        "training [CPU s]": trained,
        "observations": observations,
        "seed": seed,
        "missed": "-",
    }


def _missed(name: str, found: dict[str, float]) -> str:
    """Targets that were, by name."""
    wanted = TARGETS[name].items()
    return ", ".join(k for k, (low, high) in wanted if not low <= found[k] <= high) or "-"


def judged(
    task: Task, estimator: NPE, x: Tensor, generator: torch.Generator, seed: int
) -> dict[str, float]:
    """What is known of the estimate of one posterior."""
    given = estimator.condition(x)
    reference = task.reference(x, DRAWS, generator)
    row = told(lambda _, n: given.sample(n, seed), x, reference, seed)
    row |= {"C2ST weighted": math.nan, "n_eff / n": math.nan, "k-hat": math.nan}
    if task.log_likelihood is not None:
        weighted = given.reweighted(lambda theta: task.log_likelihood(x, theta), WEIGHTED, seed)
        chosen = systematic(torch.softmax(weighted.log_w, 0), DRAWS, generator)
        row["C2ST weighted"] = told_apart(weighted.theta[chosen], reference, seed)
        row["n_eff / n"] = weighted.n_eff / WEIGHTED
        row["k-hat"] = weighted.evidence.k_hat
    return row


def _told(task: Task, draws: Draws, seed: int, i: int, x: Tensor) -> dict[str, float]:
    """`told` beside the reference that ours has."""
    return told(draws, x, task.reference(x, DRAWS, stream(seed, 3, i)), i)


def told(draws: Draws, x: Tensor, reference: Tensor, seed: int) -> dict[str, float]:
    """How far draws of the posterior of x are from those of a reference, and what they cost."""
    began = cpu_seconds()
    drawn = draws(x, WEIGHTED)
    seconds = cpu_seconds() - began
    apart = told_apart(drawn[:DRAWS], reference, seed)
    return {"C2ST": apart, f"{WEIGHTED} draws [CPU s]": seconds}


def told_apart(x: Tensor, reference: Tensor, seed: int) -> float:
    """Accuracy of a perceptron of two layers of ten units for each number; 0.5: it cannot tell."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.model_selection import StratifiedKFold, cross_val_score
    from sklearn.neural_network import MLPClassifier

    middle, unit = reference.mean(0), reference.std(0)
    both = ((torch.cat([x, reference]) - middle) / unit).numpy()
    label = (torch.arange(len(both)) < len(x)).numpy()
    width = 10 * both.shape[1]
    classifier = MLPClassifier((width, width), max_iter=1000, random_state=seed)
    parts = StratifiedKFold(5, shuffle=True, random_state=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        scores = cross_val_score(classifier, both, label, cv=parts, n_jobs=os.cpu_count())
        return float(scores.mean())
