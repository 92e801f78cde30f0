"""scoreinv: posterior images that are calibrated, from score-based priors and any measurement."""

from scoreinv import diagnostics, gaussian, simulators
from scoreinv.data import Cutout, Grid, Visibilities, inspect, read_cutout, read_visibilities
from scoreinv.likelihood import Likelihood
from scoreinv.noise import GaussianNoise, PoissonNoise, StudentNoise
from scoreinv.operators import (
    NUFFT,
    Amplitude,
    DenseOperator,
    Identity,
    LinearOperator,
    Mask,
    PSFConvolution,
)
from scoreinv.posterior import Posterior, amplitude_by_evidence
from scoreinv.priors import (
    GaussianPrior,
    MixturePrior,
    Prior,
    ScorePrior,
    load_prior,
    shipped_priors,
)
from scoreinv.samplers import SMC, Anneal, Guided, Samples, read_samples, sample

__all__ = [
    "NUFFT",
    "SMC",
    "Amplitude",
    "Anneal",
    "Cutout",
    "DenseOperator",
    "GaussianNoise",
    "GaussianPrior",
    "Grid",
    "Guided",
    "Identity",
    "Likelihood",
    "LinearOperator",
    "Mask",
    "MixturePrior",
    "PSFConvolution",
    "PoissonNoise",
    "Posterior",
    "Prior",
    "Samples",
    "ScorePrior",
    "StudentNoise",
    "Visibilities",
    "amplitude_by_evidence",
    "diagnostics",
    "gaussian",
    "inspect",
    "load_prior",
    "read_cutout",
    "read_samples",
    "read_visibilities",
    "sample",
    "shipped_priors",
    "simulators",
]
