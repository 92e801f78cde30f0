"""Convolution with a point-spread function.

    (A x)_p = sum_q h_(p - q + c) x_q

with the centre c = n // 2 on each axis, for odd and even kernels alike. Computed by FFT on a grid
large enough that nothing wraps around (`boundary="zero"`: the sky outside the canvas is dark), or
periodic (`boundary="circular"`). The model canvas may be larger than the data, so that light from
outside the cutout enters it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from scoreinv.operators.base import LinearOperator
from scoreinv.tensors import as_tensor


class PSFConvolution(LinearOperator):
    """Convolve with a PSF, then cut out the data's field.

    Args:
        psf: Kernel with shape (h, w), (1, h, w) or (C, h, w); used as given unless `normalise`.
        shape: Shape (C, H, W) of the model canvas.
        data_shape: Pixels (H, W) of the data, the centre of the canvas (from row and column
            (canvas - data) // 2 on); the whole canvas if not given.
        boundary: "zero" (padded, linear convolution) or "circular".
        normalise: Divide by the kernel's sum.

    Raises:
        ValueError: Kernel larger than the canvas, not finite, or with a sum that is not positive; data without pixels, or
            larger than the canvas.
    """

    def __init__(
        self,
        psf: Tensor,
        shape: tuple[int, ...],
        data_shape: tuple[int, int] | None = None,
        boundary: str = "zero",
        normalise: bool = False,
    ) -> None:
        psf = as_tensor(psf, dtype=torch.float64)
        psf = psf[None] if psf.ndim == 2 else psf
        _check_psf(psf, shape)
        if boundary not in ("zero", "circular"):
            raise ValueError(f"boundary is {boundary!r}, expected 'zero' or 'circular'")
        field = tuple(data_shape or shape[-2:])
        if len(field) != 2:
            raise ValueError(f"data_shape is {field}, expected pixels (H, W)")
        if min(field) < 1:
            raise ValueError(f"the data are {field} pixels, expected at least 1 on each side")
        if field[0] > shape[-2] or field[1] > shape[-1]:
            raise ValueError(
                f"the data are {field} pixels, larger than the model canvas {tuple(shape[-2:])}"
            )
        self.shape, self.data_shape = tuple(shape), (shape[0], *field)
        self.boundary = boundary
        if normalise:
            psf = psf / psf.sum((-2, -1), keepdim=True)
        # light may wrap around into the margin, as long as it does not reach the canvas
        self.fft = tuple(shape[-2:]) if boundary == "circular" else tuple(
            _fast_length(n + k // 2) for n, k in zip(shape[-2:], psf.shape[-2:], strict=True)
        )  # fmt: skip
        self._transfer = {torch.float64: _transfer(psf, self.fft)}
        self._gain = _transfer(psf, tuple(shape[-2:]), full=True).abs().square()
        low = [(n - k) // 2 for n, k in zip(shape[-2:], field, strict=True)]
        self._window = (..., *[slice(a, a + k) for a, k in zip(low, field, strict=True)])

    def _on_grid(self, dtype: torch.dtype) -> Tensor:
        if dtype not in self._transfer:
            self._transfer[dtype] = self._transfer[torch.float64].to(
                torch.promote_types(dtype, torch.complex64)
            )
        return self._transfer[dtype]

    def forward(self, x: Tensor) -> Tensor:
        y = torch.fft.irfft2(torch.fft.rfft2(x, s=self.fft) * self._on_grid(x.dtype), s=self.fft)
        return y[self._window]

    def transpose(self, y: Tensor) -> Tensor:
        canvas = y.new_zeros((len(y), *self.shape))
        canvas[self._window] = y
        k = torch.fft.rfft2(canvas, s=self.fft) * self._on_grid(y.dtype).conj()
        x = torch.fft.irfft2(k, s=self.fft)
        return x[..., : self.shape[-2], : self.shape[-1]]

    def gain(self) -> Tensor:
        seen = self.data_shape[-2] * self.data_shape[-1] / (self.shape[-2] * self.shape[-1])
        gain = self._gain * seen
        return gain[0] if len(gain) == 1 else gain

    @property
    def stationary(self) -> bool:
        return self.boundary == "circular" and self.data_shape[-2:] == self.shape[-2:]


def gaussian_psf(fwhm: float, size: int = 19) -> Tensor:
    """A normalised Gaussian PSF, with shape (size, size); `fwhm` [pixel].

    Raises:
        ValueError: A width that is not positive and finite, or no pixels.
    """
    if not 0 < fwhm < math.inf or size < 1:
        raise ValueError(
            f"fwhm is {fwhm:g} and size {size}, expected a finite width and pixels above 0"
        )
    i = torch.arange(size, dtype=torch.float64) - size // 2
    psf = (-4 * math.log(2) / fwhm**2 * (i[:, None] ** 2 + i**2)).exp()
    return psf / psf.sum()


def _fast_length(n: int) -> int:
    """The next length >= n of the form 8 * 2^a 3^b 5^c: odd ones take the FFT nearly twice as long."""
    from scipy.fft import next_fast_len

    return 8 * next_fast_len(-(-n // 8), real=True)


def _transfer(psf: Tensor, size: tuple[int, int], full: bool = False) -> Tensor:
    """FFT of the kernel, its centre n // 2 at pixel (0, 0), on a grid of this size."""
    h, w = psf.shape[-2:]
    grid = psf.new_zeros((len(psf), max(size[0], h), max(size[1], w)))
    grid[:, :h, :w] = psf
    grid = grid.roll((-(h // 2), -(w // 2)), (-2, -1))
    return torch.fft.fft2(grid) if full else torch.fft.rfft2(grid)


def _check_psf(psf: Tensor, shape: tuple[int, ...]) -> None:
    if len(shape) != 3:
        raise ValueError(f"canvas has shape {tuple(shape)}, expected (C, H, W)")
    if psf.ndim != 3 or len(psf) not in (1, shape[0]):
        raise ValueError(
            f"psf has shape {tuple(psf.shape)}, expected (h, w) or (C, h, w) with C = {shape[0]}"
        )
    if not bool(torch.isfinite(psf).all()):
        raise ValueError(f"psf has {int((~torch.isfinite(psf)).sum())} values that are not finite")
    if psf.shape[-2] > shape[-2] or psf.shape[-1] > shape[-1]:
        raise ValueError(
            f"psf is {tuple(psf.shape[-2:])} pixels, larger than the model canvas "
            f"{tuple(shape[-2:])}; crop it around its centre, or use a larger canvas"
        )
    if bool((psf.sum((-2, -1)) <= 0).any()):
        raise ValueError(
            f"psf sums to {float(psf.sum((-2, -1)).min()):.3g}, expected a positive sum; "
            "a dirty beam? use NUFFT for visibilities"
        )
