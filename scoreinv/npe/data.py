"""Pairs (theta, x) as they come: inputs by name, missing numbers, units of their own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from scoreinv.npe.featurizers import Data
from scoreinv.tensors import as_tensor

INVALID = ("raise", "drop", "mask")
TAKEN = nn.ModuleDict()  # an instance, whose attributes are more than those of its class
ROWS = 1000  # that are looked at together
Inputs = dict[str, Tensor]
ALONE = "x"  # name of the only input


def named(x: Data) -> Inputs:
    """Inputs by name, as tensors.

    Raises:
        ValueError: Complex numbers, no axis of simulations and one of numbers, or a name that a module cannot have.
    """
    x = {k: as_tensor(v) for k, v in (x if isinstance(x, Mapping) else {ALONE: x}).items()}
    for name, v in x.items():
        if v.is_complex():
            raise ValueError(
                f"{name} is complex; give its real and imaginary parts as channels, as torch.view_as_real makes them"
            )
        if (
            not isinstance(name, str)
            or not name
            or set("./\\") & set(name)
            or hasattr(TAKEN, name)
        ):
            raise ValueError(
                f"an input cannot be called {name!r}, for which modules or files have no place; choose another name"
            )
    return x


def mapped(x: Inputs, f: Callable[[Tensor], Tensor]) -> Inputs:
    """f of each input."""
    return {name: f(v) for name, v in x.items()}


def joined(x: Inputs, more: Inputs) -> Inputs:
    """Those of one after those of the other; the first may be empty."""
    return {name: torch.cat([x[name], v]) if x else v for name, v in more.items()}


def count(x: Inputs) -> int:
    """Of the pairs, which all inputs have in common.

    Raises:
        ValueError: Inputs of different lengths, or without axes.
    """
    for name, v in x.items():
        if v.ndim < 2:
            raise ValueError(
                f"{name} has shape {tuple(v.shape)}, expected (n, numbers) or more axes: {name}[:, None]?"
            )
    lengths = {name: len(v) for name, v in x.items()}
    if len(set(lengths.values())) != 1:
        raise ValueError(f"inputs have the lengths {lengths}, expected one for all")
    return next(iter(lengths.values()))


def usable(theta: Tensor, x: Inputs, invalid: str) -> tuple[Tensor, Inputs, Tensor]:
    """Pairs under a policy for numbers that are not finite, and which were kept, with shape (n,).

    Args:
        theta: With shape (n, d).
        x: Data of each.
        invalid: raise; drop such pairs (a posterior is then that of data that are finite); or mask, which leaves missing
            numbers of the data in their place, to be told to the network (`masked`).

    Raises:
        ValueError: Numbers that are not finite where they are not allowed; nothing that is left.
    """
    ok = theta.isfinite().all(1)
    for v in () if invalid == "mask" else x.values():
        ok = ok & torch.cat([part.isfinite().flatten(1).all(1) for part in v.split(ROWS)])
    lost = int((~ok).sum())
    if lost == len(ok):
        raise ValueError(f"none of {lost} simulations is finite; does the simulator work at all?")
    if lost and invalid != "drop":
        raise ValueError(
            f"{lost} of {len(ok)} simulations are not finite; pass invalid='drop' to leave them out, or 'mask' if numbers "
            "of the data are missing"
        )
    return (theta[ok], mapped(x, lambda v: v[ok]), ok) if lost else (theta, x, ok)


def whole(x: Inputs, invalid: str) -> Inputs:
    """Data that noise has made, if the policy allows them.

    Raises:
        ValueError: Numbers that are not finite, but where they are masked: an epoch has no pair to lose.
    """
    for name, v in () if invalid == "mask" else x.items():
        if bad := int((~v.isfinite()).flatten(1).any(1).sum()):
            hint = (
                "pairs cannot be dropped from one epoch and not from another: mend `noise`, apply it to the simulations "
                "before the fit, or pass invalid='mask'"
                if invalid == "drop"
                else "mend `noise`, or pass invalid='mask' if numbers of the data are missing"
            )
            raise ValueError(
                f"noise made {bad} of {len(v)} data of {name} that are not finite, expected none for invalid={invalid!r}; "
                f"{hint}"
            )
    return x


def masked(x: Tensor) -> Tensor:
    """Missing numbers as zeros, and where they are as channels more, with shape (B, 2 C, ...)."""
    missing = ~x.isfinite()
    return torch.cat([x.masked_fill(missing, 0.0), missing.to(x.dtype)], 1)


class Standardise(nn.Module):
    """Data in units of their own scatter: of each number where there are few, of each channel else.

    Args:
        shape: Of one simulation.
        masks: How many of the last channels are masks, which stay as they are.
    """

    def __init__(self, shape: Sequence[int], masks: int = 0) -> None:
        super().__init__()
        self.shape, self.masks = tuple(shape), masks
        each = (1, shape[0], *[1] * (len(shape) - 1))
        self.register_buffer("middle", torch.zeros(each, dtype=torch.float64))
        self.register_buffer("unit", torch.ones(each, dtype=torch.float64))

    def measure(self, x: Tensor, name: str) -> None:
        """Take the units of data, with shape (n, *shape), called so in messages; masked numbers do not count."""
        over = [0, *range(2, x.ndim)]
        kept = self.shape[0] - self.masks
        sums = torch.zeros(2, 1, kept, *[1] * (x.ndim - 2), dtype=torch.float64)
        number = torch.zeros_like(sums[0])
        first = None
        for part in x.split(ROWS):
            values = part[:, :kept].double()
            there = 1 - part[:, kept:].double() if self.masks else torch.ones_like(values)
            if first is None:  # far from zero, squares of what is left lose nothing
                first = (values * there).sum(over, keepdim=True)
                first = first / there.sum(over, keepdim=True).clamp_min(1)
            left = (values - first) * there
            number += there.sum(over, keepdim=True)
            sums[0] += left.sum(over, keepdim=True)
            sums[1] += left.square().sum(over, keepdim=True)
        mean = sums[0] / number.clamp_min(1)
        unit = (sums[1] / number.clamp_min(1) - mean.square()).clamp_min(0).sqrt()
        if bad := int((~unit.isfinite()).sum()):
            raise ValueError(
                f"{bad} of {unit.numel()} features of {name} are not finite, or too large for their squares; expected "
                "numbers below 1e150: drop or mask missing ones, or take logarithms"
            )
        still = ~(unit > 1e-12 * (1e-300 + (first + mean).abs())).flatten()
        if bool(still.any()):
            raise ValueError(
                f"{int(still.sum())} of {len(still)} features of {name} are the same in all simulations (first: number "
                f"{int(still.nonzero()[0])}); they say nothing: leave them out"
            )
        self.middle[:, :kept], self.unit[:, :kept] = first + mean, unit

    def forward(self, x: Tensor) -> Tensor:
        standard = ((x.double() - self.middle) / self.unit).float()
        if not self.masks:
            return standard
        values, missing = standard.split([self.shape[0] - self.masks, self.masks], 1)
        return torch.cat([values * (1 - missing), missing], 1)
