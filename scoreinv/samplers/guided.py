"""One pass of guided steps, without moves or weights: fast, approximate, labelled so in the result.

At each level the clean image is drawn from N(D, C_sigma) conditioned on the data, D the denoised image and C_sigma the
prior's covariance given a noisy image; noise is put back for the level below. As Song et al., Pseudoinverse-Guided Diffusion
Models for Inverse Problems (2023), with the prior's covariance for its white one and a draw for its mean.
"""

from __future__ import annotations

from dataclasses import dataclass

from scoreinv.samplers.path import Plan


@dataclass(frozen=True)
class Guided:
    """Guided steps, once.

    Args:
        levels: Noise levels; a draw costs as many evaluations.
    """

    levels: int = 25

    @property
    def plan(self) -> Plan:
        return Plan(self.levels, moves=0, weights=False, guided=True)
