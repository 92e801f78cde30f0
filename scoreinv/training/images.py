"""Training images: simulated once, augmented at every look, and their two moments."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from scoreinv.gaussian import Fourier, Gaussian
from scoreinv.simulators import simulate_images
from scoreinv.streams import stream
from scoreinv.training.own import listing, read_folder
from scoreinv.training.run import TrainingData, TrainingRun


def augment(
    images: Tensor,
    generator: torch.Generator,
    shift: int,
    amplitude: tuple[float, float],
    symmetric: bool = True,
) -> Tensor:
    """Random flips and rotation (if `symmetric`), shift and amplitude of each image, with shape (B, C, H, W)."""
    draw = lambda *shape: torch.rand(shape, generator=generator)
    out = torch.empty(images.shape)
    turns, flips = (4 * draw(len(images))).int(), draw(len(images)) < 0.5
    if not symmetric:
        turns, flips = torch.zeros_like(turns), torch.zeros_like(flips)
    moves = torch.floor((2 * shift + 1) * draw(len(images), 2)).int() - shift
    low, high = math.log(amplitude[0]), math.log(amplitude[1])
    peak = (low + (high - low) * draw(len(images))).exp()
    for i, x in enumerate(images):
        x = x.float().rot90(int(turns[i]), (-2, -1))
        x = x.flip(-1) if flips[i] else x
        out[i] = peak[i] * x.roll((int(moves[i, 0]), int(moves[i, 1])), (-2, -1))
    return out


def seen(
    data: TrainingData,
    images: Tensor,
    generator: torch.Generator,
    amplitude: tuple[float, float] | None = None,
) -> Tensor:
    """Images as a training sees them; with another amplitude, if given."""
    return augment(images, generator, data.shift, amplitude or data.amplitude, data.symmetric)


def image_moments(images: Tensor, symmetric: bool = True) -> Gaussian:
    """Mean image and stationary covariance of images with shape (n, C, H, W), the same in four directions if `symmetric`."""
    mean = images.mean(0)
    power = torch.zeros(images.shape[1:], dtype=torch.float64)
    for part in images.split(1024):
        power += torch.fft.fft2(part - mean, norm="ortho").abs().double().square().sum(0)
    power = power / len(images)
    if not symmetric:
        return Gaussian(mean, Fourier(power))
    # every orientation is equally likely under the augmentation: impose it, and P(k) = P(-k) with it
    power = sum(p.rot90(k, (-2, -1)) for p in _unshifted(power) for k in range(4)) / 8
    return Gaussian(mean, Fourier(torch.fft.ifftshift(power[..., :-1, :-1], (-2, -1))))


def _unshifted(power: Tensor) -> tuple[Tensor, Tensor]:
    """The spectrum on a grid of odd size centred on k = 0 (Nyquist row repeated), and its mirror image."""
    centred = torch.fft.fftshift(power, (-2, -1))
    centred = torch.cat([centred, centred[..., :1, :]], -2)
    centred = torch.cat([centred, centred[..., :, :1]], -1)
    return centred, centred.flip(-1)


def load_images(run: TrainingRun, folder: Path, progress: bool) -> tuple[Tensor, Tensor]:
    """Training and held-out images, simulated or read once and kept beside the checkpoints; both (n, 1, H, W), float16.

    Raises:
        ValueError: A folder with fewer images than asked for, with files that are none, or with other images than the
            run began with.
    """
    data = run.data
    n = data.images + data.held_out
    source = data.kind if data.folder is None else listing(data.folder)[1]
    key = hashlib.sha256(f"{source} {data.size} {n} {run.seed}".encode()).hexdigest()[:12]
    path = folder / f"images-{key}.npy"
    if not path.exists():
        images = _found(data, n, run.seed, data.workers, progress, "images + held_out = ")
        for known in folder.glob(f"images-{'?' * len(key)}.npy"):
            if not np.array_equal(np.load(known), images[:n]):
                raise ValueError(
                    f"{data.folder} holds other images than this run began with, which {known} keeps; put those back, or "
                    "choose another output folder for these"
                )
        partial = path.with_suffix(".part.npy")
        np.save(partial, images[:n])
        partial.rename(path)
    images = torch.from_numpy(np.load(path))
    return images[: data.images], images[data.images :]


def unseen_images(data: TrainingData, n: int, seed: int, workers: int = 1) -> Tensor:
    """Images as a training sees them, but others, with shape (n, 1, H, W): simulated anew, or those of another folder.

    Args:
        data: Of the training.
        n: How many.
        seed: Decides the images, of a folder which of them; those of a training have a seed below 10,000.
        workers: Processes that simulate.

    Raises:
        ValueError: A folder with fewer images, or with files that are none.
    """
    found = _found(data, n, seed if data.folder else 10_000 + seed, workers, progress=False)
    images = torch.from_numpy(found[:n]).float()
    return torch.cat([seen(data, x[None], stream(seed, 9, i)) for i, x in enumerate(images)])


def _found(
    data: TrainingData, n: int, seed: int, workers: int, progress: bool, wanted: str = ""
) -> np.ndarray:
    """At least n images, which is what is `wanted`, with a peak of one, with shape (., 1, H, W), float16."""
    if data.folder is None:
        return simulate_images(data.kind, n, data.size, seed, workers, progress)
    images = read_folder(data.folder, data.size, seed, progress)
    if len(images) < n:
        raise ValueError(
            f"{data.folder} holds {len(images)} images, expected at least {wanted}{n}"
        )
    return images
