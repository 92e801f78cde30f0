"""Conditioning a Gaussian on the data: the one linear-algebra question of every sampler.

Three ways to solve: element by element where H and K share a basis, a factorisation in data space where the data are few,
and preconditioned conjugate gradients otherwise.
"""

from scoreinv.conditioning.base import Conditioned, Conditioner, Mobility
from scoreinv.conditioning.choice import conditioner, whitened_matrix
from scoreinv.conditioning.commuting import CommutingConditioner
from scoreinv.conditioning.data_space import DataSpaceConditioner
from scoreinv.conditioning.iterative import IterativeConditioner
from scoreinv.conditioning.lanczos import lanczos_logdet
from scoreinv.conditioning.local import LocalConditioned

__all__ = [
    "CommutingConditioner",
    "Conditioned",
    "Conditioner",
    "DataSpaceConditioner",
    "IterativeConditioner",
    "LocalConditioned",
    "Mobility",
    "conditioner",
    "lanczos_logdet",
    "whitened_matrix",
]
