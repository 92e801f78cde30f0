"""Visibilities: the Fourier transform of the sky at arbitrary (u, v).

    V_k = sum_j x_j exp(-2 pi i (u_k l_j + v_k m_j))

with u, v [lambda], l towards East and m towards North [rad]; pixel (i, j) of an (H, W) image lies
at m = (i - H // 2) Delta, l = -(j - W // 2) Delta. Computed by a non-uniform FFT (Barnett, Magland
& af Klinteberg, A Parallel Nonuniform Fast Fourier Transform Library Based on an "Exponential of
Semicircle" Kernel, 2019, arXiv:1808.06736).

With independent noise, H = A^H S^-1 A is a Toeplitz operator: convolution with the dirty beam
psf(d) = sum_k w_k cos(2 pi (u_k dl + v_k dm)) at the lags -(N - 1) .. N - 1. Zero-padding to 2N
makes it two FFTs, exact, at a cost that does not depend on the number of visibilities. Neither do draws of N(0, H) where the
visibilities are many and H is small enough to be factorised as a matrix; elsewhere they go through the visibilities.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import finufft
import numpy as np
import torch
from torch import Tensor

from scoreinv.gaussian import Fourier
from scoreinv.noise.gaussian import GaussianNoise
from scoreinv.operators.base import LinearOperator
from scoreinv.operators.information import Information, white
from scoreinv.tensors import as_tensor

DRAW_TOLERANCE = 1e-4  # of random draws: far below what their covariance can show
MATRIX = 4096  # pixels up to which H is factorised as a matrix, in seconds and 0.3 GB
MANY = 3  # visibilities for each pixel from which a draw by that factor is the cheaper one
JITTER = 1e-6  # of H's diagonal, added to factorise it
ARCSEC = np.pi / 180 / 3600


class NUFFT(LinearOperator):
    """Visibilities of an image.

    Args:
        uv: Baselines [lambda], with shape (N, 2).
        shape: Shape (1, H, W) of the image.
        pixel_scale: Side of a pixel [arcsec].
        tolerance: Relative accuracy of the transform.

    Raises:
        ValueError: Wrong shapes, values that are not finite, or a pixel too coarse for the longest
            baseline.
    """

    complex = True

    def __init__(
        self,
        uv: Tensor,
        shape: tuple[int, ...],
        pixel_scale: float,
        tolerance: float = 1e-12,
    ) -> None:
        uv = as_tensor(uv, dtype=torch.float64)
        _check_uv(uv, shape, pixel_scale)
        self.uv, self.shape, self.pixel_scale = uv, tuple(shape), float(pixel_scale)
        self.data_shape, self.tolerance = (len(uv),), tolerance
        phase = 2 * np.pi * pixel_scale * ARCSEC * uv.numpy()
        # rows run to the North, columns to the West: exp(i (rows * -phase_v + columns * phase_u))
        self._points = np.ascontiguousarray(-phase[:, 1]), np.ascontiguousarray(phase[:, 0])
        self._plans: dict[tuple, finufft.Plan] = {}

    def forward(self, x: Tensor) -> Tensor:
        return _Linear.apply(x, self)

    def transpose(self, y: Tensor) -> Tensor:
        return _Adjoint.apply(y, self)

    def _plan(
        self, kind: int, n: int, dtype: str, modes: tuple[int, int], tolerance: float
    ) -> finufft.Plan:
        # float32 transforms cannot be more accurate than this
        eps = max(tolerance, 1e-6) if dtype == "complex64" else tolerance
        key = (kind, n, dtype, eps, *modes)
        if key not in self._plans:
            plan = finufft.Plan(
                kind,
                modes,
                n_trans=n,
                eps=eps,
                isign=1 if kind == 2 else -1,
                dtype=dtype,
                nthreads=torch.get_num_threads(),
            )
            real = np.float32 if dtype == "complex64" else np.float64
            plan.setpts(*(p.astype(real) for p in self._points))
            self._plans[key] = plan
        return self._plans[key]

    def _visibilities(self, x: Tensor) -> Tensor:
        dtype = torch.promote_types(x.dtype, torch.complex64)
        flat = x.reshape(-1, *self.shape[-2:]).to(dtype)
        image = np.ascontiguousarray(flat.numpy(force=True))
        plan = self._plan(2, len(image), str(image.dtype), self.shape[-2:], self.tolerance)
        out = plan.execute(image if len(image) > 1 else image[0])
        return torch.from_numpy(out).reshape(len(image), -1)

    def _image(self, y: Tensor, modes: tuple[int, int], tolerance: float | None = None) -> Tensor:
        wide = y.to(torch.promote_types(y.dtype, torch.complex64))
        data = np.ascontiguousarray(wide.numpy(force=True))
        plan = self._plan(1, len(data), str(data.dtype), modes, tolerance or self.tolerance)
        out = plan.execute(data if len(data) > 1 else data[0])
        return torch.from_numpy(out.real.copy()).reshape(len(data), 1, *modes)

    def dirty_beam(self, weight: Tensor) -> Tensor:
        """sum_k w_k cos(2 pi (u_k dl + v_k dm)), with shape (2H, 2W), lag 0 at (H, W)."""
        H, W = self.shape[-2:]
        return self._image(weight.to(torch.complex128)[None], (2 * H, 2 * W))[0, 0]

    def information(self, noise: GaussianNoise, dtype: torch.dtype) -> Information:
        """The exact Toeplitz operator."""
        weight = noise.pixel_precision
        if weight is None:
            return super().information(noise, dtype)
        beam = self.dirty_beam(weight.expand(self.data_shape))
        H, W = self.shape[-2:]
        circulant = Fourier(nearest_circulant(beam))
        beam[0, :] = 0.0  # lags -H and -W never meet a pair of pixels; zero keeps the kernel even
        beam[:, 0] = 0.0
        kernel = torch.fft.rfft2(torch.fft.ifftshift(beam)).real
        kernels = {t: kernel.to(t) for t in (torch.float32, torch.float64)}
        root = noise.whiten(torch.ones(1, *self.data_shape, dtype=torch.complex128))
        root = root.to(torch.promote_types(dtype, torch.complex64))

        def apply(x: Tensor) -> Tensor:
            # one axis after the other: half of the rows are empty, and half are not asked for
            k = torch.fft.fft(torch.fft.rfft(x, n=2 * W), n=2 * H, dim=-2) * kernels[x.dtype]
            return torch.fft.irfft(torch.fft.ifft(k, dim=-2)[..., :H, :], n=2 * W)[..., :W]

        def draw(n: int, generator: torch.Generator) -> Tensor:
            z = root * white(self.data_shape, n, generator, root.dtype)
            return self._image(z, (H, W), DRAW_TOLERANCE)

        if len(self.uv) >= MANY * H * W and H * W <= MATRIX:
            draw = _Factored(beam, dtype).draw
        return Information(self.shape, apply, draw, exact=None, nearby=circulant)


class _Factored:
    """Draws of N(0, H) by the Cholesky factor of the Toeplitz operator of a beam with shape (2H, 2W), found when needed."""

    def __init__(self, beam: Tensor, dtype: torch.dtype) -> None:
        self.beam, self.dtype = beam, dtype

    @cached_property
    def factor(self) -> Tensor:
        matrix = toeplitz(self.beam)
        matrix.diagonal().mul_(1 + JITTER)
        return torch.linalg.cholesky(matrix).to(self.dtype)

    def draw(self, n: int, generator: torch.Generator) -> Tensor:
        H, W = self.beam.shape[0] // 2, self.beam.shape[1] // 2
        z = white((H * W,), n, generator, self.dtype)
        return (z @ self.factor.T).reshape(n, 1, H, W)


def toeplitz(beam: Tensor) -> Tensor:
    """The matrix of convolution with a beam of shape (2H, 2W), lag 0 at (H, W), with shape (H W, H W)."""
    H, W = beam.shape[0] // 2, beam.shape[1] // 2
    rows, columns = beam.stride()
    # entry (i, j), (k, l) is the beam at the lag (i - k, j - l); strides cannot fall, so k and l are turned round
    first = beam.storage_offset() + rows + columns
    lags = beam.as_strided((H, W, H, W), (rows, columns, rows, columns), first)
    return lags.flip(2, 3).reshape(H * W, H * W)


def nearest_circulant(beam: Tensor) -> Tensor:
    """The circulant closest to the Toeplitz operator of a beam with shape (2H, 2W).

    Each lag is averaged with its alias, weighted by the pairs of pixels that have it (T. Chan
    1988). Returns the eigenvalues, with shape (H, W).
    """
    H, W = beam.shape[0] // 2, beam.shape[1] // 2
    pairs = [1 - (torch.arange(2 * n) - n).abs().double() / n for n in (H, W)]
    weighted = beam * pairs[0][:, None] * pairs[1]
    folded = weighted.reshape(2, H, 2, W).sum((0, 2))
    # the lag (0, 0) sits at (H, W), which folds onto (0, 0)
    spectrum = torch.fft.fft2(folded).real
    spectrum = 0.5 * (spectrum + spectrum.flip(-2, -1).roll((1, 1), (-2, -1)))
    return spectrum.clamp_min(0.0)


class _Linear(torch.autograd.Function):
    """A x with its exact derivatives, for autograd and torch.func alike."""

    @staticmethod
    def forward(x: Tensor, operator: NUFFT) -> Tensor:
        return operator._visibilities(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.operator = inputs[1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _Adjoint.apply(grad, ctx.operator), None

    @staticmethod
    def jvp(ctx: Any, x: Tensor, _: None) -> Tensor:
        return _Linear.apply(x, ctx.operator)

    @staticmethod
    def vmap(info: Any, dims: tuple, x: Tensor, operator: NUFFT) -> tuple[Tensor, int]:
        return _batched(_Linear, info, dims, x, operator)


class _Adjoint(torch.autograd.Function):
    """A^T y = Re A^H y with its exact derivatives."""

    @staticmethod
    def forward(y: Tensor, operator: NUFFT) -> Tensor:
        return operator._image(y, operator.shape[-2:])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.operator = inputs[1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _Linear.apply(grad, ctx.operator), None

    @staticmethod
    def jvp(ctx: Any, y: Tensor, _: None) -> Tensor:
        return _Adjoint.apply(y, ctx.operator)

    @staticmethod
    def vmap(info: Any, dims: tuple, y: Tensor, operator: NUFFT) -> tuple[Tensor, int]:
        return _batched(_Adjoint, info, dims, y, operator)


def _batched(
    function: type, info: Any, dims: tuple, x: Tensor, operator: NUFFT
) -> tuple[Tensor, int]:
    """Fold the vmapped dimension into the batch."""
    x = x.movedim(dims[0], 0)
    out = function.apply(x.flatten(0, 1), operator)
    return out.reshape(info.batch_size, -1, *out.shape[1:]), 0


def _check_uv(uv: Tensor, shape: tuple[int, ...], pixel_scale: float) -> None:
    if uv.ndim != 2 or uv.shape[1] != 2:
        hint = "; transpose it?" if uv.ndim == 2 and uv.shape[0] == 2 else ""
        raise ValueError(f"uv has shape {tuple(uv.shape)}, expected (N, 2){hint}")
    if len(shape) != 3 or shape[0] != 1:
        raise ValueError(f"image shape is {tuple(shape)}, expected (1, H, W): one channel")
    if not bool(torch.isfinite(uv).all()):
        raise ValueError(
            f"uv has {int((~torch.isfinite(uv)).any(1).sum())} rows that are not finite"
        )
    if len(uv) == 0:
        raise ValueError("uv has no rows: every visibility was flagged?")
    if not 0 < pixel_scale < np.inf:
        raise ValueError(f"pixel_scale is {pixel_scale:g}, expected a positive number [arcsec]")
    longest = float(uv.abs().max())
    coarsest = 1 / (2 * longest * ARCSEC) if longest > 0 else np.inf
    if pixel_scale > coarsest:
        raise ValueError(
            f"a pixel of {pixel_scale:g} arcsec is too coarse for the longest baseline, "
            f"{longest:.4g} lambda: expected at most {coarsest:.4g} arcsec"
        )
