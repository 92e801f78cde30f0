"""Operators on pixels: all of them, some of them, or any matrix."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from scoreinv.operators.base import LinearOperator
from scoreinv.tensors import as_tensor


class Identity(LinearOperator):
    """y = x, for images with shape (C, H, W)."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.shape = self.data_shape = tuple(shape)

    def forward(self, x: Tensor) -> Tensor:
        return x

    def transpose(self, y: Tensor) -> Tensor:
        return y

    def gain(self) -> Tensor:
        return torch.ones(self.shape[-2:], dtype=torch.float64)

    @property
    def stationary(self) -> bool:
        return True

    @property
    def pixelwise(self) -> Tensor:
        return torch.ones(self.shape, dtype=torch.float64)


class Mask(LinearOperator):
    """y = x where the mask is True, 0 elsewhere.

    The masked data carry no information on x; their noise is still counted in the likelihood
    unless its variance is `inf` there.

    Args:
        mask: With shape (C, H, W), bool.
    """

    def __init__(self, mask: Tensor) -> None:
        mask = as_tensor(mask)
        if mask.dtype != torch.bool:
            raise ValueError(
                f"mask has dtype {mask.dtype}, expected torch.bool (True where data exist)"
            )
        self.mask = mask
        self.shape = self.data_shape = tuple(mask.shape)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.mask

    transpose = forward

    def gain(self) -> Tensor:
        return self.mask.double().mean().expand(self.shape[-2:]).clone()

    @property
    def pixelwise(self) -> Tensor:
        return self.mask.double()


class DenseOperator(LinearOperator):
    """y = matrix x.

    Args:
        matrix: With shape (m, d), d = C H W.
        shape: Shape (C, H, W) of the image.
    """

    def __init__(self, matrix: Tensor, shape: tuple[int, ...]) -> None:
        matrix, d = as_tensor(matrix), math.prod(shape)
        if matrix.ndim != 2 or matrix.shape[1] != d:
            hint = "; transpose it?" if matrix.ndim == 2 and matrix.shape[0] == d else ""
            raise ValueError(
                f"matrix has shape {tuple(matrix.shape)}, expected (m, {d}) "
                f"for images of shape {tuple(shape)}{hint}"
            )
        if not bool(torch.isfinite(matrix).all()):
            raise ValueError("matrix has values that are not finite")
        self.A = matrix.to(torch.promote_types(matrix.dtype, torch.float64))
        self.shape = tuple(shape)
        self.data_shape, self.complex = (matrix.shape[0],), matrix.is_complex()

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1).to(self.A.dtype) @ self.A.T

    def transpose(self, y: Tensor) -> Tensor:
        x = y.to(self.A.dtype) @ self.A.conj()
        return (x.real if self.complex else x).reshape(len(y), *self.shape)
