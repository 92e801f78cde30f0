"""What commands have in common that know a prior and data: one data section, an amplitude, perhaps a sampler."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

import scoreinv as si
from scoreinv.cli.data import (
    CutoutData,
    Observation,
    SimulatedCutout,
    Simulation,
    Speckle,
    VisibilityData,
    candidates,
    observe,
)
from scoreinv.finetune import Steered
from scoreinv.priors.zoo import prior_card
from scoreinv.samplers.simulations import ISLAND
from scoreinv.training import TrainingData, unseen_images

if TYPE_CHECKING:
    from accelerate import PartialState

DATA = ("visibilities", "cutout", "simulation", "exposure", "speckle")
SAMPLERS = ("smc", "anneal", "guided", "control")
WAIT = timedelta(days=7)
MOST = 1e20  # amplitude; squares of it and of noise must stay numbers of single precision
WEIGHED = 256  # particles of a control that are in memory at once, at most
PRIOR, HELD_OUT, CHAIN = "prior", "held out", "chain"  # where truths come from


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A prior and data.

    Args:
        prior: Shipped prior (see `scoreinv priors`), or a folder with one.
        visibilities: Data, one of five kinds: visibilities in a file.
        cutout: Data, one of five kinds: an optical image with its PSF and its noise.
        simulation: Data, one of five kinds: a simulated sky seen by ALMA, its truth known.
        exposure: Data, one of five kinds: a simulated sky behind a PSF, its truth known.
        speckle: Data, one of five kinds: a simulated sky without phases, by speckle interferometry, its truth known.
        amplitude: Sky units per model unit of the prior; chosen by the evidence if left out.
        n: Draws wanted of a posterior.
        seed: Decides every draw.
        device: Where the network runs: cpu, cuda, cuda:1.
        overwrite: Replace an existing result, and forget what an interrupted run has left.
    """

    prior: str
    visibilities: VisibilityData | None = None
    cutout: CutoutData | None = None
    simulation: Simulation | None = None
    exposure: SimulatedCutout | None = None
    speckle: Speckle | None = None
    amplitude: float | None = None
    n: int = 64
    seed: int = 0
    device: str = "cpu"
    overwrite: bool = False

    def __post_init__(self) -> None:
        given = [name for name in DATA if getattr(self, name) is not None]
        if len(given) != 1:
            seen = " and ".join(given) or "none"
            raise ValueError(f"expected exactly one of the sections {', '.join(DATA)}; got {seen}")
        if self.n < 1:
            raise ValueError(f"n is {self.n}, expected at least 1 draw")
        if self.amplitude is not None and not 1 / MOST < self.amplitude < MOST:
            raise ValueError(
                f"amplitude is {self.amplitude:g}, expected between {1 / MOST:g} and {MOST:g}, in the unit of the sky"
            )

    @property
    def data(self) -> VisibilityData | CutoutData | Simulation | SimulatedCutout | Speckle:
        """The data section that is given."""
        return next(x for x in map(self.__getattribute__, DATA) if x is not None)


def weighed_together(particles: int, n: int) -> int:
    """Particles of a control that are weighed against each other, for n draws."""
    return max(2, min(particles * n, WEIGHED))


@dataclass(frozen=True)
class Control:
    """Weighted paths of a control that `scoreinv finetune` has learned for this prior, measurement and amplitude.

    Args:
        folder: Of the fine-tuning.
        resample: Effective share of an island's particles below which they are resampled on the way; 0: never.
        particles: For each draw.
        effective: Share of the draws that particles must be worth; for data for which they are not, more are drawn, up to 16
            of a draw, and if that does not do the result says so.
        moves: How often the later part of a draw's path is walked anew, so that no draw is there twice.
    """

    folder: str
    resample: float = 0.0
    particles: int = 1
    effective: float = 0.25
    moves: int = 1

    def together(self, n: int) -> int:
        """Particles that are weighed against each other, of n draws."""
        return weighed_together(self.particles, n)

    def sampler(self, prior: si.Prior, likelihood: si.Likelihood) -> Steered:
        """The paths, of a prior in the unit of the sky."""
        learned = si.load_amortised(self.folder, prior, likelihood)
        return Steered(learned, self.resample, self.particles, self.effective, self.moves)


@dataclass(frozen=True, kw_only=True)
class SampledProblem(Problem):
    """A prior, data and a sampler.

    Args:
        smc: Sampler, one of four kinds, the default: weighted particles.
        anneal: Sampler, one of four kinds: moves without weights, for one mode.
        guided: Sampler, one of four kinds: one pass, fast and approximate.
        control: Sampler, one of four kinds: what `scoreinv finetune` has learned.
        island: Particles or draws that are made together, and kept together in case of an interruption; if not given 16, of
            a control all of a posterior, up to 256.
    """

    smc: si.SMC | None = None
    anneal: si.Anneal | None = None
    guided: si.Guided | None = None
    control: Control | None = None
    island: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        samplers = [name for name in SAMPLERS if getattr(self, name) is not None]
        if len(samplers) > 1:
            raise ValueError(
                f"expected one sampler at most, got {' and '.join(samplers)}; "
                f"leave one out, on the command line with --{samplers[0]} null"
            )
        if self.island is not None and self.island < 2:
            raise ValueError(f"island is {self.island}, expected at least 2")

    @property
    def together(self) -> int:
        """Particles of an island."""
        if self.island is not None:
            return self.island
        return ISLAND if self.control is None else self.control.together(self.n)

    def sampler(
        self, prior: si.Prior, likelihood: si.Likelihood
    ) -> si.SMC | si.Anneal | si.Guided | Steered:
        """The sampler that is given, or the default, for a prior in the unit of the sky."""
        if self.control is not None:
            return self.control.sampler(prior, likelihood)
        return self.smc or self.anneal or self.guided or si.SMC()


def launched(device: str) -> PartialState:
    """This process among those that torchrun or accelerate launch has started, one where neither has.

    They wait for one another for days: one may find its share finished long before another.
    """
    from accelerate import PartialState

    options: dict[str, Any] = {"cpu": device == "cpu"}
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        # they wait on their GPUs, and average gradients on the CPU
        backend = "gloo" if device == "cpu" else "cpu:gloo,cuda:nccl"
        options |= {"timeout": WAIT, "backend": backend}
    return PartialState(**options)


def trained_on(prior: str) -> TrainingData | None:
    """The images that a prior was trained on; None if its card does not say, as with checkpoints of score_models.

    Raises:
        ValueError: A card that says it in words of its own.
    """
    data = prior_card(prior).get("training", {}).get("data", {})
    known = {f.name for f in fields(TrainingData)}
    if unknown := sorted(set(data) - known):
        raise ValueError(
            f"the card of {prior} has {', '.join(unknown)} in training.data, expected some of {', '.join(sorted(known))}"
        )
    return TrainingData(**data) if "kind" in data else None


def truths(source: str, name: str, prior: si.Prior, n: int, seed: int) -> Tensor:
    """Images to recover, with shape (n, C, H, W) [model unit].

    Args:
        source: "prior" for its own draws, "held out" for images like those that it was trained on, simulated anew, or a
            folder of images, which are turned, moved and scaled as those in training.
        name: Of the prior.
        prior: Itself.
        n: Images.
        seed: Decides them.

    Raises:
        ValueError: A prior that was not trained on simulated images, or a folder without as many images.
    """
    if source == PRIOR:
        return prior.sample(n, seed)
    data = trained_on(name)
    if source != HELD_OUT:
        if not Path(source).is_dir():
            raise ValueError(
                f"truths are from {source!r}, expected {PRIOR!r}, {HELD_OUT!r}, {CHAIN!r} of a control, or a folder"
            )
        plain = TrainingData(
            "folder", prior.shape[-1], n, amplitude=(1.0, 1.0), shift=0, symmetric=False
        )
        return unseen_images(replace(data or plain, kind="folder", folder=source), n, seed)
    if data is None or data.folder is not None:
        raise ValueError(
            f"truths are {source!r}, but {name} learned no simulated images; expected {PRIOR!r} or a folder of images"
        )
    return unseen_images(data, n, seed, os.cpu_count() or 1)


def chosen(problem: Problem, prior: si.Prior) -> tuple[Observation, float, Sequence[str]]:
    """The observation and the amplitude of the prior: of several pixel scales the one under which the data are likeliest.

    Returns:
        Both, and a line for each of several pixel scales.
    """
    choices = [observe(part, prior.shape) for part in candidates(problem.data)]
    for seen in choices:
        seen.likelihood.noise.check_data(seen.y)
    if len(choices) == 1 and problem.amplitude is not None:
        return choices[0], problem.amplitude, []
    if len(choices) > 1 and problem.amplitude is not None:
        raise ValueError(
            "pixel scales are compared at the likeliest amplitude of each; leave amplitude out, or give one pixel_scale"
        )
    found = [si.amplitude_by_evidence(prior, seen.likelihood, seen.y) for seen in choices]
    best = max(range(len(found)), key=lambda i: found[i][1])
    lines = [
        f"{seen.grid.pixel_scale:g} arcsec: log Z {evidence - found[best][1]:+.1f}, amplitude {a:.4g}"
        for seen, (a, evidence) in zip(choices, found, strict=True)
    ]
    # to the four digits that it is known to: the last bits depend on the threads, and a run that goes on elsewhere must
    # find the same
    return choices[best], float(f"{found[best][0]:.4g}"), lines if len(found) > 1 else []


def introduce(
    prior: si.Prior, seen: Observation, amplitude: float, compared: Sequence[str]
) -> None:
    """What is about to be sampled, on the terminal."""
    for line in compared:
        say("pixel scale", line)
    say("data", f"{seen.origin['source']}, {seen.likelihood.data_size} numbers")
    say("prior", f"{prior.identity['prior']}, amplitude {amplitude:.4g} {seen.grid.unit}")


def completed(
    draws: si.Samples, config: Problem, seen: Observation, amplitude: float
) -> si.Samples:
    """The draws with the data as they were seen, the truth and the configuration."""
    residual = seen.likelihood.residual(seen.y, draws.mean[None])[0]
    data = {**seen.origin, "unit": seen.unit, "rms": seen.rms}
    return draws.with_(
        data_image=seen.image(seen.y),
        residual_image=seen.image(residual),
        truth=seen.truth,
        meta={**draws.meta, "amplitude": amplitude, "data": data, "config": asdict(config)},
    )


def findings(draws: si.Samples, seen: Observation) -> Iterator[tuple[str, str]]:
    """What a first look at the result should check."""
    chi2 = float(seen.likelihood.chi2(seen.y, draws.mean[None])) / seen.likelihood.data_size
    yield "chi^2", f"{chi2:.3f} per datum, of the posterior mean"
    largest = float(draws.residual_image.abs().nan_to_num().max()) / seen.rms
    yield "residual", f"{largest:.2f} times its noise at most"
    flux, unit = draws.x.double().flatten(1).sum(1), seen.grid.unit.removesuffix("/pixel")
    spread = f"+- {float(flux.std()):.2g} {unit}" if len(flux) > 1 else f"{unit}, of one draw"
    yield "total flux", f"{float(flux.mean()):.4g} {spread}"
    if seen.truth is not None:
        covered = si.diagnostics.pixel_coverage(draws.x, seen.truth.to(draws.x.dtype))
        pairs = (f"{share:.2f} (nominal {level:g})" for level, share in covered.items())
        yield "coverage", f"of the true pixels {', '.join(pairs)}"
        yield "true flux", f"{float(seen.truth.sum()):.4g} {unit}"


def check_file(path: Path) -> None:
    """Make sure that a file may be written there, before anything is computed."""
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder, expected the name of a file")
    path.parent.mkdir(parents=True, exist_ok=True)


def say(name: str, text: Any) -> None:
    """A line of the report on the terminal."""
    print(f"{name:<14}{text}".rstrip())
