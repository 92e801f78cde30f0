"""Networks that make features of data: numbers, images, series, sets, and several of these by name.

Every one may stand alone: a module from data with shape (B, ...) to features with shape (B, `features`).
Residual networks: He et al. (2016, arXiv:1512.03385); sets: Zaheer et al., Deep Sets (2017, arXiv:1703.06114), and with
attention Lee et al., Set Transformer (2019, arXiv:1810.00825); recurrent units: Cho et al. (2014, arXiv:1406.1078).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

Data = Tensor | Mapping[str, Tensor]
HEADS = 4  # of attention


class MLP(nn.Module):
    """Of a few numbers, with shape (B, inputs)."""

    def __init__(
        self, inputs: int, features: int = 64, hidden: Sequence[int] = (128, 128)
    ) -> None:
        super().__init__()
        widths, layers = [inputs, *hidden], []
        for a, b in zip(widths, widths[1:], strict=False):
            layers += [nn.Linear(a, b), nn.SiLU()]
        self.network = nn.Sequential(*layers, nn.Linear(widths[-1], features))
        self.features = features

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x.flatten(1))


class _Residual(nn.Module):
    """Two convolutions beside the identity, at a part of the resolution.

    Args:
        conv: Kind of convolutions.
        inputs: Channels.
        outputs: Channels; a multiple of 8.
        stride: Steps of the input from one of the output to the next.
        raw: The input are data, whose units and level say something: taken as they are, not made alike.
    """

    def __init__(
        self, conv: type[nn.Module], inputs: int, outputs: int, stride: int, raw: bool
    ) -> None:
        super().__init__()
        alike = nn.Identity() if raw else nn.Sequential(nn.GroupNorm(1, inputs), nn.SiLU())
        reach = max(1, stride - 1)
        self.first = nn.Sequential(
            alike, conv(inputs, outputs, 2 * reach + 1, stride=stride, padding=reach)
        )
        self.second = nn.Sequential(
            nn.GroupNorm(8, outputs), nn.SiLU(), conv(outputs, outputs, 3, padding=1)
        )
        self.skip = conv(inputs, outputs, 1, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        return self.skip(x) + self.second(self.first(x))


def _residual(
    conv: type[nn.Module], channels: int, widths: Sequence[int], stride: int = 2
) -> nn.Sequential:
    """Blocks of these widths, each at half the resolution of the one before; the first with a stride of its own."""
    both = zip([channels, *widths], widths, strict=False)
    blocks = (_Residual(conv, a, b, 2 if i else stride, not i) for i, (a, b) in enumerate(both))
    return nn.Sequential(*blocks)


class ResNet2D(nn.Module):
    """Of images, with shape (B, channels, H, W).

    Args:
        channels: Of the image; a noise map or a PSF may be one.
        features: That it makes.
        widths: Channels of the residual blocks, each at half the resolution of the one before; multiples of 8.
    """

    def __init__(
        self, channels: int = 1, features: int = 64, widths: Sequence[int] = (16, 32, 64)
    ) -> None:
        super().__init__()
        self.blocks = _residual(nn.Conv2d, channels, widths)
        self.last, self.features = nn.Linear(2 * widths[-1], features), features

    def forward(self, x: Tensor) -> Tensor:
        h = self.blocks(x).flatten(2)
        return self.last(torch.cat([h.mean(2), h.amax(2)], 1))


class ResNet1D(nn.Module):
    """Of series and spectra, with shape (B, channels, length).

    Features are means and maxima over the series; or means and the end of a GRU; or, of a series whose length is given, of
    each place by itself, for what is told by where things happen: a phase, a redshift.

    Args:
        channels: Of the series; times, errors and a mask of missing data may be some.
        features: That it makes.
        widths: Channels of the residual blocks, each at half the resolution of the one before; multiples of 8.
        recurrent: End in a GRU, for light curves whose order matters over all their length.
        length: Of all series; None for any.
        stride: Of the first block, in samples; more than 2 where series are long and change slowly.

    Raises:
        ValueError: A GRU of a length that is given.
    """

    def __init__(
        self,
        channels: int = 1,
        features: int = 64,
        widths: Sequence[int] = (16, 32, 64),
        recurrent: bool = False,
        length: int | None = None,
        stride: int = 2,
    ) -> None:
        super().__init__()
        if recurrent and length:
            raise ValueError("recurrent and length are two ways to keep the order; expected one")
        self.blocks = _residual(nn.Conv1d, channels, widths, stride)
        width, self.length, self.features = widths[-1], length, features
        self.gru = nn.GRU(width, width, batch_first=True) if recurrent else None
        if length:
            places = self.blocks(torch.zeros(1, channels, length)).numel()
            self.last = MLP(places, features, hidden=(128,))
        else:
            self.last = nn.Linear(2 * width, features)

    def forward(self, x: Tensor) -> Tensor:
        if self.length and x.shape[2] != self.length:
            raise ValueError(f"a series has length {x.shape[2]}, expected {self.length}")
        h = self.blocks(x)
        if self.length:
            return self.last(h)
        end = h.amax(2) if self.gru is None else self.gru(h.transpose(1, 2))[1][0]
        return self.last(torch.cat([h.mean(2), end], 1))


class DeepSet(nn.Module):
    """Of sets whose order says nothing, with shape (B, inputs, members).

    Args:
        inputs: Numbers of each member, and as many more where they are masked.
        features: That it makes.
        hidden: Widths of the networks of a member and of the set.
        layers: Of attention between members, for what they say only together.
        masked: The second half of the inputs are masks, as of an estimator with invalid="mask": a member without any number
            is no part of the set, so that sets may be of any size up to the number of members.
    """

    def __init__(
        self,
        inputs: int,
        features: int = 64,
        hidden: Sequence[int] = (128, 128),
        layers: int = 0,
        masked: bool = False,
    ) -> None:
        super().__init__()
        width = hidden[-1]
        self.each, self.attention, self.masked = MLP(inputs, width, hidden), None, masked
        if layers:
            layer = nn.TransformerEncoderLayer(
                width, HEADS, 2 * width, dropout=0.0, batch_first=True, norm_first=True
            )
            self.attention = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.together, self.features = MLP(2 * width + 1, features, hidden), features

    def forward(self, x: Tensor) -> Tensor:
        gone = torch.zeros_like(x[:, 0], dtype=torch.bool)
        if self.masked:
            gone = (x[:, x.shape[1] // 2 :] > 0).all(1)
            gone = gone & ~gone.all(1, keepdim=True)  # of nothing at all, attention is undefined
        h = self.each(x.transpose(1, 2).flatten(0, 1)).unflatten(0, gone.shape)
        if self.attention is not None:
            h = self.attention(h, src_key_padding_mask=gone)
        there = (~gone)[..., None].to(h)
        mean = (h * there).sum(1) / there.sum(1)
        most = h.masked_fill(gone[..., None], -torch.inf).amax(1)
        return self.together(torch.cat([mean, most, there.mean(1)], 1))


class Named(nn.Module):
    """Several inputs by name, such as an image, its noise map and the times, each with a featurizer of its own."""

    def __init__(self, /, **parts: nn.Module) -> None:
        super().__init__()
        self.parts = nn.ModuleDict(parts)
        self.features = sum(part.features for part in parts.values())

    def forward(self, x: Mapping[str, Tensor]) -> Tensor:
        return torch.cat([part(x[name]) for name, part in self.parts.items()], 1)


def featurizer_for(shape: Sequence[int], features: int = 64) -> nn.Module:
    """A featurizer that suits data of a shape: some numbers, series (C, length), or images (C, H, W)."""
    if len(shape) not in (1, 2, 3):
        raise ValueError(
            f"a simulation has shape {tuple(shape)}, expected (numbers,), (channels, length) or (channels, H, W); or pass a "
            "featurizer"
        )
    if len(shape) == 2:
        # at no more than some sixty places
        stride = max(2, shape[1] // 256)
        return ResNet1D(shape[0], features, length=shape[1], stride=stride)
    return (MLP if len(shape) == 1 else ResNet2D)(shape[0], features)
