"""Whether draws deserve to be believed: functions of arrays, which know nothing of how the draws were made."""

from scoreinv.diagnostics.pixels import pixel_coverage

__all__ = ["pixel_coverage"]
