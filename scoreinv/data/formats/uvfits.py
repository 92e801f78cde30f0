"""UVFITS: visibilities as FITS random groups (Greisen, AIPS Memo 117).

u, v are stored in seconds and are multiplied by the frequency of each channel; the date is the
sum of two parameters; the IF axis may be missing, and its frequency offsets are in the AIPS FQ
table; weights that are not positive are flags. Stokes I is the mean of the two parallel hands,
w_I = 4 / (1 / w_a + 1 / w_b). Files made for several sources, as CASA's exportuvfits makes them
even of one, have its position in the AIPS SU table, and zeros in the header.

The exponent is +2 pi i (u l + v m) for u, v as stored. The images say so: with it the jets of
3C 273, 3C 345 and BL Lac point South-West, West and South, and the ring of M87 is bright in the
South, as published; the opposite sign turns each by 180 degrees.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from scoreinv.data.formats.files import open_fits
from scoreinv.data.formats.visibility_table import VisibilityTable

if TYPE_CHECKING:
    from astropy.io.fits import FITS_rec, HDUList, Header

STOKES = {1: "I", -1: "RR", -2: "LL", -3: "RL", -4: "LR", -5: "XX", -6: "YY", -7: "XY", -8: "YX"}
AXES = ("IF", "FREQ", "STOKES", "COMPLEX")


def read(path: Path) -> VisibilityTable:
    """Read Stokes I of every channel of a UVFITS file.

    Raises:
        ValueError: If the file is damaged, has no random groups, no Stokes I, several sources or frequency setups, or
            flags in a table.
    """
    with open_fits(path) as hdus:
        groups = hdus[0]
        if getattr(groups.data, "parnames", None) is None:
            raise ValueError(f"{path} has no random groups, expected visibilities in UVFITS")
        if "AIPS FG" in hdus:
            raise ValueError(
                f"{path} has flags in an AIPS FG table, which is not read; apply them to the weights (in AIPS with UVCOP)"
            )
        header, parameters = groups.header, groups.data.parnames
        columns = [np.asarray(groups.data.par(i), float) for i in range(len(parameters))]
        named = _Parameters(parameters, columns, path)
        cells = _cells(groups.data["DATA"], header, path)
        offsets = _if_offsets(hdus, cells.shape[1], named.single("FREQSEL"), path)
        centre = _phase_centre(hdus, named.single("SOURCE"), path)
    frequency = (offsets[:, None] + _channels(header, cells.shape[2])).ravel()
    data, weight = _stokes_i(cells, header, path)
    antennas = named.antennas()
    weight = np.where((antennas[:, 0] == antennas[:, 1])[:, None, None], 0.0, weight)
    # One block per channel, each in order of time, so that neighbours are comparable.
    time = named.date()
    order = np.arange(len(time)) if time is None else np.argsort(time, kind="stable")
    blocks = len(frequency)
    extra = {
        "antennas": np.tile(antennas[order], (blocks, 1)),
        "time": None if time is None else np.tile(time[order], blocks),
        "frequency": float(frequency.mean()),
        **centre,
    }
    u, v = (np.outer(frequency, named.one(name)[order]).ravel() for name in ("UU", "VV"))
    data, weight = (x[order].reshape(len(x), blocks).T.ravel() for x in (data, weight))
    return VisibilityTable(u, v, data, weight, "lambda", +1, "UVFITS", extra)


class _Parameters:
    """The group parameters by the beginning of their names, such as UU of UU---SIN."""

    def __init__(self, names: list[str], columns: list[np.ndarray], path: Path) -> None:
        self.columns, self.path, self.names = list(zip(names, columns, strict=True)), path, names

    def all(self, prefix: str) -> list[np.ndarray]:
        return [column for name, column in self.columns if name.upper().startswith(prefix)]

    def one(self, prefix: str) -> np.ndarray:
        found = self.all(prefix)
        if not found:
            raise ValueError(
                f"{self.path} has no group parameter {prefix}; it has {', '.join(self.names)}"
            )
        return found[0]

    def single(self, prefix: str) -> int | None:
        """The number that all rows have, of a source or of a setup; None where they have none."""
        kinds = {round(k) for column in self.all(prefix) for k in np.unique(column)}
        if len(kinds) > 1:
            raise ValueError(
                f"{self.path} has {len(kinds)} values of {prefix}, expected one; export one at a time (in CASA "
                "exportuvfits with field=... and spw=...)"
            )
        return next(iter(kinds), None)

    def date(self) -> np.ndarray | None:
        dates = self.all("DATE")
        return sum(dates) if dates else None

    def antennas(self) -> np.ndarray:
        if self.all("ANTENNA1"):
            pair = [self.one("ANTENNA1"), self.one("ANTENNA2")]
            return np.stack(pair, 1).round().astype(int)
        baseline = np.floor(self.one("BASELINE")).astype(int)
        # Arrays of more than 255 antennas use 2048 a + b + 65536.
        large = baseline > 65536
        shifted, base = np.where(large, baseline - 65536, baseline), np.where(large, 2048, 256)
        return np.stack([shifted // base, shifted % base], 1)


def _cells(data: np.ndarray, header: Header, path: Path) -> np.ndarray:
    """Data cube with axes (row, IF, channel, Stokes, complex)."""
    names = _axis_names(header)[::-1]
    cells = np.asarray(data, float)
    for name, length in zip(names, cells.shape[1:], strict=True):
        if name not in AXES and length > 1:
            raise ValueError(f"{path} has {length} values on axis {name!r}, expected one")
    for name in ("FREQ", "STOKES", "COMPLEX"):
        if name not in names:
            raise ValueError(f"{path} has no {name} axis; it has {', '.join(names)}")
    length = dict(zip(names, cells.shape[1:], strict=True))
    if length["COMPLEX"] != 3:
        raise ValueError(
            f"{path} has {length['COMPLEX']} numbers per visibility, expected Re, Im, weight"
        )
    present = [name for name in AXES if name in names]
    cells = np.moveaxis(cells, [names.index(x) + 1 for x in present], range(-len(present), 0))
    return cells.reshape(-1, *(length.get(name, 1) for name in AXES))


def _axis_names(header: Header) -> list[str]:
    """Names of axes 2 and up; an axis may have none."""
    return [header.get(f"CTYPE{i}", "").strip() for i in range(2, header["NAXIS"] + 1)]


def _axis(header: Header, name: str) -> tuple[float, float, float] | None:
    """Reference value, step and reference pixel of an axis, or None."""
    names = _axis_names(header)
    if name not in names:
        return None
    i = names.index(name) + 2
    return tuple(header.get(f"{key}{i}", 1.0) for key in ("CRVAL", "CDELT", "CRPIX"))


def _channels(header: Header, count: int) -> np.ndarray:
    """Frequencies of the channels of the first IF [Hz]."""
    value, step, reference = _axis(header, "FREQ")
    return value + (np.arange(count) + 1 - reference) * step


def _if_offsets(hdus: HDUList, count: int, setup: int | None, path: Path) -> np.ndarray:
    """Frequency offsets of the IFs of a setup from the reference [Hz]."""
    if "AIPS FQ" not in hdus:
        if count == 1:
            return np.zeros(1)
        raise ValueError(f"{path} has {count} IFs and no AIPS FQ table with their frequencies")
    table = hdus["AIPS FQ"].data
    row = 0 if setup is None else _row(table, "FRQSEL", setup, path)
    offsets = np.atleast_1d(table["IF FREQ"][row]).astype(float)
    if len(offsets) != count:
        raise ValueError(f"{path} has {count} IFs, and {len(offsets)} in its AIPS FQ table")
    return offsets


def _row(table: FITS_rec, column: str, number: int, path: Path) -> int:
    """Where this number is in a column of a table."""
    rows = np.flatnonzero(np.asarray(table[column]) == number)
    if len(rows) != 1:
        raise ValueError(
            f"{path} has {len(rows)} rows of {column} {number} in a table, expected one"
        )
    return int(rows[0])


def _stokes_i(cells: np.ndarray, header: Header, path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Stokes I and its weight, with axes (row, IF, channel); weight 0 where flagged."""
    value, step, reference = _axis(header, "STOKES")
    codes = value + (np.arange(cells.shape[3]) + 1 - reference) * step
    where = {STOKES.get(round(code), str(code)): i for i, code in enumerate(codes)}
    visibility = cells[..., 0] + 1j * cells[..., 1]
    weight = np.maximum(cells[..., 2], 0.0)
    if "I" in where:
        return visibility[..., where["I"]], weight[..., where["I"]]
    for pair in (("RR", "LL"), ("XX", "YY")):
        if all(hand in where for hand in pair):
            a, b = (where[hand] for hand in pair)
            with np.errstate(divide="ignore"):
                combined = 4 / (1 / weight[..., a] + 1 / weight[..., b])
            return (visibility[..., a] + visibility[..., b]) / 2, combined
    raise ValueError(
        f"{path} has correlations {', '.join(where)}; Stokes I needs I, RR and LL, or XX and YY"
    )


def _phase_centre(hdus: HDUList, source: int | None, path: Path) -> dict[str, float]:
    """Right ascension and declination [deg, ICRS], where they are known."""
    header = hdus[0].header
    epoch = header.get("EPOCH") or header.get("EQUINOX") or 2000.0
    if "AIPS SU" in hdus and source is not None:
        table = hdus["AIPS SU"].data
        star = table[_row(table, "ID. NO.", source, path)]
        return _icrs(star["RAEPO"], star["DECEPO"], star["EPOCH"] or epoch)
    position = [_axis(header, name) for name in ("RA", "DEC")]
    if None in position or source is not None:
        return {}
    return _icrs(position[0][0], position[1][0], epoch)


def _icrs(ra: float, dec: float, epoch: float | str) -> dict[str, float]:
    """A position of the mean equinox of an epoch [yr]; that of 2000 is that of ICRS within 0.03 arcsec."""
    from astropy.coordinates import FK4, FK5, SkyCoord

    year = float(str(epoch).strip("BJ "))
    if year == 2000:
        return {"ra": float(ra), "dec": float(dec)}
    frame = FK4(equinox=f"B{year}") if year < 1984 else FK5(equinox=f"J{year}")
    there = SkyCoord(float(ra), float(dec), unit="deg", frame=frame).icrs
    return {"ra": float(there.ra.deg), "dec": float(there.dec.deg)}
