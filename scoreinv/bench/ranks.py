"""Coverage by rank on the problems of the suite: one truth of each fresh problem, among a few draws of its posterior."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from scipy import stats
from tqdm import tqdm

from scoreinv.bench.exact import endless, problems
from scoreinv.bench.problems import Problem
from scoreinv.bench.records import Records
from scoreinv.samplers import sample
from scoreinv.samplers.path import Sampler
from scoreinv.streams import stream


@dataclass(frozen=True)
class Rank:
    """Where the truth of one problem stands among its draws.

    Attributes:
        key: Of the record.
        rank: Share of the draws below the truth along a random direction, ties broken at random; uniform on (0, 1) for
            exact draws.
    """

    key: str
    rank: float


def rank(problem: Problem, sampler: Sampler, n: int, seed: int, key: str = "") -> Rank:
    """Sample one problem and rank its truth; nan where the sampler fails."""
    try:
        draws = sample(problem.posterior, n, sampler, seed=seed, island=max(2, n), evidence=False)
    except FloatingPointError:
        return Rank(key, math.nan)
    generator = stream(seed, -4)
    direction = torch.randn(len(problem.truth), generator=generator, dtype=torch.float64)
    # along directions in which the prior is wide, so that small images and large ones are ranked by what shows
    wide = problem.posterior.moments.covariance.sqrt(
        direction.reshape(1, *problem.posterior.shape)
    ).flatten()
    below, at = draws.x.flatten(1).double() @ wide, problem.truth @ wide
    ties = 1 + int((below == at).sum())
    u = float(torch.rand(1, generator=generator, dtype=torch.float64))
    return Rank(key, (float((below < at).sum()) + ties * u) / (n + 1))


def coverage(
    samplers: Mapping[str, Sampler],
    count: int,
    seed: int,
    n: int = 31,
    names: Sequence[str] | None = None,
    store: Path | None = None,
    progress: bool = False,
) -> Iterator[list[dict[str, float | str]]]:
    """Ranks of fresh truths among draws of their posteriors, rows of one problem at a time.

    A row states the Kolmogorov-Smirnov p-value of their uniformity and the standard deviation of their normal scores, 1 for
    exact draws, with its error: more is too narrow.

    Args:
        samplers: By what the table calls them.
        count: Problems of each kind.
        seed: Of the first problem.
        n: Draws of each.
        names: Problems of the suite; all if not given.
        store: File of the ranks so far.
        progress: Show a progress bar.
    """
    records, suite = Records(store, Rank), problems()
    for name in names or suite:
        make = suite[name]
        ranks: dict[str, list[float]] = {title: [] for title in samplers}
        for i in tqdm(range(seed, seed + count), disable=not progress, desc=name):
            problem = None
            for title, sampler in samplers.items():
                key = f"{name}; {sampler}; {n}; {i}"
                if key not in records:
                    problem = problem or make(i)
                    if sampler.refuses(problem.posterior) or endless(problem, title):
                        continue
                    records.add(rank(problem, sampler, n, i, key))
                ranks[title].append(records[key].rank)
        yield [
            {
                "problem": name,
                "method": title,
                "truths": len(r),
                "failed": len(every) - len(r),
                "uniform p": float(stats.kstest(r, "uniform").pvalue),
                "rank score sd": float(stats.norm.ppf(r).std(ddof=1)),
                "error": (2 * len(r)) ** -0.5,
            }
            for title, every in ranks.items()
            if len(r := [v for v in every if not math.isnan(v)]) > 1
        ]
