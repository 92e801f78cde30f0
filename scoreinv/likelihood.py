"""The likelihood p(y | x) of a linear measurement, y = A x + noise.

It simulates and it evaluates, and holds no data.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from scoreinv.noise.gaussian import GaussianNoise
from scoreinv.operators.base import LinearOperator


@dataclass(frozen=True)
class Likelihood:
    """y = A x + n.

    Args:
        operator: A.
        noise: Distribution of n.

    Raises:
        ValueError: The noise does not fit the operator's data.
    """

    operator: LinearOperator
    noise: GaussianNoise

    def __post_init__(self) -> None:
        self.noise.check(self.operator.data_shape, self.operator.complex)

    def simulate(self, x: Tensor, seed: int) -> Tensor:
        """Data of each image, with shape (B, *data), for x with shape (B, C, H, W)."""
        clean = self.operator(x)
        return clean + self.noise.sample(clean, torch.Generator().manual_seed(seed))

    def log_prob(self, y: Tensor, x: Tensor) -> Tensor:
        """log p(y | x), with shape (B,), in float64.

        Args:
            y: Data, with shape (*data) or (B, *data).
            x: Images, with shape (B, C, H, W).
        """
        return self.noise.log_prob(self.residual(y, x))

    def chi2(self, y: Tensor, x: Tensor) -> Tensor:
        """(y - A x)^T S^-1 (y - A x), with shape (B,), in float64."""
        return self.noise.chi2(self.residual(y, x))

    def residual(self, y: Tensor, x: Tensor) -> Tensor:
        """y - A x, with shape (B, *data), in float64."""
        clean = self.operator(x.double())
        if y.shape not in (clean.shape, clean.shape[1:]):
            raise ValueError(
                f"data have shape {tuple(y.shape)}, expected {tuple(clean.shape[1:])}, "
                f"or {tuple(clean.shape)} with data of its own for each image"
            )
        return y - clean

    def projection(self, y: Tensor) -> Tensor:
        """D = A^T S^-1 y, with shape (C, H, W), in float64, for y with shape (*data)."""
        wide = torch.complex128 if self.operator.complex else torch.float64
        return self.operator.transpose(self.noise.weigh(y[None].to(wide)))[0]

    @property
    def data_size(self) -> int:
        """Number of real data that are not masked; the two parts of complex data count each."""
        values = self.noise.covariance.eigenvalues(self.operator.data_shape)
        return int((~values.isinf()).sum()) * (2 if self.operator.complex else 1)
