"""Covariances of batches: side by side, one of several for each image, or one of its own for each image."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from scoreinv.gaussian.covariances import Covariance, Diagonal, Fourier, Scalar


class Blocks(Covariance):
    """K covariances side by side: C_k acts on x[:, k], for x with shape (B, K, *shape)."""

    def __init__(self, covariances: Sequence[Covariance]) -> None:
        self._covariances = tuple(covariances)

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self._covariances), *self._covariances[0].shape)

    def fits(self, shape: tuple[int, ...]) -> bool:
        same = len(self._covariances) == shape[0]
        return same and all(C.fits(shape[1:]) for C in self._covariances)

    def map(self, f: Callable[[Tensor], Tensor]) -> Blocks:
        return Blocks([C.map(f) for C in self._covariances])

    def apply(self, x: Tensor) -> Tensor:
        return torch.stack([C.apply(x[:, k]) for k, C in enumerate(self._covariances)], 1)

    def power(self, x: Tensor) -> Tensor:
        parts = [C.power(x[:, k]).flatten() for k, C in enumerate(self._covariances)]
        return torch.cat(parts)

    def eigenvalues(self, shape: tuple[int, ...]) -> Tensor:
        return torch.cat([C.eigenvalues(shape[1:]) for C in self._covariances])


class Mixed(Covariance):
    """One of several covariances for each image of a batch.

    Args:
        covariances: To choose from.
        which: The number of each image's, with shape (B,).
    """

    def __init__(self, covariances: Sequence[Covariance], which: Tensor) -> None:
        self._covariances, self._which = tuple(covariances), which

    @property
    def shape(self) -> tuple[int, ...]:
        return self._covariances[0].shape

    def map(self, f: Callable[[Tensor], Tensor]) -> Mixed:
        used = set(self._which.tolist())
        mapped = [C.map(f) if i in used else C for i, C in enumerate(self._covariances)]
        return Mixed(mapped, self._which)

    def apply(self, x: Tensor) -> Tensor:
        out = torch.empty_like(x)
        for i in self._which.unique().tolist():
            here = self._which == i
            out[here] = self._covariances[i].apply(x[here])
        return out

    def power(self, x: Tensor) -> Tensor:
        raise ValueError("images of several covariances have no eigenbasis in common")

    def eigenvalues(self, shape: tuple[int, ...]) -> Tensor:
        """Of each image, with shape (B, d)."""
        return torch.stack([self._covariances[i].eigenvalues(shape) for i in self._which.tolist()])


def selected(
    covariances: Sequence[Covariance], which: Tensor, shape: tuple[int, ...]
) -> Covariance:
    """`Mixed` on images of this shape, as one array where all are diagonal in pixels, or all in Fourier space."""
    kinds = {type(C) for C in covariances}
    for kind in (Diagonal, Fourier):
        if kinds <= {Scalar, kind}:
            return kind(
                torch.stack([C.eigenvalues(shape).reshape(shape) for C in covariances])[which]
            )
    return Mixed(covariances, which)


@dataclass(frozen=True)
class Modulated:
    """A covariance of its own for each image of a batch, K = sum_b a_b rho_b a_b: stationary parts of varying strength.

    Args:
        a: Standard deviations of the parts in each pixel, with shape (B, parts, C, H, W).
        rho: Correlations of the pixels, acting on the shape of a.
        white: Standard deviations of one more part, without correlation, with shape (B, C, H, W), if there is one.
    """

    a: Tensor
    rho: Fourier
    white: Tensor | None = None

    def __getitem__(self, rows: Tensor) -> Modulated:
        """Those of some images."""
        return Modulated(self.a[rows], self.rho, None if self.white is None else self.white[rows])

    def apply(self, x: Tensor) -> Tensor:
        """K x, with shape (B, C, H, W)."""
        stationary = (self.a * self.rho.apply(self.a * x[:, None])).sum(1)
        return stationary if self.white is None else stationary + self.white.square() * x

    @cached_property
    def deviation(self) -> Tensor:
        """Standard deviation of each pixel, with shape (B, C, H, W)."""
        correlated = self.rho.spectrum.mean((-2, -1), keepdim=True).to(self.a.dtype)
        variance = (self.a.square() * correlated).sum(1)
        return (variance if self.white is None else variance + self.white.square()).sqrt()

    def widened(self, factor: Tensor) -> Modulated:
        """With all standard deviations of a pixel multiplied by a factor, with shape (B, C, H, W)."""
        white = None if self.white is None else factor * self.white
        return Modulated(factor[:, None] * self.a, self.rho, white)

    def draw(self, generator: torch.Generator) -> Tensor:
        """A draw of N(0, K) for each image, with shape (B, C, H, W)."""
        z = torch.randn(self.a.shape, generator=generator, dtype=self.a.dtype)
        stationary = (self.a * self.rho.sqrt(z)).sum(1)
        if self.white is None:
            return stationary
        own = torch.randn(self.white.shape, generator=generator, dtype=self.white.dtype)
        return stationary + self.white * own


def blocks(covariances: Sequence[Covariance], shape: tuple[int, ...]) -> Covariance:
    """`Blocks` on images of this shape, as one array where all are diagonal in the same basis."""
    kinds = {type(C) for C in covariances}
    for kind in (Diagonal, Fourier):
        if kinds <= {Scalar, kind}:
            return kind(torch.stack([C.eigenvalues(shape).reshape(shape) for C in covariances]))
    return Blocks(covariances)
