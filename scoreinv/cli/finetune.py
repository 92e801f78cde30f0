"""`scoreinv finetune`: a control that draws posteriors of one measurement, for any data of it or for one observation.

Under `torchrun --nproc_per_node N -m scoreinv finetune ...`, or `accelerate launch` with GPUs, the groups of a batch are
shared out, and all processes step by the mean of their gradients.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean, stdev

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

import scoreinv as si
from scoreinv.cli.problem import (
    HELD_OUT,
    PRIOR,
    Problem,
    chosen,
    completed,
    findings,
    introduce,
    launched,
    say,
    trained_on,
    truths,
    weighed_together,
)
from scoreinv.finetune.adapted import check_control
from scoreinv.finetune.amortised import train, untrained
from scoreinv.finetune.evidence import Evidence
from scoreinv.finetune.figure import learning_figure
from scoreinv.finetune.together import check_share
from scoreinv.finetune.training import CHECKPOINT
from scoreinv.simulators import SersicGalaxy

REPORT, PICTURE, DRAWS, IMAGES = "report.json", "report.png", "draws.fits", "images.safetensors"
FLUX = 0.04  # of a galaxy of the peak 1 in a pixel, on average over the canvas
LEAST = {"sims": 1, "paths": 10, "n": 2, "images": 1, "particles": 1}


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(Problem):
    """A prior, a measurement and the training of a control.

    Args:
        output: Folder of the training, the control, its report, and draws for the observation.
        only: Serve this observation alone, not all data of such a measurement.
        steps: Of the prior's chain; 50 or more for results.
        adapted: Train the prior's own network, in the place of one beside it.
        latent: Seven numbers of a Sersic profile in the place of an image of the prior, which keeps its canvas and its
            amplitude.
        plan: How long and how fast; its seed is that of the problem.
        images: From which data are simulated for the control's own paths: new ones of the kind that the prior was trained
            on; draws of the prior, which take longer, where its card does not name it.
        sims: Simulated data whose evidence is reported, before and after.
        paths: Of the control for each of them.
        particles: Paths of the control for each draw of the observation; they weigh unevenly.
    """

    output: str
    only: bool = False
    steps: int = 50
    adapted: si.Adapted | None = None
    latent: bool = False
    plan: si.Plan
    images: int = 20000
    sims: int = 8
    paths: int = 64
    particles: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in LEAST.items():
            if (given := getattr(self, name)) < least:
                raise ValueError(f"{name} is {given}, expected at least {least}")
        if self.latent and self.adapted:
            raise ValueError(
                "latent numbers have no network of a prior to adapt; leave adapted out"
            )
        if self.latent and self.device != "cpu":
            raise ValueError(f"device is {self.device}, expected cpu: latent numbers are few")
        if self.only and self.plan.simulated:
            raise ValueError(
                f"plan.simulated is {self.plan.simulated}, but with only=true no simulated image made the data; "
                "expected 0, and as many plan.iterations as needed"
            )

    @property
    def folder(self) -> Path:
        return Path(self.output)


def finetune(config: FinetuneConfig) -> None:
    """Learn how the data of a measurement steer a prior, report what that proves, and draw a posterior with it."""
    folder = config.folder
    # by every process: none may wait for one that has left
    _check_report(config)
    process = launched(config.device)
    share, first = (process.process_index, process.num_processes), process.is_main_process
    check_share(share, config.plan.groups)
    if first:
        _prepare(config)
    process.wait_for_everyone()
    prior = si.load_prior(config.prior, config.device)
    check_control(config.adapted, prior)
    seen, amplitude, compared = chosen(config, prior)
    if first:
        introduce(prior, seen, amplitude, compared)
    if config.latent:
        galaxy = SersicGalaxy(prior.shape[-1], FLUX * prior.shape[-1] ** 2 * amplitude)
        prior = si.GaussianPrior(torch.zeros(galaxy.shape, dtype=torch.float64), 1.0)
        operator = si.Generated(seen.likelihood.operator, galaxy, galaxy.shape)
        likelihood = si.Likelihood(operator, seen.likelihood.noise)
        images = prior.sample(config.images, config.seed)
    else:
        if first:
            _images(config, prior)
        process.wait_for_everyone()
        likelihood, images = seen.likelihood, amplitude * _images(config, prior)
        prior = prior.rescaled(amplitude)
    y = seen.y if config.only else None
    learned = untrained(
        prior,
        likelihood,
        images,
        config.seed,
        steps=config.steps,
        y=y,
        control=config.adapted,
    )
    if first:
        before = learned.bounds(config.sims, config.paths, config.seed)
        say("before", _described(before))
    try:
        train(
            learned,
            images,
            replace(config.plan, seed=config.seed),
            folder=folder,
            progress=first and sys.stderr.isatty(),
            share=share,
        )
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"the training so far is kept in {folder}; the same command "
            f"{'without --overwrite ' if config.overwrite else ''}goes on from there"
        ) from None
    if not first:
        return
    learned.save(folder)
    after = learned.bounds(config.sims, config.paths, config.seed)
    say("after", _described(after))
    say("processes", process.num_processes)
    given = learned.condition(seen.y)
    island = weighed_together(config.particles, config.n)
    draws = given.sample(config.n, config.seed, config.particles, island=island, grid=seen.grid)
    parameters = None
    if config.latent:
        parameters = dict(zip(galaxy.names, galaxy.parameters(draws.x).T.tolist(), strict=True))
        draws = draws.with_(x=galaxy(draws.x))
    draws = completed(draws, config, seen, amplitude)
    print(draws)
    for name, text in findings(draws, seen):
        say(name, text)
    for name, values in (parameters or {}).items():
        say(name, f"{mean(values):.4g} +- {stdev(values):.2g}")
    draws.write(folder / DRAWS, overwrite=True)
    draws.plot().savefig((folder / DRAWS).with_suffix(".png"), dpi=150)
    learning_figure(learned.history, before, after).savefig(folder / PICTURE, dpi=120)
    report = {
        "config": asdict(config),
        "amplitude": amplitude,
        "before": [asdict(e) for e in before],
        "after": [asdict(e) for e in after],
        "observation": asdict(given.evidence(config.paths, config.seed)),
        "history": learned.history,
        "parameters": parameters,
        "galaxy": asdict(galaxy) if config.latent else None,
    }
    # JSON knows no nan, such as the bound from above of an observation
    known = json.loads(json.dumps(report), parse_constant=lambda _: None)
    (folder / REPORT).write_text(json.dumps(known, indent=1) + "\n")
    for name, file in (("draws", DRAWS), ("report", REPORT), ("figure", PICTURE)):
        say(name, folder / file)


def _check_report(config: FinetuneConfig) -> None:
    report = config.folder / REPORT
    if report.exists() and not config.overwrite:
        raise FileExistsError(f"{report} exists; choose another output, or pass --overwrite")


def _prepare(config: FinetuneConfig) -> None:
    """Make room for the report, before anything is computed."""
    if config.overwrite:  # what others keep in the folder is not ours to delete
        for name in (REPORT, CHECKPOINT, IMAGES):
            (config.folder / name).unlink(missing_ok=True)
    config.folder.mkdir(parents=True, exist_ok=True)


def _images(config: FinetuneConfig, prior: si.Prior) -> Tensor:
    """Images that the prior could have made, kept beside the training."""
    path = config.folder / IMAGES
    key = json.dumps([prior.identity, config.images, config.seed])
    if path.exists():
        with safe_open(path, "pt") as f:
            if (f.metadata() or {}).get("key") == key:
                return f.get_tensor("images")
    data = trained_on(config.prior)
    known = data is not None and data.folder is None
    source = HELD_OUT if known else PRIOR
    images = truths(source, config.prior, prior, config.images, config.seed)
    partial = path.with_suffix(".part")
    save_file({"images": images}, partial, metadata={"key": key})
    partial.replace(path)
    return images


def _described(reports: list[Evidence]) -> str:
    average = lambda name: mean(getattr(r, name) for r in reports)
    return (
        f"EUBO - ELBO {average('gap'):.2f} nat, log-weights +- {average('std'):.2f} nat, "
        f"{100 * average('ess'):.1f} % effective of {reports[0].n}, over {len(reports)} simulated data"
    )
