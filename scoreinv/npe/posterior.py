"""Neural posterior estimation of scalar parameters: p(theta | x), learned from simulated pairs.

    estimator = si.NPE(prior).fit(theta, x, seed=0)
    draws = estimator.condition(x_observed).sample(1000, seed=1)

A density q(u | features of x) of the parameters, in the space of `scoreinv.npe.parameters`, is fitted by maximum likelihood,
or, where it is the end of an ordinary differential equation, by what its velocity should be (`scoreinv.npe.flows`). No draw
leaves the prior's support, and draws come at once, for any observation.

Papamakarios & Murray, Fast epsilon-free Inference of Simulation Models with Bayesian Conditional Density Estimation (2016,
arXiv:1605.06376).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from scoreinv.npe.conditioned import CHAINS, Estimated
from scoreinv.npe.data import ROWS, Inputs, Standardise
from scoreinv.npe.estimator import Estimator
from scoreinv.npe.flows import HIDDEN, TRANSFORMS, Transport, check_flow, new_flow
from scoreinv.npe.members import Featured
from scoreinv.npe.parameters import ParameterPrior
from scoreinv.streams import integer, seeded, stream

LOG_TWO_PI = math.log(2 * math.pi)


class Density(Featured):
    """q(u | x): units, features, flow.

    Args:
        units: Of each input, by name.
        alone: Whether there is one input.
        featurizer: See `Featured`.
        flow: A module whose call on features gives a distribution of u.
    """

    def __init__(
        self, units: dict[str, Standardise], alone: bool, featurizer: nn.Module, flow: nn.Module
    ) -> None:
        super().__init__(units, alone, featurizer)
        self.flow = flow

    def scores(self, u: Tensor, x: Inputs) -> Tensor:
        """log q(u | x), with shape (B,)."""
        return self.flow(self.features(x)).log_prob(u.float())

    def criterion(self, scores: Tensor) -> Tensor:
        return -scores

    def loss(self, u: Tensor, x: Inputs, w: Tensor) -> Tensor:
        if isinstance(self.flow, Transport):
            return (w * self.flow.loss(u.float(), self.features(x))).mean()
        return super().loss(u, x, w)

    def log_ratio(self, u: Tensor, x: Inputs) -> Tensor:
        f = self.features(x)
        parts = u.float().split(10 * ROWS)
        log_q = torch.cat([self.flow(f.expand(len(v), -1)).log_prob(v) for v in parts]).double()
        return log_q + 0.5 * (u.square() + LOG_TWO_PI).sum(1)

    @torch.no_grad()
    def sample(self, n: int, x: Inputs, seed: int) -> Tensor:
        """n draws of u for one observation, with shape (n, d), in float64."""
        with seeded(seed):
            return self.flow(self.features(x)).sample((n,)).double()[:, 0]


class Direct(Estimated):
    """The posterior of one observation, whose draws come at once."""

    def log_evidence(self, n: int = CHAINS, seed: int = 0) -> float:
        return 0.0

    def _draw(self, n: int, seed: int) -> tuple[Tensor, float]:
        e = self.estimator
        which = torch.multinomial(e.weights, n, replacement=True, generator=stream(seed))
        counts = which.bincount(minlength=e.size).tolist()
        parts = [
            m.sample(k, self.x, integer(seed, 2, i))
            for i, (m, k) in enumerate(zip(e.members, counts, strict=True))
            if k
        ]
        return torch.cat(parts)[torch.randperm(n, generator=stream(seed, 1))], 0.0


class NPE(Estimator):
    """An estimator of p(theta | x).

    Args:
        prior: Of the parameters.
        flow: maf, nsf, coupling or mixture; matching or score, which follow a differential equation; or a function of the
            numbers of parameters and of features that makes any module whose call on features gives a distribution.
        featurizer: A function of no argument that makes one, called once for each member; one that suits the data's shape if
            not given (`scoreinv.npe.featurizers`).
        members: Of the ensemble.
        invalid: What to do with numbers that are not finite: raise; drop such simulations; or mask, which sets missing ones
            of the data to the mean and tells the featurizer where, by as many channels more.
        hidden: Widths of a flow's networks, as those of `new_flow`; half as wide may say more where pairs are few.
        transforms: Layers of a flow; fewer, too.

    Attributes:
        members: Densities, after `fit`.
        weights: Of the members, with shape (M,).
        history: Of each member's fit.
        dropped: Pairs that were left out.
    """

    name, given, posterior = "npe", Direct, True

    def __init__(
        self,
        prior: ParameterPrior,
        flow: str | Callable[[int, int], nn.Module] = "nsf",
        featurizer: Callable[[], nn.Module] | None = None,
        members: int = 1,
        invalid: str = "raise",
        hidden: Sequence[int] = HIDDEN,
        transforms: int = TRANSFORMS,
    ) -> None:
        super().__init__(prior, featurizer, members, invalid)
        self.flow, self.sizes = flow, {"hidden": list(hidden), "transforms": transforms}
        if isinstance(flow, str):
            check_flow(flow, **self.sizes)
        elif (tuple(hidden), transforms) != (HIDDEN, TRANSFORMS):
            raise ValueError(
                f"hidden is {list(hidden)} and transforms {transforms}; a flow of your own has its own sizes, leave them out"
            )

    @property
    def options(self) -> dict:
        return {"flow": self.flow, **self.sizes} if isinstance(self.flow, str) else {"flow": "own"}

    def new(self, units: dict[str, Standardise]) -> Density:
        own = callable(self.flow)
        make = self.flow if own else partial(new_flow, self.flow, **self.sizes)
        featurizer = self.new_featurizer()
        return Density(units, self.alone, featurizer, make(len(self.prior), featurizer.features))
