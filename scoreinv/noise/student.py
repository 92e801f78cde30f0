"""Noise with outliers: y = A x + scale t, with Student's t of few degrees of freedom for each datum.

Near the data it is Gaussian with the variance scale^2 (nu + E r^2 / scale^2) / (nu + 1) of a residual r, so that outliers
weigh little: the weights of Lange, Little & Taylor, Robust Statistical Modeling Using the t Distribution (1989).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from scoreinv.noise.base import Noise
from scoreinv.noise.gaussian import GaussianNoise, positive


class StudentNoise(Noise):
    """Independent Student's t, of the real and the imaginary part each.

    Args:
        scale: Of each datum, a number or the data's shape [data unit].
        dof: Degrees of freedom nu > 0; 1 is Cauchy's noise, and more than about 30 Gaussian.

    Raises:
        ValueError: A scale or degrees of freedom that are not positive and finite.
    """

    def __init__(self, scale: float | Tensor, dof: float) -> None:
        self.scale, self.dof = positive(scale, "scale"), float(positive(dof, "dof"))

    def observe(self, clean: Tensor, generator: torch.Generator) -> Tensor:
        from scipy.special import gammaincinv

        parts = _parts(clean)
        z = torch.randn(parts.shape, generator=generator, dtype=torch.float64)
        uniform = torch.rand(parts.shape, generator=generator, dtype=torch.float64)
        chi2 = 2 * torch.from_numpy(gammaincinv(self.dof / 2, uniform.numpy()))
        noise = z * (self.dof / chi2).sqrt()
        noise = torch.view_as_complex(noise) if clean.is_complex() else noise
        return clean + self.scale * noise

    def log_density(self, y: Tensor, clean: Tensor) -> Tensor:
        nu, scale = self.dof, self._scale(clean)
        square = (_parts(y - clean) / scale).square()
        peak = math.lgamma((nu + 1) / 2) - math.lgamma(nu / 2) - 0.5 * math.log(nu * math.pi)
        each = peak - scale.log() - 0.5 * (nu + 1) * torch.log1p(square / nu)
        return each.flatten(1).sum(1)

    def misfit(self, y: Tensor, clean: Tensor) -> Tensor:
        square = (_parts(y - clean) / self._scale(clean)).square()
        # over the variance that each residual calls for: 1 on average for any nu, chi^2 for a large one
        return ((self.dof + 1) * square / (self.dof + square)).flatten(1).sum(1)

    def nearby(self, y: Tensor, clean: Tensor) -> tuple[GaussianNoise, Tensor]:
        square = ((y - clean) / self.scale).abs().square().mean(0) / (2 if y.is_complex() else 1)
        return GaussianNoise(variance=self.scale**2 * (self.dof + square) / (self.dof + 1)), y

    def equivalent(self, clean: Tensor) -> GaussianNoise:
        return GaussianNoise(variance=self.scale**2 * (self.dof + 3) / (self.dof + 1))

    def check(self, shape: tuple[int, ...], complex: bool) -> None:
        if self.scale.ndim and tuple(self.scale.shape) != tuple(shape):
            raise ValueError(
                f"scale has shape {tuple(self.scale.shape)}, the data have shape {tuple(shape)}"
            )

    def _scale(self, clean: Tensor) -> Tensor:
        return self.scale[..., None] if clean.is_complex() and self.scale.ndim else self.scale


def _parts(r: Tensor) -> Tensor:
    """Real and imaginary parts along a last axis of their own, in float64."""
    if r.is_complex():
        return torch.view_as_real(r.to(torch.complex128))
    return r.double()
