"""The exchangeability test: an exact null for any statistic of truths and draws.

If the draws x_1 .. x_L of a simulation come from the posterior of its data, the truth x_0 is one more of them: the L + 1
members are exchangeable given the data. A statistic that is pooled over simulations then has the same distribution whoever
plays the truth, and letting a random member play it in every simulation, B times over, gives its null distribution, with
all correlations between pixels and between statistics. With T the statistic and T_b its values under the swaps,

    p = (1 + #{b: T_b >= T}) / (B + 1)

rejects a perfect sampler with probability p at most, for any number of simulations, draws and pixels. Phipson & Smyth,
Permutation P-values Should Never Be Zero (2010, arXiv:1603.05766); the largest of many statistics by the same swaps keeps
the family-wise rate: Westfall & Young, Resampling-Based Multiple Testing (1993).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from scoreinv.streams import stream

CHUNK = 256  # swaps at a time


@dataclass(frozen=True)
class Exchange:
    """Statistics of the truths beside those of the swaps, in standard deviations of the swaps.

    Attributes:
        observed: With shape (S,).
        null: Under each swap, with shape (B, S).
    """

    observed: Tensor
    null: Tensor

    @property
    def p(self) -> Tensor:
        """p-value of each statistic alone, two-sided, with shape (S,)."""
        return self._exceeded(self.null.abs(), self.observed.abs())

    def adjusted(self, among: Tensor | None = None) -> Tensor:
        """p-values corrected for the number of statistics, with shape (S,), by the largest one under each swap.

        Args:
            among: Which statistics compete, as a mask with shape (S,); all if not given. The others get nan.
        """
        among = torch.ones(len(self.observed), dtype=torch.bool) if among is None else among
        largest = self.null[:, among].abs().max(1).values[:, None]
        p = torch.full_like(self.observed, torch.nan)
        p[among] = self._exceeded(largest, self.observed[among].abs())
        return p

    def critical(self, level: float) -> float:
        """What the largest of all statistics exceeds with this probability if nothing is wrong [standard deviations]."""
        return float(self.null.abs().max(1).values.quantile(1 - level))

    @staticmethod
    def _exceeded(null: Tensor, observed: Tensor) -> Tensor:
        # equal values that were summed in another order count as equal
        return (1 + (null >= observed - 1e-9).double().sum(0)) / (len(null) + 1)


def exchange_test(
    statistic: Callable[[Tensor], Tensor], sims: int, members: int, swaps: int, seed: int
) -> Exchange:
    """Compare statistics of the truths, member 0 of each simulation, with those of random members.

    Args:
        statistic: Takes who plays the truth in each simulation, indices with shape (B, N); returns statistics (B, S).
        sims: Simulations N.
        members: Truth and draws of each, L + 1.
        swaps: Draws B of the null; no p-value is below 1 / (B + 1).
        seed: Of the swaps.

    Raises:
        ValueError: Statistics that are not finite, or of another shape.
    """
    generator = stream(seed, 5)
    who = torch.randint(members, (swaps, sims), generator=generator)
    who = torch.cat([torch.zeros(1, sims, dtype=torch.long), who])
    values = torch.cat([statistic(part) for part in who.split(CHUNK)]).double()
    if values.ndim != 2 or len(values) != swaps + 1:
        raise ValueError(
            f"statistics of {swaps + 1} swaps have shape {tuple(values.shape)}, expected ({swaps + 1}, S)"
        )
    wrong = (~values.isfinite()).any(0)
    if bool(wrong.any()):
        raise ValueError(
            f"{int(wrong.sum())} of {len(wrong)} statistics are not finite (first: number {int(wrong.nonzero()[0])}), and "
            "have no p-value; find out why first"
        )
    # truth and swaps are treated alike, so that the test stays exact
    spread = values.std(0)
    values = (values - values.mean(0)) / torch.where(spread > 0, spread, 1.0)
    return Exchange(values[0], values[1:])
