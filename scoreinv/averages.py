"""Running averages of weights, which end nearer to the minimum than the last weights do."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


@torch.no_grad()
def follow(average: Iterable[Tensor], now: Iterable[Tensor], keep: float, seen: int) -> None:
    """Move averages towards the weights of a step, in place; early on faster, so that the start is forgotten.

    Args:
        average: Of each weight.
        now: The weights, in the same order.
        keep: Share of itself that an average keeps.
        seen: Steps that it holds already, with the start; it is over about the last tenth of them while that is shorter.
    """
    share = min(keep, seen / (9 + seen))
    for old, new in zip(average, now, strict=True):
        old.lerp_(new.detach().to(old.device), 1 - share)
