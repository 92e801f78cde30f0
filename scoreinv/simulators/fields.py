"""Primitives from which images of galaxies and discs are drawn.

Positions are in pixels from the image's centre, x to the right (columns), y upwards (rows).
An inclined disc of axis ratio q whose major axis lies at angle phi from x is seen in its own
plane through

    u = x cos(phi) + y sin(phi),    v = (y cos(phi) - x sin(phi)) / q,
    r = (|u|^c + |v|^c)^(1 / c),    theta = atan2(v, u),

with c = 2 for ellipses, c > 2 for boxy and c < 2 for pointed shapes. A Sersic profile is

    I(r) = exp(-b_n ((r / r_e)^(1 / n) - 1)),

where b_n puts half of the light inside r_e. A random field is Gaussian, periodic and
stationary with the power spectrum P(k) = k^-slope exp(-(k / k_max)^2) for k >= k_min and
nothing below; k counts waves across the image. Structure finer than a pixel is blurred by a
Gaussian of standard deviation `PIXEL_BLUR`, somewhat more than the pixel's own 12^-1/2, so that
the samples do not alias.

Everything is float32. Scalars are Python floats throughout, because a numpy float64 scalar
would turn the arrays it multiplies into float64.

References:
    Ciotti & Bertin, "Analytical properties of the R^(1/m) law", A&A 352, 447 (1999)
    Athanassoula et al., "The shape of bars in early-type barred galaxies", MNRAS 245, 130 (1990)
"""

from functools import lru_cache
from math import cos, inf, sin

import numpy as np

PIXEL_BLUR = 0.4  # [pixel]


@lru_cache(maxsize=8)
def pixel_grid(size: int) -> tuple[np.ndarray, np.ndarray]:
    """Pixel centres [pixel], x with shape (1, size) and y with shape (size, 1), read-only."""
    c = np.arange(size, dtype=np.float32) - np.float32((size - 1) / 2)
    c.setflags(write=False)
    return c[None, :], c[:, None]


@lru_cache(maxsize=8)
def wavenumber(size: int) -> tuple[np.ndarray, np.ndarray]:
    """k and log(k) of a square FFT [waves per image], each with shape (size, size), read-only.

    log(k) is set to zero at k = 0, where there is never any power.
    """
    f = np.fft.fftfreq(size, 1 / size)
    k = np.hypot(f[:, None], f[None, :]).astype(np.float32)
    log_k = np.log(np.where(k > 0, k, 1))
    k.setflags(write=False)
    log_k.setflags(write=False)
    return k, log_k


@lru_cache(maxsize=64)
def spectral_cut(size: int, k_min: float, k_max: float) -> np.ndarray:
    """Amplitude that confines a field to k_min <= k <~ k_max, shape (size, size), read-only."""
    k, _ = wavenumber(size)
    cut = np.where(k >= max(k_min, 1.0), np.exp(-0.5 * (k / k_max) ** 2), 0).astype(np.float32)
    cut.setflags(write=False)
    return cut


def random_fields(
    rng: np.random.Generator,
    size: int,
    slope: float,
    k_min: float = 1.0,
    k_max: float = inf,
) -> np.ndarray:
    """Two independent Gaussian random fields of zero mean and unit variance.

    The variance is that of the ensemble: a steep field, which lives on few modes, scatters
    about it from one realisation to the next. Complex white noise has independent real and
    imaginary parts, and an amplitude even in k keeps them so: one transform, two fields.

    Arguments:
        rng: Source of randomness.
        size: Side of the image [pixel].
        slope: Minus the logarithmic slope of the power spectrum.
        k_min: Smallest wavenumber with power [waves per image].
        k_max: Width of the Gaussian cut-off in amplitude [waves per image].

    Returns:
        Fields, with shape (2, size, size), float32.
    """
    from scipy import fft

    _, log_k = wavenumber(size)
    amplitude = spectral_cut(size, k_min, k_max) * np.exp(-0.5 * slope * log_k)
    amplitude *= size**2 / float(np.square(amplitude).sum()) ** 0.5
    white = rng.standard_normal((size, size, 2), dtype=np.float32).view(np.complex64)[..., 0]
    field = fft.ifft2(amplitude * white, overwrite_x=True, workers=1)
    return np.stack([field.real, field.imag])


def sersic_b(n: float) -> float:
    """Sersic's b_n by the asymptotic series of Ciotti & Bertin (1999), for n >= 0.5."""
    series = 4 / 405 + (46 / 25515 + (131 / 1148175 - 2194697 / 30690717750 / n) / n) / n
    return 2 * n - 1 / 3 + series / n


def sersic(r: np.ndarray, r_e: float, n: float) -> np.ndarray:
    """Sersic profile of index n at radii r > 0, equal to one at the half-light radius r_e."""
    return np.exp(-sersic_b(n) * ((r / r_e) ** (1 / n) - 1))


def deproject(
    x: np.ndarray, y: np.ndarray, q: float, angle: float
) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates (u, v) in the plane of an ellipse of axis ratio q, its long axis at `angle`."""
    c, s = cos(angle), sin(angle)
    return x * c + y * s, y * (c / q) - x * (s / q)


def elliptical_radius(
    u: np.ndarray, v: np.ndarray, exponent: float = 2.0, softening: float = 1e-3
) -> np.ndarray:
    """Radius (|u|^c + |v|^c + softening^c)^(1/c); the softening [pixel] keeps it above zero."""
    if exponent == 2.0:
        return np.sqrt(u * u + v * v + softening**2)
    c = exponent
    return (np.abs(u) ** c + np.abs(v) ** c + softening**c) ** (1 / c)


def radial_gradient(u: np.ndarray, v: np.ndarray, q: float) -> np.ndarray:
    """Steepness |grad r| of the elliptical radius on the sky: 1 on the long axis, 1 / q across.

    A structure narrower than |grad r| times a pixel is not resolved.
    """
    w = v / q
    return np.sqrt((u * u + w * w + 1e-6) / (u * u + v * v + 1e-6))


def azimuth(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Azimuth in the plane [rad], from the major axis."""
    return np.arctan2(v, u)


def smooth_step(t: np.ndarray) -> np.ndarray:
    """Logistic step from 0 to 1, written with tanh so that it cannot overflow."""
    return 0.5 + 0.5 * np.tanh(0.5 * t)


def gaussian_spots(
    size: int, x: np.ndarray, y: np.ndarray, width: np.ndarray, flux: np.ndarray
) -> np.ndarray:
    """Sum of round Gaussians of peak `flux`, each argument with shape (N,), on (size, size).

    A Gaussian is the product of a row and a column, so N of them are one small contraction.
    """
    gx, gy = pixel_grid(size)
    rows = np.exp(-0.5 * ((gx - x[:, None]) / width[:, None]) ** 2)
    columns = np.exp(-0.5 * ((gy.T - y[:, None]) / width[:, None]) ** 2)
    return np.einsum("ki,kj->ij", columns * flux[:, None], rows)
