"""Samplers of another package, azula, by its own code on the same problems.

Its samplers take a denoiser, real data and a forward map, and draw from the global stream of random numbers, which is set
for them and put back. Rozet et al., azula (github.com/probabilists/azula), extra `bench`.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from scoreinv.gaussian import Scalar
from scoreinv.posterior import Posterior
from scoreinv.samplers.baselines.chain import Baseline
from scoreinv.samplers.path import Descent, Island, Request, Trace

if TYPE_CHECKING:
    from azula.sample import Sampler as AzulaSampler

Maker = Callable[..., "AzulaSampler"]


@dataclass(frozen=True)
class Azula(Baseline):
    """A sampler of azula on its VE schedule, for real data of white noise.

    Args:
        levels: Noise levels.
        method: "MMPS" (conjugate gradients), "DPS" or "DiffPIR", at their defaults but for `options`.
        options: Further arguments of that class, as pairs.
    """

    method: str = "MMPS"
    options: tuple[tuple[str, Any], ...] = field(default=())

    label: ClassVar[str] = "not used (azula, approximate); evidence unknown"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.method not in MAKERS:
            raise ValueError(f"method is {self.method!r}, expected one of {', '.join(MAKERS)}")

    def noise_levels(self, posterior: Posterior) -> list[float]:
        """The widest level and the narrowest."""
        return list(posterior.sigma_range)

    def refuses(self, posterior: Posterior) -> str:
        """Why this posterior is not for it; empty if it is."""
        likelihood = posterior.likelihood
        white = likelihood.gaussian and isinstance(likelihood.noise.covariance, Scalar)
        if not white or likelihood.operator.complex:
            return "azula takes real data with white noise, these are of another kind"
        if importlib.util.find_spec("azula") is None:
            return "azula is not installed; pip install 'scoreinv[bench]'"
        return ""

    def island(self, posterior: Posterior, n: int, generator: torch.Generator) -> Island:
        """n particles at the start, with their stream."""
        return Foreign(posterior, self, n, generator)


class Foreign(Island):
    """Particles that another package takes all the way."""

    def __init__(
        self, posterior: Posterior, options: Azula, n: int, generator: torch.Generator
    ) -> None:
        super().__init__(posterior, options.noise_levels(posterior), n, generator)
        self.options = options

    def _begin(self) -> Descent:
        self.trace.log_evidence = math.nan
        yield from ()

    def _step(self, i: int) -> Generator[Request, Tensor, int]:
        posterior, operator = self.posterior, self.posterior.likelihood.operator
        with torch.random.fork_rng(devices=()):
            # particles live on the CPU; torch.manual_seed would set the streams of GPUs too, which are not put back
            seed = int(torch.randint(2**31, (1,), generator=self.generator))
            torch.default_generator.manual_seed(seed)
            variance = posterior.likelihood.noise.covariance.eigenvalues(operator.data_shape)
            sampler = MAKERS[self.options.method](
                _denoiser(posterior, self.trace),
                posterior.y.flatten(),
                lambda x: operator.forward(x).flatten(1),
                float(variance[0]),
                dict(self.options.options),
                {"steps": self.options.levels, "silent": True, "dtype": torch.float64},
            )
            moments = posterior.moments
            start = sampler.init(
                (self.n, *posterior.shape),
                mean=moments.mean,
                var=moments.covariance.eigenvalues(posterior.shape).mean(),
            )
            self.x = sampler(start.to(posterior.dtype))
        yield from ()
        return i + 1

    def _end(self) -> Descent:
        yield from ()


def _denoiser(posterior: Posterior, trace: Trace) -> Any:
    """The prior as azula sees one, counting evaluations and backward passes."""
    from azula.denoise import Denoiser, DiracPosterior
    from azula.noise import VESchedule

    high, low = posterior.sigma_range

    class Ours(Denoiser):
        schedule = VESchedule(low, high)

        def forward(self, x_t: Tensor, t: Tensor, **kwargs: Any) -> DiracPosterior:
            trace.evaluations += 1
            sigma = self.schedule.sigma(t).expand(len(x_t)).to(x_t)
            x = _Counted.apply(x_t, trace) if x_t.requires_grad else x_t
            return DiracPosterior(mean=posterior.prior.denoise(x, sigma))

    return Ours()


class _Counted(torch.autograd.Function):
    """The identity, which counts what passes back through it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, trace: Trace) -> Tensor:
        ctx.trace = trace
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        ctx.trace.vjps += 1
        return grad, None


def _mmps(denoiser: Any, y: Tensor, A: Any, variance: float, options: Any, steps: Any) -> Any:
    from azula.guidance.mmps import MMPSDenoiser
    from azula.linalg.covariance import IsotropicCovariance
    from azula.sample import DDPMSampler

    guided = MMPSDenoiser(denoiser, y, A, IsotropicCovariance(variance), **options)
    return DDPMSampler(guided, **steps)


def _diffpir(denoiser: Any, y: Tensor, A: Any, variance: float, options: Any, steps: Any) -> Any:
    from azula.guidance.diffpir import DiffPIRDenoiser
    from azula.sample import DDPMSampler

    return DDPMSampler(DiffPIRDenoiser(denoiser, y, A, variance, **options), **steps)


def _dps(denoiser: Any, y: Tensor, A: Any, variance: float, options: Any, steps: Any) -> Any:
    from azula.guidance.dps import DPSSampler

    return DPSSampler(denoiser, y, A, **options, **steps)


MAKERS: dict[str, Maker] = {"MMPS": _mmps, "DPS": _dps, "DiffPIR": _diffpir}
