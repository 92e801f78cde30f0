"""Gaussians with structured covariances, and solves with them."""

from scoreinv.gaussian.batches import Blocks, Mixed, Modulated, blocks, selected
from scoreinv.gaussian.covariances import (
    Covariance,
    Dense,
    Diagonal,
    Fourier,
    LowRank,
    Scalar,
    filtered,
    joint,
)
from scoreinv.gaussian.moments import Gaussian
from scoreinv.gaussian.solve import conjugate_gradients, dot

__all__ = [
    "Blocks",
    "Covariance",
    "Dense",
    "Diagonal",
    "Fourier",
    "Gaussian",
    "LowRank",
    "Mixed",
    "Modulated",
    "Scalar",
    "blocks",
    "conjugate_gradients",
    "dot",
    "filtered",
    "joint",
    "selected",
]
