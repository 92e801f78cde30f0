"""What a file is, seen from its first bytes, and how to open it without surprises."""

from __future__ import annotations

import gzip
import hashlib
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from astropy.io.fits import HDUList

KINDS = ("fits", "uvfits", "npz", "npy", "hdf5", "visilens", "text")


def checked_path(path: str | Path) -> Path:
    """The path, if it is a file.

    Raises:
        FileNotFoundError: If nothing is there.
        ValueError: For a folder, such as a measurement set.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(
            f"{path} is a folder, expected a file; from a measurement set, write UVFITS with the "
            "CASA task exportuvfits, or a table of u, v, Re, Im, weight"
        )
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    return path


def sha256(path: Path) -> str:
    """SHA-256 of a file, as 64 hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def kind_of(path: str | Path) -> str:
    """Kind of a file, one of `KINDS`, from its content; the name decides only for `.bin`.

    Raises:
        ValueError: If the file is empty or of no kind that is read here.
    """
    path = checked_path(path)
    with open(path, "rb") as file:
        head = file.read(8192)
    if not head:
        raise ValueError(f"{path} is empty (0 bytes); copy or download it again")
    name = path.name.lower()
    if name.endswith((".tar", ".tgz", ".tar.gz", ".tar.bz2", ".zip")):
        raise ValueError(f"{path} is an archive; unpack it and read a file inside")
    compressed = head.startswith((b"\x1f\x8b", b"BZh"))
    inside = _head_inside(path) if head.startswith(b"\x1f\x8b") else head
    if inside.startswith(b"SIMPLE  ="):
        return "uvfits" if _has_groups(inside) else "fits"
    for magic, kind in ((b"PK\x03\x04", "npz"), (b"\x93NUMPY", "npy"), (b"\x89HDF", "hdf5")):
        if head.startswith(magic):
            return kind
    if compressed:
        return "text"
    if path.suffix.lower() == ".bin":
        return "visilens"
    if b"\x00" not in head and _is_text(head):
        return "text"
    raise ValueError(
        f"{path} is of no known kind: it begins with {head[:8]!r}; expected FITS, UVFITS, .npz, "
        "HDF5, a visilens .bin, or a text table"
    )


@contextmanager
def open_fits(path: Path) -> Iterator[HDUList]:
    """An open FITS file; what is merely untidy in it is let pass.

    Raises:
        ValueError: If the file is truncated or is not FITS.
    """
    from astropy.io import fits
    from astropy.io.fits.verify import VerifyWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", VerifyWarning)
        warnings.filterwarnings("error", message=".*[Tt]runcated")
        try:
            # Opened here, so that it is closed also when astropy gives up.
            with open(path, "rb") as file, fits.open(file, memmap=False) as hdus:
                for hdu in hdus:
                    _ = hdu.data
                yield hdus
        except (OSError, EOFError, zlib.error, fits.VerifyError, Warning) as error:
            raise ValueError(
                f"{path} is a damaged or truncated FITS file ({error}); copy or download it again"
            ) from error


def _head_inside(path: Path) -> bytes:
    """The first bytes of what gzip has compressed."""
    try:
        with gzip.open(path) as file:
            return file.read(8192)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(
            f"{path} is a damaged or truncated gzip file ({error}); copy or download it again"
        ) from error


def _has_groups(head: bytes) -> bool:
    cards = [head[i : i + 80] for i in range(0, len(head), 80)]
    return any(card.startswith(b"GROUPS  =") and b"T" in card[10:31] for card in cards)


def _is_text(head: bytes) -> bool:
    try:
        head[:-4].decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True
