"""Sequential Monte Carlo along the noise levels: the default sampler, asymptotically exact.

Particles follow the path of targets of `scoreinv.posterior` under the covariance-aware kernel, are weighted and resampled,
and moved by score-only MALA steps where a step needed correcting (`scoreinv.samplers.path`). It needs no backward pass and
has no guidance weight. With trained priors at image size the weights collapse. Scouts, particles without moves, find out;
all islands then take guided steps of second order, which is calibrated (`scoreinv bench learned`) but no longer exact, and
the result says so.

Del Moral, Doucet & Jasra, Sequential Monte Carlo Samplers (2006); Wu et al. (2023, arXiv:2306.17775).
"""

from __future__ import annotations

from dataclasses import dataclass

from scoreinv.samplers.path import Plan


@dataclass(frozen=True)
class SMC:
    """Weighted particles with moves.

    Args:
        levels: Noise levels; weighted particles take four steps from one to the next.
        moves: MALA steps where the weights vary; a draw costs at most 4 * levels * (1 + moves) evaluations, and somewhat
            more than twice as many as levels where weights collapse.
        resample_below: Resample when ESS / n falls below this.
        drop_above: Weights have collapsed where the variance of d log w / d log sigma over the particles, mean over an
            e-fold of the noise level, exceeds this; all draws take guided steps then, and the result says so.
    """

    levels: int = 40
    moves: int = 1
    resample_below: float = 0.5
    drop_above: float = 10.0

    @property
    def plan(self) -> Plan:
        return Plan(self.levels, self.moves, True, True, self.resample_below, self.drop_above)
