"""Samplers, the verb `sample`, and its result."""

from scoreinv.samplers.anneal import Anneal
from scoreinv.samplers.guided import Guided
from scoreinv.samplers.run import sample
from scoreinv.samplers.samples import Samples, read_samples
from scoreinv.samplers.smc import SMC

__all__ = ["SMC", "Anneal", "Guided", "Samples", "read_samples", "sample"]
