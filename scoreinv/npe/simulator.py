"""A simulator in two parts: one that is expensive and runs once for each draw of the prior, and one that is cheap.

    simulator = Simulator(prior, simulate, noise)

What `simulate` makes is kept (`scoreinv.npe.store`); `noise`, and whatever else is cheap, such as a PSF or a normalisation,
is applied to it anew in every epoch, so that a network never sees the same data twice.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from scoreinv.npe.featurizers import Data
from scoreinv.npe.parameters import ParameterPrior
from scoreinv.streams import stream


@dataclass(frozen=True)
class Simulator:
    """Parameters and the data that they make.

    Args:
        prior: Of the parameters.
        simulate: Of theta, with shape (n, d), and a generator: n simulations, a tensor or several by name.
        noise: Of simulations and a generator: data like them; none if they are data already.
        log_likelihood: Of one observation and theta, with shape (n, d): log p(x | theta), with shape (n,) [nat].
        featurizer: Makes a network that suits the data; one by their shape if not given.
    """

    prior: ParameterPrior
    simulate: Callable[[Tensor, torch.Generator], Data]
    noise: Callable[[Data, torch.Generator], Data] | None = None
    log_likelihood: Callable[[Data, Tensor], Tensor] | None = None
    featurizer: Callable[[], nn.Module] | None = None

    def data(self, theta: Tensor, seed: int) -> Data:
        """Data of each theta, noise and all."""
        x = self.simulate(theta, stream(seed, 0))
        return x if self.noise is None else self.noise(x, stream(seed, 1))
