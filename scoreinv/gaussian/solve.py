"""Conjugate gradients that know how far they are off."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

AHEAD = 8  # iterations that stand for all later ones in the error of conjugate gradients


def dot(x: Tensor, y: Tensor) -> Tensor:
    """Inner product of each pair, with shape (B,), summed in float64."""
    return (x.double() * y.double()).flatten(1).sum(1)


def conjugate_gradients(
    H: Callable[[Tensor], Tensor],
    b: Tensor,
    preconditioner: Callable[[Tensor], tuple[Tensor, Tensor]] = lambda r: (r, torch.zeros_like(r)),
    error: float = 1e-6,
    iterations: int = 500,
) -> tuple[Tensor, int]:
    """Solve (K^-1 + H) x = b for a batch of right-hand sides b.

    K^-1 is met only behind the preconditioner M, where K^-1 M is as harmless as M: one transform serves both, and
    directions in which K vanishes stay zero.

    Args:
        H: Symmetric positive semi-definite, acts on (B, *shape).
        b: Right-hand sides, with shape (B, *shape).
        preconditioner: Gives (M r, K^-1 M r) for a symmetric positive definite M near (K^-1 + H)^-1; by default
            M = 1 and K^-1 = 0.
        error: Stops when every solution is off by less, in the norm <e, (K^-1 + H) e>^1/2: the distance in standard
            deviations of the posterior. If 0, all iterations are done.
        iterations: At most so many.

    Returns:
        The solutions, with shape (B, *shape), and the iterations that were needed.

    Warns:
        RuntimeWarning: The solutions are further off than `error`.

    Hestenes & Stiefel, Methods of Conjugate Gradients for Solving Linear Systems (1952). The squared error that is left is
    the sum of what all later iterations remove, and a few of them stand for it: Strakos & Tichy, On Error Estimation in the
    Conjugate Gradient Method and Why It Works in Finite Precision Computations (2002).
    """

    def column(c: Tensor) -> Tensor:
        return c.reshape(-1, *[1] * (b.ndim - 1)).to(b.dtype)

    tiny = torch.finfo(b.dtype).tiny
    x, r = torch.zeros_like(b), b
    p, Kp, previous = torch.zeros_like(b), torch.zeros_like(b), b.new_ones(len(b)).double()
    removed: list[Tensor] = []
    for _ in range(iterations):
        z, Kz = preconditioner(r)
        rz = dot(r, z)
        beta = column(rz / previous.clamp_min(tiny))
        p, Kp = z + beta * p, Kz + beta * Kp
        q = Kp + H(p)
        step = rz / dot(p, q).clamp_min(tiny)
        x, r, previous = x + column(step) * p, r - column(step) * q, rz
        if error > 0:
            removed.append(step * rz)
            if len(removed) >= AHEAD and bool((sum(removed[-AHEAD:]) < error**2).all()):
                return x, _enough(removed, error)
    if error > 0:
        warnings.warn(
            f"conjugate gradients stopped after {iterations} iterations, further than {error:g} standard deviations off; "
            "noise that spans many orders of magnitude? The result is approximate",
            RuntimeWarning,
            stacklevel=2,
        )
    return x, iterations


def _enough(removed: list[Tensor], error: float) -> int:
    """Iterations after which all later ones remove less than the squared error."""
    left = torch.stack(removed).flip(0).cumsum(0).flip(0)
    return int((left >= error**2).any(1).sum())
