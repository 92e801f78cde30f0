"""What is in a data file: a table to read before anything is computed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from scoreinv.data.formats.files import checked_path, kind_of, open_fits
from scoreinv.data.formats.images import IMAGE_KEYS, is_image, load_hdf5, load_npy, stored_scale
from scoreinv.data.formats.tables import load_npz, npz_layout
from scoreinv.data.grid import Grid
from scoreinv.data.readers import read_visibilities
from scoreinv.data.visibilities import Visibilities

if TYPE_CHECKING:
    from astropy.io.fits import Header


@dataclass(frozen=True)
class Inspection:
    """Content of a data file.

    Args:
        path: The file.
        kind: What it is, such as "visibilities (UVFITS)" or "image (FITS)".
        shape: Number of visibilities or rows (N,), or shape of the image; the smallest one where
            a file holds several.
        unit: Unit of the values, "" where the file has none.
        range: Smallest and largest value; of |V| for visibilities. None for a catalogue.
        entries: Further lines, as pairs of a name and a text.
        notes: What to look at before going on.
    """

    path: Path
    kind: str
    shape: tuple
    unit: str
    range: tuple[float, float] | None
    entries: tuple[tuple[str, str], ...] = ()
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [
            ("file", str(self.path)),
            ("kind", self.kind),
            ("shape", " x ".join(str(n) for n in self.shape)),
        ]
        if self.range is not None:
            low, high = self.range
            lines.append(("values", f"{low:.4g} to {high:.4g} {self.unit}".rstrip()))
        lines += [*self.entries, *(("note", note) for note in self.notes)]
        width = max(len(name) for name, _ in lines)
        return "\n".join(f"{name:<{width}}  {text}" for name, text in lines)


def inspect(
    path: str | Path, unit: str | None = None, frequency: float | None = None
) -> Inspection:
    """Say what is in a data file.

    Args:
        path: Any file that `read_visibilities` or `read_cutout` reads, or a FITS catalogue.
        unit, frequency: For visibility tables, as in `read_visibilities`.

    Returns:
        An `Inspection`; `str` of it is an aligned table.

    Raises:
        ValueError: If the file is foreign, damaged or truncated.
    """
    path = checked_path(path)
    kind = kind_of(path)
    if kind == "fits":
        return _fits(path)
    if kind == "npy":
        return _arrays(path, {"array": load_npy(path)}, ".npy")
    if kind == "hdf5":
        return _arrays(path, load_hdf5(path), "HDF5")
    if kind == "npz":
        arrays = load_npz(path)
        if npz_layout(arrays) is None:
            return _arrays(path, arrays, ".npz")
    return _visibilities(path, unit, frequency)


def _visibilities(path: Path, unit: str | None, frequency: float | None) -> Inspection:
    vis = read_visibilities(path, unit, frequency)
    layout = vis.source.rpartition("(")[2].rstrip(")")
    size = vis.data.abs()
    return Inspection(
        path=path,
        kind=f"visibilities ({layout})",
        shape=(len(vis),),
        unit="Jy",
        range=(float(size.min()), float(size.max())),
        entries=tuple(_visibility_entries(vis)),
        notes=tuple(_visibility_notes(vis, layout, unit)),
    )


def _visibility_entries(vis: Visibilities) -> Iterator[tuple[str, str]]:
    lengths = vis.baselines / 1000
    yield "flagged", f"{vis.flagged} left out"
    yield "baselines", f"{float(lengths.min()):.4g} to {float(lengths.max()):.4g} klambda"
    yield "resolution", f"{vis.resolution:.4g} arcsec"
    yield "largest scale", f"{vis.largest_scale:.4g} arcsec"
    pixel = vis.largest_pixel / 2
    yield "pixel scale", f"{pixel:.3g} arcsec or less, never above {vis.largest_pixel:.3g}"
    if np.isfinite(vis.largest_scale):
        count = int(np.ceil(vis.largest_scale / pixel))
        yield "field", f"{vis.largest_scale:.4g} arcsec, {count} pixels, holds all scales seen"
    if vis.primary_beam is not None:
        yield "primary beam", f"{vis.primary_beam:.4g} arcsec (full width at half maximum)"
    if vis.ra is not None:
        yield "phase centre", f"RA {vis.ra:.6f} deg, Dec {vis.dec:.6f} deg"
    if vis.frequency is not None:
        yield "frequency", f"{vis.frequency / 1e9:.6g} GHz"
    if vis.antennas is not None:
        yield "antennas", f"{len(vis.antennas.unique())}"
    yield "sum of weights", f"{float(vis.weight.sum()):.4g} Jy^-2"
    yield "natural rms", f"{vis.natural_rms:.4g} Jy/beam"
    check = vis.weight_check()
    if check is not None:
        text = f"scatter / weights {check.robust:.3f} (median), {check.mean:.3f} (mean)"
        yield "weight check", f"{text}, {check.pairs} pairs"


def _visibility_notes(vis: Visibilities, layout: str, unit: str | None) -> Iterator[str]:
    check = vis.weight_check()
    if check is None:
        yield "no antenna numbers: the weights cannot be checked against the scatter"
    elif not 0.8 < check.robust < 1.25:
        yield (
            f"neighbouring visibilities scatter {check.robust:.2f} times as much (variance) as "
            "their weights say; rescale the weights, unless phases were fitted row by row"
        )
    if float(vis.weight.min()) == float(vis.weight.max()):
        yield "all weights are equal: are they calibrated?"
    copies = vis.hermitian_copies()
    if copies:
        yield f"{copies} visibilities are copies of others, also as (-u, -v, conj V); drop them"
    if layout not in ("UVFITS", "visilens"):
        if unit is None:
            yield "u, v are taken as lambda; pass unit='klambda' or unit='m' if they are not"
        yield "the file has no Fourier sign; read columns straight from CASA with sign=+1"


def _fits(path: Path) -> Inspection:
    with open_fits(path) as hdus:
        images = [
            (i, np.asarray(h.data, float), h.header) for i, h in enumerate(hdus) if is_image(h)
        ]
        tables = {i: h.data for i, h in enumerate(hdus) if getattr(h, "columns", None) is not None}
    table_lines = tuple(
        (f"HDU {i}", f"table of {len(table)} rows: {', '.join(table.names)}")
        for i, table in tables.items()
    )
    if images:
        return _fits_images(path, images, table_lines)
    if not tables:
        raise ValueError(f"{path} has neither an image nor a table in its HDUs")
    rows = len(next(iter(tables.values())))
    return Inspection(path, "catalogue (FITS)", (rows,), "", None, table_lines)


def _fits_images(
    path: Path,
    images: list[tuple[int, np.ndarray, Header]],
    table_lines: tuple[tuple[str, str], ...],
) -> Inspection:
    arrays = [image for _, image, _ in images]
    header = images[0][2]
    grid = Grid.from_header(header, arrays[0].shape[-2:])
    lines, notes = [*_hdu_lines(images), *table_lines], [*_pixel_notes(arrays)]
    if grid is None:
        notes.append("no WCS: pass pixel_scale=... [arcsec]")
    else:
        lines.append(("pixel scale", f"{grid.pixel_scale:.5g} arcsec"))
        lines.append(("centre", f"RA {grid.ra:.6f} deg, Dec {grid.dec:.6f} deg"))
    return Inspection(
        path=path,
        kind="image (FITS)" if len(images) == 1 else f"{len(images)} images (FITS)",
        shape=min(image.shape for image in arrays),
        unit=str(header.get("BUNIT", "")).strip(),
        range=_range(arrays),
        entries=tuple(lines),
        notes=tuple(notes),
    )


def _hdu_lines(
    images: list[tuple[int, np.ndarray, Header]], most: int = 8
) -> Iterator[tuple[str, str]]:
    for i, image, header in images[:most]:
        name = header.get("EXTNAME", "image")
        unit = str(header.get("BUNIT", "no unit")).strip()
        yield f"HDU {i}", f"{name}, {_describe(image)}, {unit}"
    if len(images) > most:
        sides = [n for _, image, _ in images for n in image.shape[-2:]]
        yield "...", f"{len(images) - most} more, sides {min(sides)} to {max(sides)} pixels"


def _arrays(path: Path, arrays: dict[str, np.ndarray], name: str) -> Inspection:
    images = {k: v for k, v in arrays.items() if _could_be_image(v)}
    if not images:
        raise ValueError(f"{path} holds {', '.join(arrays)}, and none of them is an image")
    lines = [(key, _describe(np.asarray(image, float))) for key, image in images.items()]
    lines += [(k, str(v)) for k, v in arrays.items() if v.ndim == 0]
    scale = stored_scale(arrays)
    if scale is not None:
        lines.append(("pixel scale", f"{scale:.5g} arcsec"))
    notes = list(_pixel_notes(images.values()))
    if scale is None:
        notes.append("no pixel scale: pass pixel_scale=... [arcsec]")
    first = next((images[key] for key in IMAGE_KEYS if key in images), [*images.values()][0])
    kind = f"{'image' if len(images) == 1 else f'{len(images)} images'} ({name})"
    return Inspection(path, kind, first.shape, "", _range([first]), tuple(lines), tuple(notes))


def _could_be_image(array: np.ndarray) -> bool:
    return array.ndim >= 2 and min(array.shape[-2:]) >= 8 and array.dtype.kind in "fiu"


def _describe(image: np.ndarray) -> str:
    text = " x ".join(str(n) for n in image.shape)
    width = fwhm(image) if image.ndim == 2 else None
    return text if width is None else f"{text}, central source of FWHM {width:.2f} pixels"


def fwhm(image: np.ndarray) -> float | None:
    """Full width at half maximum of a source in the middle of an image [pixel].

    The diameter of a circle with the area above half of the peak, on a finer spline grid. None
    if the peak is not within two pixels of the middle, or the area is not small.
    """
    from scipy.ndimage import zoom

    if not np.isfinite(image).all() or min(image.shape) < 8:
        return None
    middle = tuple(slice(max(0, n // 2 - 16), n // 2 + 17) for n in image.shape)
    peak = np.unravel_index(np.argmax(image), image.shape)
    if max(abs(p - n // 2) for p, n in zip(peak, image.shape, strict=True)) > 2:
        return None
    fine = zoom(image[middle], 8, order=3, grid_mode=True, mode="grid-constant")
    area = (fine > fine.max() / 2).sum() / 64
    return None if area > 0.2 * image[middle].size else float(2 * np.sqrt(area / np.pi))


def _range(images: Iterable[np.ndarray]) -> tuple[float, float]:
    return tuple(float(f([f(x) for x in images])) for f in (np.nanmin, np.nanmax))


def _pixel_notes(images: Iterable[np.ndarray]) -> Iterator[str]:
    images = [np.asarray(image, float) for image in images]
    bad = sum(int((~np.isfinite(image)).sum()) for image in images)
    if bad:
        yield f"{bad} pixels are NaN or infinite; read_cutout(..., mask_nan=True) masks them"
    zeros = sum(int((image == 0).sum()) for image in images) / sum(x.size for x in images)
    if zeros > 0.01:
        yield f"{zeros:.0%} of the pixels are exactly 0: masked, or padding?"
