"""A trained prior: a network behind the EDM preconditioning, with a continuous noise level and linear flux.

    D(x, sigma) = c_skip x + c_out F(c_in x, c_noise)
    c_skip = d^2 / (sigma^2 + d^2),  c_out = sigma d / sqrt(sigma^2 + d^2),  c_in = 1 / sqrt(sigma^2 + d^2),
    c_noise = ln(sigma) / 4,  d = sigma_data

Karras et al., Elucidating the Design Space of Diffusion-Based Generative Models (2022, arXiv:2206.00364), table 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from scoreinv.gaussian import Covariance, Fourier, Gaussian
from scoreinv.priors.base import Prior, noise


@dataclass(frozen=True)
class DenoisingError:
    """Power of the denoiser's error, D - x_0, against noise level and spatial frequency.

    By E[x_0 | x_sigma] = D the error's covariance is that of x_0 given x_sigma, averaged over x_sigma; it includes what
    the network has not learned.

    Args:
        levels: Increasing noise levels, with shape (L,) [model unit].
        power: Mean power at each level and whole radius |k| [cycles per image], with shape (L, K).
    """

    levels: Tensor
    power: Tensor

    def spectrum(self, sigma: float, shape: tuple[int, int]) -> Tensor:
        """The power at one level on an FFT grid, with shape (H, W), log-linear between levels."""
        t, grid = math.log(sigma), self.levels.double().log()
        i = int(torch.searchsorted(grid, t).clamp(1, len(grid) - 1))
        w = (t - float(grid[i - 1])) / float(grid[i] - grid[i - 1])
        low, high = self.power[i - 1 : i + 1].double().log()
        # below the lowest level w < 0 goes on with the slope of sigma^2
        return torch.lerp(low, high, min(w, 1.0)).exp()[radius(shape)]


def radius(shape: tuple[int, int]) -> Tensor:
    """The nearest whole radius |k| of each frequency in the order of fft2, with shape (H, W)."""
    ky, kx = (torch.fft.fftfreq(n, dtype=torch.float64) * n for n in shape)
    return (ky[:, None] ** 2 + kx**2).sqrt().round().long()


@torch.no_grad()
def denoising_error(prior: Prior, truth: Tensor, levels: Tensor, seed: int) -> DenoisingError:
    """Measure the error on images the prior was not trained on, with shape (n, C, H, W)."""
    k, rows = radius(tuple(truth.shape[-2:])), []
    count = torch.bincount(k.flatten()).double()
    for i, sigma in enumerate(levels.tolist()):
        x = truth + sigma * noise(tuple(truth.shape), truth.dtype, seed, i)
        D = torch.cat(
            [prior.denoise(part, part.new_full((len(part),), sigma)) for part in x.split(64)]
        )
        power = torch.fft.fft2(D - truth, norm="ortho").abs().double().square().mean((0, 1))
        rows.append(torch.zeros_like(count).index_add(0, k.flatten(), power.flatten()) / count)
    return DenoisingError(levels, torch.stack(rows))


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
        error: Error of the denoiser, measured on held-out images.
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
        error: DenoisingError | None = None,
        autocast: bool = True,
    ) -> None:
        self.network = network.eval().requires_grad_(False)
        self.sigma_data, self.moments, self.autocast = sigma_data, moments, autocast
        self.sigma_min, self.sigma_max, self.error = sigma_min, sigma_max, error
        self.shape, self.dtype = tuple(moments.mean.shape), torch.float32
        self.identity = identity or {"prior": type(network).__name__}

    def denoise(self, x: Tensor, sigma: Tensor) -> Tensor:
        self.check(x)
        skip, out, scale, c = preconditioning(sigma.to(self.dtype), self.sigma_data)
        inputs = (scale * x.to(self.dtype)).contiguous(memory_format=torch.channels_last)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.autocast):
            F = self.network(inputs, c)
        return (skip * x + out * F.to(self.dtype)).to(x.dtype)

    def conditional(self, sigma: float) -> Covariance:
        if self.error is None:
            return super().conditional(sigma)
        return Fourier(self.error.spectrum(sigma, self.shape[-2:]))
