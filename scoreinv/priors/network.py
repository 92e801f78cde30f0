"""A trained prior: a network behind the EDM preconditioning, with a continuous noise level and linear flux.

    D(x, sigma) = c_skip x + c_out F(c_in x, c_noise)
    c_skip = d^2 / (sigma^2 + d^2),  c_out = sigma d / sqrt(sigma^2 + d^2),  c_in = 1 / sqrt(sigma^2 + d^2),
    c_noise = ln(sigma) / 4,  d = sigma_data

Karras et al., Elucidating the Design Space of Diffusion-Based Generative Models (2022, arXiv:2206.00364), table 1.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from scoreinv.gaussian import Gaussian
from scoreinv.priors.base import Prior


def preconditioning(sigma: Tensor, sigma_data: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """c_skip, c_out, c_in with shape (B, 1, 1, 1) and c_noise with shape (B,), for sigma with shape (B,)."""
    s = sigma.reshape(-1, 1, 1, 1)
    total = s**2 + sigma_data**2
    return sigma_data**2 / total, s * sigma_data / total.sqrt(), total.rsqrt(), sigma.log() / 4


class ScorePrior(Prior):
    """A denoising network with its moments.

    Args:
        network: F(x, c) of images (B, C, H, W) and conditions (B,).
        sigma_data: Standard deviation of a pixel of the training images [model unit].
        moments: Mean and covariance of the training images.
        sigma_min: Smallest trained level [model unit].
        sigma_max: Largest trained level [model unit].
        identity: Name and hash, for the provenance of results.
        autocast: Run the network in bfloat16; the preconditioning stays in float32.
    """

    def __init__(
        self,
        network: nn.Module,
        sigma_data: float,
        moments: Gaussian,
        sigma_min: float,
        sigma_max: float,
        identity: dict[str, str] | None = None,
        autocast: bool = True,
    ) -> None:
        self.network = network.eval().requires_grad_(False)
        self.sigma_data, self.moments, self.autocast = sigma_data, moments, autocast
        self.sigma_min, self.sigma_max = sigma_min, sigma_max
        self.shape, self.dtype = tuple(moments.mean.shape), torch.float32
        self.identity = identity or {"prior": type(network).__name__}

    def denoise(self, x: Tensor, sigma: Tensor) -> Tensor:
        self.check(x)
        skip, out, scale, c = preconditioning(sigma.to(self.dtype), self.sigma_data)
        inputs = (scale * x.to(self.dtype)).contiguous(memory_format=torch.channels_last)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            F = self.network(inputs.to(self.device), c.to(self.device))
        return (skip * x + out * F.to(x.device, self.dtype)).to(x.dtype)

    @property
    def device(self) -> torch.device:
        """Where the network runs; particles stay where they are."""
        return next(self.network.parameters()).device

    def to(self, device: torch.device | str) -> ScorePrior:
        """Move the network; returns the prior itself."""
        self.network.to(device)
        return self
