"""Neural posterior estimation of scalar parameters from simulated data."""

from scoreinv.npe.estimator import NPE, Estimated, Weighted
from scoreinv.npe.featurizers import MLP, DeepSet, Named, ResNet1D, ResNet2D
from scoreinv.npe.fitting import Fitting
from scoreinv.npe.parameters import ParameterPrior

__all__ = [
    "MLP",
    "NPE",
    "DeepSet",
    "Estimated",
    "Fitting",
    "Named",
    "ParameterPrior",
    "ResNet1D",
    "ResNet2D",
    "Weighted",
]
