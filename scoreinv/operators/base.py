"""Linear measurement operators: A maps the sky x to noiseless data, its adjoint maps data back.

<A x, y> = <x, A^T y> with the real inner product Re sum conj(a) b, so that A^T y is a real image
for complex data too. `A @ B` applies B first. Operators carry no noise and no data.
"""

from __future__ import annotations

import abc
import math

import torch
from torch import Tensor

from scoreinv.gaussian import Fourier
from scoreinv.noise.gaussian import GaussianNoise, on_grid
from scoreinv.operators.information import Information, commuting, composed


class LinearOperator(abc.ABC):
    """A linear map from images, with shape (B, *shape), to data, with shape (B, *data_shape).

    Attributes:
        shape: Shape (C, H, W) of the image.
        data_shape: Shape of the data.
        complex: Whether the data are complex.
    """

    shape: tuple[int, ...]
    data_shape: tuple[int, ...]
    complex: bool = False

    @abc.abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """A x without checks, with shape (B, *data_shape)."""

    @abc.abstractmethod
    def transpose(self, y: Tensor) -> Tensor:
        """A^T y without checks, with shape (B, *shape)."""

    def __call__(self, x: Tensor) -> Tensor:
        """A x, with shape (B, *data_shape), for x with shape (B, *shape)."""
        check_shape("image", x, self.shape)
        return self.forward(x)

    def adjoint(self, y: Tensor) -> Tensor:
        """A^T y, with shape (B, *shape), for y with shape (B, *data_shape)."""
        check_shape("data", y, self.data_shape)
        return self.transpose(y)

    def pull(self, x: Tensor, y: Tensor) -> Tensor:
        """The slope of A at x transposed, times y: A^T y, wherever x is; shapes as those of `transpose`."""
        return self.transpose(y)

    def __matmul__(self, other: LinearOperator) -> LinearOperator:
        return Composition(self, other)

    def information(self, noise: GaussianNoise, dtype: torch.dtype) -> Information:
        """H = A^T S^-1 A, what the data say about the image."""
        return composed(self, noise, dtype)

    def gain(self) -> Tensor | None:
        """|A_k|^2 averaged over the field; None if A is far from stationary.

        With shape (H, W) or (C, H, W), in the order of fft2.
        """
        return None

    @property
    def stationary(self) -> bool:
        """Whether A is exactly diagonal in the Fourier basis of the image."""
        return False

    @property
    def pixelwise(self) -> Tensor | None:
        """The diagonal of A, with shape `shape`, if A acts on each pixel alone."""
        return None

    def matrix(self, dtype: torch.dtype = torch.float64) -> Tensor:
        """A as a matrix, with shape (m, d).

        Real and imaginary parts of complex data are rows of their own, one after the other.
        """
        d = math.prod(self.shape)
        columns = self.forward(torch.eye(d, dtype=dtype).reshape(d, *self.shape))
        if self.complex:
            columns = torch.view_as_real(columns)
        return columns.reshape(d, -1).T.contiguous()


class Composition(LinearOperator):
    """A B: B first."""

    def __init__(self, outer: LinearOperator, inner: LinearOperator) -> None:
        if tuple(outer.shape) != tuple(inner.data_shape) or inner.complex:
            kind = "complex " if inner.complex else ""
            raise ValueError(
                f"cannot compose: the inner operator makes {kind}data of shape "
                f"{inner.data_shape}, the outer one takes real images of shape {outer.shape}"
            )
        self.outer, self.inner = outer, inner
        self.shape, self.data_shape, self.complex = inner.shape, outer.data_shape, outer.complex

    def forward(self, x: Tensor) -> Tensor:
        return self.outer.forward(self.inner.forward(x))

    def transpose(self, y: Tensor) -> Tensor:
        return self.inner.transpose(self.outer.transpose(y))

    def gain(self) -> Tensor | None:
        outer, inner = self.outer.gain(), self.inner.gain()
        if outer is None or inner is None:
            return None
        return on_grid(outer, inner.shape[-2:]) * inner

    @property
    def stationary(self) -> bool:
        return self.outer.stationary and self.inner.stationary

    @property
    def pixelwise(self) -> Tensor | None:
        outer, inner = self.outer.pixelwise, self.inner.pixelwise
        return None if outer is None or inner is None else outer * inner

    def information(self, noise: GaussianNoise, dtype: torch.dtype) -> Information:
        outer = self.outer.information(noise, dtype)
        gain, nearby = self.inner.gain(), None
        if outer.nearby is not None and gain is not None:
            nearby = Fourier(on_grid(outer.nearby.spectrum, gain.shape[-2:]) * gain)
        return Information(
            shape=self.shape,
            apply=lambda x: self.inner.transpose(outer.apply(self.inner.forward(x))),
            draw=lambda n, generator: self.inner.transpose(outer.draw(n, generator)),
            exact=commuting(self, noise),
            nearby=nearby,
        )


def check_shape(kind: str, x: Tensor, shape: tuple[int, ...]) -> None:
    """Raise if x is not a batch of this shape."""
    if x.ndim != len(shape) + 1 or tuple(x.shape[1:]) != tuple(shape):
        expected = ", ".join(map(str, shape))
        batch = (
            " (add the batch dimension with x[None]?)" if tuple(x.shape) == tuple(shape) else ""
        )
        raise ValueError(f"{kind} has shape {tuple(x.shape)}, expected (B, {expected}){batch}")
