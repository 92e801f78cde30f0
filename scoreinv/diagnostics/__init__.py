"""Whether draws deserve to be believed: functions of arrays, which know nothing of how the draws were made."""

from scoreinv.diagnostics.battery import Coverage, Finding, coverage
from scoreinv.diagnostics.exchange import Exchange, exchange_test
from scoreinv.diagnostics.pixels import pixel_coverage

__all__ = ["Coverage", "Exchange", "Finding", "coverage", "exchange_test", "pixel_coverage"]
