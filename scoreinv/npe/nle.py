"""Neural likelihood estimation: p(x | theta), learned from simulated pairs.

The other way round than `scoreinv.npe.posterior`: a density of the data, given parameters. What the pairs' parameters are
drawn from does not matter, and the evidence is that of the data themselves. It is for some tens of numbers, which the flow
takes as they are, without features.

Papamakarios, Sterratt & Murray, Sequential Neural Likelihood (2019, arXiv:1805.07226).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from scoreinv.npe.conditioned import Tempered
from scoreinv.npe.data import ROWS, Inputs, Standardise
from scoreinv.npe.estimator import Estimator
from scoreinv.npe.flows import EXPLICIT, HIDDEN, TRANSFORMS, check_flow, new_flow
from scoreinv.npe.members import Member
from scoreinv.npe.parameters import ParameterPrior

MOST = 200  # numbers of the data


class LikelihoodDensity(Member):
    """q(x | u): units and flow.

    Args:
        units: Of each input, by name.
        alone: Whether there is one input.
        flow: A module whose call on parameters gives a distribution of all numbers of the data.
    """

    def __init__(self, units: dict[str, Standardise], alone: bool, flow: nn.Module) -> None:
        super().__init__(units, alone)
        self.flow = flow

    def features(self, x: Inputs) -> Tensor:
        """The data themselves."""
        return torch.cat([v.flatten(1) for v in self.standard(x).values()], 1)

    def scores(self, u: Tensor, x: Inputs) -> Tensor:
        """log q(x | u) in the data's units, with shape (B,)."""
        scale = sum(
            v[0].numel() / len(unit.unit.flatten()) * unit.unit.log().sum()
            for v, unit in ((v, self.units[name]) for name, v in x.items())
        )
        return self.flow(u.float()).log_prob(self.features(x)) - scale

    def criterion(self, scores: Tensor) -> Tensor:
        return -scores

    def log_ratio(self, u: Tensor, x: Inputs) -> Tensor:
        parts = u.split(10 * ROWS)
        many = lambda n: {name: v.expand(n, *v.shape[1:]) for name, v in x.items()}
        return torch.cat([self.scores(v, many(len(v))) for v in parts])


class NLE(Estimator):
    """An estimator of p(x | theta), and so of the posterior up to its normalisation, which draws bring along.

    Args:
        prior: Of the parameters.
        flow: maf, nsf, coupling or mixture.
        members: Of the ensemble.
        invalid: What to do with numbers that are not finite: raise; or drop such simulations.
        hidden: Widths of the flow's networks, as those of `new_flow`.
        transforms: Layers of the flow.
    """

    name = "nle"
    given = Tempered

    def __init__(
        self,
        prior: ParameterPrior,
        flow: str = "maf",
        members: int = 1,
        invalid: str = "raise",
        hidden: Sequence[int] = HIDDEN,
        transforms: int = TRANSFORMS,
    ) -> None:
        super().__init__(prior, None, members, invalid)
        check_flow(flow, hidden, transforms, EXPLICIT)
        if invalid == "mask":
            raise ValueError(
                "invalid is 'mask', but a density of data has no place for missing numbers; expected raise or drop"
            )
        self.flow, self.sizes = flow, {"hidden": list(hidden), "transforms": transforms}

    @property
    def options(self) -> dict:
        return {"flow": self.flow, **self.sizes}

    def new(self, units: dict[str, Standardise]) -> LikelihoodDensity:
        numbers = sum(torch.Size(shape).numel() for shape in self.shapes.values())
        if numbers > MOST:
            raise ValueError(
                f"data of {numbers} numbers, expected {MOST} or fewer; learn from summaries of them, or take NPE or NRE"
            )
        flow = new_flow(self.flow, numbers, len(self.prior), **self.sizes)
        return LikelihoodDensity(units, self.alone, flow)
