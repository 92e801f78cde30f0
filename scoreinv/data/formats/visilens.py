"""The `.bin` files of visilens (Spilker et al. 2016, arXiv:1604.05723).

Float64 numbers without a header: seven rows u, v [lambda], Re V, Im V [Jy], sigma [Jy, of each
part], antenna 1, antenna 2, with N columns, then the width of the primary beam [arcsec]. The
columns are those of a CASA measurement set, whose exponent is +2 pi i (u l + v m): the models of
visilens count x to the West with exp(-2 pi i u x).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from scoreinv.data.formats.visibility_table import VisibilityTable


def read(path: Path) -> VisibilityTable:
    """Read a visilens file.

    Raises:
        ValueError: If the length or the columns do not fit the layout.
    """
    size = path.stat().st_size
    numbers, rest = divmod(size, 8)
    if rest or numbers < 8 or (numbers - 1) % 7:
        raise ValueError(
            f"{path} has {size} bytes, expected 8 * (7 N + 1): truncated, or not a visilens file?"
        )
    values = np.fromfile(path, dtype="<f8")
    u, v, real, imag, sigma, first, second = values[:-1].reshape(7, -1)
    antennas = np.stack([first, second], 1)
    if not (np.isfinite(antennas).all() and (antennas == np.round(antennas)).all()):
        raise ValueError(
            f"{path} has fractions in its antenna columns, expected whole numbers: truncated, or "
            "not a visilens file?"
        )
    with np.errstate(divide="ignore"):
        weight = np.where(sigma > 0, 1 / sigma**2, 0.0)
    extra = {"antennas": antennas.astype(int), "primary_beam": float(values[-1])}
    return VisibilityTable(u, v, real + 1j * imag, weight, "lambda", +1, "visilens", extra)
