"""What is fitted: networks of parameters u and data x, each with a loss of pairs and a ratio r(u) for one observation."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from scoreinv.npe.data import ALONE, ROWS, Inputs, Standardise, count, mapped


class Member(nn.Module, ABC):
    """One network, or a member of an ensemble.

    Args:
        units: Of each input, by name.
        alone: Whether there is one input, which has no name of its own.
    """

    def __init__(self, units: dict[str, Standardise], alone: bool) -> None:
        super().__init__()
        self.units, self.alone = nn.ModuleDict(units), alone

    @abstractmethod
    def features(self, x: Inputs) -> Tensor:
        """Of data, with shape (B, features)."""

    @abstractmethod
    def scores(self, u: Tensor, x: Inputs) -> Tensor:
        """What is known of pairs, with shape (B, ...): that of an ensemble is the log of the mean of their exponentials."""

    @abstractmethod
    def criterion(self, scores: Tensor) -> Tensor:
        """Loss of each pair, with shape (B,), for its scores."""

    @abstractmethod
    def log_ratio(self, u: Tensor, x: Inputs) -> Tensor:
        """log r(u), with shape (B,), for one observation x in a batch of one."""

    def loss(self, u: Tensor, x: Inputs, w: Tensor) -> Tensor:
        """That is minimised: of a batch, whose pairs have weights w of mean 1, with shape (B,)."""
        scores = self.scores(u, x)
        return (w * self.criterion(scores)).mean() + self.penalty(scores)

    def penalty(self, scores: Tensor) -> Tensor | float:
        """What is added to the loss of a batch."""
        return 0.0

    def standard(self, x: Inputs) -> Inputs:
        """Data in their units, in the order of the fit, whatever that of x."""
        return {name: unit(x[name]) for name, unit in self.units.items()}

    @torch.no_grad()
    def many_features(self, x: Inputs) -> Tensor:
        """Of many data, some at a time, with shape (n, features), in float64."""
        parts = torch.arange(count(x)).split(ROWS)
        some = (mapped(x, lambda v, rows=rows: v[rows]) for rows in parts)
        return torch.cat([self.features(part).double() for part in some])


class Featured(Member):
    """A member that looks at data through features.

    Args:
        featurizer: Makes features of standardised data; of one input alone, or of several by name.
    """

    def __init__(self, units: dict[str, Standardise], alone: bool, featurizer: nn.Module) -> None:
        super().__init__(units, alone)
        self.featurizer = featurizer

    def features(self, x: Inputs) -> Tensor:
        standard = self.standard(x)
        return self.featurizer(standard[ALONE] if self.alone else standard)
