"""Sequential Monte Carlo along the noise levels: the default sampler, asymptotically exact.

Particles follow the path of targets of `scoreinv.posterior` under the covariance-aware kernel, are weighted and resampled,
and moved by score-only MALA steps where a step needed correcting (`scoreinv.samplers.path`). It needs no backward pass and
has no guidance weight. With trained priors at image size the weights collapse: those islands start again with guided steps
and moves near the data's noise, which is calibrated (`scoreinv bench learned`) but no longer exact, and the result says so.

Del Moral, Doucet & Jasra, Sequential Monte Carlo Samplers (2006); Wu et al. (2023, arXiv:2306.17775).
"""

from __future__ import annotations

from dataclasses import dataclass

from scoreinv.samplers.path import Plan


@dataclass(frozen=True)
class SMC:
    """Weighted particles with moves.

    Args:
        levels: Noise levels.
        moves: MALA steps at each level where they pay; a draw costs at most levels * (1 + moves) evaluations,
            where weights collapse those of the attempt and of a guided path.
        resample_below: Resample when ESS / n falls below this.
        drop_above: Weights whose relative variance (n / ESS - 1 of each step alone) sums to more than this over an e-fold
            of the noise level have collapsed; the island starts again with guided steps, and the result says so.
    """

    levels: int = 56
    moves: int = 3
    resample_below: float = 0.5
    drop_above: float = 2.0

    @property
    def plan(self) -> Plan:
        return Plan(self.levels, self.moves, True, True, self.resample_below, self.drop_above)
