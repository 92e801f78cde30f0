"""Tensors of whatever holds numbers: FITS files and old ones of NumPy have bytes in an order that torch does not take."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor


def as_tensor(value: Tensor | ArrayLike, dtype: torch.dtype | None = None) -> Tensor:
    """The value as a tensor, which shares its memory where torch can; arrays in any byte order, also reversed ones.

    Raises:
        ValueError: An array of anything but numbers.
    """
    if isinstance(value, np.ndarray):
        if value.dtype.kind not in "biufc" or value.dtype.itemsize > 16:
            raise ValueError(f"an array is of type {value.dtype}, expected numbers")
        if not value.dtype.isnative or any(step < 0 for step in value.strides):
            value = np.array(value, dtype=value.dtype.newbyteorder("="), order="C")
    return torch.as_tensor(value, dtype=dtype)
