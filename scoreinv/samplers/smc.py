"""Sequential Monte Carlo along the noise levels: the default sampler, asymptotically exact.

Particles follow the data's pull on their denoised images, and are weighted and resampled for what the network says beyond
what a Gaussian prior would have foreseen (`scoreinv.samplers.path`). It needs no backward pass and has no guidance weight.
With trained priors at image size the weights collapse. Scouts, a few particles on a coarse path, find out; all islands then
take guided steps of second order, which is calibrated (`scoreinv bench learned`) but no longer exact, and the result says
so.

Del Moral, Doucet & Jasra, Sequential Monte Carlo Samplers (2006); Wu et al. (2023, arXiv:2306.17775).
"""

from __future__ import annotations

from dataclasses import dataclass

from scoreinv.samplers.path import Plan


@dataclass(frozen=True)
class SMC:
    """Weighted particles.

    Args:
        levels: Noise levels; weighted particles take four steps from one to the next, at a cost of five evaluations at
            most. Where weights collapse a draw costs somewhat more than twice as many evaluations as levels.
        resample_below: Resample when ESS / n falls below this.
        drop_above: Weights have collapsed where the variance of d log w / d log sigma over the particles, mean over an
            e-fold of the noise level, exceeds this and few particles carry the weights; all draws take guided steps then,
            and the result says so.
    """

    levels: int = 40
    resample_below: float = 0.5
    drop_above: float = 20.0

    @property
    def plan(self) -> Plan:
        return Plan(self.levels, 0, True, True, self.resample_below, self.drop_above)
