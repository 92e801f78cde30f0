"""scoreinv: posterior images that are calibrated, from score-based priors and any measurement."""

from scoreinv import diagnostics, gaussian, simulators
from scoreinv.data import Cutout, Grid, Visibilities, inspect, read_cutout, read_visibilities
from scoreinv.finetune import (
    Amortised,
    Plan,
    Recipe,
    Rewarded,
    finetune,
    finetune_by_reward,
    load_amortised,
    sampler_bounds,
)
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
from scoreinv.predictive import held_out, predicted, predictive_p
from scoreinv.priors import (
    GaussianPrior,
    MixturePrior,
    Prior,
    ScorePrior,
    load_prior,
    shipped_priors,
)
from scoreinv.samplers import (
    SMC,
    Anneal,
    Guided,
    Samples,
    Simulations,
    read_samples,
    read_simulations,
    sample,
    sample_again,
    sample_simulations,
)

__all__ = [
    "NUFFT",
    "SMC",
    "Amortised",
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
    "Plan",
    "PoissonNoise",
    "Posterior",
    "Prior",
    "Recipe",
    "Rewarded",
    "Samples",
    "Simulations",
    "ScorePrior",
    "StudentNoise",
    "Visibilities",
    "amplitude_by_evidence",
    "diagnostics",
    "finetune",
    "finetune_by_reward",
    "gaussian",
    "held_out",
    "inspect",
    "load_amortised",
    "load_prior",
    "predicted",
    "predictive_p",
    "read_cutout",
    "read_samples",
    "read_simulations",
    "read_visibilities",
    "sample",
    "sample_again",
    "sample_simulations",
    "sampler_bounds",
    "shipped_priors",
    "simulators",
]
