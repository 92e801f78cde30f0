"""Columns of a visibility file, before units and signs are settled."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True, eq=False)
class VisibilityTable:
    """What a file holds, in the file's own unit and with the file's own Fourier sign.

    Args:
        u, v: Baselines in `unit`, with shape (N,).
        data: Visibilities [Jy], complex, with shape (N,).
        weight: Inverse variances [Jy^-2], with shape (N,); not positive where flagged.
        unit: "lambda", "klambda" or "m"; None where the file does not say.
        sign: Sign of the Fourier exponent; None where the file does not say.
        layout: Name of the layout.
        extra: Further fields of `Visibilities`; arrays have N rows.
    """

    u: np.ndarray
    v: np.ndarray
    data: np.ndarray
    weight: np.ndarray
    unit: str | None
    sign: int | None
    layout: str
    extra: dict[str, Any]
