"""Structured covariances, and the linear algebra that everything else stands on.

A covariance C is known through its eigenvalues and the orthonormal basis in which it is diagonal,
so that any function of it is as cheap as C itself: `C.map(f)` has the eigenvalues f(lambda) in the
same basis. Pixels (`Scalar`, `Diagonal`), the discrete Fourier transform (`Fourier`, stationary
fields), a few directions (`LowRank`) and a full eigenbasis (`Dense`) are the bases. All of them
act on batches x, with shape (B, C, H, W) or (B, *shape).
"""

from __future__ import annotations

import abc
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


class Covariance(abc.ABC):
    """A symmetric positive semi-definite operator, diagonal in a known orthonormal basis."""

    @abc.abstractmethod
    def map(self, f: Callable[[Tensor], Tensor]) -> Covariance:
        """f(C): the same basis with eigenvalues f(lambda); f acts elementwise."""

    @abc.abstractmethod
    def apply(self, x: Tensor) -> Tensor:
        """C x, with shape (B, *shape), for x with shape (B, *shape)."""

    @abc.abstractmethod
    def eigenvalues(self, shape: tuple[int, ...]) -> Tensor:
        """All eigenvalues with their multiplicities on images of this shape, with shape (d,)."""

    @property
    @abc.abstractmethod
    def shape(self) -> tuple[int, ...]:
        """Shape of what it is known by; () fits any image, (d,) any image of d pixels."""

    @abc.abstractmethod
    def power(self, x: Tensor) -> Tensor:
        """Mean squared coordinate of a batch in the eigenbasis, in the order that `map` sees.

        Where one eigenvalue stands for many directions, their mean.
        """

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether it acts on images of this shape."""
        return _broadcasts(self.shape, shape)

    def solve(self, x: Tensor) -> Tensor:
        """C^-1 x, with shape (B, *shape)."""
        return self.map(torch.reciprocal).apply(x)

    def sqrt(self, x: Tensor) -> Tensor:
        """C^1/2 x (the symmetric root), with shape (B, *shape)."""
        return self.map(torch.sqrt).apply(x)

    def logdet(self, shape: tuple[int, ...]) -> float:
        """log det C on images of this shape."""
        return float(self.eigenvalues(shape).log().sum())

    def marginal_variance(self, shape: tuple[int, ...]) -> float:
        """Mean variance of a pixel, trace(C) / d."""
        return float(self.eigenvalues(shape).mean())


@dataclass(frozen=True)
class Scalar(Covariance):
    """White covariance, variance times the identity."""

    variance: Tensor | float

    @property
    def shape(self) -> tuple[int, ...]:
        return ()

    def map(self, f: Callable[[Tensor], Tensor]) -> Scalar:
        return Scalar(f(torch.as_tensor(self.variance, dtype=torch.float64)))

    def apply(self, x: Tensor) -> Tensor:
        return x * float(self.variance)

    def power(self, x: Tensor) -> Tensor:
        return x.double().square().mean()

    def eigenvalues(self, shape: tuple[int, ...]) -> Tensor:
        return torch.full((math.prod(shape),), float(self.variance), dtype=torch.float64)


@dataclass(frozen=True)
class Diagonal(Covariance):
    """Independent pixels; `variance` has the shape of one image, or broadcasts to it."""

    variance: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.variance.shape)

    def map(self, f: Callable[[Tensor], Tensor]) -> Diagonal:
        return Diagonal(f(self.variance))

    def apply(self, x: Tensor) -> Tensor:
        return x * self.variance.to(x.dtype)

    def power(self, x: Tensor) -> Tensor:
        return _mean_to(x.double().square().mean(0), self.shape)

    def eigenvalues(self, shape: tuple[int, ...]) -> Tensor:
        return self.variance.expand(shape).reshape(-1).double()

    def coordinates(self, x: Tensor) -> Tensor:
        """Orthonormal coordinates in which the covariance is diagonal, in the order of its eigenvalues: the pixels."""
        return x

    def image(self, q: Tensor) -> Tensor:
        """The image with these coordinates."""
        return q


@dataclass(frozen=True)
class Fourier(Covariance):
    """Stationary (circulant) covariance.

    Args:
        spectrum: Power at each frequency in the order of `torch.fft.fft2`, with shape (H, W) or
            (C, H, W); white noise of variance v has the spectrum v everywhere.
    """

    spectrum: Tensor

    def __post_init__(self) -> None:
        flipped = self.spectrum.flip(-2, -1).roll((1, 1), (-2, -1))
        tolerance = 1e-6 * float(self.spectrum.abs().max())
        if not torch.allclose(self.spectrum, flipped, rtol=1e-4, atol=tolerance):
            raise ValueError(
                "the power spectrum of a real field is symmetric, P(k) = P(-k), in the order of "
                "torch.fft.fft2; this one is not. Was it shifted with fftshift? Undo that with "
                "ifftshift."
            )

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.spectrum.shape)

    def fits(self, shape: tuple[int, ...]) -> bool:
        return _broadcasts(self.shape, shape) and self.shape[-2:] == tuple(shape[-2:])

    def half(self, dtype: torch.dtype) -> Tensor:
        """The spectrum at the frequencies of `torch.fft.rfft2`."""
        if dtype not in self._halves:
            half = self.spectrum[..., : self.spectrum.shape[-1] // 2 + 1]
            self._halves[dtype] = half.to(dtype).contiguous()
        return self._halves[dtype]

    @cached_property
    def _halves(self) -> dict[torch.dtype, Tensor]:
        return {}

    def map(self, f: Callable[[Tensor], Tensor]) -> Fourier:
        return Fourier(f(self.spectrum))

    def apply(self, x: Tensor) -> Tensor:
        return filtered(x, self)[0]

    def power(self, x: Tensor) -> Tensor:
        power = torch.fft.fft2(x, norm="ortho").abs().double().square().mean(0)
        return _mean_to(power, self.shape)

    def eigenvalues(self, shape: tuple[int, ...]) -> Tensor:
        return self.spectrum.expand(shape).reshape(-1).double()

    def coordinates(self, x: Tensor) -> Tensor:
        """Orthonormal coordinates in which the covariance is diagonal, in the order of its eigenvalues.

        The Hartley transform, which is real and its own inverse. Hartley, A More Symmetrical Fourier Analysis Applied to
        Transmission Problems (1942).
        """
        f = torch.fft.fft2(x, norm="ortho")
        return f.real - f.imag

    def image(self, q: Tensor) -> Tensor:
        """The image with these coordinates."""
        return self.coordinates(q)


class LowRank(Covariance):
    """A few directions above a white floor, floor I + U diag(excess) U^T.

    Args:
        factor: Directions F with shape (r, *shape); the covariance is floor I + F^T F.
        floor: White variance, > 0 where C must be inverted.
    """

    def __init__(self, factor: Tensor, floor: float) -> None:
        flat = factor.reshape(factor.shape[0], -1)
        _, singular, self._basis = torch.linalg.svd(flat, full_matrices=False)
        self._floor = torch.as_tensor(floor, dtype=flat.dtype)
        self._values = singular**2 + self._floor

    @property
    def shape(self) -> tuple[int, ...]:
        return (self._basis.shape[1],)

    def fits(self, shape: tuple[int, ...]) -> bool:
        return self.shape == (math.prod(shape),)

    def map(self, f: Callable[[Tensor], Tensor]) -> LowRank:
        other = object.__new__(LowRank)
        values = f(torch.cat([self._values, self._floor[None]]))
        other._basis, other._values, other._floor = self._basis, values[:-1], values[-1]
        return other

    def apply(self, x: Tensor) -> Tensor:
        flat, basis = x.reshape(x.shape[0], -1), self._basis.to(x.dtype)
        excess = (self._values - self._floor).to(x.dtype)
        return (self._floor.to(x.dtype) * flat + ((flat @ basis.T) * excess) @ basis).reshape(
            x.shape
        )

    def power(self, x: Tensor) -> Tensor:
        flat = x.flatten(1).double()
        inside = (flat @ self._basis.double().T).square()
        outside = flat.square().sum(1) - inside.sum(1)
        rest = max(flat.shape[1] - inside.shape[1], 1)
        return torch.cat([inside.mean(0), outside.mean()[None] / rest])

    def eigenvalues(self, shape: tuple[int, ...]) -> Tensor:
        rest = self._floor.expand(math.prod(shape) - len(self._values))
        return torch.cat([self._values, rest]).double()


class Dense(Covariance):
    """A full matrix, with shape (d, d), d = C H W; factorised once into its eigenbasis."""

    def __init__(self, matrix: Tensor) -> None:
        if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
            raise ValueError(f"covariance has shape {tuple(matrix.shape)}, expected (d, d)")
        skew = float((matrix - matrix.T).abs().max())
        if not skew <= 1e-4 * float(matrix.abs().max()):
            raise ValueError(
                f"covariance differs from its transpose by up to {skew:.3g}, expected a finite, "
                "symmetric matrix; a Cholesky factor L? pass L @ L.T"
            )
        values, self._basis = torch.linalg.eigh(0.5 * (matrix + matrix.T))
        if float(values[0]) < -1e-8 * float(values[-1]):
            raise ValueError(
                f"covariance has a negative eigenvalue, {float(values[0]):.3g}; "
                "expected a positive semi-definite matrix"
            )
        self._values = values.clamp_min(0)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self._values.shape)

    def fits(self, shape: tuple[int, ...]) -> bool:
        return self.shape == (math.prod(shape),)

    def map(self, f: Callable[[Tensor], Tensor]) -> Dense:
        other = object.__new__(Dense)
        other._basis, other._values = self._basis, f(self._values)
        return other

    def apply(self, x: Tensor) -> Tensor:
        basis = self._basis.to(x.dtype)
        flat = x.reshape(x.shape[0], -1)
        return ((flat @ basis * self._values.to(x.dtype)) @ basis.T).reshape(x.shape)

    def power(self, x: Tensor) -> Tensor:
        return (x.flatten(1).double() @ self._basis.double()).square().mean(0)

    def eigenvalues(self, shape: tuple[int, ...]) -> Tensor:
        return self._values.double()


def filtered(x: Tensor, *covariances: Covariance) -> list[Tensor]:
    """[C_1 x, C_2 x, ...], each with the shape of x; stationary covariances share one transform."""
    if not all(isinstance(C, Fourier) for C in covariances):
        return [C.apply(x) for C in covariances]
    k, size = torch.fft.rfft2(x), x.shape[-2:]
    return [torch.fft.irfft2(k * C.half(x.dtype), s=size) for C in covariances]


def joint(f: Callable[..., Tensor], *covariances: Covariance) -> Covariance | None:
    """f(C_1, C_2, ...) if all are diagonal in pixels, or all in Fourier space; None otherwise."""
    rest = [C for C in covariances if not isinstance(C, Scalar)]
    values = {Scalar: "variance", Diagonal: "variance", Fourier: "spectrum"}
    kinds = {type(C) for C in rest}
    if len(kinds) > 1 or not kinds <= set(values):
        return None
    kind = kinds.pop() if kinds else Scalar
    arguments = (getattr(C, values[type(C)]) for C in covariances)
    return kind(f(*(torch.as_tensor(v, dtype=torch.float64) for v in arguments)))


def _broadcasts(own: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    aligned = zip(own[::-1], tuple(shape)[::-1], strict=False)
    return len(own) <= len(shape) and all(a in (1, b) for a, b in aligned)


def _mean_to(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Mean over the axes along which `shape` broadcasts to that of x."""
    return x.sum_to_size(shape) * (math.prod(shape) / x.numel())
