"""Training images of one's own: the files of a folder, brought to one size and a peak of one."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F
from tqdm import tqdm

from scoreinv.data.formats.files import kind_of
from scoreinv.data.formats.images import IMAGE_KEYS, image_hdus, load_hdf5, load_npy
from scoreinv.data.formats.tables import load_npz

PICTURES = (".png", ".jpg", ".jpeg", ".tif", ".tiff")


def listing(folder: str | Path) -> tuple[list[Path], str]:
    """The files of a folder in the order of their names, and a hash of names, sizes and times.

    Raises:
        ValueError: No folder, or nothing in it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder; expected one with images in its files")
    files = sorted(p for p in folder.iterdir() if p.is_file() and not p.name.startswith("."))
    if not files:
        raise ValueError(f"{folder} holds no files; expected images: FITS, .npy, .npz, HDF5, PNG")
    stats = [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in files]
    return files, hashlib.sha256(repr(stats).encode()).hexdigest()


def read_folder(folder: str | Path, size: int, seed: int, progress: bool = False) -> np.ndarray:
    """All images of a folder in random order, with shape (n, 1, size, size), float16, each with a peak of one.

    A file holds one image or a stack of them. The central square of each is resampled to the size wanted, smoothed first
    where that is coarser.

    Args:
        folder: Of files that `file_images` reads.
        size: Side of the images [pixel].
        seed: Decides the order, and so which images are held out.
        progress: Show a progress bar.

    Raises:
        ValueError: A file without images, or images without a finite, positive peak.
    """
    files, _ = listing(folder)
    found = [
        np.stack([_square(image, size, path) for image in file_images(path)])
        for path in tqdm(files, disable=not progress, unit="file", desc="images")
    ]
    images = np.concatenate(found)[:, None].astype(np.float16)
    return images[np.random.default_rng([seed]).permutation(len(images))]


def file_images(path: Path) -> np.ndarray:
    """The images of one file, with shape (n, H, W): FITS, `.npy`, `.npz`, HDF5, or a picture, whose colours are averaged.

    Raises:
        ValueError: No images, or several arrays of different shapes.
    """
    if path.suffix.lower() in PICTURES:
        return _picture(path)[None]
    kind = kind_of(path)
    if kind == "fits":
        stacks = [_stack(v, path) for v in image_hdus(path).values()]
        if not stacks or len({s.shape[1:] for s in stacks}) > 1:
            raise ValueError(f"{path} has no image HDU, or several of different shapes")
        return np.concatenate(stacks)
    if kind == "npy":
        return _stack(load_npy(path), path)
    if kind not in ("npz", "hdf5"):
        raise ValueError(
            f"{path} is a {kind} file, expected images: FITS, .npy, .npz, HDF5 or a picture"
        )
    arrays = load_npz(path) if kind == "npz" else load_hdf5(path)
    name = next((k for k in IMAGE_KEYS if k in arrays), None)
    if name is None:
        raise ValueError(
            f"{path} holds {', '.join(arrays)}; expected an array named {' or '.join(IMAGE_KEYS)}"
        )
    return _stack(arrays[name], path)


def _picture(path: Path) -> np.ndarray:
    from matplotlib.image import imread

    try:
        pixels = np.asarray(imread(path), float)
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"{path} is a damaged picture ({error})") from error
    return pixels if pixels.ndim == 2 else pixels[..., :3].mean(-1)  # a fourth is opacity


def _stack(pixels: np.ndarray, path: Path) -> np.ndarray:
    """Arrays (H, W), (n, H, W) or (n, 1, H, W) as (n, H, W)."""
    pixels = np.asarray(pixels, float)
    if pixels.ndim == 4 and pixels.shape[1] == 1:
        pixels = pixels[:, 0]
    colours = pixels.ndim == 3 and pixels.shape[2] in (3, 4) and min(pixels.shape[:2]) > 4
    if pixels.ndim not in (2, 3) or colours:
        raise ValueError(
            f"{path} has an array of shape {pixels.shape}, expected (H, W), (n, H, W) or (n, 1, H, W)"
            + ("; colours are not images of a stack: take their mean" if colours else "")
        )
    return pixels.reshape(-1, *pixels.shape[-2:])


def _square(image: np.ndarray, size: int, path: Path) -> np.ndarray:
    """The central square at this size, over its peak."""
    side = min(image.shape)
    top, left = ((n - side) // 2 for n in image.shape)
    square = torch.from_numpy(image[top : top + side, left : left + side].copy())
    finite = side > 0 and bool(np.isfinite(image).all())
    if finite and side != size:
        square = F.interpolate(square[None, None], (size, size), mode="bilinear", antialias=True)[
            0, 0
        ]
    if not finite or not bool(square.max() > 0):
        raise ValueError(
            f"images of {path} have pixels that are not finite, or none above 0 in their central square; mend them or take "
            "them away"
        )
    return (square / square.max()).numpy()
