"""`scoreinv sample`: posterior images of one observation."""

from __future__ import annotations

import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import scoreinv as si
from scoreinv.cli.data import Observation
from scoreinv.cli.problem import (
    SampledProblem,
    check_file,
    chosen,
    completed,
    findings,
    introduce,
    say,
)

ENDINGS = (".fits", ".h5", ".hdf5")
PICTURES = (".png", ".pdf", ".svg", ".jpg")


@dataclass(frozen=True, kw_only=True)
class SampleConfig(SampledProblem):
    """One observation, a prior and a sampler.

    Args:
        output: Result, ending in .fits, .h5 or .hdf5.
        batch: Islands that share a call of the network; 1 suits a CPU, as many as fit a GPU.
        figure: true: beside the output, ending in .png; false: none; or its name.
    """

    output: str
    batch: int = 1
    figure: bool | str = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.path.suffix not in ENDINGS:
            raise ValueError(f"output is {self.output}, expected a name in {', '.join(ENDINGS)}")
        if self.picture is not None and self.picture.suffix.lower() not in PICTURES:
            raise ValueError(f"figure is {self.figure}, expected a name in {', '.join(PICTURES)}")
        if self.batch < 1:
            raise ValueError(f"batch is {self.batch}, expected at least 1")

    @property
    def path(self) -> Path:
        return Path(self.output)

    @property
    def islands(self) -> Path:
        """Folder of the finished islands."""
        return self.path.with_suffix(".islands")

    @property
    def picture(self) -> Path | None:
        """File of the figure."""
        if isinstance(self.figure, bool):
            return self.path.with_suffix(".png") if self.figure else None
        return Path(self.figure)


def sample(config: SampleConfig) -> None:
    """Draw posterior images of one observation, and write them with a figure."""
    _prepare(config)
    prior = si.load_prior(config.prior, config.device)
    seen, amplitude, compared = chosen(config, prior)
    introduce(prior, seen, amplitude, compared)
    posterior = si.Posterior(prior.rescaled(amplitude), seen.likelihood, seen.y)
    _clear(config)
    draws = _draw(config, posterior, seen)
    draws = completed(draws, config, seen, amplitude)
    print(draws)
    for name, text in findings(draws, seen):
        say(name, text)
    say("result", draws.write(config.path, overwrite=config.overwrite))
    shutil.rmtree(config.islands)
    if config.picture is not None:
        draws.plot().savefig(config.picture, dpi=150)
        say("figure", config.picture)


def _prepare(config: SampleConfig) -> None:
    """Make sure that the result can be written, before anything is computed."""
    for path in filter(None, (config.path, config.picture)):
        check_file(path)
        if path.exists() and not config.overwrite:
            raise FileExistsError(f"{path} exists; choose another output, or pass --overwrite")


def _clear(config: SampleConfig) -> None:
    """Make way for a result that nothing stands against any more."""
    for path in filter(None, (config.path, config.picture)):
        path.unlink(missing_ok=True)
    if config.overwrite and config.islands.exists():
        shutil.rmtree(config.islands)


def _draw(config: SampleConfig, posterior: si.Posterior, seen: Observation) -> si.Samples:
    try:
        return si.sample(
            posterior,
            config.n,
            config.sampler(posterior.prior, posterior.likelihood),
            seed=config.seed,
            island=config.together,
            batch=config.batch,
            folder=config.islands,
            progress=sys.stderr.isatty(),
            grid=seen.grid,
        )
    except KeyboardInterrupt:
        finished = len(list(config.islands.glob("*.safetensors")))
        raise KeyboardInterrupt(
            f"{finished} islands are finished and kept in {config.islands}; "
            f"the same command {'without --overwrite ' if config.overwrite else ''}goes on from there"
        ) from None
