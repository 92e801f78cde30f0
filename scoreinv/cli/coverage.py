"""`scoreinv coverage`: whether posteriors of simulated data cover the truth.

Under `torchrun --nproc_per_node N -m scoreinv coverage ...`, or `accelerate launch` with GPUs, the simulations are shared
out; the report is the same for any number of processes. (`accelerate launch --cpu` starts one, whatever it is told; torchrun
takes `--n` for an option of its own, so n goes into the file.)
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import scoreinv as si
from scoreinv.cli.problem import (
    CHAIN,
    PRIOR,
    SampledProblem,
    check_file,
    chosen,
    launched,
    say,
    truths,
)
from scoreinv.diagnostics.battery import SWAPS
from scoreinv.finetune import Steered
from scoreinv.samplers.run import installed
from scoreinv.samplers.simulations import finished_simulations, forget_simulations


@dataclass(frozen=True, kw_only=True)
class CoverageConfig(SampledProblem):
    """An observation to imitate, a prior, truths to recover, and a sampler to test.

    Args:
        truths: "prior" for its own draws, which test the sampler; "held out" for images like those that it was trained on,
            simulated anew, or a folder of images: these test the prior, too; "chain" for what a control's chain draws
            without data, which tests its paths and weights alone.
        output: Report, ending in .json; a figure of the same name, and a folder of the simulations.
        gaussian: Take the Gaussian with the prior's moments in the prior's place: exact answers in minutes.
        sims: Simulations.
        swaps: Draws of the null distribution; no p-value is below one in so many.
    """

    output: str
    truths: str = PRIOR
    gaussian: bool = False
    sims: int = 128
    swaps: int = 1999

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.path.suffix != ".json":
            raise ValueError(f"output is {self.output}, expected a name in .json")
        if self.sims < 10 or self.n < 10:
            raise ValueError(
                f"sims is {self.sims} and n {self.n}; expected at least 10 of each, better 100"
            )
        if self.truths == CHAIN and self.control is None:
            raise ValueError(
                f"truths are {CHAIN!r}, of the chain that a control steers; expected the section control"
            )
        if self.swaps < SWAPS:
            raise ValueError(
                f"swaps is {self.swaps}, expected at least {SWAPS} for a p-value of 5 %"
            )

    @property
    def path(self) -> Path:
        return Path(self.output)

    @property
    def picture(self) -> Path:
        """File of the figure."""
        return self.path.with_suffix(".png")

    @property
    def folder(self) -> Path:
        """Of the finished simulations."""
        return self.path.with_suffix("")


def coverage(config: CoverageConfig) -> None:
    """Simulate data like an observation's, sample every posterior, and test whether they cover the truths."""
    # by every process: none may wait for one that has left
    for path in (config.path, config.picture):
        check_file(path)
    if config.path.exists() and not config.overwrite:
        raise FileExistsError(f"{config.path} exists; choose another output, or pass --overwrite")
    process = launched(config.device)
    prior = si.load_prior(config.prior, config.device)
    seen, amplitude, compared = chosen(config, prior)
    sought = None
    if config.truths not in (PRIOR, CHAIN):
        images = truths(config.truths, config.prior, prior, config.sims, config.seed)
        sought = amplitude * images
    # what is wrong with the configuration is known by now: nothing finished is lost for a slip
    if process.is_main_process:
        _prepare(config)
    process.wait_for_everyone()
    if config.gaussian:
        prior = si.GaussianPrior(prior.moments.mean.double(), prior.moments.covariance)
    prior = prior.rescaled(amplitude)
    sampler = config.sampler(prior, seen.likelihood)
    if isinstance(sampler, Steered) and config.truths == CHAIN:
        sought = sampler.amortised.unsteered(config.sims, config.seed)
    try:
        found = si.sample_simulations(
            prior,
            seen.likelihood,
            config.sims,
            config.n,
            sampler,
            seed=config.seed,
            island=config.together,
            truths=sought,
            folder=config.folder,
            progress=process.is_main_process and sys.stderr.isatty(),
            share=(process.process_index, process.num_processes),
        )
        process.wait_for_everyone()
    except KeyboardInterrupt:
        finished = len(finished_simulations(config.folder))
        raise KeyboardInterrupt(
            f"{finished} simulations are finished and kept in {config.folder}; the same command goes on from there"
        ) from None
    if not process.is_main_process:
        return
    if found is None:
        # each process has its share in hand, the folder has them all
        found = si.read_simulations(config.folder, config.sims)
    report = found.coverage(config.seed, config.swaps)
    for line in compared:
        say("pixel scale", line)
    say("data", f"like {seen.origin['source']}, {seen.likelihood.data_size} numbers")
    say(
        "prior",
        f"{type(prior).__name__} {config.prior}, amplitude {amplitude:.4g} {seen.grid.unit}",
    )
    cost = f"{float(found.evaluations.mean()):.0f} evaluations a draw, {float(found.seconds.sum()):.0f} s in all"
    say("truths", config.truths if sought is not None else "draws of the prior")
    say("simulations", f"{report.sims} of {config.n} draws, {cost}")
    say("processes", process.num_processes)
    print(report)
    meta = {
        "scoreinv": installed("scoreinv"),
        "prior": prior.identity,
        "amplitude": amplitude,
        "data": seen.origin,
        "config": asdict(config),
    }
    report.write(config.path, json.loads(json.dumps(meta, default=str)))
    report.plot().savefig(config.picture, dpi=120)
    say("report", config.path)
    say("figure", config.picture)


def _prepare(config: CoverageConfig) -> None:
    """Make way for a report that is asked for again."""
    if config.overwrite:
        forget_simulations(config.folder)
