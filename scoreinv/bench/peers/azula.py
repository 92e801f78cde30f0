"""Samplers of azula on its VE schedule.

Rozet et al., azula (github.com/probabilists/azula), extra `bench`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from scoreinv.bench.peers.base import Peer, denoise_counted, noise_variance
from scoreinv.posterior import Posterior
from scoreinv.samplers.path import Trace

if TYPE_CHECKING:
    from azula.sample import Sampler as AzulaSampler

Maker = Callable[..., "AzulaSampler"]


@dataclass(frozen=True)
class Azula(Peer):
    """A sampler of azula.

    Args:
        levels: Noise levels.
        method: "MMPS" (conjugate gradients), "DPS" or "DiffPIR".
        options: Further arguments of that class, as pairs.
    """

    package: ClassVar[str] = "azula"
    methods: ClassVar[tuple[str, ...]] = ("MMPS", "DPS", "DiffPIR")

    def draws(self, posterior: Posterior, n: int, trace: Trace) -> Tensor:
        operator, moments = posterior.likelihood.operator, posterior.moments
        sampler = MAKERS[self.method](
            _denoiser(posterior, trace),
            posterior.y.flatten(),
            lambda x: operator.forward(x).flatten(1),
            noise_variance(posterior),
            dict(self.options),
            {"steps": self.levels, "silent": True, "dtype": torch.float64},
        )
        start = sampler.init(
            (n, *posterior.shape),
            mean=moments.mean,
            var=moments.covariance.eigenvalues(posterior.shape).mean(),
        )
        return sampler(start.to(posterior.dtype))


def _denoiser(posterior: Posterior, trace: Trace) -> Any:
    """The prior as azula sees one."""
    from azula.denoise import Denoiser, DiracPosterior
    from azula.noise import VESchedule

    high, low = posterior.sigma_range

    class Ours(Denoiser):
        schedule = VESchedule(low, high)

        def forward(self, x_t: Tensor, t: Tensor, **kwargs: Any) -> DiracPosterior:
            sigma = self.schedule.sigma(t)
            return DiracPosterior(mean=denoise_counted(posterior, trace, x_t, sigma))

    return Ours()


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
