"""Tests of coverage, their effect sizes and a verdict: `coverage(draws, truths, seed)`.

Ranks of the truth by many quantities, three statistics of each (`scoreinv.diagnostics.ranks`), and one exact null for them
all (`scoreinv.diagnostics.exchange`). The family-wise false-alarm rate is the level that is asked for.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

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
from scoreinv.diagnostics.quantities import Quantities, band_names, quantities
from scoreinv.diagnostics.ranks import STATISTICS, conditional, pooled, ranks, weighted
from scoreinv.diagnostics.sharpness import Sharpness, sharpness

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WANTED = 1.1  # a factor in width that a test should be able to see
SHARP = "sharpness"
EXAMPLES = 3


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
        abstained: Simulations whose weights were too uneven to judge.
        findings: All statistics.
        dispersion: Width of the posteriors over the one that calibration asks for: below 1 too narrow.
        groups: The same for each band of spatial frequency, or coordinate.
        bias: How far truths lie above the draws, in posterior standard deviations, for each scalar.
        detectable: Factors in width below and above 1 that these simulations find with 80 % probability.
        sharpness: What the draws know.
        ranks: Of the truths, with shape (N, K), for the quantities `names`.
        names: Of the quantities.
        z: Errors of the draws' mean in posterior standard deviations, rms over the simulations, with the shape of an image.
        examples: Truth, mean and standard deviation of the first simulations, with shape (n, 3, *shape); empty for vectors.
        seed: That was given.
    """

    sims: int
    draws: int
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

        "sharpness" stands for draws that know no more than draws for other data, or lose to the baseline.
        """
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
        return f"not calibrated: {f.statistic} of the {f.quantity} (p = {f.adjusted:.2g})"

    def _calibrated(self) -> str:
        if not 1 / WANTED <= self.detectable[0] <= self.detectable[1] <= WANTED:
            least = needed(self.sims, self.detectable, WANTED)
            return (
                f"underpowered: nothing found, but {100 * (WANTED - 1):.0f} % in width would need "
                f"about {least} simulations"
            )
        within = max(self.dispersion.high - 1, 1 - self.dispersion.low)
        return f"calibrated within {100 * within:.0f} %"

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
                f"{low:+.1f} or {high:+.1f} % in width, with {100 * POWER:.0f} % probability",
            ),
            ("sharpness", f"contraction {sharp.contraction:.3f}, skill {sharp.skill:.3f}{gain}"),
        ]
        if self.abstained:
            lines.append(("not judged", f"{self.abstained} simulations with uneven weights"))
        return "\n".join(f"{name:<14}{text}" for name, text in lines)

    def as_dict(self) -> dict:
        """All but the arrays, for JSON."""
        record = {
            k: v for k, v in asdict(self).items() if k not in ("ranks", "z", "names", "examples")
        }
        record["verdict"], record["flagged"], record["p"] = self.verdict, self.flagged(), self.p
        return json.loads(json.dumps(record), parse_constant=lambda _: None)

    def write(self, path: str | Path) -> None:
        """The report as JSON."""
        Path(path).write_text(json.dumps(self.as_dict(), indent=1) + "\n")

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
    swaps: int = 1999,
) -> Coverage:
    """Test whether truths are exchangeable with the draws of their posteriors.

    Args:
        draws: Of each simulation's posterior, with shape (N, L, *shape): images whose last two axes are pixels, or vectors.
        truths: With shape (N, *shape).
        seed: Of everything random: ties, projections, swaps.
        weights: Of the draws, with shape (N, L), if they have any.
        references: Points that depend on the data only, such as dirty images, with shape (N, *shape). If not given, one draw
            of each simulation is set aside for that.
        baseline: Point estimates from the data, such as Wiener filters, with shape (N, *shape), which a posterior mean must
            not lose to.
        extra: More quantities by name, of draws (N, L) and of truths (N,): the log density of a posterior that has one (its
            levels of highest density), shear, lens masses.
        covariates: Of each simulation, with shape (N,), such as its signal to noise: biases and widths that go with them are
            found even if they cancel over all simulations.
        truth_noise: Standard deviation of the truths' own noise, broadcasting with them: real images of high signal to noise
            are truths up to that. As much is added to the draws, which costs power and keeps the rate of false alarms.
        swaps: Draws of the null.

    Raises:
        ValueError: Shapes that do not fit, values that are not finite, weights too uneven.
    """
    draws, truths = (torch.as_tensor(v) for v in (draws, truths))
    _check(draws, truths, references, baseline, weights)
    extra = {k: tuple(torch.as_tensor(v) for v in pair) for k, pair in (extra or {}).items()}
    if any(torch.as_tensor(v).shape != (len(truths),) for v in (covariates or {}).values()):
        raise ValueError(
            f"covariates are {', '.join(covariates)}, expected one number for each of {len(truths)} simulations"
        )
    draws, abstained = _noisy(draws, torch.as_tensor(truth_noise), seed), 0
    if weights is not None:
        if extra or covariates:
            raise ValueError(
                "extra quantities and covariates of weighted draws are not supported; resample the draws first"
            )
        keep, draws = weighted(draws, torch.as_tensor(weights), seed)
        abstained = len(truths) - len(keep)
        truths, references, baseline = (
            None if v is None else torch.as_tensor(v)[keep] for v in (truths, references, baseline)
        )
    if references is None:
        references, draws = draws[:, -1], draws[:, :-1]
        extra = {k: (d[:, :-1], t) for k, (d, t) in extra.items()}
    found = quantities(draws, truths, torch.as_tensor(references), seed)
    if extra:
        found = found.joined(_extra(extra))
    N, members, K = found.values.shape
    rank = ranks(found.values, seed)
    findings = _findings(found, rank, covariates or {}, swaps, seed)
    ratio, count = squared(draws, truths)
    image = truths.ndim >= 3
    names = (
        band_names(*truths.shape[-2:])
        if image
        else [f"coordinate {i + 1}" for i in range(len(count))]
    )
    scalars = [k for k in range(K) if found.families[k] in ("scalars", "given")]
    radius = found.of("whitened distance" if image else "distance in units of sd")
    mean, sd = draws.double().mean(1), draws.double().std(1)
    return Coverage(
        sims=N,
        draws=members - 1,
        abstained=abstained,
        findings=findings,
        dispersion=dispersion(ratio, count),
        groups={n: dispersion(ratio[:, [i]], count[[i]]) for i, n in enumerate(names)},
        bias={found.names[k]: bias(rank[:, 0, k], members) for k in scalars},
        detectable=detectable(radius, seed),
        sharpness=sharpness(
            draws, truths, None if baseline is None else torch.as_tensor(baseline), swaps, seed
        ),
        ranks=rank[:, 0],
        names=found.names,
        z=((mean - truths) / sd.clamp_min(1e-300)).square().mean(0).sqrt(),
        examples=torch.stack([truths.double(), mean, sd], 1)[: EXAMPLES if image else 0],
        seed=seed,
    )


def _noisy(draws: Tensor, std: Tensor, seed: int) -> Tensor:
    """Draws with noise of their own."""
    if not bool((std > 0).any()):
        return draws
    generator = torch.Generator().manual_seed(seed)
    return draws + std.to(draws.dtype) * torch.randn(
        draws.shape, generator=generator, dtype=draws.dtype
    )


def _findings(
    found: Quantities, rank: Tensor, covariates: Mapping[str, Tensor], swaps: int, seed: int
) -> list[Finding]:
    """All statistics of all quantities under the same swaps."""
    along = {name: torch.as_tensor(v) for name, v in covariates.items()}

    def statistic(who: Tensor) -> Tensor:
        return torch.cat(
            [pooled(rank, who), *(conditional(rank, who, c) for c in along.values())], 1
        )

    test = exchange_test(statistic, *rank.shape[:2], swaps, seed)
    names = [*STATISTICS, *(f"{kind} with {c}" for c in along for kind in STATISTICS[:2])]
    quantity = list(zip(found.families, found.names, strict=True))
    labels = [(*q, name) for name in names for q in quantity]
    values = zip(test.observed.tolist(), test.p.tolist(), test.adjusted().tolist(), strict=True)
    return [Finding(*label, *value) for label, value in zip(labels, values, strict=True)]


def _extra(extra: Mapping[str, tuple[Tensor, Tensor]]) -> Quantities:
    values = [torch.cat([t.double()[:, None], d.double()], 1) for d, t in extra.values()]
    return Quantities(list(extra), ["given"] * len(extra), torch.stack(values, -1))


def _check(
    draws: Tensor,
    truths: Tensor,
    references: Tensor | None,
    baseline: Tensor | None,
    weights: Tensor | None,
) -> None:
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
    if len(draws) < 10 or draws.shape[1] < 10:
        raise ValueError(
            f"there are {len(draws)} simulations of {draws.shape[1]} draws, expected at least 10 of 10"
        )
    for name, v in (("references", references), ("baseline", baseline)):
        if v is not None and tuple(v.shape) != shape:
            raise ValueError(
                f"{name} have shape {tuple(v.shape)}, truths {shape}; expected the same"
            )
    if weights is not None and tuple(weights.shape) != tuple(draws.shape[:2]):
        raise ValueError(
            f"weights have shape {tuple(weights.shape)}, draws {tuple(draws.shape)}; expected {tuple(draws.shape[:2])}"
        )
    for name, v in (("draws", draws), ("truths", truths)):
        bad = int((~torch.isfinite(v)).sum())
        if bad:
            raise ValueError(
                f"{bad} of {v.numel()} values of the {name} are not finite; find out why first"
            )
