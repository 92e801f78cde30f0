"""Many chains go from a density q that is easy to draw to q f, by way of q f^beta.

beta rises as far as half of the chains stay effective; chains are resampled in proportion to what f gained, and then move by
Metropolis's rule. The mean of the weights at each rise gives the evidence,

    log int q f  =  sum_i log mean f^(beta_i - beta_(i - 1)).

Del Moral, Doucet & Jasra, Sequential Monte Carlo Samplers (2006).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from scoreinv.samplers.smc import systematic

ACCEPTED = 0.4  # share of the proposals, to which their length h is tuned
LONGEST, SHORTEST = 1.0, 0.01  # of h

# x' of x, a length and a generator; and log of [q(x') pi(x | x')] / [q(x) pi(x' | x)], a number or with shape (B,)
Propose = Callable[[Tensor, float, torch.Generator], tuple[Tensor, Tensor | float]]


def temper(
    x: Tensor,
    log_f: Callable[[Tensor], Tensor],
    aim: Callable[[Tensor], Propose],
    moves: int,
    generator: torch.Generator,
) -> tuple[Tensor, float]:
    """Chains of q f, and log of the integral of q f [nat].

    Args:
        x: Draws of q, with shape (B, d).
        log_f: Of x, with shape (B,); -inf where q f is zero.
        aim: Makes a proposal, once at each temperature, for the chains as they are then.
        moves: At each temperature; four times as many at the last.
        generator: Of everything random.

    Raises:
        ValueError: f is zero for all draws of q.
    """
    now, beta, log_z, h = log_f(x), 0.0, 0.0, 0.5
    if not bool((now > -math.inf).any()):
        raise ValueError(
            f"f is zero for all {len(x)} draws of the start; there is no way to begin"
        )
    while beta < 1:
        step = rise(now, 1 - beta)
        beta, log_w = beta + step, step * now
        log_z += float(torch.logsumexp(log_w, 0)) - math.log(len(x))
        keep = systematic(torch.softmax(log_w, 0), len(x), generator)
        x, now = x[keep], now[keep]
        propose = aim(x)
        for _ in range(moves if beta < 1 else 4 * moves):
            new, log_q = propose(x, h, generator)
            then = log_f(new)
            chance = torch.rand(len(x), generator=generator, dtype=torch.float64).log()
            ok = chance < beta * (then - now) + log_q
            x, now = torch.where(ok[:, None], new, x), torch.where(ok, then, now)
            h *= math.exp(0.5 * (float(ok.double().mean()) - ACCEPTED))
            h = min(LONGEST, max(SHORTEST, h))
    return x, log_z


def rise(log_f: Tensor, most: float, effective: float = 0.5) -> float:
    """How far beta may rise, to `most`, with this share of the chains effective, for log f with shape (B,)."""
    share = lambda step: 1 / (torch.softmax(step * log_f, 0).square().sum() * len(log_f))
    if share(most) >= effective:
        return most
    low, high = 0.0, most
    for _ in range(40):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if share(middle) >= effective else (low, middle)
    return max(low, 1e-6)
