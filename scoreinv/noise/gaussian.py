"""Additive Gaussian noise, y = A x + n, n ~ N(0, S).

S is white, independent with a variance for each datum, or stationary with a power spectrum on the
data's grid (drizzled images). Of complex data the real and the imaginary part each have the
covariance S and are independent.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from scoreinv.gaussian import Covariance, Dense, Diagonal, Fourier, Scalar
from scoreinv.noise.base import Noise
from scoreinv.tensors import as_tensor


class GaussianNoise(Noise):
    """N(0, S); give exactly one of the arguments.

    Args:
        std: Standard deviation of each datum (of each part of complex data) [data unit], a number
            or the data's shape.
        variance: Its square; `inf` masks a datum.
        spectrum: Noise power at each frequency of the data's grid, with shape (H, W) or (C, H, W)
            in the order of fft2; white noise of variance v has the spectrum v.
        covariance: A `scoreinv.gaussian` covariance, or a matrix with shape (m, m).

    Raises:
        ValueError: Not exactly one argument; values that are not finite or not positive.
    """

    def __init__(
        self,
        std: float | Tensor | None = None,
        variance: float | Tensor | None = None,
        spectrum: Tensor | None = None,
        covariance: Covariance | Tensor | None = None,
    ) -> None:
        given = {
            k: v
            for k, v in dict(
                std=std, variance=variance, spectrum=spectrum, covariance=covariance
            ).items()
            if v is not None
        }
        if len(given) != 1:
            raise ValueError(
                "GaussianNoise takes exactly one of std, variance, spectrum, covariance; "
                f"got {sorted(given) or 'none'}"
            )
        if std is not None:
            variance = positive(std, "std") ** 2
        if variance is not None:
            variance = positive(variance, "variance", infinite=True)
            self.covariance: Covariance = (
                Scalar(float(variance)) if variance.ndim == 0 else Diagonal(variance)
            )
        elif spectrum is not None:
            self.covariance = Fourier(positive(spectrum, "spectrum"))
        else:
            if not isinstance(covariance, Covariance):
                covariance = Dense(as_tensor(covariance, dtype=torch.float64))
            self.covariance = covariance.map(lambda v: positive(v, "covariance", infinite=True))
        self._precision = self.covariance.map(torch.reciprocal)
        self._whitener = self.covariance.map(torch.rsqrt)
        self._root = self.covariance.map(lambda v: torch.where(v.isinf(), 0.0, v).sqrt())

    def weigh(self, r: Tensor) -> Tensor:
        """S^-1 r, with shape (B, *data_shape)."""
        return _parts(self._precision, r)

    def whiten(self, r: Tensor) -> Tensor:
        """S^-1/2 r, with shape (B, *data_shape)."""
        return _parts(self._whitener, r)

    def sample(self, like: Tensor, generator: torch.Generator) -> Tensor:
        """Noise of the shape and dtype of `like`, with shape (B, *data_shape)."""
        real = torch.view_as_real(like) if like.is_complex() else like
        z = torch.randn(real.shape, generator=generator, dtype=real.dtype)
        return _parts(self._root, torch.view_as_complex(z) if like.is_complex() else z)

    def observe(self, clean: Tensor, generator: torch.Generator) -> Tensor:
        return clean + self.sample(clean, generator)

    def log_density(self, y: Tensor, clean: Tensor) -> Tensor:
        return self.log_prob(y - clean)

    def log_density_about(self, y: Tensor, clean: Tensor, along: Tensor, across: Tensor) -> Tensor:
        # the amplitude of v + e has mean^2 = |v|^2 + across and the variance along, to first order in 1 / |v|^2
        mean = (clean.square() + across).sqrt()
        total = self.covariance.eigenvalues(tuple(y.shape)).reshape(y.shape) + along
        square = (y - mean).square() / total + (2 * math.pi * total).log()
        # masked data do not count
        return -0.5 * square.where(total.isfinite(), 0.0).flatten(1).sum(1)

    def misfit(self, y: Tensor, clean: Tensor) -> Tensor:
        return self.chi2(y - clean)

    def nearby(self, y: Tensor, clean: Tensor) -> tuple[GaussianNoise, Tensor]:
        return self, y

    def equivalent(self, clean: Tensor) -> GaussianNoise:
        return self

    def log_prob(self, r: Tensor) -> Tensor:
        """log N(r; 0, S), with shape (B,), in float64; masked data do not count."""
        r = r.to(torch.complex128 if r.is_complex() else torch.float64)
        parts = 2 if r.is_complex() else 1
        values = self.covariance.eigenvalues(tuple(r.shape[1:]))
        values = values[~values.isinf()]
        norm = parts * float((2 * math.pi * values).log().sum())
        return -0.5 * (self.chi2(r) + norm)

    def chi2(self, r: Tensor) -> Tensor:
        """r^T S^-1 r, with shape (B,), in float64."""
        w = self.whiten(r.to(torch.complex128 if r.is_complex() else torch.float64))
        return w.abs().square().flatten(1).sum(1)

    def check(self, shape: tuple[int, ...], complex: bool) -> None:
        if not self.covariance.fits(shape):
            raise ValueError(
                f"noise has shape {self.covariance.shape}, the data have shape {tuple(shape)}"
            )
        if complex and not isinstance(self.covariance, Scalar | Diagonal):
            raise ValueError(
                "noise of complex data takes std or variance, not a spectrum or a matrix"
            )

    @property
    def pixel_precision(self) -> Tensor | None:
        """1 / variance of each datum, if they are independent."""
        if isinstance(self.covariance, Scalar):
            return torch.tensor(1 / float(self.covariance.variance), dtype=torch.float64)
        return self._precision.variance if isinstance(self.covariance, Diagonal) else None

    @property
    def is_stationary(self) -> bool:
        """Whether S is diagonal in the Fourier basis of the data's grid."""
        return isinstance(self.covariance, Scalar | Fourier)

    def spectral_precision(self, shape: tuple[int, int]) -> Tensor | None:
        """S_k^-1 on an FFT grid of this shape; None if unknown.

        Where S is diagonal in pixels, the mean precision of the data.
        """
        if isinstance(self.covariance, Scalar | Diagonal):
            return self.pixel_precision.mean().expand(shape).to(torch.float64)
        if isinstance(self.covariance, Fourier):
            return on_grid(self.covariance.spectrum, shape).reciprocal()
        return None


def on_grid(spectrum: Tensor, shape: tuple[int, int]) -> Tensor:
    """A power spectrum carried to an FFT grid of another shape by way of its autocovariance."""
    own = spectrum.shape[-2:]
    if tuple(own) == tuple(shape):
        return spectrum
    floor = float(spectrum.min())
    lags = torch.fft.fftshift(torch.fft.ifft2(spectrum).real, (-2, -1))
    out = spectrum.new_zeros((*spectrum.shape[:-2], *shape))
    rows, columns = (_overlap(a, b) for a, b in zip(own, shape, strict=True))
    out[..., rows[1], columns[1]] = lags[..., rows[0], columns[0]]
    out = torch.fft.fft2(torch.fft.ifftshift(out, (-2, -1))).real
    out = 0.5 * (out + out.flip(-2, -1).roll((1, 1), (-2, -1)))
    return out.clamp_min(floor)


def _overlap(own: int, other: int) -> tuple[slice, slice]:
    """Slices of two centred axes (centre n // 2) that cover the lags both have with both signs."""
    if own == other:
        return slice(None), slice(None)
    lag = (min(own, other) - 1) // 2
    return tuple(slice(n // 2 - lag, n // 2 + lag + 1) for n in (own, other))


def _parts(C: Covariance, r: Tensor) -> Tensor:
    """C applied to the real and the imaginary part."""
    if not r.is_complex():
        return C.apply(r)
    return torch.complex(C.apply(r.real.contiguous()), C.apply(r.imag.contiguous()))


def positive(value: float | Tensor, name: str, infinite: bool = False) -> Tensor:
    """The value in float64; raises if it is not positive and finite, or positive where it may be infinite."""
    value = as_tensor(value, dtype=torch.float64)
    bad = ~(value > 0) if infinite else ~(value > 0) | value.isinf()
    if bool(bad.any()):
        raise ValueError(
            f"noise {name} has {int(bad.sum())} of {value.numel()} values that are not positive "
            f"and finite (first: {float(value[bad].flatten()[0]):g}); "
            "mask a datum by variance = inf, or drop it"
        )
    return value
