"""Processes that train one control together: each on its share of the data, all by the mean of their gradients."""

from __future__ import annotations

import math
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
    if count == 1:
        return
    if not torch.distributed.is_initialized():
        raise ValueError(
            f"{count} processes share a training, and none knows of the others; start them by torchrun or accelerate launch"
        )
    known = torch.distributed.get_rank(), torch.distributed.get_world_size()
    if share != known:
        raise ValueError(f"share is {share}, but this process is {known[0]} of {known[1]}")


def average(tensors: Iterable[Tensor], share: Share) -> None:
    """Make each tensor the mean of those of all processes, in place; by way of the CPU, wherever they are."""
    tensors = list(tensors)
    if share[1] == 1 or not tensors:
        return
    flat = torch.cat([t.detach().double().cpu().flatten() for t in tensors])
    torch.distributed.all_reduce(flat)
    for t, mean in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
        t.detach().copy_(mean.reshape(t.shape) / share[1])


def average_numbers(found: dict[str, float], share: Share) -> dict[str, float]:
    """The mean of each number over all processes."""
    values = torch.tensor(list(found.values()), dtype=torch.float64)
    average([values], share)
    return dict(zip(found, values.tolist(), strict=True))


def check_same(own: dict[str, float], share: Share) -> None:
    """Raise, in all processes, if numbers that they should agree on are not the same in all."""
    if share[1] == 1:
        return
    values = torch.tensor(list(own.values()), dtype=torch.float64)
    everyone = [torch.empty_like(values) for _ in range(share[1])]
    torch.distributed.all_gather(everyone, values)
    for i, name in enumerate(own):
        seen = [float(v[i]) for v in everyone]
        if any(not math.isclose(v, seen[0], rel_tol=1e-3, abs_tol=1e-3) for v in seen):
            values = ", ".join(f"{v:g}" for v in seen)
            raise ValueError(
                f"the processes of this training do not agree on its {name} ({values}); do all see one folder, and does "
                "a control of your own start from one seed?"
            )
