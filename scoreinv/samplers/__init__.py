"""Samplers, the verb `sample`, and its result."""

from scoreinv.samplers.anneal import Anneal
from scoreinv.samplers.guided import Guided
from scoreinv.samplers.run import sample
from scoreinv.samplers.samples import Samples, read_samples
from scoreinv.samplers.simulations import (
    Simulations,
    read_simulations,
    sample_again,
    sample_simulations,
)
from scoreinv.samplers.smc import SMC

__all__ = [
    "SMC",
    "Anneal",
    "Guided",
    "Samples",
    "Simulations",
    "read_samples",
    "read_simulations",
    "sample",
    "sample_again",
    "sample_simulations",
]
