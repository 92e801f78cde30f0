"""Whether two sets of images come from one population: nearest neighbours, and counts in random cells.

Both nulls are exact: labels are permuted, and nothing else knows of them. They ask whether draws of many posteriors, taken
together, look like truths, which a sampler that mixes up its observations passes: a complement of coverage.
"""

from __future__ import annotations

import torch
from torch import Tensor

from scoreinv.diagnostics.quantities import about_mean
from scoreinv.streams import stream

NEIGHBOURS = 10
PERMUTATIONS = 200
CELLS = 30


def c2st(x: Tensor, reference: Tensor, seed: int) -> tuple[float, float]:
    """Accuracy of a classifier that tells two sets apart (0.5: it cannot), and how often chance does as well.

    The classifier is the majority of the nearest neighbours, left-one-out, in units of the standard deviation of each
    pixel. Repeated images are taken once, and as many of both sets. Lopez-Paz & Oquab, Revisiting Classifier
    Two-Sample Tests (2017, arXiv:1610.06545); Schilling, Multivariate Two-Sample Tests Based on Nearest Neighbors (1986).

    Args:
        x: With shape (n, *shape).
        reference: With shape (m, *shape).
        seed: Of the permutations.
    """
    x, reference = _flat(x, reference)
    generator = stream(seed, 6)
    x, reference = x.unique(dim=0), reference.unique(dim=0)
    n = min(len(x), len(reference))
    # a random n of each: unique images come sorted
    chosen = [v[torch.randperm(len(v), generator=generator)[:n]] for v in (x, reference)]
    both = _scaled(torch.cat(chosen))
    label = (torch.arange(2 * n) < n).double()
    distance = torch.cdist(both, both).fill_diagonal_(torch.inf)
    near = distance.topk(min(NEIGHBOURS, 2 * n - 1), largest=False).indices

    def accuracy(label: Tensor) -> float:
        votes = label[near].mean(1) - 0.5
        right = (votes * (label - 0.5) > 0).double() + 0.5 * (votes == 0).double()
        return float(right.mean())

    found = accuracy(label)
    null = [
        accuracy(label[torch.randperm(2 * n, generator=generator)]) for _ in range(PERMUTATIONS)
    ]
    return found, (1 + sum(a >= found for a in null)) / (1 + PERMUTATIONS)


def pqmass(x: Tensor, reference: Tensor, seed: int) -> tuple[float, float]:
    """chi^2 of two sets' counts in cells around random images, and how often chance exceeds it.

    Cells are those nearest to each of a few images of both sets, which are then left out. Lemos et al., PQMass:
    Probabilistic Assessment of the Quality of Generative Models using Probability Mass Estimation (2024, arXiv:2402.04355);
    the permutations take the place of their chi^2 distribution, which few counts do not follow.

    Args:
        x: With shape (n, *shape).
        reference: With shape (m, *shape).
        seed: Of centres and permutations.
    """
    x, reference = _flat(x, reference)
    generator = stream(seed, 6)
    both = _scaled(torch.cat([x, reference]))
    label = (torch.arange(len(both)) < len(x)).double()
    order = torch.randperm(len(both), generator=generator)
    cells = min(CELLS, max(2, len(both) // 10))
    centres, rest = order[:cells], order[cells:]
    cell = torch.cdist(both[rest], both[centres]).argmin(1)
    label = label[rest]
    total = torch.bincount(cell, minlength=cells).double()
    share = label.mean()

    def chi2(label: Tensor) -> float:
        first = torch.bincount(cell, weights=label, minlength=cells)
        expected = (share * (1 - share) * total).clamp_min(1e-300)
        return float(((first - share * total).square() / expected).sum())

    found = chi2(label)
    null = [
        chi2(label[torch.randperm(len(label), generator=generator)]) for _ in range(PERMUTATIONS)
    ]
    return found, (1 + sum(a >= found for a in null)) / (1 + PERMUTATIONS)


def _flat(x: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    if x.shape[1:] != reference.shape[1:] or min(len(x), len(reference)) < 2:
        raise ValueError(
            f"the sets have shapes {tuple(x.shape)} and {tuple(reference.shape)}; "
            "expected (n, *shape) and (m, *shape), at least 2 of each"
        )
    if not bool(torch.isfinite(x).all() and torch.isfinite(reference).all()):
        raise ValueError("the sets have values that are not finite; find out why first")
    return x.flatten(1), reference.flatten(1)


def _scaled(both: Tensor) -> Tensor:
    """About the mean, in units of each pixel's standard deviation; pixels that never change do not count.

    Far from zero, distances by |a|^2 - 2 ab + |b|^2 would lose their digits.
    """
    left = about_mean(both)
    sd = left.std(0)
    return left / torch.where(sd > 0, sd, 1.0)
