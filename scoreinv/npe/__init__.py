"""Neural estimation of scalar parameters from simulated data: of posteriors, likelihoods and ratios."""

from scoreinv.npe.conditioned import Estimated, Weighted
from scoreinv.npe.estimator import Estimator
from scoreinv.npe.featurizers import MLP, DeepSet, Named, ResNet1D, ResNet2D
from scoreinv.npe.fitting import Fitting
from scoreinv.npe.nle import NLE
from scoreinv.npe.nre import NRE
from scoreinv.npe.parameters import ParameterPrior
from scoreinv.npe.posterior import NPE
from scoreinv.npe.rounds import Clipped, Sequential, Truncated, sequential
from scoreinv.npe.simulator import Simulator

__all__ = [
    "MLP",
    "NLE",
    "NPE",
    "NRE",
    "Clipped",
    "DeepSet",
    "Estimated",
    "Estimator",
    "Fitting",
    "Named",
    "ParameterPrior",
    "ResNet1D",
    "ResNet2D",
    "Sequential",
    "Simulator",
    "Truncated",
    "Weighted",
    "sequential",
]
