"""A piece of an optical image, with its PSF and the noise of its pixels.

    y = h * x + n,    n ~ N(0, C)

Drizzled images have correlated noise. A covariance that depends on the lag only, wrapped around
an (H, W) grid, is circulant: its eigenvalues are the noise spectrum P, the Fourier transform of
the autocovariance in the order of `torch.fft.fft2`. White noise of variance v has P = v at every
frequency, and the mean of P is the variance of a pixel.

References: Casertano et al. (2000), AJ 120, 2747 (noise of drizzled images); Rowe et al. (2015),
arXiv:1407.7676 (correlated noise in GalSim).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from scoreinv.data.grid import Grid
from scoreinv.data.visibilities import copied

ENOUGH_PIXELS = 100


@dataclass(frozen=True, eq=False)
class Cutout:
    """An image to be deconvolved.

    Args:
        data: Pixels, with shape (1, H, W), in the unit of the grid.
        grid: Pixel scale and sky position.
        psf: Point spread function at the same scale, with shape (1, h, w), centre (h // 2,
            w // 2); as it was measured, not normalised.
        noise_spectrum: Eigenvalues of the noise covariance on the grid [unit^2], (1, H, W).
        std: Standard deviation of the noise of a pixel [unit].
        mask: True where a pixel was measured, with shape (1, H, W); the others hold 0.
        background: Level that was subtracted from the file's pixels [unit].
        source: Where the data come from.
        sha256: Hash of the file.

    Raises:
        ValueError: If shapes disagree, a pixel is not finite, the noise is not positive, or the
            PSF cannot be one.
    """

    data: Tensor
    grid: Grid
    psf: Tensor | None = None
    noise_spectrum: Tensor | None = None
    std: float | None = None
    mask: Tensor | None = None
    background: float = 0.0
    source: str = ""
    sha256: str = ""

    def __post_init__(self) -> None:
        data = copied(self.data).double()
        if data.shape != (1, *self.grid.shape):
            raise ValueError(
                f"data has shape {tuple(data.shape)}, expected {(1, *self.grid.shape)}, one image "
                "on this grid"
            )
        _check_pixels(data)
        object.__setattr__(self, "data", data)
        if self.psf is not None:
            psf = copied(self.psf).double()
            _check_psf(psf, self.grid.shape)
            object.__setattr__(self, "psf", psf)
        if self.noise_spectrum is not None:
            spectrum = copied(self.noise_spectrum).double()
            if spectrum.shape != data.shape or not (spectrum > 0).all():
                raise ValueError(
                    f"noise_spectrum has shape {tuple(spectrum.shape)} and minimum "
                    f"{float(spectrum.min()):.3g}, expected {tuple(data.shape)} and positive"
                )
            object.__setattr__(self, "noise_spectrum", spectrum)
        if self.std is not None and not self.std > 0:
            raise ValueError(f"std is {self.std}, expected a positive number [{self.grid.unit}]")
        if self.mask is not None:
            mask = copied(self.mask).bool()
            if mask.shape != data.shape:
                raise ValueError(
                    f"mask has shape {tuple(mask.shape)}, expected {tuple(data.shape)}"
                )
            object.__setattr__(self, "mask", mask)


def _check_pixels(data: Tensor) -> None:
    bad = int((~torch.isfinite(data)).sum())
    if bad:
        raise ValueError(
            f"{bad} of {data.numel()} pixels are NaN or infinite; pass mask_nan=True to give them "
            "zero weight, or crop them away with size and centre"
        )


def _check_psf(psf: Tensor, shape: tuple[int, int]) -> None:
    if psf.ndim != 3 or len(psf) != 1:
        raise ValueError(f"psf has shape {tuple(psf.shape)}, expected (1, h, w)")
    if not torch.isfinite(psf).all():
        raise ValueError(
            f"psf has {int((~torch.isfinite(psf)).sum())} NaN or infinite pixels; mend them or "
            "cut them away with psf_size"
        )
    if not psf.sum() > 0:
        raise ValueError(
            f"psf sums to {float(psf.sum()):.4g}, expected a positive sum: is this the PSF, and "
            "is its background subtracted?"
        )
    largest = tuple(2 * n - 1 for n in shape)
    if psf.shape[1] > largest[0] or psf.shape[2] > largest[1]:
        raise ValueError(
            f"psf has shape {tuple(psf.shape[1:])}, and no two pixels of an image of shape "
            f"{tuple(shape)} are so far apart; cut it with psf_size={min(largest)}"
        )


def blank_sky(
    stamp: np.ndarray, seed: float = 3.5, wing: float = 1.5, smooth: float = 2.0, grow: int = 4
) -> np.ndarray:
    """An image with its sources taken out.

    The image is smoothed and compared with its own scatter; regions above `wing` that reach
    `seed` somewhere are sources, so that the wings of a source go with it and noise peaks stay.

    Args:
        stamp: Image, with shape (H, W). NaN and exact zeros count as not measured.
        seed, wing: Thresholds [standard deviations of the smoothed sky].
        smooth: Width of the Gaussian that smooths [pixel].
        grow: How far sources are widened [pixel].

    Returns:
        The image with NaN at sources, with shape (H, W); all NaN if no sky is left.
    """
    from scipy.ndimage import gaussian_filter

    stamp = np.array(stamp, dtype=float)
    valid = np.isfinite(stamp) & (stamp != 0)
    sky = valid
    for _ in range(20):
        if not sky.any():
            break
        level = np.median(stamp[sky])
        smoothed = gaussian_filter(np.where(valid, stamp - level, 0.0), smooth)
        previous, sky = sky, valid & ~_sources(smoothed, sky, seed, wing, grow)
        if (sky == previous).all():
            break
    return np.where(sky, stamp, np.nan)


def _sources(
    smoothed: np.ndarray, sky: np.ndarray, seed: float, wing: float, grow: int
) -> np.ndarray:
    from scipy import ndimage

    scatter = _robust_std(smoothed[sky])
    regions, _ = ndimage.label(smoothed > wing * scatter, structure=np.ones((3, 3)))
    found = np.unique(regions[smoothed > seed * scatter])
    return ndimage.binary_dilation(np.isin(regions, found[found > 0]), iterations=grow)


def _robust_std(values: np.ndarray) -> float:
    return 1.4826 * np.median(np.abs(values - np.median(values)))


def autocovariance(patches: Iterable[np.ndarray], max_lag: int) -> np.ndarray:
    """Noise autocovariance at lags up to `max_lag`.

    Args:
        patches: Images of blank sky with NaN where masked, each with shape (H, W); the mean of
            each is taken out.
        max_lag: Largest lag in rows and in columns [pixel].

    Returns:
        Covariance [unit^2], with shape (2 L + 1, 2 L + 1), lag (0, 0) in the middle.

    Raises:
        ValueError: If no patch has 100 measured pixels.
    """
    lags = np.arange(-max_lag, max_lag + 1)
    products, pairs = 0.0, 0.0
    for patch in patches:
        ok = np.isfinite(patch)
        if ok.sum() < ENOUGH_PIXELS:
            continue
        noise = np.where(ok, patch - patch[ok].mean(), 0.0)
        products = products + _correlate(noise, max_lag)[np.ix_(lags, lags)]
        pairs = pairs + _correlate(ok.astype(float), max_lag)[np.ix_(lags, lags)].round()
    if not np.all(pairs > 0):
        raise ValueError(
            f"too little blank sky for lags up to {max_lag}: no patch has {ENOUGH_PIXELS} "
            "measured pixels; give larger patches, or the noise itself"
        )
    return products / pairs


def _correlate(x: np.ndarray, max_lag: int) -> np.ndarray:
    shape = [n + max_lag for n in x.shape]
    return np.fft.irfft2(np.abs(np.fft.rfft2(x, shape)) ** 2, shape)


def noise_spectrum(
    patches: Iterable[np.ndarray],
    shape: tuple[int, int],
    variance: float | None = None,
    max_lag: int = 8,
) -> Tensor:
    """Noise spectrum on a grid, measured on blank sky.

    The autocovariance is tapered with cos^2(pi lag / (2 (L + 1))) along each axis, wrapped around
    the grid and transformed; values below 1 % of the variance are raised to it.

    Args:
        patches: Images of blank sky with NaN where masked, each with shape (H, W), as from
            `blank_sky`.
        shape: Shape of the grid, (H, W).
        variance: Variance of a pixel that the spectrum is scaled to [unit^2]; left out, the
            measured one.
        max_lag: Largest lag L at which the noise is correlated [pixel].

    Returns:
        Eigenvalues of the circulant covariance [unit^2] in the order of `torch.fft.fft2`, with
        shape (1, H, W). Their mean is the variance.

    Raises:
        ValueError: If the grid is smaller than 2 L + 1, or there is too little blank sky.
    """
    if min(shape) < 2 * max_lag + 1:
        raise ValueError(
            f"the grid has shape {tuple(shape)}, and lags up to {max_lag} need at least "
            f"{2 * max_lag + 1} pixels; pass a smaller max_lag"
        )
    lags = np.arange(-max_lag, max_lag + 1)
    taper = np.cos(np.pi * lags / (2 * (max_lag + 1))) ** 2
    wrapped = np.zeros(shape)
    wrapped[np.ix_(lags, lags)] = autocovariance(patches, max_lag) * np.outer(taper, taper)
    spectrum = np.fft.fft2(wrapped).real
    spectrum = np.maximum(spectrum, 0.01 * wrapped[0, 0])
    spectrum *= (wrapped[0, 0] if variance is None else variance) / spectrum.mean()
    return torch.from_numpy(spectrum)[None]
