"""Images from FITS, `.npz`, `.npy` and HDF5 files, as plain arrays with what their file says."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from scoreinv.data.formats.files import checked_path, kind_of, open_fits
from scoreinv.data.formats.tables import load_npz

if TYPE_CHECKING:
    from astropy.io.fits import HDUList, Header

IMAGE_KEYS = ("image_data", "images", "image")
PSF_KEYS = ("psf_model", "kernel_point_source", "psfs", "psf")


@dataclass(frozen=True, eq=False)
class StoredImage:
    """An image as it is stored.

    Args:
        pixels: Values, with shape (H, W), float64.
        header: FITS header, or None.
        pixel_scale: Side of a pixel [arcsec] where a file without WCS states it, or None.
        unit: Unit that the file states, or "".
    """

    pixels: np.ndarray
    header: Header | None
    pixel_scale: float | None
    unit: str


def read_image(
    path: str | Path,
    hdu: int | str = 0,
    plane: int | None = None,
    keys: tuple[str, ...] = IMAGE_KEYS,
) -> StoredImage:
    """Read one image.

    Args:
        path: File.
        hdu: Number or name of a FITS HDU, or name of an array in the other formats.
        plane: Which image of a three-dimensional array; an array of one image ignores it.
        keys: Names of arrays that a number as `hdu` stands for in `.npz` and HDF5 files.

    Raises:
        ValueError: If there is no such image.
    """
    path = checked_path(path)
    kind = kind_of(path)
    if kind == "fits":
        pixels, header = _fits_image(path, hdu)
        unit = str(header.get("BUNIT", "")).strip()
        return StoredImage(_plane(pixels, plane, path, hdu), header, None, unit)
    if kind == "npy":
        return StoredImage(_plane(load_npy(path), plane, path, hdu), None, None, "")
    if kind not in ("npz", "hdf5"):
        raise ValueError(f"{path} is a {kind} file, expected an image: FITS, .npz, .npy or HDF5")
    arrays = load_npz(path) if kind == "npz" else load_hdf5(path)
    name = hdu if isinstance(hdu, str) else next((key for key in keys if key in arrays), None)
    if name not in arrays:
        raise ValueError(f"{path} holds {', '.join(arrays)}; pass the name of the image as hdu")
    return StoredImage(_plane(arrays[name], plane, path, name), None, stored_scale(arrays), "")


def image_hdus(path: Path) -> dict[int, np.ndarray]:
    """Numbers and arrays of the HDUs of a FITS file that hold images."""
    with open_fits(path) as hdus:
        return {i: np.asarray(hdu.data, float) for i, hdu in enumerate(hdus) if is_image(hdu)}


def catalogue_row(path: str | Path, image_path: Path, hdu: int | str) -> dict[str, Any]:
    """Row of a GalSim catalogue, as a dict, that describes one HDU of an image file.

    Raises:
        ValueError: Unless there is exactly one such row.
    """
    with open_fits(checked_path(path)) as hdus:
        tables = [x.data for x in hdus if getattr(x, "columns", None) is not None]
    if not tables or "GAL_HDU" not in tables[0].names:
        raise ValueError(f"{path} is no GalSim catalogue: it has no table with a column GAL_HDU")
    table = tables[0]
    rows = table["GAL_HDU"] == hdu
    files = np.char.strip(np.asarray(table["GAL_FILENAME"], str))
    if (files == image_path.name).any():
        rows &= files == image_path.name
    if rows.sum() != 1:
        raise ValueError(
            f"{path} has {rows.sum()} rows for HDU {hdu} of {image_path.name}, expected one"
        )
    return {name: table[name][rows][0] for name in table.names}


def load_npy(path: Path) -> np.ndarray:
    """The array of an `.npy` file.

    Raises:
        ValueError: If the file is damaged or holds Python objects.
    """
    try:
        return np.load(path, allow_pickle=False)
    except (OSError, EOFError, ValueError) as error:
        raise ValueError(
            f"{path} is a damaged .npy file or holds Python objects ({error}); copy it again"
        ) from error


def load_hdf5(path: Path) -> dict[str, np.ndarray]:
    """Arrays of numbers of an HDF5 file, by name; groups are not entered.

    Raises:
        ValueError: If the file is damaged.
    """
    import h5py

    try:
        with h5py.File(path) as file:
            items = {k: v for k, v in file.items() if isinstance(v, h5py.Dataset)}
            numbers = {
                k: v for k, v in items.items() if v.shape is not None and v.dtype.kind in "biufc"
            }
            return {name: np.asarray(item[()]) for name, item in numbers.items()}
    except OSError as error:
        raise ValueError(
            f"{path} is a damaged or truncated HDF5 file ({error}); copy or download it again"
        ) from error


def stored_scale(arrays: dict[str, np.ndarray]) -> float | None:
    """Pixel scale [arcsec] among named arrays: a number, or lenstronomy's matrix; else None."""
    if "transform_pix2angle" in arrays:
        return float(np.sqrt(abs(np.linalg.det(arrays["transform_pix2angle"]))))
    scale = np.asarray(arrays.get("pixel_scale_arcsec", np.nan))
    if scale.size != 1:
        raise ValueError(
            f"pixel_scale_arcsec has shape {scale.shape}, expected one number; pass pixel_scale=... [arcsec]"
        )
    return float(scale) if np.isfinite(scale).all() else None


def is_image(hdu: Any) -> bool:
    """True for a FITS HDU that holds an image."""
    return getattr(hdu, "is_image", False) and np.ndim(hdu.data) >= 2


def _fits_image(path: Path, hdu: int | str) -> tuple[np.ndarray, Header]:
    with open_fits(path) as hdus:
        try:
            chosen = hdus[hdu]
        except (IndexError, KeyError) as error:
            raise ValueError(f"{path} has no HDU {hdu!r}; it has {_listing(hdus)}") from error
        if not is_image(chosen):
            raise ValueError(f"HDU {hdu!r} of {path} holds no image; it has {_listing(hdus)}")
        return np.asarray(chosen.data), chosen.header


def _listing(hdus: HDUList) -> str:
    names = [f"{i} {hdu.name} {getattr(hdu, 'shape', ())}" for i, hdu in enumerate(hdus)]
    return f"{len(hdus)} HDUs: " + ", ".join(names[:6]) + (", ..." if len(names) > 6 else "")


def _plane(pixels: np.ndarray, plane: int | None, path: Path, hdu: int | str) -> np.ndarray:
    if pixels.dtype.kind not in "biuf":
        raise ValueError(
            f"array {hdu!r} of {path} is of type {pixels.dtype}, expected real numbers, the brightness of pixels"
        )
    if pixels.ndim > 2 and set(pixels.shape[:-2]) == {1}:
        pixels = pixels.reshape(pixels.shape[-2:])
    if pixels.ndim == 3 and plane is not None:
        if not 0 <= plane < len(pixels):
            raise ValueError(f"array {hdu!r} of {path} has {len(pixels)} planes, not {plane}")
        pixels = pixels[plane]
    if pixels.ndim != 2:
        raise ValueError(
            f"array {hdu!r} of {path} has shape {pixels.shape}, expected one image (H, W); pass "
            "plane=... to choose one of several"
        )
    return np.asarray(pixels, float)
