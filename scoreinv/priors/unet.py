"""The network F of a trained prior: a small U-Net that is fast on a CPU.

A 2x pixel-unshuffle in front and a 2x pixel-shuffle behind move all convolutions to a quarter of the pixels; the rest is
a residual U-Net with group normalisation whose scale and shift follow the noise level. With channels_last memory a 64x64
image costs about 3 ms on two CPU cores, and 2 ms in bfloat16 on those that have units for its matrices.

The residual block and its conditioning follow Dhariwal & Nichol, Diffusion Models Beat GANs on Image Synthesis (2021,
arXiv:2105.05233); the pixel-unshuffle follows Shi et al., Real-Time Single Image and Video Super-Resolution Using an
Efficient Sub-Pixel Convolutional Neural Network (2016, arXiv:1609.05158).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from scoreinv.streams import seeded

REACH = 4  # pixels on each side of one over which a second look averages
RANGE = (-5.0, 20.0)  # of what it averages: one bright pixel is not its neighbours
MOST = 3.0  # logarithm of the factor by which it changes what the first says of the error


def sinusoidal(c: Tensor, features: int) -> Tensor:
    """Sines and cosines of a scalar condition, with shape (B, features), for c with shape (B,)."""
    frequency = torch.exp(torch.linspace(0, math.log(100.0), features // 2, device=c.device))
    phase = c[:, None] * frequency
    return torch.cat([phase.sin(), phase.cos()], dim=1)


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions; the noise level scales and shifts the second normalisation."""

    def __init__(self, inputs: int, outputs: int, embedding: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(8, inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.modulation = nn.Linear(embedding, 2 * outputs)
        self.norm2 = nn.GroupNorm(8, outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.skip = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()
        nn.init.zeros_(self.conv2.weight)
        nn.init.zeros_(self.conv2.bias)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        scale, shift = self.modulation(embedding)[:, :, None, None].chunk(2, dim=1)
        h = self.conv2(F.silu(torch.addcmul(shift, self.norm2(h), 1 + scale)))
        return self.skip(x) + h


class UNet(nn.Module):
    """U-Net over pixel-unshuffled images.

    Args:
        channels: Channels C of the image.
        widths: Feature channels of each level; level i works at 1 / 2^(i + 1) of the image's resolution.
        blocks: Residual blocks in each level, on the way down and on the way up.
        embedding: Features of the noise-level embedding.
        outputs: Channels of F; those of the image if not given.
        told: Numbers that each image comes with, such as its class, which join the embedding; none if 0.
    """

    @seeded(0)
    def __init__(
        self,
        channels: int = 1,
        widths: Sequence[int] = (48, 96, 192),
        blocks: int = 1,
        embedding: int = 128,
        outputs: int | None = None,
        told: int = 0,
    ) -> None:
        super().__init__()
        self.features = embedding
        self.embed = nn.Sequential(
            nn.Linear(embedding, embedding), nn.SiLU(), nn.Linear(embedding, embedding), nn.SiLU()
        )
        self.tell = nn.Linear(told, embedding, bias=False) if told else None
        self.first = nn.Conv2d(4 * channels, widths[0], 3, padding=1)
        self.down, self.pool = nn.ModuleList(), nn.ModuleList()
        self.up, self.lift = nn.ModuleList(), nn.ModuleList()
        for i, width in enumerate(widths):
            self.down.append(
                nn.ModuleList(ResidualBlock(width, width, embedding) for _ in range(blocks))
            )
            if i + 1 < len(widths):
                self.pool.append(nn.Conv2d(width, widths[i + 1], 2, stride=2))
                self.lift.append(nn.Conv2d(widths[i + 1], 4 * width, 1))
                self.up.append(
                    nn.ModuleList(
                        ResidualBlock(2 * width if b == 0 else width, width, embedding)
                        for b in range(blocks)
                    )
                )
        self.middle = ResidualBlock(widths[-1], widths[-1], embedding)
        self.norm = nn.GroupNorm(8, widths[0])
        self.last = nn.Conv2d(widths[0], 4 * (outputs or channels), 3, padding=1)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def look(self, x: Tensor, c: Tensor, y: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The last features, with shape (B, widths[0], H / 2, W / 2), and the embedding of c, with shape (B, embedding)."""
        e = self.embed(sinusoidal(c, self.features))
        if self.tell is not None:
            e = e + self.tell(y)
        h = self.first(F.pixel_unshuffle(x, 2))
        skips = []
        for i, level in enumerate(self.down):
            for block in level:
                h = block(h, e)
            if i < len(self.pool):
                skips.append(h)
                h = self.pool[i](h)
        h = self.middle(h, e)
        for level, lift in zip(reversed(self.up), reversed(self.lift), strict=True):
            h = torch.cat([F.pixel_shuffle(lift(h), 2), skips.pop()], dim=1)
            for block in level:
                h = block(h, e)
        return h, e

    def forward(self, x: Tensor, c: Tensor, y: Tensor | None = None) -> Tensor:
        """F for scaled images x, with shape (B, C, H, W), conditions c, with shape (B,), and what they are told, y."""
        return self.read(self.look(x, c, y)[0])

    def read(self, h: Tensor) -> Tensor:
        """F from the last features, with shape (B, C, H, W)."""
        return F.pixel_shuffle(self.last(F.silu(self.norm(h))), 2)


class ErrorHead(nn.Module):
    """How far F is off in each pixel and band of frequency, read from the features that F is read from.

    Args:
        channels: Channels C of the image.
        bands: Bands of frequency.
        features: Channels of the last features.
        embedding: Features of the noise-level embedding.
        hidden: Channels between its two convolutions.
    """

    @seeded(0)
    def __init__(
        self, channels: int, bands: int, features: int, embedding: int, hidden: int = 32
    ) -> None:
        super().__init__()
        self.bands = bands
        self.norm = nn.GroupNorm(8, features)
        self.modulation = nn.Linear(embedding, 2 * features)
        self.first = nn.Conv2d(features, hidden, 3, padding=1)
        self.last = nn.Conv2d(hidden, 4 * channels * bands, 3, padding=1)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, h: Tensor, e: Tensor) -> Tensor:
        """Logarithm of the variance of F, with shape (B, bands, C, H, W)."""
        scale, shift = self.modulation(e)[:, :, None, None].chunk(2, dim=1)
        h = F.silu(torch.addcmul(shift, self.norm(h), 1 + scale))
        log_v = F.pixel_shuffle(self.last(F.silu(self.first(h))), 2)
        return log_v.unflatten(1, (self.bands, -1))


class SecondLook(nn.Module):
    """What D is short of in each pixel, and how well the rest of it is known, from D beside the features of F.

    Features are normalised over the image, so that F has errors on blank sky as it has on faint light, and does not know
    which of the two it sees. D in units of its error knows: it is noise about zero, or is not.

    Args:
        channels: Channels C of the image.
        features: Channels of the last features.
        embedding: Features of the noise-level embedding.
        hidden: Channels between its convolutions.
    """

    @seeded(0)
    def __init__(self, channels: int, features: int, embedding: int, hidden: int = 48) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(8, features)
        self.modulation = nn.Linear(embedding, 2 * features)
        self.first = nn.Conv2d(features + 12 * channels, hidden, 3, padding=1)
        self.middle = nn.Conv2d(hidden, hidden, 3, padding=1)
        self.last = nn.Conv2d(hidden, 8 * channels, 3, padding=1)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, h: Tensor, e: Tensor, u: Tensor, log_d: Tensor) -> tuple[Tensor, Tensor]:
        """What D is short of, in units of d, and the logarithm of the factor by which d is too small: both (B, C, H, W).

        Args:
            h: Last features, with shape (B, features, H / 2, W / 2).
            e: Embedding of the noise level, with shape (B, embedding).
            u: D in units of its error d, with shape (B, C, H, W).
            log_d: Logarithm of d over the noise, with shape (B, C, H, W).
        """
        scale, shift = self.modulation(e)[:, :, None, None].chunk(2, dim=1)
        h = F.silu(torch.addcmul(shift, self.norm(h), 1 + scale))
        around = F.pad(u.clamp(*RANGE), [REACH] * 4, mode="circular")
        around = F.avg_pool2d(around, 2 * REACH + 1, 1)
        seen = (F.pixel_unshuffle(v, 2) for v in (u.asinh(), log_d, around.asinh()))
        h = F.silu(self.first(torch.cat([h, *seen], 1)))
        short, factor = F.pixel_shuffle(self.last(F.silu(self.middle(h))), 2).chunk(2, dim=1)
        return short, factor.clamp(-MOST, MOST)


def error_head(network: UNet, bands: int) -> ErrorHead:
    """A head that fits a network, with weights that say 1 everywhere."""
    channels, features = network.last.out_channels // 4, network.last.in_channels
    head = ErrorHead(channels, bands, features, network.features)
    return head.to(memory_format=torch.channels_last)


def second_look(network: UNet) -> SecondLook:
    """One that fits a network, with weights that change nothing."""
    channels, features = network.last.out_channels // 4, network.last.in_channels
    look = SecondLook(channels, features, network.features)
    return look.to(memory_format=torch.channels_last)


@torch.no_grad()
def initialise(module: nn.Module, generator: torch.Generator) -> None:
    """Draw weights of unit gain, and set biases to zero; weights of zero and scales of normalisations stay as they are."""
    for name, p in module.named_parameters():
        if p.ndim > 1 and bool(p.any()):
            p.normal_(0, p[0].numel() ** -0.5, generator=generator)
        elif name.rpartition(".")[2] == "bias":
            p.zero_()
