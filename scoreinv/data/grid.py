"""The pixel grid of an image and its place on the sky.

A grid is H rows by W columns of square pixels. Its reference pixel is (H // 2, W // 2), at the
phase centre or at the pointing (ra, dec). World coordinates follow Calabretta & Greisen,
"Representations of celestial coordinates in FITS" (2002, A&A 395, 1077): the orthographic
projection SIN is that of an interferometer, the gnomonic projection TAN that of a telescope.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from astropy.io.fits import Header
    from astropy.wcs import WCS

PROJECTIONS = {"radio": "SIN", "optical": "TAN"}


def ascii_of(text: str) -> str:
    """What a FITS header can hold of a text."""
    return text.replace("\u00b5", "u").replace("\u03bc", "u").encode("ascii", "replace").decode()


def read_wcs(header: Header) -> WCS:
    """The WCS of a FITS header; what astropy mends in its dates and units is let pass."""
    from astropy.wcs import WCS, FITSFixedWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FITSFixedWarning)
        return WCS(header)


@dataclass(frozen=True)
class Grid:
    """Pixels on the sky.

    Args:
        shape: Number of rows and columns, (H, W).
        pixel_scale: Side of a pixel [arcsec].
        ra, dec: Sky position of pixel (H // 2, W // 2) [deg], both or neither.
        frequency: Frequency of the image [Hz].
        unit: Unit of the image, such as "Jy/pixel".
        wcs_header: FITS cards of a measured WCS, which then replace the ones made from ra, dec.

    Raises:
        ValueError: For an empty shape, a pixel scale that is not positive, or ra without dec.
    """

    shape: tuple[int, int]
    pixel_scale: float
    ra: float | None = None
    dec: float | None = None
    frequency: float | None = None
    unit: str = ""
    wcs_header: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        shape = tuple(int(n) for n in self.shape)
        if len(shape) != 2 or min(shape) < 1:
            raise ValueError(f"shape is {self.shape}, expected (rows, columns) such as (64, 64)")
        if not (np.isfinite(self.pixel_scale) and self.pixel_scale > 0):
            raise ValueError(
                f"pixel_scale is {self.pixel_scale}, expected a positive number of arcsec"
            )
        if (self.ra is None) != (self.dec is None):
            raise ValueError(f"ra is {self.ra} and dec is {self.dec}: give both [deg], or neither")
        object.__setattr__(self, "shape", shape)

    @classmethod
    def from_header(cls, header: Header, shape: tuple[int, int], unit: str = "") -> Grid | None:
        """Grid of an image of shape (H, W) with the celestial WCS of a FITS header.

        Returns None if the header holds no celestial WCS.

        Raises:
            ValueError: If the pixels are not square to 1 %.
        """
        from astropy.wcs.utils import proj_plane_pixel_scales

        wcs = read_wcs(header).celestial
        if not wcs.has_celestial:
            return None
        scales = 3600.0 * proj_plane_pixel_scales(wcs)
        if abs(scales[0] - scales[1]) > 0.01 * scales.mean():
            raise ValueError(
                f"the pixels measure {scales[0]:.6g} x {scales[1]:.6g} arcsec, expected squares; "
                "resample the image first"
            )
        rows, columns = shape
        ra, dec = (float(x) for x in wcs.all_pix2world(columns // 2, rows // 2, 0))
        cards = {card.keyword: card.value for card in wcs.to_header(relax=True).cards}
        scale = float(scales.mean())
        return cls((rows, columns), scale, ra, dec, unit=unit, wcs_header=cards)

    @property
    def field(self) -> tuple[float, float]:
        """Height and width of the grid [arcsec]."""
        return tuple(n * self.pixel_scale for n in self.shape)

    def offsets(self) -> tuple[np.ndarray, np.ndarray]:
        """Offsets from the reference pixel: East, with shape (W,), and North, (H,) [arcsec]."""
        rows, columns = self.shape
        east = -(np.arange(columns) - columns // 2) * self.pixel_scale
        return east, (np.arange(rows) - rows // 2) * self.pixel_scale

    def cropped(self, row: int, column: int, shape: tuple[int, int]) -> Grid:
        """The part of the grid that begins at pixel (row, column), of the given shape (H, W)."""
        middle = tuple(n // 2 for n in self.shape)
        if self.wcs_header is None and (row + shape[0] // 2, column + shape[1] // 2) == middle:
            return replace(self, shape=shape)
        wcs = self.wcs()
        cards = dict(self.header())
        cards["CRPIX1"] -= column
        cards["CRPIX2"] -= row
        part = replace(self, shape=shape, wcs_header=cards)
        if not wcs.has_celestial:
            return part
        rows, columns = part.shape
        ra, dec = wcs.all_pix2world(column + columns // 2, row + rows // 2, 0)
        return replace(part, ra=float(ra), dec=float(dec))

    def header(self, kind: str | None = None) -> Header:
        """FITS cards of the two sky axes, for the header of an image of this grid.

        Without ra and dec the axes are linear offsets from the reference pixel [arcsec], positive
        to the East and to the North.

        Args:
            kind: "radio" (SIN projection) or "optical" (TAN). Left out, a grid with a frequency
                is radio and any other is optical. A measured WCS is returned as it is.

        Returns:
            An `astropy.io.fits.Header`.
        """
        from astropy.io.fits import Header

        if kind is not None and kind not in PROJECTIONS:
            raise ValueError(f"kind is {kind!r}, expected one of {sorted(PROJECTIONS)}")
        if self.wcs_header is not None:
            cards = dict(self.wcs_header)
        elif self.ra is None:
            cards = self._linear()
        else:
            kind = kind or ("optical" if self.frequency is None else "radio")
            cards = self._celestial(PROJECTIONS[kind])
        if self.frequency is not None:
            cards["RESTFRQ"] = self.frequency
        if self.unit:
            cards["BUNIT"] = ascii_of(self.unit)
        header = Header()
        header.update(cards)
        return header

    def wcs(self, kind: str | None = None) -> WCS:
        """The `astropy.wcs.WCS` of the two sky axes; `kind` as in `header`."""
        return read_wcs(self.header(kind))

    def _celestial(self, projection: str) -> dict[str, Any]:
        return {
            "WCSAXES": 2,
            "RADESYS": "ICRS",
            **self._axes((f"RA---{projection}", f"DEC--{projection}"), "deg", 1 / 3600),
            "CRVAL1": self.ra,
            "CRVAL2": self.dec,
        }

    def _linear(self) -> dict[str, Any]:
        axes = self._axes(("OFFSET-E", "OFFSET-N"), "arcsec", 1.0)
        return {"WCSAXES": 2, **axes, "CRVAL1": 0.0, "CRVAL2": 0.0}

    def _axes(self, names: tuple[str, str], unit: str, factor: float) -> dict[str, Any]:
        rows, columns = self.shape
        return {
            "CTYPE1": names[0],
            "CTYPE2": names[1],
            "CUNIT1": unit,
            "CUNIT2": unit,
            # FITS counts pixels from 1.
            "CRPIX1": columns // 2 + 1.0,
            "CRPIX2": rows // 2 + 1.0,
            "CDELT1": -self.pixel_scale * factor,
            "CDELT2": self.pixel_scale * factor,
        }
