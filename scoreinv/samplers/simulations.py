"""Posteriors of simulated data, to test coverage with: truths from the prior, data from the likelihood, draws of each.

Simulation i depends on (seed, i) only: neither on how many others there are nor on which process runs it. Finished
simulations are kept in a folder, one file each, and found again after an interruption.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from scoreinv.diagnostics import Coverage, coverage
from scoreinv.likelihood import Likelihood
from scoreinv.noise import GaussianNoise
from scoreinv.posterior import Posterior
from scoreinv.priors.base import Prior
from scoreinv.samplers.path import Sampler
from scoreinv.samplers.run import fingerprint, sample
from scoreinv.samplers.smc import SMC
from scoreinv.streams import integer

ISLAND = 16
ROUNDING = 1e-4  # of the brightest pixel
# a seed for each in a simulation, and none that users take: what shares random numbers is not independent
TRUTH, DATA, DRAWS = range(3)


@dataclass(frozen=True)
class Simulations:
    """Truths, draws of their posteriors, and what else is known of each.

    Attributes:
        draws: With shape (N, n, C, H, W).
        truths: With shape (N, C, H, W).
        wiener: Posterior means under the Gaussian with the prior's moments, with shape (N, C, H, W).
        dirty: Data as images, with shape (N, C, H, W).
        log_likelihood: log p(y | x) of truth and draws, with shape (N, n + 1) [nat].
        evaluations: Network evaluations per draw, with shape (N,).
        seconds: With shape (N,).
    """

    draws: Tensor
    truths: Tensor
    wiener: Tensor
    dirty: Tensor
    log_likelihood: Tensor
    evaluations: Tensor
    seconds: Tensor

    def coverage(self, seed: int, swaps: int = 1999) -> Coverage:
        """The battery of `scoreinv.diagnostics.coverage`, with the likelihood among its quantities.

        What goes wrong for bright or for faint sources alone is found by the peak of the data's image.
        """
        fit = self.log_likelihood
        return coverage(
            self.draws,
            self.truths,
            seed,
            references=self.dirty,
            baseline=self.wiener,
            extra={"log likelihood": (fit[:, 1:], fit[:, 0])},
            covariates={"brightness": self.dirty.flatten(1).max(1).values},
            swaps=swaps,
        )


def sample_simulations(
    prior: Prior,
    likelihood: Likelihood,
    sims: int,
    n: int,
    sampler: Sampler | None = None,
    *,
    seed: int,
    island: int = ISLAND,
    truths: Tensor | None = None,
    believed: Likelihood | None = None,
    folder: str | Path | None = None,
    progress: bool = False,
    share: tuple[int, int] = (0, 1),
) -> Simulations | None:
    """Simulate data of many truths and sample the posterior of each.

    Args:
        prior: Of the sky; the truths are its draws.
        likelihood: Simulates the data, and is what the sampler believes.
        sims: Simulations wanted, N.
        n: Draws of each.
        sampler: `SMC()` if not given.
        seed: Decides truths, data and draws.
        island: Particles or draws that are made together, see `scoreinv.sample`.
        truths: Other truths than draws of the prior, with shape (N, C, H, W): these test the prior, too.
        believed: Another likelihood for the sampler than the one that made the data.
        folder: Where finished simulations are kept, and found again.
        progress: Show a progress bar.
        share: This process' number and how many there are: it runs every so many-th simulation.

    Returns:
        All simulations; None with several processes, which meet in the folder: `read_simulations`.

    Raises:
        ValueError: A folder that holds other simulations, or truths that do not fit.
        FloatingPointError: Draws that are not finite; finished simulations stay in the folder.
    """
    if sims < 1 or n < 2:
        raise ValueError(f"sims is {sims} and n {n}; expected sims >= 1 and n >= 2")
    if truths is not None and tuple(truths.shape) != (sims, *prior.shape):
        raise ValueError(
            f"truths have shape {tuple(truths.shape)}, expected {(sims, *prior.shape)}"
        )
    if folder is None and share[1] > 1:
        raise ValueError("several processes need a folder in which to meet")

    def truth(i: int, kept: Tensor | None) -> Tensor:
        # the last bits of what a network draws again would depend on the threads
        if truths is not None:
            return kept if kept is not None and _alike(kept, truths[i]) else truths[i]
        return prior.sample(1, integer(seed, i, TRUTH))[0] if kept is None else kept

    def posterior(truth: Tensor, i: int) -> Posterior:
        y = likelihood.simulate(truth[None], integer(seed, i, DATA))[0]
        return Posterior(prior, believed or likelihood, y)

    return _sampled(
        truth, posterior, sims, n, sampler or SMC(), seed, island, folder, progress, share
    )


def _alike(kept: Tensor, given: Tensor) -> bool:
    """Whether an image that was kept is the given one, but for rounding."""
    if kept.dtype != given.dtype or kept.shape != given.shape:
        return False
    return float((kept - given).abs().max()) <= ROUNDING * float(given.abs().max())


def sample_again(
    posterior: Posterior,
    truths: Tensor,
    n: int,
    sampler: Sampler | None = None,
    *,
    seed: int,
    folder: str | Path | None = None,
    progress: bool = False,
    share: tuple[int, int] = (0, 1),
) -> Simulations | None:
    """Simulations around one observation: its draws are the truths, observed once more, and sampled given both data.

    Whatever the sampler makes of this observation is tested there, not on average over the prior. Posterior simulation-based
    calibration: Saeilynoja, Schmitt, Buerkner & Vehtari (2025, arXiv:2502.03279). Two sets of data with the same Gaussian
    noise are as good as their mean with half its variance.

    Args:
        posterior: Of the observation, linear and Gaussian in its likelihood.
        truths: Draws of it, with shape (N, C, H, W).
        n: Draws of each.
        sampler: `SMC()` if not given.
        seed: Decides data and draws.
        folder: As in `sample_simulations`.
        progress: Show a progress bar.
        share: As in `sample_simulations`.

    Raises:
        ValueError: A likelihood that is not linear and Gaussian.
    """
    likelihood = posterior.likelihood
    if not likelihood.gaussian:
        raise ValueError(
            f"the likelihood has {type(likelihood.noise).__name__} and {type(likelihood.operator).__name__}; "
            "only linear data with Gaussian noise can be joined with data of a second observation"
        )
    halved = GaussianNoise(covariance=likelihood.noise.covariance.map(lambda v: 0.5 * v))
    both = Likelihood(likelihood.operator, halved)

    def joined(truth: Tensor, i: int) -> Posterior:
        y = likelihood.simulate(truth[None], integer(seed, i, DATA))[0]
        return Posterior(posterior.prior, both, 0.5 * (y + posterior.y))

    sims = len(truths)
    return _sampled(
        lambda i, _: truths[i],
        joined,
        sims,
        n,
        sampler or SMC(),
        seed,
        ISLAND,
        folder,
        progress,
        share,
    )


def _sampled(
    truths: Callable[[int, Tensor | None], Tensor],
    problem: Callable[[Tensor, int], Posterior],
    sims: int,
    n: int,
    sampler: Sampler,
    seed: int,
    island: int,
    folder: str | Path | None,
    progress: bool,
    share: tuple[int, int],
) -> Simulations | None:
    """This process' share of the simulations, and all of them if it is the only process."""
    found, island = [], min(island, sampler.particles * n)
    for i in tqdm(
        range(share[0], sims, share[1]), disable=not progress, desc="simulations", unit="posterior"
    ):
        path = None if folder is None else _path(Path(folder), i)
        key, record = (None, None) if path is None else _read(path)
        truth = truths(i, None if record is None else record["truths"])
        posterior = problem(truth, i)
        own = integer(seed, i, DRAWS)
        wanted = f"{fingerprint(posterior, sampler, own, island)}, {n} draws"
        if record is None:
            record = _simulation(posterior, truth, n, sampler, own, island)
            if path is not None:
                _keep(path, wanted, record)
        elif key != wanted:
            raise ValueError(
                f"{path.parent} holds simulations of another problem, sampler or seed; "
                "choose another output, or pass --overwrite to delete them"
            )
        found.append(record)
    return _stacked(found) if share[1] == 1 else None


def read_simulations(folder: str | Path, sims: int) -> Simulations:
    """The first simulations of a folder of `sample_simulations`, as many as asked for.

    Raises:
        ValueError: Simulations are missing or broken.
    """
    paths = [_path(Path(folder), i) for i in range(sims)]
    missing = [path.name for path in paths if not path.exists()]
    if missing:
        raise ValueError(
            f"{len(missing)} of {sims} simulations are not in {folder}, the first is {missing[0]}; run them first"
        )
    return _stacked([_read(path)[1] for path in paths])


def finished_simulations(folder: str | Path) -> list[Path]:
    """The files of the simulations in a folder of `sample_simulations`."""
    return sorted(Path(folder).glob("simulation-*.safetensors"))


def forget_simulations(folder: str | Path) -> None:
    """Delete the simulations of a folder, and nothing else in it."""
    for path in finished_simulations(folder):
        path.unlink()


def _stacked(records: list[dict[str, Tensor]]) -> Simulations:
    return Simulations(**{k: torch.stack([r[k] for r in records]) for k in records[0]})


def _path(folder: Path, i: int) -> Path:
    return folder / f"simulation-{i:05d}.safetensors"


def _simulation(
    posterior: Posterior, truth: Tensor, n: int, sampler: Sampler, seed: int, island: int
) -> dict[str, Tensor]:
    """The fields of `Simulations` for one truth."""
    draws = sample(posterior, n, sampler, seed=seed, island=island, evidence=False)
    members = torch.cat([truth[None], draws.x]).double()
    mean = posterior.moments.mean.to(posterior.dtype)[None]
    return {
        "draws": draws.x,
        "truths": truth.to(draws.x.dtype),
        "wiener": (mean + posterior.gaussian.shift(mean))[0].to(draws.x.dtype),
        "dirty": posterior.data_image().to(draws.x.dtype),
        "log_likelihood": posterior.likelihood.log_prob(posterior.y, members),
        "evaluations": torch.tensor(draws.evaluations, dtype=torch.float64),
        "seconds": torch.tensor(draws.seconds, dtype=torch.float64),
    }


def _keep(path: Path, key: str, record: dict[str, Tensor]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".part{os.getpid()}")
    try:
        save_file({k: v.contiguous() for k, v in record.items()}, partial, metadata={"key": key})
        os.replace(partial, path)
    except (OSError, SafetensorError) as error:
        raise OSError(
            f"could not keep {path}: {error}. The simulations finished before stay there; free some space and run again"
        ) from error
    finally:
        partial.unlink(missing_ok=True)


def _read(path: Path) -> tuple[str, dict[str, Tensor]] | tuple[None, None]:
    """Key and fields of a finished simulation; None if it is not there."""
    if not path.exists():
        return None, None
    try:
        with safe_open(path, "pt") as f:
            return f.metadata()["key"], {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118
    except (SafetensorError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is not a finished simulation ({error}); delete it to run it again"
        ) from error
