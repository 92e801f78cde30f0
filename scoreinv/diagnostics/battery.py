"""Tests of coverage, their effect sizes and a verdict: `coverage(draws, truths, seed)`.

Ranks of the truth by many quantities, three statistics of each (`scoreinv.diagnostics.ranks`), and one exact null for them
all (`scoreinv.diagnostics.exchange`). The family-wise false-alarm rate is the level that is asked for.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from scoreinv.diagnostics.effects import (
    LEVEL,
    POWER,
    Effect,
    bias,
    detectable,
    dispersion,
    needed,
    squared,
)
from scoreinv.diagnostics.exchange import exchange_test
from scoreinv.diagnostics.quantities import Quantities, band_names, numbered, quantities
from scoreinv.diagnostics.ranks import (
    SIMULATIONS,
    STATISTICS,
    conditional,
    pooled,
    ranks,
    unweighted,
)
from scoreinv.diagnostics.sharpness import Sharpness, sharpness
from scoreinv.streams import stream
from scoreinv.tensors import as_tensor

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WANTED = 1.1  # a factor in width that a test should be able to see
SHARP = "sharpness"
EXAMPLES = 3
SWAPS = 99  # least number


@dataclass(frozen=True)
class Finding:
    """One statistic of one quantity.

    Attributes:
        family: Of the quantity.
        quantity: Its name.
        statistic: "bias", "dispersion" or "shape"; "bias with ..." and "dispersion with ..." a covariate.
        value: In standard deviations of its null.
        p: Its own p-value.
        adjusted: p-value corrected for all statistics of the battery.
    """

    family: str
    quantity: str
    statistic: str
    value: float
    p: float
    adjusted: float


@dataclass(frozen=True)
class Coverage:
    """What the battery found.

    Attributes:
        sims: Simulations N that were judged.
        draws: Draws L of each that were compared, without the one that serves as TARP's reference.
        swaps: Draws of the null.
        abstained: Simulations whose weights were too uneven to judge.
        findings: All statistics.
        dispersion: Width of the posteriors over the one that calibration asks for: below 1 too narrow.
        groups: The same for each band of spatial frequency, or coordinate.
        bias: How far truths lie above the mean of their draws, in posterior standard deviations, for each scalar.
        detectable: Factors in width below and above 1 that the battery finds with 80 % probability at least.
        sharpness: What the draws know.
        ranks: Of the truths, with shape (N, K), for the quantities `names`.
        names: Of the quantities.
        z: Errors of the draws' mean in posterior standard deviations, rms over the simulations, with the shape of an image.
        examples: Truth, mean and standard deviation of the first simulations, with shape (n, 3, *shape); empty for vectors.
        seed: That was given.
    """

    sims: int
    draws: int
    swaps: int
    abstained: int
    findings: list[Finding]
    dispersion: Effect
    groups: dict[str, Effect]
    bias: dict[str, Effect]
    detectable: tuple[float, float]
    sharpness: Sharpness
    ranks: Tensor
    names: list[str]
    z: Tensor
    examples: Tensor
    seed: int

    def flagged(self, level: float = LEVEL) -> list[str]:
        """Families of tests that reject calibration, with this family-wise false-alarm rate; empty if none does.

        "sharpness" stands beside them, outside that rate: for a mean that loses to the baseline, at this level, and for
        draws that know no more than draws for other data, which is right only where the data say nothing.

        Raises:
            ValueError: A level that so many swaps cannot resolve.
        """
        if not 1 / (self.swaps + 1) <= level < 1:
            raise ValueError(
                f"level is {level:g}, expected {1 / (self.swaps + 1):.2g} to 1: no p-value of {self.swaps} swaps is lower"
            )
        found = [f.family for f in self.findings if f.adjusted <= level]
        sharp = self.sharpness
        if sharp.ignorant > LEVEL or sharp.behind <= level:
            found.append(SHARP)
        return list(dict.fromkeys(found))

    @property
    def p(self) -> float:
        """p-value of the whole battery: the least of the corrected ones."""
        return min(f.adjusted for f in self.findings)

    @property
    def worst(self) -> Finding:
        """The finding that is furthest from calibration."""
        return max(self.findings, key=lambda f: (-f.adjusted, abs(f.value)))

    @property
    def verdict(self) -> str:
        """In words: calibrated within so much, too narrow, too wide, biased, underpowered."""
        families = self.flagged()
        judged = [name for name in families if name != SHARP]
        parts = [self._miscalibrated()] if judged else []
        if SHARP in families:
            lost = self.sharpness.behind <= LEVEL
            parts += ["the mean loses to the baseline" if lost else "knows no more than the prior"]
        return "; ".join(parts) or self._calibrated()

    def _miscalibrated(self) -> str:
        width = self.dispersion
        if not width.low <= 1 <= width.high:
            narrow = width.value < 1
            off = 1 - width.value if narrow else width.value - 1
            return f"too {'narrow' if narrow else 'wide'} by {100 * off:.0f} %{self._also()}"
        f = self.worst
        return f"not calibrated: {f.statistic} of the ranks of the {f.quantity} (p = {f.adjusted:.2g})"

    def _calibrated(self) -> str:
        if not 1 / WANTED <= self.detectable[0] <= self.detectable[1] <= WANTED:
            least = needed(self.sims, self.detectable, WANTED)
            return (
                f"underpowered: nothing found, but {100 * (WANTED - 1):.0f} % in width would need "
                f"about {least} simulations"
            )
        within = max(self.dispersion.high - 1, 1 - self.dispersion.low)
        return f"calibrated within {100 * within:.0f} % in width"

    def _also(self) -> str:
        """What scalars are off by themselves; a wrong width alone moves ranks of distances, not theirs."""
        off = [
            f
            for f in self.findings
            if f.family == "scalars" and f.statistic == "bias" and f.adjusted <= LEVEL
        ]
        return ", and biased: " + ", ".join(f.quantity for f in off) if off else ""

    def __str__(self) -> str:
        """The verdict and what it rests on."""
        low, high = (100 * (v - 1) for v in self.detectable)
        width, sharp = self.dispersion, self.sharpness
        found, gain = ", ".join(self.flagged()) or "nothing", ""
        if not math.isnan(sharp.gain):
            gain = f", {100 * sharp.gain:.0f} % less squared error than the baseline"
        lines = [
            ("verdict", self.verdict),
            ("flagged", f"{found} at {100 * LEVEL:.0f} % (p = {self.p:.2g})"),
            (
                "width",
                f"{width.value:.3f} ({width.low:.3f} to {width.high:.3f}) of the calibrated one",
            ),
            *(
                (
                    "bias",
                    f"{name}: truths {e.value:+.2f} ({e.low:+.2f} to {e.high:+.2f}) sd above the draws",
                )
                for name, e in self.bias.items()
            ),
            (
                "detectable",
                f"{low:+.1f} or {high:+.1f} % in width, with {100 * POWER:.0f} % probability or more",
            ),
            (
                "sharpness",
                f"contraction {sharp.contraction:.3f}, information {sharp.information:.4g} nat, "
                f"skill {sharp.skill:.3f}{gain}",
            ),
        ]
        if self.abstained:
            lines.append(
                ("not judged", f"{self.abstained} simulations whose weights leave too few draws")
            )
        return "\n".join(f"{name:<14}{text}" for name, text in lines)

    def as_dict(self) -> dict:
        """All but the arrays, for JSON."""
        record = {
            k: v for k, v in asdict(self).items() if k not in ("ranks", "z", "names", "examples")
        }
        record["verdict"], record["flagged"], record["p"] = self.verdict, self.flagged(), self.p
        return json.loads(json.dumps(record), parse_constant=lambda _: None)

    def write(self, path: str | Path, meta: Mapping[str, Any] | None = None) -> None:
        """The report as JSON.

        Args:
            path: File.
            meta: What else to keep: configuration, hashes, versions.
        """
        record = {**self.as_dict(), **({} if meta is None else {"meta": dict(meta)})}
        Path(path).write_text(json.dumps(record, indent=1) + "\n")

    def plot(self) -> Figure:
        """Rank distributions, coverage, widths and errors on one page."""
        from scoreinv.diagnostics.page import page

        return page(self)


def coverage(
    draws: Tensor,
    truths: Tensor,
    seed: int,
    *,
    weights: Tensor | None = None,
    references: Tensor | None = None,
    baseline: Tensor | None = None,
    extra: Mapping[str, tuple[Tensor, Tensor]] | None = None,
    covariates: Mapping[str, Tensor] | None = None,
    truth_noise: float | Tensor = 0.0,
    coordinates: Sequence[str] | None = None,
    swaps: int = 1999,
) -> Coverage:
    """Test whether truths are exchangeable with the draws of their posteriors.

    Args:
        draws: Of each simulation's posterior, with shape (N, L, *shape): images whose last two axes are pixels, or vectors.
        truths: With shape (N, *shape).
        seed: Of everything random: ties, projections, swaps.
        weights: Of the draws, with shape (N, L), if they have any: as many draws are kept as count alike.
        references: Points that depend on the data only, such as dirty images, with shape (N, *shape). If not given, one draw
            of each simulation is set aside for that.
        baseline: Point estimates from the data, such as Wiener filters, with shape (N, *shape), which a posterior mean must
            not lose to.
        extra: More quantities by name, of draws (N, L) and of truths (N,): the log density of a posterior that has one (its
            levels of highest density), shear, lens masses.
        covariates: Functions of the data alone, one number for each simulation, with shape (N,), such as the signal to noise
            that was measured: biases and widths that go with them are found even if they cancel over all simulations. A
            function of the truth would be found to go with its own error.
        truth_noise: Standard deviation of the truths' own noise, broadcasting with them: real images of high signal to noise
            are truths up to that. As much is added to the draws, which costs power and keeps the rate of false alarms.
        coordinates: Names of a vector's numbers, as they are to be called.
        swaps: Draws of the null, at least 99.

    Raises:
        ValueError: Shapes that do not fit, values that are not finite, weights too uneven.
    """
    draws, truths = _real("draws", draws), _real("truths", truths)
    _check(draws, truths, swaps)
    image = truths.ndim >= 3
    if coordinates is not None and (image or len(set(coordinates)) != truths.shape[1]):
        raise ValueError(
            f"coordinates are {list(coordinates)}, for truths with shape {tuple(truths.shape)}; expected as many different "
            "names as a vector has numbers"
        )
    same = tuple(truths.shape)
    references, baseline = (
        None if v is None else _real(name, v, same)
        for name, v in (("references", references), ("baseline", baseline))
    )
    alone, each = same[:1], tuple(draws.shape[:2])
    extra = {
        k: (_real(f"extra {k} of draws", d, each), _real(f"extra {k} of truths", t, alone))
        for k, (d, t) in (extra or {}).items()
    }
    covariates = {k: _real(f"covariate {k}", v, alone) for k, v in (covariates or {}).items()}
    truths, unit = truths.to(draws.dtype), _unit(truths)
    draws, truths = draws / unit, truths / unit
    references, baseline = (
        None if v is None else v.to(draws.dtype) / unit for v in (references, baseline)
    )
    draws, abstained = _noisy(draws, truth_noise, same, unit, seed), 0
    if weights is not None:
        judged, kept = unweighted(_real("weights", weights, each), seed)
        abstained = len(truths) - len(judged)
        rows = judged[:, None]
        draws, truths = draws[rows, kept], truths[judged]
        references, baseline = (None if v is None else v[judged] for v in (references, baseline))
        extra = {k: (d[rows, kept], t[judged]) for k, (d, t) in extra.items()}
        covariates = {k: v[judged] for k, v in covariates.items()}
    if references is None:
        # a draw of each simulation; any, for draws may come in an order
        order = torch.rand(draws.shape[:2], generator=stream(seed, 10)).argsort(1)
        rows = torch.arange(len(draws))[:, None]
        references, draws = draws[rows[:, 0], order[:, 0]], draws[rows, order[:, 1:]]
        extra = {k: (d[rows, order[:, 1:]], t) for k, (d, t) in extra.items()}
    found = quantities(draws, truths, references, seed, coordinates)
    if extra:
        found = found.joined(_extra(extra, found.names))
    N, members, K = found.values.shape
    rank = ranks(found.values, seed)
    findings, critical = _findings(found, rank, covariates, swaps, seed)
    ratio, count = squared(draws, truths)
    names = band_names(*truths.shape[-2:]) if image else coordinates or numbered(len(count))
    scalars = [k for k in range(K) if found.families[k] in ("scalars", "extra")]
    radius = found.of("whitened distance" if image else "distance in units of sd")
    first = draws[:, 0].double()
    left = draws.double() - first[:, None]  # of equal draws nothing, without rounding
    mean, sd = first + left.mean(1), left.std(1)
    sharp = sharpness(draws, truths, baseline, swaps, seed)
    L = members - 1
    # t-scores: the mean of L draws is uncertain, and so is their variance
    narrower = (1 + 1 / L) * (L - 1) / max(L - 3, 1)
    z = ((mean - truths) / sd.clamp_min(torch.finfo(torch.float64).tiny)).square().mean(0)
    return Coverage(
        sims=N,
        draws=L,
        swaps=swaps,
        abstained=abstained,
        findings=findings,
        dispersion=dispersion(ratio, count),
        groups={n: dispersion(ratio[:, [i]], count[[i]]) for i, n in enumerate(names)},
        bias={found.names[k]: bias(found.values[..., k]) for k in scalars},
        detectable=detectable(radius, critical, seed),
        sharpness=replace(sharp, energy_score=unit * sharp.energy_score),
        ranks=rank[:, 0],
        names=found.names,
        z=(z / narrower).sqrt(),
        examples=unit * torch.stack([truths.double(), mean, sd], 1)[: EXAMPLES if image else 0],
        seed=seed,
    )


def _real(name: str, values: Any, shape: tuple[int, ...] | None = None) -> Tensor:
    """Values as real, finite numbers of this shape, without a gradient."""
    v = as_tensor(values).detach()
    if v.is_complex():
        raise ValueError(f"{name} are {v.dtype}, expected real numbers")
    if shape is not None and tuple(v.shape) != shape:
        raise ValueError(f"{name} have shape {tuple(v.shape)}, expected {shape}")
    bad = int((~torch.isfinite(v)).sum())
    if bad:
        raise ValueError(
            f"{bad} of {v.numel()} values of the {name} are not finite; find out why first"
        )
    return v if v.dtype in (torch.float32, torch.float64) else v.double()


def _unit(truths: Tensor) -> float:
    """Standard deviation of all that is true: squares of numbers in it neither overflow nor vanish."""
    largest = float(truths.abs().max())
    if not largest > 0:
        return 1.0
    return largest * float((truths.double() / largest).std()) or largest


def _noisy(
    draws: Tensor, std: float | Tensor, shape: tuple[int, ...], unit: float, seed: int
) -> Tensor:
    """Draws with noise of their own, like that of their truths."""
    std = as_tensor(std)
    if not bool((std >= 0).all() and torch.isfinite(std).all()):
        raise ValueError("truth_noise is negative or not finite, expected a standard deviation")
    if not bool((std > 0).any()):
        return draws
    try:
        each = (std / unit).to(draws.dtype).broadcast_to(shape)[:, None]
    except RuntimeError:
        raise ValueError(
            f"truth_noise has shape {tuple(std.shape)}, which does not broadcast with truths {shape}"
        ) from None
    noise = torch.randn(draws.shape, generator=stream(seed, 9), dtype=draws.dtype)
    return draws + each * noise


def _findings(
    found: Quantities, rank: Tensor, along: Mapping[str, Tensor], swaps: int, seed: int
) -> tuple[list[Finding], float]:
    """All statistics of all quantities under the same swaps, and how large one must be to be found."""

    def statistic(who: Tensor) -> Tensor:
        return torch.cat(
            [pooled(rank, who), *(conditional(rank, who, c) for c in along.values())], 1
        )

    test = exchange_test(statistic, *rank.shape[:2], swaps, seed)
    names = [*STATISTICS, *(f"{kind} with {c}" for c in along for kind in STATISTICS[:2])]
    quantity = list(zip(found.families, found.names, strict=True))
    labels = [(*q, name) for name in names for q in quantity]
    values = zip(test.observed.tolist(), test.p.tolist(), test.adjusted().tolist(), strict=True)
    findings = [Finding(*label, *value) for label, value in zip(labels, values, strict=True)]
    return findings, test.critical(LEVEL)


def _extra(extra: Mapping[str, tuple[Tensor, Tensor]], known: list[str]) -> Quantities:
    if taken := set(extra) & set(known):
        raise ValueError(
            f"extra quantities are called {', '.join(sorted(taken))}, as the battery's own; rename"
        )
    values = [torch.cat([t.double()[:, None], d.double()], 1) for d, t in extra.values()]
    return Quantities(list(extra), ["extra"] * len(extra), torch.stack(values, -1))


def _check(draws: Tensor, truths: Tensor, swaps: int) -> None:
    shape = tuple(truths.shape)
    if draws.ndim < 3 or (draws.shape[0], *draws.shape[2:]) != shape:
        swapped = draws.ndim == truths.ndim + 1 and (draws.shape[1], *draws.shape[2:]) == shape
        hint = (
            "; draws come as (simulations, draws, ...): transpose the first two axes?"
            if swapped
            else ""
        )
        raise ValueError(
            f"draws have shape {tuple(draws.shape)} and truths {shape}, "
            f"expected (N, L, *shape) and (N, *shape){hint}"
        )
    if len(draws) < SIMULATIONS or draws.shape[1] < 10:
        raise ValueError(
            f"there are {len(draws)} simulations of {draws.shape[1]} draws, expected at least {SIMULATIONS} of 10"
        )
    if swaps < SWAPS:
        raise ValueError(f"swaps is {swaps}, expected at least {SWAPS} for a p-value of 5 %")
    if bool((draws == draws[:, :1]).all()):
        raise ValueError("all draws of each simulation are equal: no posterior is like that")
