"""Neural posterior estimates of scalar parameters beside posteriors that are known.

C2ST is the accuracy of a perceptron that tells estimate and reference apart, in five parts, as by Lueckmann et al. (2021,
arXiv:2101.04653), whose problems are in `tasks`. A sine in noise is met in rounds of 2,560 simulations, as by Zhang et al.
(nbi, 2023, arXiv:2312.03824). sbi and lampe may estimate from the same pairs, nbi the same sines. Flux, radius and shape of
galaxies behind a PSF, and of discs from their visibilities, are estimated beside draws of the posteriors of their images.
"""

from __future__ import annotations

import math
import os
import statistics
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from scoreinv.bench import tasks
from scoreinv.bench.learned import psf_problem, uv_problem
from scoreinv.bench.peers.estimates import (
    ESTIMATES,
    Draws,
    cpu_seconds,
    missing,
    rounds_by_nbi,
)
from scoreinv.bench.speed import one_thread
from scoreinv.npe import NPE, Clipped, Fitting, sequential
from scoreinv.npe.images import geometry, geometry_prior, image_pairs
from scoreinv.posterior import Posterior
from scoreinv.priors import load_prior, shipped_priors
from scoreinv.samplers import Guided, sample
from scoreinv.samplers.smc import systematic
from scoreinv.streams import stream
from scoreinv.training import TrainingData, unseen_images

INF = math.inf
PAIRS = 10_000
DRAWS = 2000  # of estimate and reference, that are told apart
WEIGHTED = 10_000  # draws of an estimate that are weighted by the likelihood
REFINED = 8  # times that these are drawn anew, at most

SINE, ROUNDS, A_ROUND = "sine", 3, 2560
OURS, SBI, NBI = "scoreinv", "sbi", "nbi"
SCENES = {"geometry": ("galaxy32", psf_problem), "disc geometry": ("disc64", uv_problem)}
SCENE_NOISE, IMAGES, WORKERS = 0.05, 6000, 2
SPEED, EPOCHS, TIMES = "speed", 5, 5
TRAINING = "training [CPU s]"
PROBLEMS = (*tasks.TASKS, SINE, SPEED, *SCENES)
EPOCH, RATIO = "an epoch [CPU s]", "an epoch / sbi's"
QUICK, QUICK_EPOCHS = ("two_moons", "gaussian_linear_uniform"), 60
EXACT = {"C2ST weighted": (0, 0.53), "n_eff / n": (0.2, INF)}
TARGETS: dict[str, dict[str, tuple[float, float]]] = {
    "two_moons": {"C2ST": (0, 0.56), **EXACT},
    "gaussian_linear_uniform": {"C2ST": (0, 0.54), **EXACT},
    "gaussian_mixture": {"C2ST": (0, 0.60), **EXACT},
    "slcp": {"C2ST": (0, 0.87), **EXACT},
    "sine": {
        "n_eff of a round": (1000, INF),
        "n_eff / n": (0.4, INF),
        TRAINING: (0, 35),
    },
    SPEED: {EPOCH: (0, 0.30), f"{WEIGHTED} draws [CPU s]": (0, 0.5)},
}
SBI_EPOCH = 0.47  # CPU s, where the target of an epoch was set


@dataclass(frozen=True)
class Suite:
    """How problems are run.

    Args:
        seed: First of the simulations and the fits.
        fits: Of each of `tasks.TASKS`, of simulations of their own, each judged by a share of the observations.
        observations: Of each, those published, from the first on.
        members: Of the ensemble.
        epochs: Of each of our fits, at most; of sines and scenes fewer.
        progress: Show how many observations have judged a fit.
    """

    seed: int
    fits: int = 2
    observations: int = 10
    members: int = 1
    epochs: int = Fitting.epochs
    progress: bool = False


def packages(name: str, peers: bool) -> list[str]:
    """That have a row of a problem: ours, and sbi, lampe or nbi if wanted, and installed."""
    others = {SINE: (NBI,)} | dict.fromkeys((*tasks.TASKS, SPEED), tuple(ESTIMATES))
    return [OURS, *filter(present, others.get(name, ()) if peers else ())]


def npe(name: str, suite: Suite, package: str = OURS) -> dict[str, Any]:
    """The row of a problem, one of `PROBLEMS`, for a package: medians over fits and observations."""
    seed = suite.seed
    with one_thread():
        if name == SPEED:
            return speed(seed, package)
        if name in SCENES:
            plan = Fitting(epochs=min(60, suite.epochs), batch=100)
            return of_images(name, seed, suite.observations, plan)
        if name == SINE:
            plan = Fitting(epochs=min(40, suite.epochs))
            rounds = _rounds if package == OURS else _rounds_by_nbi
            return sine(seed, package, lambda s: rounds(s, plan))
        return estimates(name, suite, package)


def present(package: str) -> bool:
    """Whether a package can be used here; warns if not."""
    if reason := missing(package):
        warnings.warn(f"left out: {reason}", stacklevel=2)
    return not reason


def estimates(name: str, suite: Suite, package: str) -> dict[str, Any]:
    """The row of one of `tasks.TASKS`, of the same pairs and observations for each package."""
    task, seen = tasks.TASKS[name](), tasks.published(name)[: suite.observations]
    plan = Fitting(epochs=suite.epochs, decay=task.decay)

    def fitted(i: int) -> tuple[list[dict[str, float]], dict[str, float]]:
        """What is known of the estimates of some observations, and what the fit cost."""
        seed = suite.seed + i
        theta = task.prior.sample(PAIRS, seed)
        x = task.simulate(theta, stream(seed, 1))
        began = cpu_seconds()
        if package == OURS:
            estimator = NPE(task.prior, task.flow, members=suite.members, **task.sizes)
            estimator.fit(theta, x, seed=seed, plan=plan)
            cost = {"epochs": len(estimator.history[0]), TRAINING: cpu_seconds() - began}
            cost["members"] = suite.members
            judge = partial(judged, task, estimator)
        else:
            draws = ESTIMATES[package](task.prior, task.flow, theta, x, seed)
            cost, judge = {TRAINING: cpu_seconds() - began}, partial(_told, task, draws)
        judges = tqdm(
            range(i, len(seen), suite.fits),
            f"{name}, {package}, fit {i + 1} of {suite.fits}",
            disable=not suite.progress,
        )
        return [judge(seen[j], seed, j) for j in judges], cost

    each = [fitted(i) for i in range(suite.fits)]
    row = {"problem": name, "package": package, "flow": task.flow}
    row |= _medians([found for of_fit, _ in each for found in of_fit])
    row |= {"observations": len(seen), "fits": suite.fits, "seed": suite.seed}
    row |= _medians([cost for _, cost in each])
    return {**row, "missed": _missed(name, row) if package == OURS else "-"}


def _medians(found: Sequence[dict[str, float]]) -> dict[str, float]:
    return {k: statistics.median(f[k] for f in found) for k in found[0]}


def speed(seed: int, package: str) -> dict[str, Any]:
    """What an epoch of a flow of masked networks costs, of 9,000 pairs in 10 dimensions, and its draws.

    The least of a few times each: what else runs on a machine only adds.
    """
    task = tasks.TASKS["gaussian_linear_uniform"]()
    theta = task.prior.sample(PAIRS, seed)
    x, estimator = task.simulate(theta, stream(seed, 1)), NPE(task.prior, "maf")

    def fitted(epochs: int) -> Draws:
        if package != OURS:
            return ESTIMATES[package](task.prior, "maf", theta, x, seed, epochs)
        estimator.fit(theta, x, seed, Fitting(epochs=epochs))
        return lambda x, n: estimator.condition(x).sample(n, seed)

    def least(what: Callable[[], Any]) -> float:
        took = []
        for _ in range(TIMES):
            began = cpu_seconds()
            what()
            took.append(cpu_seconds() - began)
        return min(took)

    draws = fitted(1)  # the first of all fits imports and compiles
    one, more = (least(partial(fitted, epochs)) for epochs in (1, 1 + EPOCHS))
    found = {EPOCH: (more - one) / EPOCHS}
    if package == OURS:
        # sbi draws until a draw is within the prior, which after one epoch says nothing of its speed
        found[f"{WEIGHTED} draws [CPU s]"] = least(lambda: draws(x[0], WEIGHTED))
    row = {"problem": SPEED, "package": package, "flow": "maf", **found, "seed": seed}
    return {**row, "missed": _missed(SPEED, found) if package == OURS else "-"}


def beside_sbi(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of a run, in which our epoch is judged by its ratio to that of sbi where there is one.

    Seconds are a machine's; the ratio is less so.
    """
    epochs = {r["package"]: r[EPOCH] for r in rows if r["problem"] == SPEED}
    if SBI not in epochs:
        return list(rows)
    return [_over(r, epochs[SBI]) if r["problem"] == SPEED else r for r in rows]


def _over(row: dict[str, Any], theirs: float) -> dict[str, Any]:
    """A row of what an epoch costs, beside one of sbi's."""
    names = list(row)
    names.insert(names.index(EPOCH) + 1, RATIO)
    found = row | {RATIO: row[EPOCH] / theirs}
    if row["package"] == OURS:
        targets = TARGETS[SPEED] | {
            EPOCH: (0, INF),
            RATIO: (0, TARGETS[SPEED][EPOCH][1] / SBI_EPOCH),
        }
        found["missed"] = _judged(targets, found)
    return {k: found[k] for k in names}


def sine(
    seed: int,
    package: str,
    one: Callable[[int], dict[str, float]],
    observations: int = 3,
) -> dict[str, Any]:
    """The row of rounds for one observation: medians over a few, each with rounds of its own."""
    found = [one(seed + i) for i in range(observations)]
    row = _medians(found) | {"observations": observations, "seed": seed}
    missed = _missed(SINE, row) if package == OURS else "-"
    return {"problem": SINE, "package": package, "flow": "maf", **row, "missed": missed}


def _rounds_by_nbi(seed: int, plan: Fitting) -> dict[str, float]:
    """What rounds of nbi for one sine come to."""
    prior, x = tasks.sine(seed)
    return rounds_by_nbi(prior, tasks.curve, x, ROUNDS, A_ROUND, WEIGHTED, plan.epochs, seed)


def _rounds(seed: int, plan: Fitting) -> dict[str, float]:
    """What rounds for one sine come to; draws of the estimates are its proposals, as in the example."""
    prior, x = tasks.sine(seed)
    noise = lambda x, generator: x + tasks.normal(x.shape, generator)
    known = lambda theta: -0.5 * (x - tasks.curve(theta)).square().sum(1) - 25 * math.log(math.tau)
    began = cpu_seconds()
    found = sequential(
        lambda: NPE(prior, "maf"),
        lambda theta, _: tasks.curve(theta),
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
    weighted = found.given.reweighted(known, WEIGHTED, seed, REFINED)
    return {
        "rounds": len(found.weighted),
        "n_eff of a round": max(w.n_eff for w in found.weighted),
        "n_eff / n": weighted.n_eff / WEIGHTED,
        "before": found.given.reweighted(known, WEIGHTED, seed).n_eff / WEIGHTED,
        "k-hat": weighted.evidence.k_hat,
        TRAINING: trained,
    }


def of_images(
    name: str, seed: int, observations: int, plan: Fitting, n: int = IMAGES
) -> dict[str, Any]:
    """The row of sources' flux, radius and shape, estimated at once beside draws of the images' posteriors."""
    of, seen_by = SCENES[name]
    prior, n_draws = load_prior(of), 64
    data = TrainingData(**shipped_priors()[of]["training"]["data"])
    images = unseen_images(data, n + observations, seed, WORKERS)
    likelihood = seen_by(prior, SCENE_NOISE)
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
    unseen, own = (
        torch.stack([compared(v, i) for i, v in enumerate(source[:, None])]).mean(0)
        for source in sources
    )
    return {
        "problem": name,
        "flow": "nsf",
        "apart [sd]": float(unseen[0].sqrt()),
        "width over that of images": float(unseen[1].exp()),
        "error over sd": float(unseen[2].sqrt()),
        "that of images": float(unseen[3].sqrt()),
        "that of the prior's own": float(own[3].sqrt()),
        TRAINING: trained,
        "observations": observations,
        "seed": seed,
        "missed": "-",
    }


def _missed(name: str, found: dict[str, float]) -> str:
    """Targets that were, by name."""
    return _judged(TARGETS[name], found)


def _judged(targets: Mapping[str, tuple[float, float]], found: Mapping[str, float]) -> str:
    missed = (k for k, (low, high) in targets.items() if not low <= found[k] <= high)
    return ", ".join(missed) or "-"


def judged(task: tasks.Task, estimator: NPE, x: Tensor, seed: int, i: int) -> dict[str, float]:
    """What is known of the estimate of the i-th posterior."""
    given, generator = estimator.condition(x), stream(seed, 3, i)
    reference = task.reference(x, DRAWS, generator)
    row = told(lambda _, n: given.sample(n, i), x, reference, i)
    names = ("C2ST weighted", "n_eff / n", "before", "k-hat")
    row |= dict.fromkeys(names, math.nan)
    if task.log_likelihood is not None:
        known = lambda theta: task.log_likelihood(x, theta)
        weighted = given.reweighted(known, WEIGHTED, i, REFINED)
        chosen = systematic(torch.softmax(weighted.log_w, 0), DRAWS, generator)
        row["C2ST weighted"] = told_apart(weighted.theta[chosen], reference, i)
        row["n_eff / n"] = weighted.n_eff / WEIGHTED
        row["before"] = given.reweighted(known, WEIGHTED, i).n_eff / WEIGHTED
        row["k-hat"] = weighted.evidence.k_hat
    return row


def _told(task: tasks.Task, draws: Draws, x: Tensor, seed: int, i: int) -> dict[str, float]:
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
    both = ((torch.cat([x, reference]) - middle) / unit).float().numpy()
    label = (torch.arange(len(both)) < len(x)).numpy()
    width = 10 * both.shape[1]
    classifier = MLPClassifier((width, width), max_iter=1000, random_state=seed)
    parts = StratifiedKFold(5, shuffle=True, random_state=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        scores = cross_val_score(classifier, both, label, cv=parts, n_jobs=os.cpu_count())
        return float(scores.mean())
