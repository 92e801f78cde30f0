"""Neural ratio estimation: r = p(theta, x) / (p(theta) p(x)), by telling pairs that belong together from others.

With f = log r, K parameters theta_k that do not belong to x, and theta_0 that does, the loss of a pair is

    - 1 / (1 + g) log [K / (K + g sum_(k = 1..K) e^f_k)]
    - g / (1 + g) log [g e^f_0 / (K + g e^f_0 + g sum_(k = 1..K-1) e^f_k)],

whose least is at the ratio itself for all K and g (Miller, Weniger & Forre, Contrastive Neural Ratio Estimation, 2022,
arXiv:2210.06170, equation 12). K = g = 1 is the classifier of Hermans, Begy & Louppe (2020, arXiv:1903.04057). With a weight
b, it is kept balanced by

    b (E sigmoid f_0 + E sigmoid f_1 - 1)^2,

which widens it where it is not sure (Delaunoy, Hermans, Rozet, Wehenkel & Louppe, Towards Reliable Simulation-Based
Inference with Balanced Neural Ratio Estimation, 2022, arXiv:2208.13624).

Asked for marginals, the network learns the ratio of any part of the parameters at once: those that are left out are hidden
from it, which ones differs from pair to pair (Rozet & Louppe, Arbitrary Marginal Neural Ratio Estimation, 2021,
arXiv:2110.00449).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from scoreinv.npe.conditioned import Tempered
from scoreinv.npe.data import ROWS, Data, Inputs, Standardise
from scoreinv.npe.estimator import Estimator
from scoreinv.npe.featurizers import MLP
from scoreinv.npe.members import Featured
from scoreinv.npe.parameters import ParameterPrior

HIDDEN = (128, 128, 128)


class Ratio(Featured):
    """log r(u, x): units, features, head.

    Args:
        units: Of each input, by name.
        alone: Whether there is one input.
        featurizer: See `Featured`.
        head: Of parameters, which of them are seen where that may differ, and features: to one number.
        contrasts: K.
        gamma: g.
        balance: b.
        marginals: Whether parameters may be hidden.
    """

    def __init__(
        self,
        units: dict[str, Standardise],
        alone: bool,
        featurizer: nn.Module,
        head: nn.Module,
        contrasts: int,
        gamma: float,
        balance: float,
        marginals: bool,
    ) -> None:
        super().__init__(units, alone, featurizer)
        self.head, self.contrasts, self.marginals = head, contrasts, marginals
        self.balance = balance
        self.register_buffer("gamma", torch.tensor(gamma))

    def scores(self, u: Tensor, x: Inputs) -> Tensor:
        """f of the parameters that belong to x, and of those of the next K pairs, with shape (B, 1 + K)."""
        if len(u) <= self.contrasts:
            raise ValueError(
                f"{len(u)} pairs beside {self.contrasts} contrasts; expected larger batches, or fewer contrasts"
            )
        f, seen = self.features(x), None
        if self.marginals:
            # as many hidden as seen on average, and any number as often as another
            share = torch.rand(len(u), 1, device=u.device)
            seen = (torch.rand(u.shape, device=u.device) < share).float()
        each = [self._log_ratio(u.roll(-k, 0), f, seen) for k in range(1 + self.contrasts)]
        return torch.stack(each, 1)

    def criterion(self, scores: Tensor) -> Tensor:
        K, log_g = self.contrasts, self.gamma.log()
        log_K = scores.new_full((len(scores), 1), math.log(K))
        apart = torch.cat([log_K, log_g + scores[:, 1:]], 1)
        beside = torch.cat([log_K, log_g + scores[:, :K]], 1)
        none = math.log(K) - torch.logsumexp(apart, 1)
        first = log_g + scores[:, 0] - torch.logsumexp(beside, 1)
        return -(none + self.gamma * first) / (1 + self.gamma)

    def penalty(self, scores: Tensor) -> Tensor | float:
        if not self.balance:
            return 0.0
        together, apart = scores[:, 0].sigmoid().mean(), scores[:, 1].sigmoid().mean()
        return self.balance * (together + apart - 1).square()

    def log_ratio(self, u: Tensor, x: Inputs, seen: Tensor | None = None) -> Tensor:
        f = self.features(x)
        if self.marginals and seen is None:
            seen = torch.ones(u.shape[1])
        parts = [
            self._log_ratio(v, f.expand(len(v), -1), None if seen is None else seen.expand_as(v))
            for v in u.split(10 * ROWS)
        ]
        return torch.cat(parts)

    def _log_ratio(self, u: Tensor, f: Tensor, seen: Tensor | None) -> Tensor:
        u = u.float()
        known = [u] if seen is None else [u * seen, seen]
        return self.head(torch.cat([*known, f], 1))[:, 0]


@dataclass(frozen=True)
class Marginal(Tempered):
    """The posterior of some of the parameters; the others are integrated out.

    Attributes:
        of: Their names, in the order of the columns of theta.
    """

    of: tuple[str, ...] = ()

    @property
    def prior(self) -> ParameterPrior:
        return self.estimator.prior.only(self.of)

    @torch.no_grad()
    def log_ratio(self, u: Tensor) -> Tensor:
        names = self.estimator.prior.names
        where = [names.index(name) for name in self.of]
        seen = torch.zeros(len(names))
        seen[where] = 1
        full = u.new_zeros(len(u), len(names))
        full[:, where] = u
        return self.estimator.mixed(
            [m.log_ratio(full, self.x, seen) for m in self.estimator.members]
        )


class NRE(Estimator):
    """An estimator of p(x | theta) / p(x), and so of the posterior.

    Args:
        prior: Of the parameters.
        featurizer: As that of `NPE`.
        members: Of the ensemble.
        invalid: As that of `NPE`.
        contrasts: K; 1 for a classifier of pairs.
        gamma: g, how much more often one of the K belongs to x than none.
        balance: b; 100 for an estimate that is rather too wide than too narrow. Needs K = 1 and g = 1.
        marginals: Learn the ratios of all parts of the parameters, for `marginal`.
        head: A function of the number of its inputs that makes a module to one number.
    """

    name = "nre"
    given = Tempered

    def __init__(
        self,
        prior: ParameterPrior,
        featurizer: Callable[[], nn.Module] | None = None,
        members: int = 1,
        invalid: str = "raise",
        contrasts: int = 1,
        gamma: float = 1.0,
        balance: float = 0.0,
        marginals: bool = False,
        head: Callable[[int], nn.Module] = lambda inputs: MLP(inputs, 1, HIDDEN),
    ) -> None:
        super().__init__(prior, featurizer, members, invalid)
        if contrasts < 1 or not gamma > 0 or not balance >= 0:
            raise ValueError(
                f"contrasts is {contrasts}, gamma {gamma:g} and balance {balance:g}, expected contrasts of at least 1, "
                "gamma above 0 and balance of at least 0"
            )
        if balance and (contrasts, gamma) != (1, 1):
            raise ValueError(
                f"balance is for a classifier of pairs, but contrasts is {contrasts} and gamma {gamma:g}; expected 1 and 1"
            )
        self.contrasts, self.gamma, self.balance = contrasts, gamma, balance
        self.marginals, self.head = marginals, head

    @property
    def options(self) -> dict:
        return {
            "contrasts": self.contrasts,
            "gamma": self.gamma,
            "balance": self.balance,
            "marginals": self.marginals,
        }

    def new(self, units: dict[str, Standardise]) -> Ratio:
        featurizer, d = self.new_featurizer(), len(self.prior)
        head = self.head((2 * d if self.marginals else d) + featurizer.features)
        return Ratio(
            units,
            self.alone,
            featurizer,
            head,
            self.contrasts,
            self.gamma,
            self.balance,
            self.marginals,
        )

    def marginal(self, x: Data, of: Sequence[str]) -> Marginal:
        """The posterior of some parameters, by name, for one observation.

        Raises:
            ValueError: An estimator that did not learn marginals, other names, and as `condition`.
        """
        if not self.marginals:
            raise ValueError(
                "this estimator knows all parameters together; make it with marginals=True, or take columns of its draws"
            )
        if not of or not set(of) <= set(self.prior.names) or len(set(of)) < len(of):
            raise ValueError(
                f"of is {list(of)}, expected different ones of {', '.join(self.prior.names)}"
            )
        return Marginal(self, self.condition(x).x, tuple(of))
