"""Data of images that a generator makes of a few latent variables."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from scoreinv.operators.base import LinearOperator, check_shape


class Generated:
    """y = A f(z), a measurement that is not linear in z.

    Args:
        inner: A, of images.
        generator: f, from z with shape (B, *shape) to images with shape (B, *inner.shape), differentiable.
        shape: Shape (1, 1, d) of z.

    Attributes:
        data_shape: Shape of the data.
        complex: Whether they are complex.
    """

    def __init__(
        self, inner: LinearOperator, generator: Callable[[Tensor], Tensor], shape: Sequence[int]
    ) -> None:
        self.inner, self.generator, self.shape = inner, generator, tuple(shape)
        self.data_shape, self.complex = inner.data_shape, inner.complex

    def __call__(self, z: Tensor) -> Tensor:
        """A f(z), with shape (B, *data_shape), for z with shape (B, *shape)."""
        check_shape("latents", z, self.shape)
        return self.inner.forward(self.generator(z))

    def slope(self, z: Tensor) -> Tensor:
        """The derivatives of A f, with shape (B, d, *data_shape), for z with shape (B, *shape)."""
        one = torch.func.jacfwd(lambda v: self.generator(v[None])[0])
        each = torch.func.vmap(one)(z.double())
        columns = each.reshape(len(z), *self.inner.shape, -1).movedim(-1, 1)
        return self.inner.forward(columns.flatten(0, 1)).unflatten(0, columns.shape[:2])
