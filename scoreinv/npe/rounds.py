"""Rounds of simulations for one observation, each where the posterior may be as the round before knows it.

Simulations from all of the prior are mostly unlike the observation. With r(u) = q(u | x) / N(u; 0, 1) of an estimate and the
level t above which all but a small share e of its draws lie, those of the next round come from the prior, but for regions
that the data exclude:

    Truncated:  p'(u) = N(u; 0, 1) [r(u) > t],        Clipped:  p'(u) = N(u; 0, 1) min(1, r(u) / t).

Where r > t, p' is the prior up to a factor, so what is learned is the posterior itself there, without a correction of its
density. Of all regions that hold as much of the posterior, that one holds least of the prior. Draws of the first come by
rejection, of the estimate or of the prior, whichever is refused less, and lie inside the regions of all rounds; so the pairs
of earlier ones that do are used again. The second takes draws of the estimate as they come, and pairs of all rounds have
weights

    w  =  min(1, r / t) / sum_i f_i r_i,        f_i the share of the pairs that round i made, r_0 = 1,

below N / (n t). Truncation: Deistler, Goncalves & Macke (2022, arXiv:2210.04815); estimates as proposals whose importance
weights tell when to stop: Zhang et al., nbi (2023, arXiv:2312.03824); the mixture in the denominator: Veach & Guibas (1995).

Where the likelihood is known, draws of each round's estimate are weighted by it, and of the next estimate only a tenth: the
rest are of a mixture that is fitted to the weighted draws of the rounds before (`scoreinv.npe.mixture`). A clipped round
simulates those draws, r is that of both together, and e the share of the posterior, by the weights; a truncated one, whose
bounds are hard, keeps to the estimate. Once fewer draws are effective than before, the rounds end, and the best estimate is
taken.

Pairs that hardly count cost as much as others. Those of less than a hundredth of the mean weight are left out by chance, or
weigh as much as that, so that the mean loss is the same.
"""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from scoreinv.digests import digest
from scoreinv.npe.conditioned import FARTHEST, Estimated, Weighted
from scoreinv.npe.data import ALONE, joined, mapped, named
from scoreinv.npe.estimator import Estimator
from scoreinv.npe.featurizers import Data
from scoreinv.npe.fitting import Fitting
from scoreinv.npe.mixture import Mixture, Population
from scoreinv.npe.parameters import ParameterPrior
from scoreinv.streams import integer, stream

SHARE = 1e-3  # of the posterior that a round may leave out
LEVEL = 10_000  # draws that tell t
LEAST = 0.01  # of the mean weight of pairs
REFUSED = 1000  # draws for each that is kept, at most
FORMAT = 2  # of the files of rounds
PAIRS, FITTED = "pairs.safetensors", "fitted"  # of a round that is kept

Known = tuple[Tensor, Tensor]  # log r of draws, and their weights, both with shape (n,)


@dataclass(frozen=True)
class Region:
    """Where an estimate expects the parameters, and what is known by weights beside it.

    Attributes:
        given: The estimate.
        mixture: Fitted to weighted draws of the rounds before; None if there are none.
        log_t: log of the level.
    """

    given: Estimated
    mixture: Mixture | None = None
    log_t: float = 0.0

    def draw(self, n: int, seed: int) -> tuple[Tensor, Tensor]:
        """n draws u, with shape (n, d), and their `log_ratio`; a few are beyond all that is ever asked for."""
        if self.mixture is not None:
            return self.given.drawn_beside(self.mixture, n, seed)
        u = self.given.prior.to_normal(self.given.sample(n, seed))
        return u, self.log_ratio(u)

    def log_ratio(self, u: Tensor) -> Tensor:
        """log r, with shape (B,)."""
        if self.mixture is not None:
            return self.given.log_ratio_beside(self.mixture, u)
        return self.given.log_ratio(u)

    def log_r(self, u: Tensor) -> Tensor:
        """Over the level, with shape (B,)."""
        return self.log_ratio(u) - self.log_t

    def holding(self, share: float, seed: int) -> Region:
        """With the level above which all but a share of its own draws lie."""
        _, log_r = self.draw(LEVEL, seed)
        return self.above(log_r, torch.ones_like(log_r), share)

    def above(self, log_r: Tensor, w: Tensor, share: float) -> Region:
        """With the level above which all but a share of draws lie, by their weights, both with shape (n,)."""
        order = log_r.argsort()
        left_out = (w[order].cumsum(0) / w.sum() <= share).sum()
        return replace(self, log_t=float(log_r[order[left_out]]))


class Proposal(ABC):
    """How a round's parameters are drawn."""

    @abstractmethod
    def draw(self, regions: list[Region], n: int, seed: int) -> Tensor:
        """n parameters u, with shape (n, d)."""

    @abstractmethod
    def bounded(self, region: Region, known: Known | None, share: float, seed: int) -> Region:
        """The region with its level; known are weighted draws of it, where the likelihood is."""

    @abstractmethod
    def weights(self, u: Tensor, regions: list[Region], made: list[int]) -> Tensor:
        """Of all pairs, with shape (N,), under the prior of the last region; 0 for those outside.

        Args:
            u: With shape (N, d).
            regions: Of all rounds but the first, which is of the prior.
            made: Pairs that each round made.
        """


@dataclass(frozen=True)
class Truncated(Proposal):
    """Draws of the prior inside of all regions."""

    def draw(self, regions: list[Region], n: int, seed: int) -> Tensor:
        found, tried, generator, region = [], 0, stream(seed), regions[-1]
        while sum(map(len, found)) < n:
            if tried > REFUSED * n:
                raise ValueError(
                    f"{sum(map(len, found))} of {tried} draws lie where the estimate expects them; the posterior is too "
                    "narrow beside the prior to be truncated so: take Clipped"
                )
            size, d = 2 * n, len(region.given.prior)
            if region.log_t > 0:
                u, log_r = region.draw(size, integer(seed, tried))
                log_r = log_r - region.log_t
                lucky = torch.rand(size, generator=generator, dtype=u.dtype).log() < -log_r
                inside = (log_r > 0) & lucky
            else:
                u = torch.randn(size, d, generator=generator, dtype=torch.float64)
                inside = region.log_r(u) > 0
            u = u[inside]
            found.append(u[_inside(u, regions)] if len(u) else u)
            tried += size
        return torch.cat(found)[:n]

    def bounded(self, region: Region, known: Known | None, share: float, seed: int) -> Region:
        # what is cut off is lost, and few weighted draws do not know where the posterior ends
        return Region(region.given).holding(share, seed)

    def weights(self, u: Tensor, regions: list[Region], made: list[int]) -> Tensor:
        return _inside(u, regions).double()


@dataclass(frozen=True)
class Clipped(Proposal):
    """Draws of the last estimate, with weights."""

    def draw(self, regions: list[Region], n: int, seed: int) -> Tensor:
        u, _ = regions[-1].draw(n, seed)
        return u[(u.abs() <= FARTHEST).all(1)]

    def bounded(self, region: Region, known: Known | None, share: float, seed: int) -> Region:
        return region.holding(share, seed) if known is None else region.above(*known, share)

    def weights(self, u: Tensor, regions: list[Region], made: list[int]) -> Tensor:
        log_f = torch.tensor(made, dtype=torch.float64).log() - math.log(sum(made))
        each = [torch.zeros(len(u), dtype=torch.float64), *(v.log_ratio(u) for v in regions)]
        mixed = torch.logsumexp(torch.stack(each) + log_f[:, None], 0)
        return (regions[-1].log_r(u).clamp_max(0) - mixed).exp()


PROPOSALS: dict[str, Proposal] = {"truncated": Truncated(), "clipped": Clipped()}


def _kept(file: Path, card: dict, made: Callable[[], tuple[Tensor, Data]]) -> tuple[Tensor, Data]:
    """Parameters u and simulations of a round, made now or found again.

    Args:
        file: Of the round.
        card: What tells these rounds from others; values of JSON.
        made: Makes them.

    Raises:
        ValueError: A file of other rounds, or a broken one.
    """
    if not file.exists():
        u, x = made()
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_suffix(".part")
        arrays = {"u": u, **{f"x-{k}": v.contiguous() for k, v in named(x).items()}}
        save_file(arrays, part, {"card": json.dumps(card)})
        part.replace(file)
    try:
        with safe_open(file, "pt") as read:
            kept = {k: read.get_tensor(k) for k in read.keys()}  # noqa: SIM118  not a dictionary
            of = json.loads((read.metadata() or {}).get("card", "{}"))
    except (OSError, SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(
            f"{file} cannot be read ({error}); remove its folder to make this round anew"
        ) from error
    if other := [k for k, v in card.items() if of.get(k) != v]:
        said = lambda card: ", ".join(f"{k} {card.get(k)!r}" for k in other)
        raise ValueError(
            f"{file} is of rounds with {said(of)}, expected {said(card)}; choose another folder, or remove this one"
        )
    x = {k.removeprefix("x-"): v for k, v in kept.items() if k != "u"}
    return kept["u"], x[ALONE] if set(x) == {ALONE} else x


def _said(x: Tensor) -> str:
    """What tells data from others."""
    return f"{tuple(x.shape)} {digest([x.double()])[:16]}"


def _thinned(w: Tensor, generator: torch.Generator) -> Tensor:
    """Weights whose means are these, with shape (N,), of which none is small but those that are 0."""
    least = LEAST * w.mean()
    kept = torch.rand(w.shape, generator=generator, dtype=w.dtype) * least < w
    return torch.where(w < least, least * kept, w)


def _inside(u: Tensor, regions: list[Region]) -> Tensor:
    """Which lie in all regions, with shape (B,)."""
    return torch.stack([region.log_r(u) > 0 for region in regions]).all(0)


@dataclass
class Sequential:
    """What came of the rounds.

    Attributes:
        given: The posterior of the observation, as the best estimate knows it.
        estimators: Of each round.
        pairs: That each round was fitted to, those without weight left out.
        weighted: Draws of each estimate, and of what was known beside it, by the likelihood, where that is known.
        best: Number of the round whose estimate was taken.
    """

    given: Estimated
    estimators: list[Estimator] = field(default_factory=list)
    pairs: list[int] = field(default_factory=list)
    weighted: list[Weighted] = field(default_factory=list)
    best: int = 0


def sequential(
    new: Callable[[], Estimator],
    simulate: Callable[[Tensor, torch.Generator], Data],
    x: Data,
    *,
    rounds: int,
    n: int,
    seed: int,
    proposal: Proposal | None = None,
    log_likelihood: Callable[[Tensor], Tensor] | None = None,
    noise: Callable[[Data, torch.Generator], Data] | None = None,
    plan: Fitting | None = None,
    share: float = SHARE,
    device: str = "cpu",
    progress: bool = False,
    folder: Path | None = None,
) -> Sequential:
    """Fit an estimate for one observation in rounds.

    Args:
        new: Makes an estimator that is not fitted.
        simulate: Data of theta, with shape (n, d), for a generator.
        x: The observation.
        rounds: At most, the first of which draws from the prior.
        n: Simulations of each.
        seed: Decides everything random.
        proposal: `Truncated` if not given.
        log_likelihood: log p(x | theta) of the observation, with shape (n,), for theta with shape (n, d) [nat].
        noise: Makes data of simulated ones, anew in every epoch, as that of `Estimator.fit`.
        plan: Of the fits.
        share: Of the posterior, as far as it is known, that the next round may leave out.
        device: Where the networks are fitted.
        progress: Show a progress bar.
        folder: Where the simulations and the estimate of each round are kept, from which the same call goes on,
            also for more rounds.

    Raises:
        ValueError: No round, a share that is none, a posterior that `Truncated` cannot reach; a folder of rounds for another
            observation, or with another prior, seed, number, proposal or plan.
    """
    if rounds < 1 or not 0 < share < 1:
        raise ValueError(
            f"rounds is {rounds} and share {share:g}, expected at least 1, and between 0 and 1"
        )
    blank = new()
    if not blank.posterior:
        raise ValueError(f"rounds are for NPE, and {type(blank).__name__} learns no posterior")
    proposal, plan, result = proposal or Truncated(), plan or Fitting(), None
    card = {
        "format": FORMAT,
        "observation": mapped(named(x), _said),
        "parameters": blank.prior.card,
        "n": n,
        "seed": seed,
        "share": share,
        "proposal": type(proposal).__name__,
        "plan": asdict(plan),
    }
    regions, population = [], Population()
    u, seen = torch.empty(0, len(blank.prior), dtype=torch.float64), {}
    for i in tqdm(range(rounds), disable=not progress, unit="round"):
        estimator = new()
        prior, own = estimator.prior, None if folder is None else folder / f"round-{i}"

        def made(prior: ParameterPrior = prior, i: int = i) -> tuple[Tensor, Data]:
            first = integer(seed, 3, i - 1) if i else integer(seed, 0, i)
            u = proposal.draw(regions, n, first) if i else prior.to_normal(prior.sample(n, first))
            return u, simulate(prior.from_normal(u), stream(seed, 1, i))

        more, simulated = made() if own is None else _kept(own / PAIRS, card, made)
        u, seen = torch.cat([u, more]), joined(seen, named(simulated))
        w = proposal.weights(u, regions, [n] * (i + 1)) if regions else torch.ones(n).double()
        w = _thinned(w, stream(seed, 5, i))
        used = w > 0
        some = mapped(seen, lambda v, used=used: v[used])
        if own is not None and (own / FITTED).exists():
            estimator.load(own)
        else:
            estimator.fit(
                prior.from_normal(u[used]),
                some if isinstance(simulated, Mapping) else some[ALONE],
                integer(seed, 2, i),
                plan,
                noise=noise,
                pair_weights=None if bool((w[used] == w[used][0]).all()) else w[used],
                device=device,
                checkpoint=None if own is None else own / "checkpoint",
            )
            if own is not None:
                estimator.save(own)
                (own / FITTED).touch()
        given = estimator.condition(x)
        result = result or Sequential(given)
        result.estimators.append(estimator)
        result.pairs.append(int(used.sum()))
        mixture = population.fitted(stream(seed, 6, i)) if population.known else None
        region, known = Region(given, mixture), None
        if log_likelihood is not None:
            drawn, log_r = region.draw(n, integer(seed, 3, i))
            weighted = given.weighed(drawn, log_r, log_likelihood)
            result.weighted.append(weighted)
            sizes = [weighted.n_eff for weighted in result.weighted]
            if sizes[-1] < max(sizes):
                break
            population.add(drawn, weighted.log_w)
            known = log_r, torch.softmax(weighted.log_w, 0)
        result.given, result.best = given, i
        if i + 1 < rounds:
            regions.append(proposal.bounded(region, known, share, integer(seed, 4, i)))
    return result
