"""Gaussians with structured covariances, and the linear algebra that everything else stands on.

A covariance C is known through its eigenvalues and the orthonormal basis in which it is diagonal,
so that any function of it is as cheap as C itself: `C.map(f)` has the eigenvalues f(lambda) in the
same basis. Pixels (`Scalar`, `Diagonal`), the discrete Fourier transform (`Fourier`, stationary
fields), a few directions (`LowRank`) and a full eigenbasis (`Dense`) are the bases. All of them
act on batches x, with shape (B, C, H, W) or (B, *shape).
"""

from __future__ import annotations

import abc
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

AHEAD = 8  # iterations that stand for all later ones in the error of conjugate gradients


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


@dataclass(frozen=True)
class Gaussian:
    """N(mean, covariance) over images; `mean` has shape (C, H, W)."""

    mean: Tensor
    covariance: Covariance

    def log_prob(self, x: Tensor) -> Tensor:
        """log N(x; mean, C), with shape (B,), in float64, for x with shape (B, C, H, W)."""
        r = x.double() - self.mean.double()
        misfit = (r * self.covariance.solve(r)).flatten(1).sum(1)
        shape = tuple(self.mean.shape)
        return -0.5 * (
            misfit + self.covariance.logdet(shape) + math.prod(shape) * math.log(2 * math.pi)
        )

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """n draws, with shape (n, C, H, W)."""
        z = torch.randn((n, *self.mean.shape), generator=generator, dtype=self.mean.dtype)
        return self.mean + self.covariance.sqrt(z)

    def rescaled(self, amplitude: float) -> Gaussian:
        """The distribution of amplitude * x."""
        return Gaussian(amplitude * self.mean, self.covariance.map(lambda v: amplitude**2 * v))


def _broadcasts(own: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    aligned = zip(own[::-1], tuple(shape)[::-1], strict=False)
    return len(own) <= len(shape) and all(a in (1, b) for a, b in aligned)


def _mean_to(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Mean over the axes along which `shape` broadcasts to that of x."""
    return x.sum_to_size(shape) * (math.prod(shape) / x.numel())


def dot(x: Tensor, y: Tensor) -> Tensor:
    """Inner product of each pair, with shape (B,), summed in float64."""
    return (x.double() * y.double()).flatten(1).sum(1)


def conjugate_gradients(
    H: Callable[[Tensor], Tensor],
    b: Tensor,
    preconditioner: Callable[[Tensor], tuple[Tensor, Tensor]] = lambda r: (r, torch.zeros_like(r)),
    error: float = 1e-6,
    iterations: int = 500,
) -> tuple[Tensor, int]:
    """Solve (K^-1 + H) x = b for a batch of right-hand sides b.

    K^-1 is met only behind the preconditioner M, where K^-1 M is as harmless as M: one transform serves both, and
    directions in which K vanishes stay zero.

    Args:
        H: Symmetric positive semi-definite, acts on (B, *shape).
        b: Right-hand sides, with shape (B, *shape).
        preconditioner: Gives (M r, K^-1 M r) for a symmetric positive definite M near (K^-1 + H)^-1; by default
            M = 1 and K^-1 = 0.
        error: Stops when every solution is off by less, in the norm <e, (K^-1 + H) e>^1/2: the distance in standard
            deviations of the posterior. If 0, all iterations are done.
        iterations: At most so many.

    Returns:
        The solutions, with shape (B, *shape), and the iterations that were needed.

    Warns:
        RuntimeWarning: The solutions are further off than `error`.

    Hestenes & Stiefel, Methods of Conjugate Gradients for Solving Linear Systems (1952). The squared error that is left is
    the sum of what all later iterations remove, and a few of them stand for it: Strakos & Tichy, On Error Estimation in the
    Conjugate Gradient Method and Why It Works in Finite Precision Computations (2002).
    """

    def column(c: Tensor) -> Tensor:
        return c.reshape(-1, *[1] * (b.ndim - 1)).to(b.dtype)

    tiny = torch.finfo(b.dtype).tiny
    x, r = torch.zeros_like(b), b
    p, Kp, previous = torch.zeros_like(b), torch.zeros_like(b), b.new_ones(len(b)).double()
    removed: list[Tensor] = []
    for _ in range(iterations):
        z, Kz = preconditioner(r)
        rz = dot(r, z)
        beta = column(rz / previous.clamp_min(tiny))
        p, Kp = z + beta * p, Kz + beta * Kp
        q = Kp + H(p)
        step = rz / dot(p, q).clamp_min(tiny)
        x, r, previous = x + column(step) * p, r - column(step) * q, rz
        if error > 0:
            removed.append(step * rz)
            if len(removed) >= AHEAD and bool((sum(removed[-AHEAD:]) < error**2).all()):
                return x, _enough(removed, error)
    if error > 0:
        warnings.warn(
            f"conjugate gradients stopped after {iterations} iterations, further than {error:g} standard deviations off; "
            "noise that spans many orders of magnitude? The result is approximate",
            RuntimeWarning,
            stacklevel=2,
        )
    return x, iterations


def _enough(removed: list[Tensor], error: float) -> int:
    """Iterations after which all later ones remove less than the squared error."""
    left = torch.stack(removed).flip(0).cumsum(0).flip(0)
    return int((left >= error**2).any(1).sum())


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
