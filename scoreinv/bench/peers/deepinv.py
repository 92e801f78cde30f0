"""Samplers of deepinv on its variance-exploding diffusion, between the levels of the posterior's path.

Its likelihood terms go with `PosteriorDiffusion` and its DDPM solver; its own `DPS` and `DiffPIR` classes clip images to a
range that these problems do not have. Tachella et al., DeepInverse (github.com/deepinv/deepinv), extra `bench`.
"""

from __future__ import annotations

import importlib
import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from scoreinv.bench.peers.base import Peer, denoise_counted, noise_variance
from scoreinv.posterior import Posterior
from scoreinv.samplers.path import Trace


@dataclass(frozen=True)
class DeepInv(Peer):
    """A sampler of deepinv.

    Args:
        levels: Noise levels.
        method: "MMPS" (conjugate gradients), "PiGDM" or "DPS" (the norm of the residual).
        options: Further arguments of the likelihood term, as pairs.
    """

    package: ClassVar[str] = "deepinv"
    methods: ClassVar[tuple[str, ...]] = ("MMPS", "PiGDM", "DPS")

    def missing(self) -> str:
        """Why the package cannot be used here; empty if it can."""
        if reason := super().missing():
            return reason
        try:
            importlib.import_module("deepinv")
        except (ImportError, RuntimeError) as error:
            return f"deepinv does not import ({error}); install a torchvision that fits torch {torch.__version__}"
        return ""

    def draws(self, posterior: Posterior, n: int, trace: Trace) -> Tensor:
        from deepinv import physics, sampling

        terms = {
            "MMPS": sampling.MomentMatchingDataFidelity,
            "PiGDM": sampling.PiGDMDataFidelity,
            "DPS": sampling.DPSDataFidelity,
        }
        operator, (high, low) = posterior.likelihood.operator, posterior.sigma_range
        measurement = physics.LinearPhysics(
            A=lambda x, **_: operator.forward(x.double()).to(x.dtype),
            A_adjoint=lambda y, **_: operator.transpose(y.double()).to(y.dtype),
            noise_model=physics.GaussianNoise(math.sqrt(noise_variance(posterior))),
        )
        sampler = sampling.PosteriorDiffusion(
            data_fidelity=terms[self.method](**dict(self.options)),
            denoiser=_denoiser(posterior, trace),
            sde=sampling.VarianceExplodingDiffusion(sigma_min=low, sigma_max=high, alpha=1.0),
            solver=sampling.DDPMSolver(timesteps=torch.linspace(1, 0, self.levels)),
            minus_one_one=False,
        )
        y = posterior.y.expand(n, *posterior.y.shape)
        return sampler(y, measurement, x_init=(n, *posterior.shape)).to(posterior.dtype)


def _denoiser(posterior: Posterior, trace: Trace) -> Any:
    """The prior as deepinv sees one."""
    from deepinv.models import Denoiser

    class Ours(Denoiser):
        def forward(self, x: Tensor, sigma: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            sigma = torch.as_tensor(sigma, dtype=x.dtype)
            return denoise_counted(posterior, trace, x, sigma).to(x.dtype)

    return Ours()
