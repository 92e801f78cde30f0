"""`scoreinv inspect FILE`: what is in a data file."""

from __future__ import annotations

from dataclasses import dataclass

import scoreinv as si
from scoreinv.cli.data import located


@dataclass(frozen=True)
class InspectConfig:
    """A data file.

    Args:
        path: File; `scoreinv inspect FILE` is enough.
        unit: For visibility tables, the unit of u, v: lambda, klambda or m.
        frequency: For visibility tables in metres, their frequency [Hz].
    """

    path: str
    unit: str | None = None
    frequency: float | None = None


def inspect(config: InspectConfig) -> None:
    """Say what is in a data file, its units, its scales and what to look at before going on."""
    print(si.inspect(located(config.path), config.unit, config.frequency))
