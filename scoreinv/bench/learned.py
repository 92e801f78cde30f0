"""Calibration of image posteriors with a trained prior.

Truths drawn from the prior itself test the inference; held-out simulated images test the prior with it. The error of the
posterior mean over its predicted standard deviation, rms over all truths, is 1 for a calibrated posterior: in total, in
bands of spatial frequency, and as normal scores of the total flux. And truths fit the data as well as draws do, on average.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from scipy import stats
from torch import Tensor
from tqdm import tqdm

from scoreinv.bench.records import Records
from scoreinv.likelihood import Likelihood
from scoreinv.noise import GaussianNoise
from scoreinv.operators import NUFFT, PSFConvolution, gaussian_psf
from scoreinv.operators.fourier import ARCSEC
from scoreinv.posterior import Posterior
from scoreinv.priors import Prior
from scoreinv.samplers import sample
from scoreinv.samplers.path import Sampler
from scoreinv.samplers.run import fingerprint
from scoreinv.simulators.arrays import alma_track

BANDS = ((0, 3), (3, 8), (8, 16), (16, 1000))


@dataclass(frozen=True)
class Outcome:
    """What one truth's posterior got right; nan if its draws were not finite.

    Attributes:
        key: Hash of all that decides it.
        error: Squared error of the posterior mean in each band of spatial frequency.
        predicted: What the posterior's variance predicts for it.
        flux: Normal score of the true total flux.
        likelier: log p(y | truth) less its mean over the draws [nat].
        normalised: Squared error of the draws' mean over the truth's sum of squares.
        evaluations: Network evaluations per draw.
        seconds: Wall time.
        weights: What became of the weights.
        vjps: Vector-Jacobian products of the network per draw.
    """

    key: str
    error: tuple[float, ...]
    predicted: tuple[float, ...]
    flux: float
    likelier: float
    normalised: float
    evaluations: float
    seconds: float
    weights: str
    vjps: float = 0.0


def psf_problem(prior: Prior, noise: float) -> Likelihood:
    """Blur of 3.8 pixels and white noise [model unit]."""
    return Likelihood(PSFConvolution(gaussian_psf(3.8), prior.shape), GaussianNoise(std=noise))


def uv_problem(prior: Prior, noise: float) -> Likelihood:
    """A three-hour ALMA track, the longest baseline resolved by three pixels.

    Args:
        prior: Sets the canvas, and the typical image.
        noise: Noise of the dirty image over the peak of a typical one: the median of 16 draws of the prior.
    """
    uv = torch.from_numpy(alma_track(-23.0, 230e9, np.linspace(-1.5, 1.5, 12)))
    A = NUFFT(uv, prior.shape, 1 / (3 * float(uv.abs().max()) * ARCSEC))
    dirty = A.adjoint(A(prior.sample(16, seed=0).double())) / len(uv)
    peak = float(dirty.flatten(1).max(1).values.median())
    return Likelihood(A, GaussianNoise(std=noise * peak * math.sqrt(len(uv))))


def problem(kind: str, prior: Prior, noise: float) -> Likelihood:
    """The problem of this name, "psf" or "uv"."""
    return PROBLEMS[kind](prior, noise)


PROBLEMS = {"psf": psf_problem, "uv": uv_problem}


def band_power(x: Tensor) -> Tensor:
    """Squared norm in each band of spatial frequency [cycles per image], with shape (B, bands)."""
    H, W = x.shape[-2:]
    ky, kx = torch.fft.fftfreq(H) * H, torch.fft.fftfreq(W) * W
    k = (ky[:, None] ** 2 + kx**2).sqrt()
    power = torch.fft.fft2(x.double(), norm="ortho").abs().square().sum(-3)
    return torch.stack([power[:, (k >= low) & (k < high)].sum(1) for low, high in BANDS], dim=1)


def outcome(
    prior: Prior, likelihood: Likelihood, truth: Tensor, sampler: Sampler, n: int, seed: int
) -> Outcome:
    """Observe one truth, with shape (C, H, W), sample, and compare."""
    posterior = Posterior(prior, likelihood, likelihood.simulate(truth[None], seed)[0])
    key = fingerprint(posterior, sampler, seed, n)
    try:
        draws = sample(posterior, n, sampler, seed=seed, island=n, evidence=False)
    except FloatingPointError as error:
        unknown = (math.nan,) * len(BANDS)
        return Outcome(key, unknown, unknown, *[math.nan] * 5, weights=str(error))
    x, truth = draws.x.double(), truth.double()
    mean = x.mean(0)
    log_p = likelihood.log_prob(posterior.y, torch.cat([truth[None], x]))
    flux = x.flatten(1).sum(1)
    # the mean of n draws scatters by a share 1 / n of the variance around the exact posterior mean
    inflation = (1 + 1 / n) * n / (n - 1)
    # the mean and the standard deviation of n draws make it a t-score
    t = float((truth.sum() - flux.mean()) / (flux.std() * math.sqrt(1 + 1 / n)))
    return Outcome(
        key,
        tuple(band_power((mean - truth)[None])[0].tolist()),
        tuple((inflation * band_power(x - mean).mean(0)).tolist()),
        float(stats.norm.ppf(stats.t.cdf(t, n - 1))),
        float(log_p[0] - log_p[1:].mean()),
        float((mean - truth).square().sum() / truth.square().sum()),
        draws.evaluations,
        draws.seconds,
        draws.weights,
        draws.vjps,
    )


def calibrate(
    prior: Prior,
    likelihood: Likelihood,
    truths: Tensor,
    sampler: Sampler,
    n: int,
    seed: int,
    store: Path | None = None,
    progress: bool = False,
) -> list[Outcome]:
    """Outcomes of all truths, with shape (N, C, H, W); those already in the file `store` are not run again."""
    records, outcomes = Records(store, Outcome), []
    for i, truth in enumerate(tqdm(truths, disable=not progress, desc="truths")):
        y = likelihood.simulate(truth[None], 1000 * seed + i)[0]
        key = fingerprint(Posterior(prior, likelihood, y), sampler, 1000 * seed + i, n)
        if key not in records:
            records.add(outcome(prior, likelihood, truth, sampler, n, 1000 * seed + i))
        outcomes.append(records[key])
    return outcomes


def summary(outcomes: list[Outcome], n: int) -> dict[str, float | list[float]]:
    """The table's row: ratios with their jackknife errors, nan where fewer than two runs ended well.

    Args:
        outcomes: Of all truths; those that failed are counted and left out.
        n: Draws of each. The scatter of their mean is taken out of its squared error, which is that of the posterior mean.
    """
    good = [o for o in outcomes if math.isfinite(o.evaluations)]
    count, failed = len(outcomes), len(outcomes) - len(good)
    outcomes = good if len(good) > 1 else outcomes
    error = np.array([o.error for o in outcomes])
    predicted = np.array([o.predicted for o in outcomes])
    scatter = predicted.sum(1) / (n + 1)  # variance over n; what is predicted is 1 + 1 / n of it
    normalised = np.array([o.normalised for o in outcomes]) * (1 - scatter / error.sum(1))

    def ratio(e: np.ndarray, p: np.ndarray) -> np.ndarray:
        e, p = np.atleast_1d(e.sum(0)), np.atleast_1d(p.sum(0))
        # a small image has no frequencies in the highest band
        return np.sqrt(np.divide(e, p, out=np.full_like(e, np.nan), where=p > 0))

    def jackknife(e: np.ndarray, p: np.ndarray) -> np.ndarray:
        n = len(e)
        left_out = np.array([ratio(np.delete(e, i, 0), np.delete(p, i, 0)) for i in range(n)])
        return np.sqrt((n - 1) * left_out.var(0))

    total = error.sum(1), predicted.sum(1)
    flux = np.array([o.flux for o in outcomes])
    likelier = np.array([o.likelier for o in outcomes])
    return {
        "truths": count,
        "failed": failed,
        "total": float(ratio(*total)[0]),
        "total_error": float(jackknife(*total)[0]),
        "bands": ratio(error, predicted).tolist(),
        "bands_error": jackknife(error, predicted).tolist(),
        "flux_mean": float(flux.mean()),
        "flux_std": float(flux.std(ddof=1)),
        "likelier": float(likelier.mean()),
        "likelier_error": float(likelier.std(ddof=1) / math.sqrt(len(likelier))),
        "normalised_error": float(np.median(normalised)),
        "evaluations": max(o.evaluations for o in outcomes),
        "VJPs": max(o.vjps for o in outcomes),
        "seconds": float(np.mean([o.seconds for o in outcomes])),
    }
