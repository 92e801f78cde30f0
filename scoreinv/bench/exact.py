"""The samplers against posteriors that are known in closed form.

Sliced Wasserstein distances are stated over their noise floor: the mean distance of sets of as many exact draws. 1 is exact,
and a single set of exact draws scatters around it by up to a half where modes are far apart.
"""

from __future__ import annotations

import itertools
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path

from torch import Tensor
from tqdm import tqdm

from scoreinv.bench.ablation import PARTS, Ablated
from scoreinv.bench.imperfect import estimated, learned
from scoreinv.bench.increments import increments
from scoreinv.bench.memory import peak_memory
from scoreinv.bench.peers import Azula, DeepInv
from scoreinv.bench.problems import (
    Problem,
    four_fields,
    gaussian_field,
    grid_mixture,
    power_law_mixture,
)
from scoreinv.bench.records import Records
from scoreinv.bench.scores import mean_error, sliced_wasserstein, variance_ratio
from scoreinv.bench.speed import one_thread
from scoreinv.bench.tempered import amplitudes, counts, outliers
from scoreinv.conditioning.iterative import IterativeConditioner
from scoreinv.diagnostics.population import c2st
from scoreinv.processes import answers
from scoreinv.samplers import SMC, Anneal, Guided, sample
from scoreinv.samplers.baselines import (
    DAPS,
    DPS,
    MMPS,
    TDS,
    ConvolvedLikelihood,
    DiffPIR,
    PiGDM,
    PnPDM,
)
from scoreinv.samplers.path import Sampler

LARGE = 512  # pixels from which a fifth of the draws are made
QUICK = ("grid 8 1", "grid 80 4", "power law 64 16")  # problems for a first look
LEARNED = ("grid 8 2", "power law 64 16")  # problems that come with a learned score, too, and with
IMAGES = (500, 5000)  # from which their moments are estimated
FLOOR = 10  # sets of exact draws for the noise floor
METHODS: dict[str, Sampler] = {
    "SMC": SMC(),
    "SMC40": SMC(40),
    "SMC7": SMC(7),
    "Anneal": Anneal(),
    "Guided": Guided(),
    "TDS": TDS(),
    "MMPS": MMPS(),
    "PiGDM": PiGDM(),
    "DPS": DPS(),
    "DiffPIR": DiffPIR(),
    "DAPS": DAPS(),
    "PnP-DM": PnPDM(),
    "convolved": ConvolvedLikelihood(),
    "PiGDM weighted": PiGDM(weighted=True),
    "azula-MMPS": Azula(method="MMPS"),
    "azula-DPS": Azula(1000, "DPS"),
    "azula-DiffPIR": Azula(method="DiffPIR"),
    "deepinv-MMPS": DeepInv(method="MMPS"),
    "deepinv-PiGDM": DeepInv(method="PiGDM"),
    "deepinv-DPS": DeepInv(1000, "DPS"),
    **{f"SMC without {part}": Ablated(without=part) for part in PARTS},
}
SLOW = ("DPS", "PnP-DM", "azula-DPS", "deepinv-DPS")  # a thousand evaluations a draw and more
# solve with a white covariance
WHITE = ("TDS", "PiGDM", "DiffPIR", "DAPS", "PnP-DM", "convolved", "PiGDM weighted")
DEFAULT = tuple(METHODS)[: tuple(METHODS).index("convolved") + 1]


@dataclass(frozen=True)
class Score:
    """How far a sampler's draws are from an exact posterior.

    Attributes:
        key: Of the record: problem, method, seed, number of draws, island.
        problem: Its name.
        method: The sampler's.
        seed: Of the problem and of the draws.
        n: Draws.
        wasserstein: Sliced Wasserstein distance over its floor; 1 is exact.
        total_variation: Between the shares of the modes and their exact weights.
        mean: Error of the mean in posterior standard deviations, over that of as many exact draws; 1 is exact.
        seen: Variance of what the data see of an image, K H x under the prior's moments, over the exact one.
        unseen: The same of the rest.
        mahalanobis: Squared radius inside the modes per dimension; 1 is exact, < 1 too narrow.
        chi: Misfit to the data over that of exact draws.
        c2st: Accuracy of a classifier against exact draws; 0.5 is exact.
        c2st_p: How often chance does as well.
        distinct: Share of the draws that are not repeated.
        evidence_error: Of log_evidence [nat].
        evidence_std: What the sampler says of it [nat].
        evaluations: Of the network per draw.
        vjps: Vector-Jacobian products per draw.
        seconds: Wall time of all draws.
        memory: Largest resident set while they were made, over that before [MB].
        ess: Smallest effective sample size over n, where weights are used.
        weighted: Whether importance weights were used.
    """

    key: str
    problem: str
    method: str
    seed: int
    n: int
    wasserstein: float
    total_variation: float
    mean: float
    seen: float
    unseen: float
    mahalanobis: float
    chi: float
    c2st: float
    c2st_p: float
    distinct: float
    evidence_error: float
    evidence_std: float
    evaluations: float
    vjps: float
    seconds: float
    memory: float
    ess: float
    weighted: bool


@dataclass(frozen=True)
class Reference:
    """Exact draws to compare as many samplers with as there are.

    Attributes:
        x: The draws, with shape (4 n, d).
        floor: Mean distance of sets of n exact draws from them.
    """

    x: Tensor
    floor: float


def reference(problem: Problem, n: int, seed: int) -> Reference:
    """Exact draws for n draws of a sampler."""
    x, *sets = problem.draws((4 + FLOOR) * n, seed + 1).split([4 * n] + FLOOR * [n])
    return Reference(x, sum(sliced_wasserstein(a, x) for a in sets) / FLOOR)


def score(
    problem: Problem,
    sampler: Sampler,
    n: int,
    seed: int,
    island: int = 16,
    key: str = "",
    against: Reference | None = None,
) -> Score:
    """Run a sampler on a problem and score it against exact draws, which are made if not given."""
    against = against or reference(problem, n, seed)
    posterior = problem.posterior
    with one_thread(), peak_memory() as peak:
        began = time.perf_counter()
        draws = sample(posterior, n, sampler, seed=seed, island=island)
        seconds = time.perf_counter() - began
    x, exact = draws.x.flatten(1).double(), against.x
    variation, radius = problem.inside(x)
    images = lambda x: x.reshape(-1, *posterior.shape).to(posterior.dtype)
    shift = posterior.gaussian.shift
    of_data = shift(images(0 * x[:1]))
    seen, seen_exactly = ((of_data - shift(images(a))).flatten(1) for a in (x, exact))
    chi2 = lambda x: float(posterior.likelihood.chi2(posterior.y, images(x)).mean())
    accuracy, p = c2st(x, exact, seed)
    return Score(
        key=key,
        problem=problem.name,
        method=type(sampler).__name__,
        seed=seed,
        n=n,
        wasserstein=sliced_wasserstein(x, exact) / against.floor,
        total_variation=variation,
        mean=mean_error(x, exact) / math.sqrt(1 / n + 1 / len(exact)),
        seen=variance_ratio(seen, seen_exactly),
        unseen=variance_ratio(x - seen, exact - seen_exactly),
        mahalanobis=radius,
        chi=chi2(x) / chi2(exact),
        c2st=accuracy,
        c2st_p=p,
        distinct=len(x.unique(dim=0)) / n,
        evidence_error=draws.log_evidence - problem.log_evidence,
        evidence_std=draws.log_evidence_std,
        evaluations=draws.evaluations,
        vjps=draws.vjps,
        seconds=seconds,
        memory=peak.megabytes,
        ess=float(draws.ess.nan_to_num(math.inf).min())
        if draws.ess.isfinite().any()
        else math.nan,
        weighted=draws.weights.startswith("used throughout"),
    )


def failed(problem: Problem, run: Run, n: int) -> Score:
    """The score of draws that are not finite: nan in every number."""
    known = {"key": run.key, "problem": problem.name, "seed": run.seed, "n": n, "weighted": False}
    known["method"] = type(run.sampler).__name__
    rest = {f.name: math.nan for f in fields(Score) if f.name not in known}
    return Score(**known, **rest)


def problems() -> dict[str, Callable[[int], Problem]]:
    """The suite: what makes each problem from a seed."""
    suite: dict[str, Callable[[int], Problem]] = {}
    for d in (8, 80, 800):
        for m in (1, 2, 4):
            suite[f"grid {d} {m}"] = partial(grid_mixture, d, m)
    for d, m in ((64, 4), (64, 16), (64, 64), (256, 128)):
        suite[f"power law {d} {m}"] = partial(power_law_mixture, d, m)
    for kind in ("Laplace", "Student"):
        suite[f"{kind} 64 16"] = partial(increments, kind, 64, 16)
    suite["counts 64 32"] = partial(counts, 64, 32)
    suite["outliers 64 16"] = partial(outliers, 64, 16)
    for d in (2, 8):
        suite[f"amplitudes {d}"] = partial(amplitudes, d)
    for kind, size in (("blur", 32), ("Fourier", 32), ("mask", 32), ("blur", 64)):
        suite[f"fields {size} {kind}"] = partial(four_fields, kind=kind, size=size)
    for kind in ("PSF", "uv"):
        suite[f"field 64 {kind}"] = partial(gaussian_field, kind=kind)
    for name in LEARNED:
        suite[f"{name} learned"] = partial(learned, suite[name])
        for count in IMAGES:
            suite[f"{name} of {count}"] = partial(estimated, suite[name], count)
    return suite


def slow(name: str, title: str) -> bool:
    """Whether a sampler takes minutes on a problem, or the problem to make."""
    return title in SLOW or pixels(name) >= LARGE or name.endswith(" learned")


def pixels(name: str) -> int:
    """Of the images of a problem of the suite; 0 where its name does not say."""
    size = next((int(word) for word in name.split() if word.isdigit()), 0)
    return size**2 if name.startswith("field") else size


@dataclass(frozen=True)
class Run:
    """One sampler on one problem.

    Attributes:
        key: Of its score.
        name: The problem's, in `problems`.
        title: The sampler's, in the table.
        sampler: What runs.
        seed: Of the problem and of the draws.
        n: Draws; a fifth of them from 512 pixels on.
        island: Particles in an island of `SMC`; all others run as one.
    """

    key: str
    name: str
    title: str
    sampler: Sampler
    seed: int
    n: int
    island: int


def endless(problem: Problem, title: str) -> bool:
    """Whether a sampler solves with a white covariance where only hundreds of iterations a level do that."""
    return title in WHITE and isinstance(problem.posterior.conditioner, IterativeConditioner)


class Bench:
    """Runs samplers on problems, and keeps the last problem with its exact draws for the next sampler."""

    def __init__(self) -> None:
        self.suite = problems()
        self.last: tuple[str, int] | None = None
        self.problem: Problem
        self.against: dict[int, Reference]

    def __call__(self, run: Run) -> Score | None:
        """The score; None if the sampler does not take the problem."""
        if self.last != (run.name, run.seed):
            self.problem, self.against = self.suite[run.name](run.seed), {}
            self.last = run.name, run.seed
        problem = self.problem
        if run.sampler.refuses(problem.posterior) or endless(problem, run.title):
            return None
        n = run.n if pixels(run.name) < LARGE else run.n // 5
        if n not in self.against:
            self.against[n] = reference(problem, n, run.seed)
        size = run.island if isinstance(run.sampler, SMC) else n
        try:
            return score(problem, run.sampler, n, run.seed, size, run.key, self.against[n])
        except FloatingPointError:
            return failed(problem, run, n)


def scores(
    samplers: Mapping[str, Sampler],
    n: int,
    seeds: range,
    island: int,
    names: Sequence[str] | None = None,
    store: Path | None = None,
    progress: bool = False,
    workers: int = 1,
    slow_seeds: int | None = None,
) -> Iterator[dict[str, list[Score]]]:
    """Scores of every sampler on one problem after another, of all seeds; those in `store` are found again.

    A sampler that does not take the data of a problem is left out there.

    Args:
        samplers: By what the table calls them.
        n: Draws of small problems; a fifth of them from 512 pixels on.
        seeds: Problems of each kind.
        island: Particles in an island of `SMC`; all others run as one.
        names: Problems of the suite; all if not given.
        store: File of the scores so far.
        progress: Show a progress bar.
        workers: Processes, of one thread each; with 1 all runs in this one.
        slow_seeds: Problems of each kind where a run is `slow`; as many as of the others if not given.
    """
    records = Records(store, Score)
    few = seeds if slow_seeds is None else seeds[:slow_seeds]
    runs = [
        Run(f"{name}; {sampler}; {n}; {island}; {seed}", name, title, sampler, seed, n, island)
        for name in names or problems()
        for seed in seeds
        for title, sampler in samplers.items()
        if seed in (few if slow(name, title) else seeds)
    ]
    todo = [run for run in runs if run.key not in records]
    alike = [
        list(group) for _, group in itertools.groupby(todo, key=lambda run: (run.name, run.seed))
    ]
    left = Counter(run.name for run in todo)
    waiting = list(dict.fromkeys(run.name for run in runs))

    def finished() -> Iterator[dict[str, list[Score]]]:
        """Problems of which nothing is left to do."""
        while waiting and not left[waiting[0]]:
            name, groups = waiting.pop(0), {title: [] for title in samplers}
            for run in runs:
                if run.name == name and run.key in records:
                    groups[run.title].append(records[run.key])
            yield {title: group for title, group in groups.items() if group}

    yield from finished()
    with tqdm(total=len(todo), disable=not progress, desc="runs") as bar:
        for run, found in answers(alike, workers, Bench):
            if found is not None:
                records.add(found)
            left[run.name] -= 1
            bar.set_postfix_str(f"{run.name}, {run.title}")
            bar.update()
            yield from finished()


def row(title: str, scores: list[Score]) -> dict[str, float | str]:
    """The table's row: means over the seeds, the worst of them where it says so; runs that failed are counted apart."""
    every, scores = scores, [s for s in scores if not math.isnan(s.wasserstein)] or scores
    lost = sum(math.isnan(s.wasserstein) for s in every)
    title = f"{title}, {lost} of {len(every)} failed" if lost else title
    dropped = sum(not s.weighted for s in scores)
    if 0 < dropped < len(scores):
        title = f"{title}, weights dropped in {dropped} of {len(scores)}"
    sizes = [s.ess for s in scores if not math.isnan(s.ess)]
    mean = lambda key: sum(getattr(s, key) for s in scores) / len(scores)
    return {
        "problem": scores[0].problem,
        "method": title,
        "SW / floor": mean("wasserstein"),
        "worst": max(s.wasserstein for s in scores),
        "mode TV": mean("total_variation"),
        "mean / floor": mean("mean"),
        "var seen": mean("seen"),
        "unseen": mean("unseen"),
        "Mahalanobis": mean("mahalanobis"),
        "chi": mean("chi"),
        "C2ST": mean("c2st"),
        "least p": min(s.c2st_p for s in scores),
        "distinct": mean("distinct"),
        "log Z rms error": (sum(s.evidence_error**2 for s in scores) / len(scores)) ** 0.5,
        "log Z std": mean("evidence_std"),
        "evaluations": max(s.evaluations for s in scores),
        "VJPs": max(s.vjps for s in scores),
        "seconds": mean("seconds"),
        "MB": max(s.memory for s in scores),
        "least ESS / n": min(sizes, default=math.nan),
        "seeds": len(scores),
        "n": scores[0].n,
    }
