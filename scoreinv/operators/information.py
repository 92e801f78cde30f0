"""H = A^T S^-1 A: all that the data's precision says about the image.

A linear Gaussian likelihood enters every sampler through H, through D = A^T S^-1 y, and through
draws of N(0, H), the noise as it appears in D. Where H is diagonal in the pixel or in the Fourier
basis it is known exactly as a covariance; otherwise the nearest circulant (T. Chan, An Optimal
Circulant Preconditioner for Toeplitz Systems, 1988) preconditions the solves.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from scoreinv.gaussian import Covariance, Diagonal, Fourier, Scalar
from scoreinv.noise.gaussian import GaussianNoise

POWERS = 20  # of H that its largest eigenvalue is found by

if TYPE_CHECKING:
    from scoreinv.operators.base import LinearOperator


@dataclass(frozen=True)
class Information:
    """H = A^T S^-1 A.

    Attributes:
        shape: Shape (C, H, W) of the image.
        apply: H x, for x with shape (B, C, H, W).
        draw: n draws of N(0, H) from a generator, with shape (n, C, H, W).
        exact: H as a covariance (`Scalar`, `Diagonal`, `Fourier`), if it is diagonal there.
        nearby: The closest circulant to H, if A is close to stationary.
    """

    shape: tuple[int, ...]
    apply: Callable[[Tensor], Tensor]
    draw: Callable[[int, torch.Generator], Tensor]
    exact: Covariance | None
    nearby: Fourier | None

    def largest(self) -> float:
        """The eigenvalue of the direction that data know best; a little less where only powers of H tell it."""
        if self.exact is not None:
            return float(self.exact.eigenvalues(self.shape).max())
        generator = torch.Generator().manual_seed(0)
        x = white(self.shape, 1, generator, torch.float64)
        for _ in range(POWERS):
            x = self.apply(x)
            size = float(x.norm())
            if not size:
                break
            x = x / size
        return size


def white(
    shape: tuple[int, ...], n: int, generator: torch.Generator, dtype: torch.dtype
) -> Tensor:
    """White noise, with shape (n, *shape); both parts of complex noise have unit variance."""
    z = torch.randn((n, *shape), generator=generator, dtype=dtype)
    return math.sqrt(2) * z if dtype.is_complex else z


def composed(operator: LinearOperator, noise: GaussianNoise, dtype: torch.dtype) -> Information:
    """H by applying A, S^-1 and A^T in turn."""
    kind = torch.promote_types(dtype, torch.complex64) if operator.complex else dtype

    def draw(n: int, generator: torch.Generator) -> Tensor:
        return operator.transpose(noise.whiten(white(operator.data_shape, n, generator, kind)))

    return Information(
        shape=operator.shape,
        apply=lambda x: operator.transpose(noise.weigh(operator.forward(x))),
        draw=draw,
        exact=commuting(operator, noise),
        nearby=_circulant(operator, noise),
    )


def commuting(operator: LinearOperator, noise: GaussianNoise) -> Covariance | None:
    """H as a covariance, where A and S share the pixel or the Fourier basis."""
    pixels = operator.pixelwise
    if pixels is not None and noise.pixel_precision is not None:
        weight = (pixels**2 * noise.pixel_precision).expand(operator.shape)
        uniform = bool((weight == weight.flatten()[0]).all())
        return Scalar(weight.flatten()[0]) if uniform else Diagonal(weight)
    gain = operator.gain()
    if operator.stationary and gain is not None:
        precision = noise.spectral_precision(gain.shape[-2:])
        if precision is not None and noise.is_stationary:
            return Fourier(gain * precision)
    return None


def _circulant(operator: LinearOperator, noise: GaussianNoise) -> Fourier | None:
    gain = operator.gain()
    if gain is None or gain.ndim < 2 or operator.complex:
        return None
    precision = noise.spectral_precision(gain.shape[-2:])
    return None if precision is None else Fourier(gain * precision)
