"""Reference processes: Markov chains, from which a control departs.

A chain x_0, x_1, ..., x_T is drawn in the order of generation: x_0 is noise, x_T the image. Step k draws a z that knows
nothing of the control, and takes x_k to x_{k+1}; a control u tilts the density of z by exp(u . z). Here

    x_{k+1}  =  mean_k(x_k) + V_k^1/2 z,      z  ~  N(0, 1),

and the tilt moves the mean by V_k^1/2 u. The reverse chain of a prior is in `scoreinv.finetune.chain`; processes that know
nothing are in `scoreinv.finetune.free`, those of characters in `scoreinv.finetune.absorbing`.
"""

from __future__ import annotations

import abc
from dataclasses import dataclass, field

import torch
from torch import Tensor

from scoreinv.gaussian import Covariance
from scoreinv.operators.information import white


class Step(abc.ABC):
    """The law of x_{k+1} for each state of a batch, by a z that a control tilts.

    Attributes:
        denoised: What x is known to become, with shape (B, *shape).
        error: How far from that it may end, as `Prior.denoise_with_error` says; None where a prior does not.
    """

    denoised: Tensor
    error: Tensor | None = None

    @abc.abstractmethod
    def drawn(self, u: Tensor | float, generator: torch.Generator, spread: float = 1.0) -> Tensor:
        """z under a control, with shape (B, *shape); 0 for none. With spread > 1 it strays further."""

    @abc.abstractmethod
    def taken(self, z: Tensor) -> Tensor:
        """x_{k+1} of z, with shape (B, *shape)."""

    @abc.abstractmethod
    def noise(self, x: Tensor) -> Tensor:
        """z of the states that a step has led to, with shape (B, *shape)."""

    @staticmethod
    @abc.abstractmethod
    def log_density(u: Tensor, z: Tensor) -> Tensor:
        """log p_u - log p of steps at their z, with shape (B,), in float64."""

    @abc.abstractmethod
    def log_ratio(self, x: Tensor, z: Tensor) -> Tensor:
        """log-density of the step that this one stands for over this one's, at states x with their z, with shape (B,)."""


@dataclass(frozen=True)
class GaussianStep(Step):
    """N(mean, V) for each image of a batch.

    Attributes:
        mean: With shape (B, *shape).
        covariance: V, one for each image.
        denoised: What x is known to become, with shape (B, *shape): E[x_T | x_k] of a prior, x itself where nothing is
            known.
        plain: The step of the chain that this one stands for, and 1/2 log det of its covariance over this one's; None if
            it stands for itself.
        error: See `Step`, with shape (B, parts, *shape).
    """

    mean: Tensor
    covariance: Covariance
    denoised: Tensor
    plain: tuple[GaussianStep, Tensor] | None = None
    error: Tensor | None = None

    def drawn(self, u: Tensor | float, generator: torch.Generator, spread: float = 1.0) -> Tensor:
        n, *shape = self.mean.shape
        return u + spread * white(tuple(shape), n, generator, self.mean.dtype)

    def taken(self, z: Tensor) -> Tensor:
        return self.mean + self.covariance.sqrt(z)

    def noise(self, x: Tensor) -> Tensor:
        return self.leant(x - self.mean)

    def leant(self, shift: Tensor) -> Tensor:
        """u that moves the mean by a shift, V^-1/2 shift, with shape (B, *shape)."""
        return self.covariance.map(torch.rsqrt).apply(shift)

    @staticmethod
    def log_density(u: Tensor, z: Tensor) -> Tensor:
        """u . z - |u|^2 / 2."""
        u, z = u.flatten(1).double(), z.flatten(1).double()
        return (u * (z - 0.5 * u)).sum(1)

    def log_ratio(self, x: Tensor, z: Tensor) -> Tensor:
        if self.plain is None:
            return torch.zeros(len(x), dtype=torch.float64)
        step, log_volume = self.plain
        square = lambda v: v.double().flatten(1).square().sum(1)
        return 0.5 * (square(z) - square(step.noise(x))) - log_volume


@dataclass(frozen=True)
class LocalStep(GaussianStep):
    """N(mean, V) with V^1/2 = M R^1/2: pixels that scatter as they do in each image, and go together as they do where it is.

    Attributes:
        covariance: R, stationary, of mean variance 1.
        deviation: M, standard deviations of the pixels, with shape (B, *shape).
    """

    deviation: Tensor = field(kw_only=True)

    def taken(self, z: Tensor) -> Tensor:
        return self.mean + self.deviation * self.covariance.sqrt(z)

    def leant(self, shift: Tensor) -> Tensor:
        return super().leant(shift / self.deviation)


class Reference(abc.ABC):
    """A Markov chain.

    Attributes:
        law: Of its steps.
        steps: T.
        shape: Of an image.
        dtype: Of the states.
    """

    law: type[Step] = GaussianStep
    steps: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def device(self) -> torch.device:
        """Where its network runs, and where those of controls are to; states and data stay on the CPU."""
        return torch.device("cpu")

    @abc.abstractmethod
    def start(self, n: int, y: Tensor | None) -> Step:
        """The law of n states x_0, given data (n, *data) if there are any."""

    @abc.abstractmethod
    def step(self, x: Tensor, k: Tensor, y: Tensor | None) -> Step:
        """Step k of each state, for x with shape (B, *shape), k with shape (B,) and data (B, *data), if there are any."""

    @abc.abstractmethod
    def noised(self, x: Tensor, k: int, generator: torch.Generator) -> Tensor:
        """States x_0, ..., x_k that lead to states x_k = x, with shape (k + 1, B, *shape)."""

    def towards(self, x: Tensor, end: Tensor, k: Tensor) -> Tensor | None:
        """E[x_{k+1} | x_k, x_T] of paths from `noised`, for states, images (B, *shape), steps (B,); None if not known."""
        return None

    @abc.abstractmethod
    def clock(self, k: Tensor) -> Tensor:
        """A time for the control's network, rising from -1 to 1 or so, with shape (B,)."""

    @abc.abstractmethod
    def scale(self, k: Tensor) -> Tensor:
        """Standard deviation of a pixel of x_k, with shape (B,)."""

    def steered(self, slope: Tensor, k: Tensor) -> Tensor:
        """u of steps k that a log-reward with the gradient g asks for, with the shape (B, *shape) of g: V^1/2 g."""
        return self.step(slope, k, None).covariance.sqrt(slope)

    def log_terminal(self, x: Tensor) -> Tensor:
        """log-density of x_T that a reward must be freed of, with shape (B,); 0 for a prior, which is part of the target."""
        return torch.zeros(len(x), dtype=torch.float64)
