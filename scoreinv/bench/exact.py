"""The samplers against posteriors that are known in closed form.

Scores: sliced Wasserstein distance over its noise floor (the mean distance of sets of as many exact draws; 1 is exact, and a
single set of exact draws scatters around it by up to a half where modes are far apart), total variation of the mode
weights, Mahalanobis radius inside the modes (1 is exact, < 1 too narrow), error of the evidence.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from scoreinv.bench.problems import MixtureProblem, four_fields, grid_mixture, power_law_mixture
from scoreinv.priors.base import stream
from scoreinv.samplers import sample
from scoreinv.samplers.path import Sampler

FLOOR = 10  # sets of exact draws for the noise floor


@dataclass(frozen=True)
class Score:
    """How far draws are from an exact posterior."""

    problem: str
    seed: int
    wasserstein: float
    total_variation: float
    mahalanobis: float
    evidence_error: float
    evidence_std: float
    evaluations: float
    seconds: float
    weighted: bool


def sliced_wasserstein(x: Tensor, reference: Tensor, directions: int = 400) -> float:
    """Root mean square of the 2-Wasserstein distances of random one-dimensional projections.

    Args:
        x: Draws, with shape (n, d).
        reference: Exact draws, with shape (k n, d).
    """
    theta = torch.randn((x.shape[1], directions), generator=stream(0), dtype=torch.float64)
    theta = theta / theta.norm(dim=0)
    a, b = (x @ theta).sort(0).values, (reference @ theta).sort(0).values
    b = b.reshape(len(x), -1, directions)
    return float((a[:, None] - b).square().mean().sqrt())


def score(problem: MixtureProblem, sampler: Sampler, n: int, seed: int) -> Score:
    """Run a sampler on a problem and score it."""
    draws = sample(problem.posterior, n, sampler, seed=seed)
    x = draws.x.flatten(1).double()
    reference = problem.draws(4 * n, seed + 1)
    floor = [sliced_wasserstein(problem.draws(n, seed + 2 + i), reference) for i in range(FLOOR)]
    radius, density = problem.radius(x)
    mode = density.argmax(1)
    share = torch.bincount(mode, minlength=len(problem.weights)) / n
    return Score(
        problem.name,
        seed,
        sliced_wasserstein(x, reference) * FLOOR / sum(floor),
        0.5 * float((share - problem.weights).abs().sum()),
        float(radius.gather(1, mode[:, None]).mean()),
        draws.log_evidence - problem.log_evidence,
        draws.log_evidence_std,
        draws.evaluations,
        draws.seconds,
        draws.weights == "used throughout",
    )


def mixture_problems(seed: int, quick: bool = False) -> list[MixtureProblem]:
    """The suite of one seed."""
    grids = [(8, 1), (8, 2), (8, 4), (80, 1), (80, 2), (80, 4)]
    fields = [(64, 4), (64, 16), (256, 128)]
    if quick:
        grids, fields = [(8, 1), (80, 4)], [(64, 16)]
    return [
        *(grid_mixture(d, m, seed) for d, m in grids),
        *(power_law_mixture(d, m, seed) for d, m in fields),
        *([] if quick else [four_fields(seed)]),
    ]


def mixture_table(
    sampler: Sampler, n: int, seeds: Iterable[int], quick: bool = False
) -> list[dict]:
    """Scores of every problem, averaged over the seeds, as rows."""
    scores: dict[str, list[Score]] = {}
    for seed in seeds:
        for problem in mixture_problems(seed, quick):
            scores.setdefault(problem.name, []).append(score(problem, sampler, n, seed))
    return [_row(name, group) for name, group in scores.items()]


def _row(name: str, scores: list[Score]) -> dict[str, float | str]:
    mean = lambda key: sum(getattr(s, key) for s in scores) / len(scores)
    return {
        "problem": name,
        "seeds": len(scores),
        "SW / floor": mean("wasserstein"),
        "worst": max(s.wasserstein for s in scores),
        "mode TV": mean("total_variation"),
        "Mahalanobis": mean("mahalanobis"),
        "log Z rms error": (sum(s.evidence_error**2 for s in scores) / len(scores)) ** 0.5,
        "log Z std": mean("evidence_std"),
        "evaluations": max(s.evaluations for s in scores),
        "seconds": mean("seconds"),
        "weighted": mean("weighted"),
    }
