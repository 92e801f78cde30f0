"""Priors over images: denoisers at every noise level, with their moments."""

from scoreinv.priors.analytic import GaussianPrior, MixturePrior
from scoreinv.priors.base import Prior
from scoreinv.priors.network import ScorePrior
from scoreinv.priors.zoo import load_prior, shipped_priors

__all__ = ["GaussianPrior", "MixturePrior", "Prior", "ScorePrior", "load_prior", "shipped_priors"]
