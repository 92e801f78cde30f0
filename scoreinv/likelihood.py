"""The likelihood p(y | x) of a measurement, y = A x + noise.

It simulates and it evaluates, and holds no data. Samplers condition Gaussians on data, which linear operators and Gaussian
noise allow in closed form; of any other likelihood they take the nearest such one to go by, and correct for the rest with
the true one (`scoreinv.posterior`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from numpy.typing import ArrayLike
from torch import Tensor

from scoreinv.gaussian import Covariance
from scoreinv.noise import GaussianNoise, Noise, RiceNoise
from scoreinv.operators import Amplitude, DenseOperator, Generated, LinearOperator
from scoreinv.operators.information import Information, white
from scoreinv.tensors import as_tensor

PROBES = 256  # draws that measure how a Gaussian error of an image shows in amplitudes


@dataclass(frozen=True)
class Likelihood:
    """p(y | x).

    Args:
        operator: A.
        noise: What separates y from A x.

    Raises:
        ValueError: The noise does not fit the operator's data.
    """

    operator: LinearOperator | Amplitude | Generated
    noise: Noise

    def __post_init__(self) -> None:
        self.noise.check(self.operator.data_shape, self.operator.complex)
        noise = self.noise
        amplitudes = isinstance(self.operator, Amplitude)
        if not amplitudes and isinstance(noise, RiceNoise):
            raise ValueError(
                "RiceNoise is that of amplitudes; take GaussianNoise for other data, or make them amplitudes with "
                "Amplitude(operator)"
            )
        if amplitudes and not isinstance(noise, GaussianNoise | RiceNoise):
            raise ValueError(
                f"noise of amplitudes is a {type(noise).__name__}, expected RiceNoise or GaussianNoise"
            )
        if amplitudes and isinstance(noise, GaussianNoise) and noise.pixel_precision is None:
            raise ValueError(
                "noise of amplitudes takes std or variance, not a spectrum or a matrix"
            )

    @property
    def linear(self) -> bool:
        """Whether A is a linear operator."""
        return isinstance(self.operator, LinearOperator)

    @property
    def gaussian(self) -> bool:
        """Whether Gaussians can be conditioned on the data in closed form."""
        return self.linear and isinstance(self.noise, GaussianNoise)

    def simulate(self, x: Tensor | ArrayLike, seed: int) -> Tensor:
        """Data of each image, with shape (B, *data), for x with shape (B, C, H, W).

        In the precision of x; counts and data with outliers are in float64.
        """
        x = as_tensor(x)
        # in single precision the phases of visibilities would be off by more than good noise
        clean = self.operator(x.double())
        wide = torch.promote_types(x.dtype, torch.complex64) if clean.is_complex() else x.dtype
        return self.noise.observe(clean.to(wide), torch.Generator().manual_seed(seed))

    def log_prob(self, y: Tensor | ArrayLike, x: Tensor | ArrayLike) -> Tensor:
        """log p(y | x), with shape (B,), in float64.

        Args:
            y: Data, with shape (*data) or (B, *data).
            x: Images, with shape (B, C, H, W).
        """
        return self.noise.log_density(*self._pair(y, x))

    def chi2(self, y: Tensor | ArrayLike, x: Tensor | ArrayLike) -> Tensor:
        """Squared residuals over their variance, (y - A x)^T S^-1 (y - A x), with shape (B,), in float64."""
        return self.noise.misfit(*self._pair(y, x))

    def residual(self, y: Tensor | ArrayLike, x: Tensor | ArrayLike) -> Tensor:
        """y - A x, with shape (B, *data), in float64; of amplitudes y less their mean."""
        y, clean = self._pair(y, x)
        return y - self.noise.mean(clean)

    def projection(self, y: Tensor) -> Tensor:
        """D = A^T S^-1 y, with shape (C, H, W), in float64, for y with shape (*data); linear and Gaussian only."""
        wide = torch.complex128 if self.operator.complex else torch.float64
        return self.operator.transpose(self.noise.weigh(y[None].to(wide)))[0]

    def nearby(self, y: Tensor, x: Tensor) -> tuple[Likelihood, Tensor]:
        """The linear Gaussian likelihood that looks like this one for such images, and its data.

        Of amplitudes it knows nothing: any phase would be a guess. Nor does it of what a generator makes.

        Args:
            y: Data, with shape (*data).
            x: What the image may be, with shape (B, C, H, W).
        """
        if self.gaussian:
            return self, y
        if isinstance(self.operator, Generated):
            blind = DenseOperator(torch.zeros(1, math.prod(self.operator.shape)), x.shape[1:])
            nothing = GaussianNoise(variance=math.inf)
            return Likelihood(blind, nothing), torch.zeros(1, dtype=torch.float64)
        if not self.linear:
            nothing = GaussianNoise(variance=torch.full(self.operator.data_shape, math.inf))
            inner = self.operator.inner
            return Likelihood(inner, nothing), torch.zeros(y.shape, dtype=torch.complex128)
        noise, data = self.noise.nearby(y, self.operator(x.double()))
        return Likelihood(self.operator, noise), data

    def equivalent(self, x: Tensor) -> Likelihood:
        """The linear Gaussian likelihood whose data know about as much of an image as those of this one.

        Args:
            x: A typical image, with shape (C, H, W).
        """
        if self.gaussian:
            return self
        noise = self.noise.equivalent(self.operator(x[None].double())[0])
        if self.linear:
            return Likelihood(self.operator, noise)
        if isinstance(self.operator, Generated):
            slope = noise.whiten(self.operator.slope(x[None])[0]).flatten(1).T
            return Likelihood(DenseOperator(slope, self.operator.shape), GaussianNoise(std=1.0))
        # of a visibility only the part along itself is seen, which is half of it
        variance = 2 / noise.pixel_precision.expand(self.operator.data_shape)
        return Likelihood(self.operator.inner, GaussianNoise(variance=variance))

    def curvature(self, z: Tensor) -> Tensor:
        """The Fisher information of the data on each z, with shape (B, d, d), of what a generator makes of it.

        Args:
            z: With shape (B, 1, 1, d).
        """
        slope, clean = self.operator.slope(z), self.operator(z.double())
        whitened = [
            self.noise.equivalent(c).whiten(J).flatten(1)
            for J, c in zip(slope, clean, strict=True)
        ]
        return torch.stack([(J @ J.mH).real for J in whitened])

    def log_slope(self, y: Tensor, x: Tensor) -> Tensor:
        """The gradient of log p(y | x), with the shape (B, C, H, W) and dtype of x, for data as in `log_prob`."""
        if self.gaussian:
            misfit = self.noise.weigh(y - self.operator(x.double()))
            return self.operator.transpose(misfit).to(x.dtype)
        with torch.enable_grad():
            x = x.detach().requires_grad_(True)
            (slope,) = torch.autograd.grad(self.log_prob(y, x).sum(), x)
        # the amplitude of nothing has no slope
        return slope.nan_to_num()

    def log_prob_about(self, y: Tensor, x: Tensor, error: Covariance) -> Tensor:
        """log p(y | x_0), with shape (B,), where x_0 is known to be x up to a Gaussian error.

        Amplitudes are told apart only as far as the error allows; of others, for which conditioning allows for it, or
        nothing does, it is `log_prob`.

        Args:
            y: Data, with shape (*data).
            x: Images, with shape (B, C, H, W).
            error: Covariance of the error.
        """
        if not isinstance(self.operator, Amplitude):
            return self.log_prob(y, x)
        blurred = self.operator.blurred(x.double(), error.sqrt(self._probes))
        return self.noise.log_density_about(y, *blurred)

    def information(self, dtype: torch.dtype) -> Information:
        """H = A^T S^-1 A for images of this precision, prepared once for all data; linear and Gaussian only."""
        if dtype not in self._informations:
            self._informations[dtype] = self.operator.information(self.noise, dtype)
        return self._informations[dtype]

    @cached_property
    def _informations(self) -> dict[torch.dtype, Information]:
        return {}

    @cached_property
    def _probes(self) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        return white(self.operator.shape, PROBES, generator, torch.float64)

    def _pair(self, y: Tensor | ArrayLike, x: Tensor | ArrayLike) -> tuple[Tensor, Tensor]:
        """The data and what they would be without noise, in float64."""
        y, x = as_tensor(y), as_tensor(x)
        clean = self.operator(x.double())
        if y.shape not in (clean.shape, clean.shape[1:]):
            raise ValueError(
                f"data have shape {tuple(y.shape)}, expected {tuple(clean.shape[1:])}, "
                f"or {tuple(clean.shape)} with data of its own for each image"
            )
        return y, clean

    @property
    def data_size(self) -> int:
        """Number of real data that are not masked; the two parts of complex data count each."""
        count = math.prod(self.operator.data_shape)
        if isinstance(self.noise, GaussianNoise):
            values = self.noise.covariance.eigenvalues(self.operator.data_shape)
            count = int((~values.isinf()).sum())
        return count * (2 if self.operator.complex else 1)
