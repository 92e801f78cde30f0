"""One pass under the twist, without moves or weights: fast, approximate, labelled so in the result."""

from __future__ import annotations

from dataclasses import dataclass

from scoreinv.samplers.path import Plan


@dataclass(frozen=True)
class Guided:
    """The covariance-aware kernel times the twist, once.

    Args:
        levels: Noise levels; a draw costs as many evaluations.
    """

    levels: int = 25

    @property
    def plan(self) -> Plan:
        return Plan(self.levels, moves=0, weights=False, guided=True)
