"""Processes that train one control together: each on its share of the data, all by the mean of their gradients."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

Share = tuple[int, int]  # number of this process, and of all
ALONE: Share = (0, 1)


def check_share(share: Share, groups: int) -> None:
    """Raise if so many processes cannot share the groups of a batch."""
    index, count = share
    if not 0 <= index < count:
        raise ValueError(f"share is {share}, expected the number of a process below their count")
    if groups % count:
        raise ValueError(
            f"{count} processes share {groups} groups of paths, expected as many for each; "
            f"make plan.groups a multiple of {count}"
        )
    if count > 1 and not torch.distributed.is_initialized():
        raise ValueError(
            f"{count} processes share a training, and none knows of the others; start them by torchrun or accelerate launch"
        )


def average(tensors: Iterable[Tensor], share: Share) -> None:
    """Make each tensor the mean of those of all processes, in place."""
    tensors = list(tensors)
    if share[1] == 1 or not tensors:
        return
    flat = torch.cat([t.detach().double().flatten() for t in tensors])
    torch.distributed.all_reduce(flat)
    for t, mean in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
        t.detach().copy_(mean.reshape(t.shape) / share[1])


def average_numbers(
    found: dict[str, float], device: torch.device, share: Share
) -> dict[str, float]:
    """The mean of each number over all processes."""
    values = torch.tensor(list(found.values()), dtype=torch.float64, device=device)
    average([values], share)
    return dict(zip(found, values.tolist(), strict=True))
