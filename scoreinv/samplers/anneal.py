"""Annealed moves without weights: right for posteriors with one mode, of any size.

Particles step as those of `SMC` do, and are moved at each level by score-only MALA steps; every particle goes its own way.
The evidence comes from the path integral.
"""

from __future__ import annotations

from dataclasses import dataclass

from scoreinv.samplers.path import Plan


@dataclass(frozen=True)
class Anneal:
    """Moves at every level, never weights.

    Args:
        levels: Noise levels.
        moves: MALA steps at each level; a draw costs levels * (1 + moves) evaluations.
    """

    levels: int = 50
    moves: int = 3

    @property
    def plan(self) -> Plan:
        return Plan(self.levels, self.moves, weights=False, guided=False)
