"""Weights of a network under fit: as one vector, and their running average."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from scoreinv.averages import follow


@contextlib.contextmanager
def joined(network: nn.Module) -> Iterator[list[Tensor]]:
    """Its weights as one vector of each type, of which all are views within, as are their gradients.

    A step of an optimiser is then a few calls, however many layers there are; in networks for scalars, which are small, it
    is calls that cost.
    """
    try:
        yield _join(network)
    finally:
        for weight in network.parameters():
            weight.data, weight.grad = weight.data.clone(), None


def _join(network: nn.Module) -> list[Tensor]:
    """Vectors of weights that learn, with their gradients, of which those of the network become views."""
    kinds: dict[torch.dtype, list[nn.Parameter]] = {}
    for weight in network.parameters():
        if weight.requires_grad:
            kinds.setdefault(weight.dtype, []).append(weight)
    vectors = []
    for some in kinds.values():
        vector = torch.cat([weight.detach().flatten() for weight in some])
        vector.grad = torch.zeros_like(vector)
        sizes = [weight.numel() for weight in some]
        for weight, *views in zip(
            some, vector.split(sizes), vector.grad.split(sizes), strict=True
        ):
            weight.data, weight.grad = (view.view_as(weight) for view in views)
        vectors.append(vector)
    return vectors


class Average:
    """The running average of weights, which is over the last tenth of the steps until it is long enough.

    Args:
        member: Whose weights they are.
        weights: As vectors, from `joined`.
        share: Of itself that the average keeps at each step; 0 are the last weights.
    """

    def __init__(self, member: nn.Module, weights: list[Tensor], share: float) -> None:
        self.share, self.steps = share, 0
        self._member, self._weights = member, weights
        self._judged = copy.deepcopy(member) if share else member
        self._averaged = _join(self._judged) if share else weights

    def update(self) -> None:
        """After a step."""
        if self.share:
            follow(self._averaged, self._weights, self.share, self.steps)
            self.steps += 1

    @torch.no_grad()
    def network(self) -> nn.Module:
        """The member with the average of its weights, and what else it holds as it is."""
        if self.share:
            for old, now in zip(self._judged.buffers(), self._member.buffers(), strict=True):
                old.copy_(now)
        return self._judged

    def state_dict(self) -> dict[str, Any]:
        """All that decides it."""
        return {"steps": self.steps, "network": self._judged.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what `state_dict` gave."""
        self.steps = state["steps"]
        self._judged.load_state_dict(state["network"])
