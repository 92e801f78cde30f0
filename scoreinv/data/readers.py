"""From a file to `Visibilities` or a `Cutout`: here units, signs and flags are settled."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from scoreinv.data.cutout import ENOUGH_PIXELS, Cutout, blank_sky, noise_spectrum
from scoreinv.data.formats import tables, uvfits, visilens
from scoreinv.data.formats.files import checked_path, kind_of, sha256
from scoreinv.data.formats.images import (
    PSF_KEYS,
    StoredImage,
    catalogue_row,
    image_hdus,
    read_image,
)
from scoreinv.data.formats.visibility_table import VisibilityTable
from scoreinv.data.grid import Grid
from scoreinv.data.visibilities import Visibilities

LIGHT = 299792458.0
VISIBILITY_FORMATS = {
    "visilens": visilens.read,
    "uvfits": uvfits.read,
    "npz": tables.read_npz,
    "text": tables.read_text,
}

logger = logging.getLogger(__name__)


def read_visibilities(
    path: str | Path,
    unit: str | None = None,
    frequency: float | None = None,
    format: str | None = None,
    sign: int | None = None,
) -> Visibilities:
    """Read visibilities from UVFITS, visilens `.bin`, `.npz` or a text table.

    Flagged rows, of zero weight, are left out and counted. Negative weights are flags in UVFITS
    and errors elsewhere.

    Args:
        path: File.
        unit: Unit of u, v in `.npz` and text: "lambda" (the default), "klambda", or "m" together
            with `frequency`. Archives of MPoL and IRIS need it: theirs has changed over time.
        frequency: Frequency [Hz] where the file has none.
        format: "uvfits", "visilens", "npz" or "text"; left out, it is seen from the content.
        sign: Sign of the Fourier exponent in the file: -1 for exp(-2 pi i (u l + v m)), +1 for
            its conjugate. UVFITS and visilens have +1. Tables do not record it: the default is
            -1, as in this package and MPoL; columns taken straight from a CASA
            measurement set need +1. The wrong sign turns the image by 180 degrees.

    Returns:
        `Visibilities`, with the sign of this package.

    Raises:
        ValueError: If the file is damaged, foreign, or leaves a choice open.
    """
    path = checked_path(path)
    kind = kind_of(path) if format is None else format
    if kind not in VISIBILITY_FORMATS:
        raise ValueError(
            f"{path} is read as {kind!r}, expected visibilities in one of "
            f"{', '.join(VISIBILITY_FORMATS)}; images are read with read_cutout"
        )
    table = VISIBILITY_FORMATS[kind](path)
    factor = _wavelengths(table, unit, frequency, path)
    # The opposite sign is the same baseline seen from its other end.
    factor = -factor if _sign(table, sign) > 0 else factor
    kept = table.weight != 0
    flagged = int((~kept).sum())
    if flagged:
        logger.info("%s: %d of %d visibilities are flagged", path, flagged, len(kept))
    extra = {"frequency": frequency, **table.extra}
    extra = {k: v[kept] if isinstance(v, np.ndarray) else v for k, v in extra.items()}
    return Visibilities(
        uv=factor * np.stack([table.u, table.v], 1)[kept],
        data=table.data[kept],
        weight=table.weight[kept],
        source=f"{path.name} ({table.layout})",
        sha256=sha256(path),
        flagged=flagged,
        **extra,
    )


def _wavelengths(
    table: VisibilityTable, unit: str | None, frequency: float | None, path: Path
) -> float:
    """Factor from the file's u, v to wavelengths."""
    if table.layout in ("UVFITS", "visilens"):
        if unit not in (None, "lambda"):
            raise ValueError(
                f"{path} is {table.layout}, whose unit is known; leave out unit={unit!r}"
            )
        return 1.0
    unit = table.unit if unit is None else unit
    if unit is None:
        raise ValueError(
            f"{path} has the keys of MPoL, which meant kilolambda and later lambda; pass "
            "unit='klambda' or unit='lambda'"
        )
    if unit == "m":
        if frequency is None:
            raise ValueError("unit='m' needs frequency=... [Hz] to turn metres into wavelengths")
        if not frequency > 0:
            raise ValueError(f"frequency is {frequency:g} Hz, expected above 0")
        return frequency / LIGHT
    if unit not in ("lambda", "klambda"):
        raise ValueError(f"unit is {unit!r}, expected 'lambda', 'klambda' or 'm'")
    return 1000.0 if unit == "klambda" else 1.0


def _sign(table: VisibilityTable, sign: int | None) -> int:
    if sign not in (None, -1, 1):
        raise ValueError(f"sign is {sign!r}, expected -1 or +1")
    return next(s for s in (sign, table.sign, -1) if s is not None)


def read_cutout(
    path: str | Path,
    hdu: int | str = 0,
    psf: str | Path | np.ndarray | None = None,
    psf_hdu: int | str | None = None,
    size: int | tuple[int, int] | None = None,
    centre: tuple[int, int] | None = None,
    noise: float | str | None = None,
    catalogue: str | Path | None = None,
    pixel_scale: float | None = None,
    background: float | str | None = None,
    mask_nan: bool = False,
    psf_size: int | None = None,
    plane: int | None = None,
) -> Cutout:
    """Read an image with its PSF from FITS, `.npz`, `.npy` or HDF5.

    Args:
        path: File with the image.
        hdu: Number or name of the FITS HDU; name of the array in `.npz` and HDF5 files.
        psf: File with the PSF at the same pixel scale, which may be `path` itself, or an array
            of shape (h, w). Left out, the cutout has no PSF.
        psf_hdu: HDU or array of the PSF; left out, what the catalogue says, or the only one.
        size: Side, or (rows, columns), of the part to keep [pixel]; left out, everything.
        centre: Pixel (row, column) of the file that comes to (H // 2, W // 2) of the part; left
            out, the middle of the image.
        noise: The standard deviation of white noise; or "measured", the spectrum of the blank
            sky in all images of the file. Left out, the cutout has no noise.
        catalogue: GalSim catalogue of the file. It gives the pixel scale, the HDU of the PSF and
            the variance that a measured spectrum is scaled to. Left out, that variance is the
            one of the blank sky of this image.
        pixel_scale: Side of a pixel [arcsec], for files that do not state it.
        background: Number, or "median-of-border" of the whole image, to subtract; left out,
            nothing is subtracted.
        mask_nan: Give NaN pixels the value 0 and no weight, by `mask`.
        psf_size: Largest side of the part of the PSF to keep around its centre (h // 2, w // 2)
            [pixel].
        plane: Which image of a three-dimensional array; for the PSF also, if that has several.

    Returns:
        `Cutout`.

    Raises:
        ValueError: If something is missing, damaged or does not fit; the message says what.
    """
    path = checked_path(path)
    image = read_image(path, hdu, plane)
    row = None if catalogue is None else catalogue_row(catalogue, path, hdu)
    grid = _grid(image, row, pixel_scale, path)
    level = _background(image.pixels, background)
    window = _window(grid.shape, size, centre)
    pixels = image.pixels[window] - level
    measured = np.isfinite(pixels)
    if mask_nan:
        pixels = np.where(measured, pixels, 0.0)
    std, spectrum = _noise(noise, path, image, row, pixels.shape)
    return Cutout(
        data=pixels[None],
        grid=grid.cropped(window[0].start, window[1].start, pixels.shape) if size else grid,
        psf=None if psf is None else _psf(psf, psf_hdu, row, psf_size, plane)[None],
        noise_spectrum=spectrum,
        std=std,
        mask=measured[None] if mask_nan else None,
        background=level,
        source=f"{path.name} [{hdu}]",
        sha256=sha256(path),
    )


def _grid(
    image: StoredImage, row: dict[str, Any] | None, pixel_scale: float | None, path: Path
) -> Grid:
    shape = image.pixels.shape
    grid = None if image.header is None else Grid.from_header(image.header, shape, image.unit)
    stated = grid.pixel_scale if grid else image.pixel_scale
    if stated is None and row is not None:
        stated = float(row["PIXEL_SCALE"])
    if stated is None and pixel_scale is None:
        raise ValueError(f"{path} does not state its pixel scale; pass pixel_scale=... [arcsec]")
    if stated is not None and pixel_scale is not None and abs(pixel_scale / stated - 1) > 0.01:
        raise ValueError(
            f"pixel_scale is {pixel_scale} arcsec, and {path} states {stated:.6g}; leave it out"
        )
    return grid or Grid(shape, stated or pixel_scale, unit=image.unit)


def _background(pixels: np.ndarray, background: float | str | None) -> float:
    if background is None:
        return 0.0
    if background != "median-of-border":
        if isinstance(background, str):
            raise ValueError(
                f"background is {background!r}, expected a number or 'median-of-border'"
            )
        return float(background)
    edge = np.ones(pixels.shape, bool)
    edge[1:-1, 1:-1] = False
    if not np.isfinite(pixels[edge]).any():
        raise ValueError(
            "no pixel of the border is finite, and background is 'median-of-border'; give the background as a number"
        )
    return float(np.nanmedian(pixels[edge]))


def _window(
    shape: tuple[int, int],
    size: int | tuple[int, int] | None,
    centre: tuple[int, int] | None,
) -> tuple[slice, slice]:
    """Slices of the part of an image that has `centre` at its own centre."""
    if size is None:
        if centre is not None:
            raise ValueError("centre was passed without size; pass the size of the part to keep")
        return slice(0, shape[0]), slice(0, shape[1])
    sizes = (size, size) if np.isscalar(size) else tuple(size)
    if min(sizes) < 1:
        raise ValueError(f"a part of shape {sizes} has no pixels; expected a size of at least 1")
    centre = tuple(n // 2 for n in shape) if centre is None else centre
    starts = [c - n // 2 for c, n in zip(centre, sizes, strict=True)]
    if any(s < 0 or s + n > m for s, n, m in zip(starts, sizes, shape, strict=True)):
        raise ValueError(
            f"a part of shape {sizes} around pixel {tuple(centre)} leaves the image of shape "
            f"{tuple(shape)}; take a smaller size or another centre"
        )
    return tuple(slice(s, s + n) for s, n in zip(starts, sizes, strict=True))


def _psf(
    psf: str | Path | np.ndarray,
    psf_hdu: int | str | None,
    row: dict[str, Any] | None,
    psf_size: int | None,
    plane: int | None,
) -> np.ndarray:
    if isinstance(psf, (str, Path)):
        pixels = _stored_psf(checked_path(psf), psf_hdu, row, plane)
    else:
        pixels = np.asarray(psf, float)
    if pixels.ndim != 2:
        raise ValueError(f"psf has shape {pixels.shape}, expected (h, w)")
    if psf_size is None:
        return pixels
    return pixels[_window(pixels.shape, tuple(min(psf_size, n) for n in pixels.shape), None)]


def _stored_psf(
    path: Path, psf_hdu: int | str | None, row: dict[str, Any] | None, plane: int | None
) -> np.ndarray:
    if psf_hdu is None and kind_of(path) == "fits":
        found = image_hdus(path)
        if row is not None:
            psf_hdu = int(row["PSF_HDU"])
        elif len(found) == 1:
            psf_hdu = next(iter(found))
        else:
            raise ValueError(f"{path} holds {len(found)} images; pass psf_hdu to choose the PSF")
    return read_image(path, psf_hdu or 0, plane, PSF_KEYS).pixels


def _noise(
    noise: float | str | None,
    path: Path,
    image: StoredImage,
    row: dict[str, Any] | None,
    shape: tuple[int, int],
) -> tuple[float | None, Tensor | None]:
    """Standard deviation and spectrum of the noise, None where not asked for."""
    if noise is None:
        return None, None
    if noise != "measured":
        if isinstance(noise, str):
            raise ValueError(f"noise is {noise!r}, expected a standard deviation or 'measured'")
        return float(noise), None
    skies = _blank_skies(path, image)
    variance = _sky_variance(image, path) if row is None else float(row["NOISE_VARIANCE"])
    max_lag = min(8, (min(shape) - 1) // 2)
    return variance**0.5, noise_spectrum(skies, shape, variance, max_lag)


def _blank_skies(path: Path, image: StoredImage) -> list[np.ndarray]:
    """Blank sky of every image of a file, each divided by its own standard deviation."""
    pixels = [image.pixels]
    if kind_of(path) == "fits" and image.header is not None:
        pixels = [x for x in image_hdus(path).values() if x.ndim == 2] or pixels
    skies = (blank_sky(x) for x in pixels)
    return [x / np.nanstd(x) for x in skies if np.isfinite(x).sum() >= ENOUGH_PIXELS]


def _sky_variance(image: StoredImage, path: Path) -> float:
    sky = blank_sky(image.pixels)
    count = int(np.isfinite(sky).sum())
    if count < ENOUGH_PIXELS:
        raise ValueError(
            f"the image of {path} has {count} pixels of blank sky, expected {ENOUGH_PIXELS} to "
            "measure its variance; pass catalogue=... or noise=<standard deviation>"
        )
    return float(np.nanvar(sky))
