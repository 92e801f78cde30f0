"""One pass of guided steps, without moves or weights: fast, approximate, labelled so in the result.

At each level the denoised image D becomes the mean of N(D, C_sigma) conditioned on the data, C_sigma the prior's covariance
given a noisy image; the ODE of that denoiser is followed by Heun's method, with fresh noise at each level
(`scoreinv.samplers.path`).
"""

from __future__ import annotations

from dataclasses import dataclass

from scoreinv.samplers.path import Plan


@dataclass(frozen=True)
class Guided:
    """Guided steps, once.

    Args:
        levels: Noise levels; a draw costs nearly twice as many evaluations.
    """

    levels: int = 40

    @property
    def plan(self) -> Plan:
        return Plan(self.levels, moves=0, weights=False, guided=True)
