"""Pairs (theta, x) as they come: named inputs, missing numbers, units of their own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from scoreinv.npe.featurizers import Data

INVALID = ("raise", "drop", "mask")


Inputs = dict[str, Tensor]
ALONE = "x"  # name of the only input


def named(x: Data) -> Inputs:
    """Inputs by name."""
    return dict(x) if isinstance(x, Mapping) else {ALONE: x}


def mapped(x: Inputs, f: Callable[[Tensor], Tensor]) -> Inputs:
    """f of each input."""
    return {name: f(v) for name, v in x.items()}


def count(x: Inputs) -> int:
    """Of the pairs, which all inputs have in common.

    Raises:
        ValueError: Inputs of different lengths.
    """
    lengths = {name: len(v) for name, v in x.items()}
    if len(set(lengths.values())) != 1:
        raise ValueError(f"inputs have the lengths {lengths}, expected one for all")
    return next(iter(lengths.values()))


def valid(theta: Tensor, x: Inputs) -> Tensor:
    """Pairs of finite numbers, with shape (n,)."""
    ok = theta.isfinite().all(1)
    for part in x.values():
        ok = ok & part.isfinite().flatten(1).all(1)
    return ok


def usable(theta: Tensor, x: Inputs, invalid: str) -> tuple[Tensor, Inputs, int]:
    """Pairs under a policy for numbers that are not finite, and how many were dropped.

    Args:
        theta: With shape (n, d).
        x: Data of each.
        invalid: raise; drop such pairs (which a posterior then knows nothing of: it is that of data that are finite); or
            mask: set missing numbers of the data to zero, and tell the network where, by as many channels more.

    Raises:
        ValueError: Another policy; numbers that are not finite, if it is raise; none that are left.
    """
    if invalid not in INVALID:
        raise ValueError(f"invalid is {invalid!r}, expected one of {', '.join(INVALID)}")
    if invalid == "mask":
        x = mapped(x, masked)
    ok = valid(theta, x)
    lost = int((~ok).sum())
    if lost == len(ok):
        raise ValueError(f"none of {lost} simulations is finite; does the simulator work at all?")
    if lost and invalid != "drop":
        raise ValueError(
            f"{lost} of {len(ok)} simulations are not finite; pass invalid='drop' to leave them out, or 'mask' if numbers "
            "of the data are missing"
        )
    return theta[ok], mapped(x, lambda v: v[ok]), lost


def masked(x: Tensor) -> Tensor:
    """Missing numbers as zeros, and where they are as channels more, with shape (B, 2 C, ...)."""
    missing = ~x.isfinite()
    return torch.cat([x.masked_fill(missing, 0.0), missing.to(x.dtype)], 1)


class Standardise(nn.Module):
    """Data in units of their own scatter: of each number where there are few, of each channel else.

    Args:
        shape: Of one simulation.
    """

    def __init__(self, shape: Sequence[int]) -> None:
        super().__init__()
        self.shape = tuple(shape)
        each = (1, shape[0], *[1] * (len(shape) - 1))
        self.register_buffer("middle", torch.zeros(each))
        self.register_buffer("unit", torch.ones(each))

    def measure(self, x: Tensor, name: str) -> None:
        """Take the units of data, with shape (n, *shape), called so in messages."""
        over = [0, *range(2, x.ndim)]
        middle = x.double().mean(over, keepdim=True)
        unit = (x.double() - middle).square().mean(over, keepdim=True).sqrt()
        still = ~(unit > 1e-12 * (1e-300 + middle.abs())).flatten()
        if bool(still.any()):
            raise ValueError(
                f"{int(still.sum())} of {len(still)} features of {name} are the same in all simulations (first: number "
                f"{int(still.nonzero()[0])}); they say nothing: leave them out"
            )
        self.middle.copy_(middle)
        self.unit.copy_(unit)

    def forward(self, x: Tensor) -> Tensor:
        return (x.float() - self.middle) / self.unit
