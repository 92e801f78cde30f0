"""What it takes to run the samplers of another package: they take particles all the way, by their own code.

They draw from the global stream of random numbers, which is set for them and put back.
"""

from __future__ import annotations

import abc
import importlib.util
import math
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from scoreinv.gaussian import Scalar
from scoreinv.posterior import Posterior
from scoreinv.samplers.baselines.chain import Baseline
from scoreinv.samplers.path import Descent, Island, Request, Trace
from scoreinv.streams import seeded


@dataclass(frozen=True)
class Peer(Baseline):
    """A sampler of another package, for real data of white noise.

    Args:
        levels: Noise levels.
        method: What that package calls it.
        options: Further arguments of it, as pairs; the rest is at that package's defaults.
    """

    method: str = "MMPS"
    options: tuple[tuple[str, Any], ...] = ()

    package: ClassVar[str]
    methods: ClassVar[tuple[str, ...]]

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.method not in self.methods:
            raise ValueError(
                f"method is {self.method!r}, expected one of {', '.join(self.methods)}"
            )

    @property
    def label(self) -> str:
        return f"not used ({self.package}, approximate); evidence unknown"

    def noise_levels(self, posterior: Posterior) -> list[float]:
        """The widest level and the narrowest."""
        return list(posterior.sigma_range)

    def refuses(self, posterior: Posterior) -> str:
        """Why this posterior is not for it; empty if it is."""
        likelihood = posterior.likelihood
        white = likelihood.gaussian and isinstance(likelihood.noise.covariance, Scalar)
        if not white or likelihood.operator.complex:
            return f"{self.package} takes real data with white noise, these are of another kind"
        return self.missing()

    def missing(self) -> str:
        """Why the package cannot be used here; empty if it can."""
        if importlib.util.find_spec(self.package) is None:
            return f"{self.package} is not installed; pip install 'scoreinv[bench]'"
        return ""

    def island(self, posterior: Posterior, n: int, generator: torch.Generator) -> Island:
        """n particles at the start, with their stream."""
        return Foreign(posterior, self, n, generator)

    @abc.abstractmethod
    def draws(self, posterior: Posterior, n: int, trace: Trace) -> Tensor:
        """n draws, with shape (n, C, H, W), from the global stream; what they cost goes to the trace."""


class Foreign(Island):
    """Particles that another package takes all the way."""

    def __init__(
        self, posterior: Posterior, options: Peer, n: int, generator: torch.Generator
    ) -> None:
        super().__init__(posterior, options.noise_levels(posterior), n, generator)
        self.options = options

    def _begin(self) -> Descent:
        self.trace.log_evidence = math.nan
        yield from ()

    def _step(self, i: int) -> Generator[Request, Tensor, int]:
        with seeded(int(torch.randint(2**31, (1,), generator=self.generator))):
            self.x = self.options.draws(self.posterior, self.n, self.trace)
        yield from ()
        return i + 1

    def _end(self) -> Descent:
        yield from ()


def denoise_counted(posterior: Posterior, trace: Trace, x: Tensor, sigma: Tensor) -> Tensor:
    """The prior's denoised images, with shape (B, C, H, W); evaluations and backward passes go to the trace."""
    trace.evaluations += 1
    x = x.to(posterior.dtype)
    x = _Counted.apply(x, trace)
    return posterior.prior.denoise(x, sigma.reshape(-1).expand(len(x)).to(x))


class _Counted(torch.autograd.Function):
    """The identity, which counts what passes back through it."""

    @staticmethod
    def forward(x: Tensor, trace: Trace) -> Tensor:
        return x.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Trace], output: Tensor) -> None:
        ctx.trace = inputs[1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        ctx.trace.vjps += 1
        return grad, None


def noise_variance(posterior: Posterior) -> float:
    """Variance of the data's white noise."""
    likelihood = posterior.likelihood
    return float(likelihood.noise.covariance.eigenvalues(likelihood.operator.data_shape)[0])
