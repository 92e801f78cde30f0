"""What every noise model can do: simulate and evaluate p(y | A x), and name the Gaussian most like it near the data."""

from __future__ import annotations

import abc
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from scoreinv.noise.gaussian import GaussianNoise


class Noise(abc.ABC):
    """p(y | clean), with clean = A x."""

    @abc.abstractmethod
    def observe(self, clean: Tensor, generator: torch.Generator) -> Tensor:
        """Data of noiseless ones, both with shape (B, *data_shape)."""

    @abc.abstractmethod
    def log_density(self, y: Tensor, clean: Tensor) -> Tensor:
        """log p(y | clean), with shape (B,), in float64; y broadcasts to clean, with shape (B, *data_shape)."""

    @abc.abstractmethod
    def misfit(self, y: Tensor, clean: Tensor) -> Tensor:
        """chi^2: squared residuals over their variance, 1 on average for each real number, with shape (B,), in float64."""

    @abc.abstractmethod
    def nearby(self, y: Tensor, clean: Tensor) -> tuple[GaussianNoise, Tensor]:
        """Gaussian noise and data that say of A x about what y does.

        Args:
            y: Data, with shape (*data_shape).
            clean: What A x may be, with shape (B, *data_shape).
        """

    @abc.abstractmethod
    def equivalent(self, clean: Tensor) -> GaussianNoise:
        """Gaussian noise whose data have about the Fisher information on A x, for A x = clean, with shape (*data_shape)."""

    @abc.abstractmethod
    def check(self, shape: tuple[int, ...], complex: bool) -> None:
        """Raise if this noise does not fit data of this shape."""

    def mean(self, clean: Tensor) -> Tensor:
        """What data scatter about, their background apart, with shape (B, *data_shape)."""
        return clean

    def check_data(self, y: Tensor) -> None:  # noqa: B027 (most noise can make any data)
        """Raise if y, with shape (*data_shape), cannot have come of this noise."""
