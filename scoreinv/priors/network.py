"""A trained prior: a network behind the EDM preconditioning, with a continuous noise level and linear flux.

    D(x, sigma) = c_skip x + c_out F(c_in x, c_noise)
    c_skip = d^2 / (sigma^2 + d^2),  c_out = sigma d / sqrt(sigma^2 + d^2),  c_in = 1 / sqrt(sigma^2 + d^2),
    c_noise = ln(sigma) / 4,  d = sigma_data

A second head says how far D is off: the covariance of x_0 given x_sigma is taken as sum_b a_b rho_b a_b over a few bands b
of frequency, with the standard deviations a_b(x, sigma) of the pixels from the head and a stationary rho_b for each level.
Coarse errors reach far from a source and fine ones do not; one rho for both would leave faint wings too stiff. The errors
are skewed, too: a place is blank, or holds a source. How skewed is measured at each level, in units of what a Gamma
variable of mean D and this variance would be. 0 would be Gaussian; galaxies have 1 above a twentieth of the peak. A second
look at D corrects it beforehand, mostly on blank sky (`scoreinv.training.error`).

Karras et al., Elucidating the Design Space of Diffusion-Based Generative Models (2022, arXiv:2206.00364), table 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor, nn

from scoreinv.gaussian import Fourier, Gaussian
from scoreinv.priors.base import Prior, of_network
from scoreinv.priors.unet import ErrorHead, SecondLook

FAINTEST = 0.3  # significance of a pixel, below which a Gamma is not taken to be more skewed


def preconditioning(sigma: Tensor, sigma_data: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """c_skip, c_out, c_in with shape (B, 1, 1, 1) and c_noise with shape (B,), for sigma with shape (B,)."""
    s = sigma.reshape(-1, 1, 1, 1)
    total = s**2 + sigma_data**2
    return sigma_data**2 / total, s * sigma_data / total.sqrt(), total.rsqrt(), sigma.log() / 4


@lru_cache
def multiplies_bfloat16(device: str) -> bool:
    """Whether a kind of device has units that multiply matrices of bfloat16."""
    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    known = getattr(torch.cpu, "get_capabilities", dict)()  # not in older torch
    return device == "cpu" and bool(known.get("amx_bf16"))


@dataclass(frozen=True)
class ErrorModel:
    """What a prior knows of its error.

    Attributes:
        head: The logarithm of the variance of F in each pixel and band, from the network's features.
        white: Variance of white noise of variance 1 in each band, with shape (bands,).
        levels: Noise levels at which the following were measured, rising, with shape (L,) [model unit].
        corrections: Pairs of what the head says, rising, and what it is short of, with shape (L, bands, knots, 2).
        power: Spectra of rho at each, with shape (L, bands, 1, H, W).
        gamma: Skewness of the errors at each over that of a Gamma distribution of the same mean and width, with shape (L,).
        excess_noise: `Prior.excess_noise`, with which posterior draws of noisy images vary as much as their means are off.
        look: What D is short of, and how much the head is, from D beside the features, if it was learned.
    """

    head: ErrorHead
    white: Tensor
    levels: Tensor
    corrections: Tensor
    power: Tensor
    gamma: Tensor
    excess_noise: float = 0.0
    look: SecondLook | None = None

    def deviations(self, log_v: Tensor, out: Tensor, sigma: Tensor) -> Tensor:
        """Standard deviations of x_0 - D in each band, with the shape of log_v.

        They are at most those of the noise: beyond the images that it was trained on the head may say anything, and a draw
        that believes it goes further off, to be believed less still. Such draws are held together, not calibrated.

        Args:
            log_v: What the head says, with shape (B, bands, C, H, W).
            out: c_out, with shape (B, 1, 1, 1).
            sigma: Noise levels, with shape (B,).
        """
        most = 2 * (sigma[:, None] * self.white.to(sigma).sqrt() / out[:, 0, 0]).log()
        said = torch.minimum(self.corrected(log_v, sigma), most[..., None, None, None])
        return out[:, None] * (0.5 * said).exp()

    def corrected(self, log_v: Tensor, sigma: Tensor) -> Tensor:
        """What the head says, with shape (B, bands, C, H, W), corrected at levels sigma, with shape (B,).

        Linear between the pairs, and constant beyond them; these are interpolated between the measured levels.
        """
        i, share = self._place(sigma)
        pairs = torch.lerp(
            self.corrections[i - 1], self.corrections[i], share[:, None, None, None]
        )
        at, short = pairs.to(log_v)[..., None, None, None].unbind(3)
        corrected = log_v + short[:, :, 0]
        for j in range(1, at.shape[2]):
            low, high = at[:, :, j - 1], at[:, :, j]
            share = ((log_v - low) / (high - low).clamp_min(1e-6)).clamp(0, 1)
            corrected = torch.addcmul(corrected, short[:, :, j] - short[:, :, j - 1], share)
        return corrected

    def correlation(self, sigma: float) -> Fourier:
        """rho between the measured levels, by interpolating logarithms."""
        i, share = self._place(torch.tensor(sigma, dtype=torch.float64))
        return Fourier(torch.lerp(self.power[i - 1].log(), self.power[i].log(), share).exp())

    def skewness(self, significance: Tensor, sigma: float) -> Tensor:
        """`Prior.error_skewness`, with gamma interpolated between the measured levels."""
        i, share = self._place(torch.tensor(sigma, dtype=torch.float64))
        gamma = float(torch.lerp(self.gamma[i - 1], self.gamma[i], share))
        return gamma * gamma_skewness(significance)

    def _place(self, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """Between which measured levels each sigma is: the index of the upper one, and how far up, in the logarithm."""
        at, known = sigma.to(self.levels).log(), self.levels.log()
        i = torch.searchsorted(known, at).clamp(1, len(known) - 1)
        return i, ((at - known[i - 1]) / (known[i] - known[i - 1])).clamp(0, 1)


def gamma_skewness(significance: Tensor) -> Tensor:
    """Skewness of a Gamma distribution by its mean over its standard deviation, with the same shape.

    A denoised image can fall to zero and below, where no Gamma is; there it is that of `FAINTEST`.
    """
    return 2 / significance.clamp_min(FAINTEST)


@dataclass(frozen=True)
class FirstLook:
    """What a network and its head make of noisy images.

    Attributes:
        D: Denoised images, with shape (B, C, H, W).
        log_v: Logarithm of the variance of F in each band, with shape (B, bands, C, H, W).
        out: c_out, with shape (B, 1, 1, 1).
        d: Standard deviation of x_0 about D of which the head speaks, with shape (B, C, H, W).
        s: Noise levels, with shape (B, 1, 1, 1).
        h: Last features of the network.
        e: Embedding of the noise level.
    """

    D: Tensor
    log_v: Tensor
    out: Tensor
    d: Tensor
    s: Tensor
    h: Tensor
    e: Tensor

    def again(self, look: SecondLook) -> tuple[Tensor, Tensor]:
        """The answer of a second look."""
        return look(self.h, self.e, self.D / self.d, (self.d / self.s).log())


class ScorePrior(Prior):
    """A denoising network with its moments.

    Args:
        network: F(x, c) of images (B, C, H, W) and conditions (B,).
        sigma_data: Standard deviation of a pixel of the training images [model unit].
        moments: Mean and covariance of the training images.
        sigma_min: Smallest trained level [model unit].
        sigma_max: Largest trained level [model unit].
        identity: Name and hash, for the provenance of results.
        autocast: Run the network in bfloat16; the preconditioning stays in float32. If left out, where the device has units
            that multiply its matrices: without them float32 is faster.
        error: What the network knows of its error, if it learned that.
        symmetric: `Prior.symmetric`.
    """

    def __init__(
        self,
        network: nn.Module,
        sigma_data: float,
        moments: Gaussian,
        sigma_min: float,
        sigma_max: float,
        identity: dict[str, str] | None = None,
        autocast: bool | None = None,
        error: ErrorModel | None = None,
        symmetric: bool = False,
    ) -> None:
        self.network = network.eval().requires_grad_(False)
        self.sigma_data, self.moments, self.autocast = sigma_data, moments, autocast
        self.sigma_min, self.sigma_max = sigma_min, sigma_max
        self.shape, self.dtype = tuple(moments.mean.shape), torch.float32
        self.identity = identity or of_network(network)
        self.error, self.symmetric = error, symmetric

    @property
    def excess_noise(self) -> float:
        """0 if the network did not learn its error."""
        return 0.0 if self.error is None else self.error.excess_noise

    def bfloat16(self) -> torch.autocast:
        """The context in which the network runs."""
        device = self.device.type
        enabled = multiplies_bfloat16(device) if self.autocast is None else self.autocast
        return torch.autocast(device, torch.bfloat16, enabled=enabled)

    def denoise(self, x: Tensor, sigma: Tensor) -> Tensor:
        if self.error is not None and self.error.look is not None:
            return self._looked(x, sigma)[0].to(x.dtype)
        skip, out, inputs, c = self.prepared(x, sigma)
        with self.bfloat16():
            F = self.network(inputs, c)
        return (skip * x + out * F.to(x.device, self.dtype)).to(x.dtype)

    def denoise_with_error(self, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        if self.error is None:
            return super().denoise_with_error(x, sigma)
        D, log_v, out = self._looked(x, sigma)
        a = self.error.deviations(log_v, out, sigma.to(self.dtype))
        return D.to(x.dtype), a.to(x.dtype)

    def _looked(self, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """D, the logarithm of the variance of F in each band, and c_out, on the device of x."""
        known = self.first_look(x, sigma)
        D, log_v = known.D, known.log_v
        if self.error.look is not None:
            short, factor = known.again(self.error.look)
            D, log_v = D + known.d * short, log_v + 2 * factor[:, None]
        return D.to(x.device), log_v.to(x.device), known.out.to(x.device)

    def first_look(self, x: Tensor, sigma: Tensor) -> FirstLook:
        """What the network and its head make of noisy images, before any second look; on the network's device."""
        skip, out, inputs, c = self.prepared(x, sigma)
        with self.bfloat16():
            h, e = self.network.look(inputs, c)
            F, log_v = self.network.read(h), self.error.head(h, e)
        here = lambda v: v.to(self.device, self.dtype)
        F, log_v, out, s = here(F), here(log_v), here(out), here(sigma).reshape(-1, 1, 1, 1)
        D = here(skip) * here(x) + out * F
        d = torch.minimum(out * (0.5 * log_v.logsumexp(1)).exp(), s)
        return FirstLook(D, log_v, out, d, s, here(h), here(e))

    def correlation(self, sigma: float) -> Fourier | None:
        return None if self.error is None else self.error.correlation(sigma)

    def error_skewness(self, significance: Tensor, sigma: float) -> Tensor | None:
        return None if self.error is None else self.error.skewness(significance, sigma)

    def prepared(self, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """c_skip, c_out, and the inputs of the network on its device."""
        self.check(x)
        skip, out, scale, c = preconditioning(sigma.to(self.dtype), self.sigma_data)
        inputs = (scale * x.to(self.dtype)).contiguous(memory_format=torch.channels_last)
        return skip, out, inputs.to(self.device), c.to(self.device)

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    def to(self, device: torch.device | str) -> ScorePrior:
        """Move the network; returns the prior itself."""
        self.network.to(device)
        for part in (self.error.head, self.error.look) if self.error is not None else ():
            if part is not None:
                part.to(device)
        return self
