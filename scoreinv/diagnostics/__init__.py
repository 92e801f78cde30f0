"""Whether draws deserve to be believed: functions of arrays, which know nothing of how the draws were made."""

from scoreinv.diagnostics.battery import Coverage, Finding, coverage
from scoreinv.diagnostics.exchange import Exchange, exchange_test
from scoreinv.diagnostics.local import lc2st
from scoreinv.diagnostics.pixels import pixel_coverage
from scoreinv.diagnostics.population import c2st, pqmass

__all__ = [
    "Coverage",
    "Exchange",
    "Finding",
    "c2st",
    "coverage",
    "exchange_test",
    "lc2st",
    "pixel_coverage",
    "pqmass",
]
