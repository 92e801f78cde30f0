"""Processes that know nothing: they end as white Gaussian noise of a known density, of which rewards are freed.

With a control they sample a density without a prior, or the latent space of a generator f by the reward r(f(z)) N(z; 0, v).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from scoreinv.finetune.reference import GaussianStep, Reference
from scoreinv.gaussian import Diagonal, Scalar
from scoreinv.operators.information import white


class Free(Reference):
    """A process that ends as N(0, v).

    Args:
        shape: Of an image.
        steps: T.
        variance: v of x_T.
        first: Variance of x_0.
    """

    dtype = torch.float64

    def __init__(self, shape: Sequence[int], steps: int, variance: float, first: float) -> None:
        if steps < 2 or not variance > 0:
            raise ValueError(
                f"steps is {steps} and variance {variance:g}; expected at least 2 steps and a variance > 0"
            )
        self.shape, self.steps, self.variance = tuple(shape), steps, float(variance)
        self._first = Scalar(first)

    def start(self, n: int, y: Tensor | None) -> GaussianStep:
        nothing = torch.zeros(n, *self.shape, dtype=self.dtype)
        return GaussianStep(nothing, self._first, nothing)

    def clock(self, k: Tensor) -> Tensor:
        return 2 * k.double() / self.steps - 1

    def scale(self, k: Tensor) -> Tensor:
        return torch.full((len(k),), math.sqrt(self.variance), dtype=self.dtype)

    def log_terminal(self, x: Tensor) -> Tensor:
        flat = x.double().flatten(1)
        norm = flat.shape[1] * math.log(2 * math.pi * self.variance)
        return -0.5 * (flat.square().sum(1) / self.variance + norm)


class Brownian(Free):
    """Brownian motion from 0 to variance v, in equal steps, or each by the same share of the variance that is left.

    A step that is large beside the structure of a target is no Gaussian under it, so steps should be short near the end: on
    25 modes of variance 0.3 under v = 50, 40 steps down to 0.05 leave the exact control 0.2 nat from the evidence, equal
    steps 2.8. Zhang & Chen, Path Integral Sampler (2022, arXiv:2111.15141), with equal steps.

    Args:
        shape: Of an image.
        steps: T.
        variance: v of x_T.
        last: Variance left to the last step, which takes all of it, a few times below that of the finest structure; equal
            steps if not given.

    Attributes:
        passed: Variances of x_0, ..., x_T.

    Raises:
        ValueError: A last step longer than equal ones, or of no length.
    """

    def __init__(
        self, shape: Sequence[int], steps: int, variance: float, last: float | None = None
    ) -> None:
        super().__init__(shape, steps, variance, first=0.0)
        k = torch.arange(steps + 1, dtype=torch.float64)
        if last is None:
            left = 1 - k / steps
        elif 0 < last <= variance / steps:
            left = torch.cat([(last / variance) ** (k[:-1] / (steps - 1)), k[:1]])
        else:
            raise ValueError(
                f"the last of {steps} steps has variance {last:g}, expected above 0 and at most {variance / steps:g}, "
                "that of equal steps"
            )
        self.passed, self._lengths = self.variance * (1 - left), -self.variance * left.diff()

    def step(self, x: Tensor, k: Tensor, y: Tensor | None) -> GaussianStep:
        V = self._lengths[k].reshape(-1, *[1] * len(self.shape))
        return GaussianStep(x, Diagonal(V.expand(len(k), *self.shape)), x)

    def noised(self, x: Tensor, k: int, generator: torch.Generator) -> Tensor:
        states = [x]
        for i in range(k - 1, -1, -1):  # a bridge to 0
            share = float(self.passed[i] / self.passed[i + 1])
            spread = math.sqrt(share * float(self.passed[i + 1] - self.passed[i]))
            z = white(self.shape, len(x), generator, x.dtype)
            states.append(states[-1] * share + spread * z)
        return torch.stack(states[::-1])

    def towards(self, x: Tensor, end: Tensor, k: Tensor) -> Tensor:
        share = self._lengths[k] / (self.variance - self.passed[k])
        return x + share.reshape(-1, *[1] * len(self.shape)) * (end - x)


class OrnsteinUhlenbeck(Free):
    """A stationary process of variance v: x_{k+1} = x_k e^-h + sqrt(v (1 - e^-2h)) z.

    Args:
        shape: Of an image.
        steps: T.
        variance: v.
        time: T h, over which a start is forgotten as e^-time.
    """

    def __init__(
        self, shape: Sequence[int], steps: int, variance: float = 1.0, time: float = 3.0
    ) -> None:
        super().__init__(shape, steps, variance, first=variance)
        if not time > 0:
            raise ValueError(f"time is {time:g}, expected a number > 0")
        self.decay = math.exp(-time / steps)

    def step(self, x: Tensor, k: Tensor, y: Tensor | None) -> GaussianStep:
        V = Scalar(self.variance * (1 - self.decay**2))
        left = (self.decay ** (self.steps - k.double())).reshape(-1, *[1] * len(self.shape))
        return GaussianStep(self.decay * x, V, left * x)

    def noised(self, x: Tensor, k: int, generator: torch.Generator) -> Tensor:
        states, spread = [x], math.sqrt(self.variance * (1 - self.decay**2))
        for _ in range(k):  # it runs backwards as it runs forwards
            z = white(self.shape, len(x), generator, x.dtype)
            states.append(self.decay * states[-1] + spread * z)
        return torch.stack(states[::-1])

    def towards(self, x: Tensor, end: Tensor, k: Tensor) -> Tensor:
        far = (self.decay ** (self.steps - k.double() - 1)).reshape(-1, *[1] * len(self.shape))
        near = self.decay
        both = near * (1 - far**2) * x + far * (1 - near**2) * end
        return both / (1 - (near * far) ** 2)
