"""Visibility tables that record neither unit nor sign: `.npz` archives and text columns.

| layout  | keys                         | written by           | unit                       |
|---------|------------------------------|----------------------|----------------------------|
| frank   | u, v, V, weights             | frank                | lambda                     |
| exoALMA | u, v, Vis, Wgt               | exoALMA              | lambda                     |
| MPoL    | uu, vv, data, weight         | MPoL, visread, IRIS  | kilolambda, later lambda   |
| text    | 5 columns u, v, Re, Im, w    | frank, galario       | lambda, or metres          |
"""

from __future__ import annotations

import bz2
import gzip
import io
import zipfile
import zlib
from pathlib import Path

import numpy as np

from scoreinv.data.formats.visibility_table import VisibilityTable

LAYOUTS = {
    "frank": ("u", "v", "V", "weights"),
    "exoALMA": ("u", "v", "Vis", "Wgt"),
    "MPoL": ("uu", "vv", "data", "weight"),
}


def load_npz(path: Path) -> dict[str, np.ndarray]:
    """Arrays of an `.npz` archive, by name.

    Raises:
        ValueError: If the archive is damaged or holds Python objects.
    """
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except (zipfile.BadZipFile, zlib.error, OSError, EOFError, ValueError) as error:
        raise ValueError(
            f"{path} is a damaged .npz archive or holds Python objects ({error}); expected plain "
            "arrays, as from numpy.savez"
        ) from error


def npz_layout(arrays: dict[str, np.ndarray]) -> str | None:
    """Name of the layout whose keys are all there, or None."""
    for name, keys in LAYOUTS.items():
        if all(key in arrays for key in keys):
            return name
    return None


def read_npz(path: Path) -> VisibilityTable:
    """Read visibilities from an `.npz` archive.

    Raises:
        ValueError: If the keys fit no layout, or there are several channels.
    """
    arrays = load_npz(path)
    layout = npz_layout(arrays)
    if layout is None:
        known = "; ".join(f"{name}: {', '.join(keys)}" for name, keys in LAYOUTS.items())
        raise ValueError(f"{path} has the keys {', '.join(arrays)}; expected those of {known}")
    u, v, data, weight = (
        _one_channel(arrays[key], key, path, complex_too=key == LAYOUTS[layout][2])
        for key in LAYOUTS[layout]
    )
    lengths = dict(zip(LAYOUTS[layout], map(len, (u, v, data, weight)), strict=True))
    if len(set(lengths.values())) > 1:
        seen = ", ".join(f"{key} has {n}" for key, n in lengths.items())
        raise ValueError(f"{path}: {seen} numbers, expected as many of each")
    unit = None if layout == "MPoL" else "lambda"
    return VisibilityTable(u, v, data, weight, unit, None, layout, {})


def read_text(path: Path) -> VisibilityTable:
    """Read visibilities from five columns of text, plain or compressed with gzip or bzip2.

    Raises:
        ValueError: If the file is truncated, empty, or does not have five columns.
    """
    text = _decompressed(path)
    if not any(line.strip() and not line.lstrip().startswith("#") for line in text.splitlines()):
        raise ValueError(f"{path} has no rows of numbers; expected u, v, Re, Im, weight")
    try:
        rows = np.loadtxt(io.StringIO(text), ndmin=2)
    except ValueError as error:
        raise ValueError(
            f"{path} is not a table of numbers ({error}); expected five columns u, v, Re, Im, "
            "weight between blanks, with # before comments"
        ) from error
    if rows.shape[1] != 5:
        raise ValueError(
            f"{path} has {rows.shape[1]} columns, expected five: u, v, Re, Im, weight"
        )
    u, v, real, imag, weight = rows.T
    return VisibilityTable(u, v, real + 1j * imag, weight, "lambda", None, "text", {})


def _one_channel(array: np.ndarray, key: str, path: Path, complex_too: bool) -> np.ndarray:
    if array.dtype.kind not in ("biufc" if complex_too else "biuf"):
        raise ValueError(
            f"{path} has {key} of type {array.dtype}, expected {'' if complex_too else 'real '}numbers"
        )
    if array.ndim == 2 and array.shape[0] > 1:
        raise ValueError(
            f"{path} has {array.shape[0]} channels in {key}, with shape {array.shape}; an image "
            "is made from one: save the channel you want as arrays of shape (N,)"
        )
    return array.reshape(-1)


def _decompressed(path: Path) -> str:
    with open(path, "rb") as file:
        magic = file.read(3)
    opener = gzip.open if magic[:2] == b"\x1f\x8b" else bz2.open if magic == b"BZh" else open
    try:
        with opener(path, "rt", encoding="utf-8") as file:
            return file.read()
    except (EOFError, OSError, UnicodeDecodeError, zlib.error) as error:
        raise ValueError(
            f"{path} is truncated or not a text table ({error}); copy or download it again"
        ) from error
