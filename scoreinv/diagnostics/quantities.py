"""What is compared between truths and draws: one number for each member of a simulation.

A quantity may look at all members of its simulation, truth and draws alike, as long as it treats them alike; distances to
their mean, and their power about it, are of that kind. Names of images' quantities: total flux, peak, half-light radius and
ellipticity by unweighted moments of the positive part, power of the residual about the mean in bands of spatial frequency,
distances, random projections, pixels beyond two standard deviations.

Distances to a reference that depends on the data are those of Lemos et al., Sampling-Based Accuracy Testing of Posterior
Estimators for General Inference (TARP, 2023, arXiv:2302.03026); where none is given, one draw is set aside for it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from scoreinv.streams import stream

# edges of bands of spatial frequency [cycles per pixel]
BANDS = (0.0, 1 / 32, 1 / 16, 1 / 8, 1 / 4, 1.0)
SHAPES = ("total flux", "peak", "half-light radius", "ellipticity")
PROJECTIONS = 8


@dataclass(frozen=True)
class Quantities:
    """Numbers of all members.

    Attributes:
        names: Of the K quantities.
        families: Of each.
        values: With shape (N, L + 1, K), the truth first.
    """

    names: list[str]
    families: list[str]
    values: Tensor

    def of(self, name: str) -> Tensor:
        """Values of one quantity, with shape (N, L + 1)."""
        return self.values[..., self.names.index(name)]

    def joined(self, other: Quantities) -> Quantities:
        """These and others of the same members."""
        values = torch.cat([self.values, other.values], -1)
        return Quantities(self.names + other.names, self.families + other.families, values)


def quantities(
    draws: Tensor,
    truths: Tensor,
    references: Tensor,
    seed: int,
    coordinates: Sequence[str] | None = None,
) -> Quantities:
    """All quantities of images, whose last two axes are pixels, or of vectors.

    Args:
        draws: With shape (N, L, *shape).
        truths: With shape (N, *shape).
        references: Of TARP, with shape (N, *shape), independent of truths and draws given the data.
        seed: Of the projections.
        coordinates: Names of a vector's numbers.
    """
    shape = truths.shape[1:]
    scalars = _image if truths.ndim >= 3 else partial(_vector, names=coordinates)
    generator = stream(seed, 8)
    directions = torch.randn(math.prod(shape), PROJECTIONS, generator=generator)
    rows, names = [], []
    for x, truth, reference in zip(draws, truths, references, strict=True):
        members = torch.cat([truth[None], x])
        found = {**dict(_any(members, reference, directions)), **dict(scalars(members))}
        names = list(found)
        rows.append(torch.stack([v.double() for v in found.values()], -1))
    families, labels = zip(*names, strict=True)
    return Quantities(list(labels), list(families), torch.stack(rows))


Named = Iterator[tuple[tuple[str, str], Tensor]]


def _any(members: Tensor, reference: Tensor, directions: Tensor) -> Named:
    """Distances and projections, which need no pixels."""
    flat = members.flatten(1)
    r = about_mean(flat)
    z2 = r.square() / r.var(0).clamp_min(torch.finfo(r.dtype).tiny)
    yield ("distance", "distance to mean"), r.square().sum(1)
    yield ("distance", "distance in units of sd"), z2.sum(1)
    yield ("distance", "distance to the others"), torch.cdist(r, r).mean(1)
    yield ("pixels", "number beyond 2 sd"), (z2 > 4).sum(1)
    yield ("pixels", "largest in units of sd"), z2.max(1).values
    yield ("TARP", "distance to reference"), (flat - reference.flatten()).square().sum(1)
    # truths go with their data; draws that ignore them do not
    yield ("data", "overlap with reference"), r @ reference.flatten().to(r.dtype)
    for i, v in enumerate((flat @ directions.to(flat.dtype)).T):
        yield ("projections", f"projection {i + 1}"), v


def numbered(count: int) -> list[str]:
    """Names of a vector's numbers that have none."""
    return [f"coordinate {i + 1}" for i in range(count)]


def _vector(members: Tensor, names: Sequence[str] | None) -> Named:
    for name, v in zip(names or numbered(members.shape[1]), members.T, strict=True):
        yield ("scalars", name), v


def _image(members: Tensor) -> Named:
    flat = members.flatten(1, -3).sum(1) if members.ndim > 3 else members
    for name, v in zip(SHAPES, morphology(flat), strict=True):
        yield ("scalars", name), v
    power, count = band_power(about_mean(members))
    for name, v in zip(band_names(*members.shape[-2:]), power.T, strict=True):
        yield ("power spectrum", name), v
    # each band in units of its own mean: the residual as if it were white
    scale = power.mean(0).clamp_min(torch.finfo(power.dtype).tiny)
    yield ("distance", "whitened distance"), (power * count / scale).sum(1)


def about_mean(x: Tensor, dim: int = 0) -> Tensor:
    """What is left of the mean along one axis; nothing at all of equal numbers, whose mean may be rounded."""
    left = x - x.narrow(dim, 0, 1)
    return left - left.mean(dim, keepdim=True)


def morphology(image: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Total flux, peak, half-light radius [pixel] and ellipticity of images with shape (B, H, W), each with shape (B,).

    Radius and ellipticity are of the positive part about its centroid; the ellipticity is |e| for
    e = (Q_xx - Q_yy + 2 i Q_xy) / (Q_xx + Q_yy), with Q the second moments.
    """
    B, H, W = image.shape
    light = image.clamp_min(0).double()
    total = light.flatten(1).sum(1).clamp_min(torch.finfo(torch.float64).tiny)
    y, x = torch.arange(H).double()[:, None], torch.arange(W).double()
    mean = lambda v: (light * v).flatten(1).sum(1) / total
    dx, dy = x - mean(x)[:, None, None], y - mean(y)[:, None, None]
    xx, yy, xy = mean(dx**2), mean(dy**2), mean(dx * dy)
    order = (dx**2 + dy**2).flatten(1).argsort(1)
    grown = light.flatten(1).gather(1, order).cumsum(1)
    half = (grown < 0.5 * total[:, None]).sum(1).clamp_max(H * W - 1)
    radius = (dx**2 + dy**2).flatten(1).gather(1, order).gather(1, half[:, None])[:, 0].sqrt()
    e = ((xx - yy) ** 2 + 4 * xy**2).sqrt() / (xx + yy).clamp_min(torch.finfo(torch.float64).tiny)
    return image.flatten(1).sum(1), image.flatten(1).max(1).values, radius, e


def band_power(r: Tensor) -> tuple[Tensor, Tensor]:
    """Mean power in each band of spatial frequency, and its modes, of images with shape (B, ..., H, W).

    Returns:
        Power with shape (B, bands) and counts with shape (bands,), for the bands of `band_names`.
    """
    H, W = r.shape[-2:]
    weight = _modes(H, W)
    counts = weight.sum(1)
    power = torch.fft.rfft2(r, norm="ortho").abs().square().double()
    power = power.flatten(1, -3).sum(1) if r.ndim > 3 else power
    return power.flatten(1) @ weight.T / counts, counts


def band_names(H: int, W: int) -> list[str]:
    """Wavelengths of the bands that images of H x W pixels have [pixel]."""
    named = []
    for low, high in itertools.pairwise(BANDS):
        if low == 0:
            named.append(f"power above {1 / high:.3g} px")
        else:
            least = f"{1 / high:.3g} to " if high < 1 else "up to "
            named.append(f"power at {least}{1 / low:.3g} px")
    return [
        name for name, seen in zip(named, _in_band(H, W).flatten(1).any(1), strict=True) if seen
    ]


def _in_band(H: int, W: int) -> Tensor:
    """Which frequencies of the half plane belong to each of `BANDS`, with shape (bands, H, W // 2 + 1)."""
    k = (torch.fft.fftfreq(H)[:, None] ** 2 + torch.fft.rfftfreq(W) ** 2).sqrt()
    return torch.stack([(k >= low) & (k < high) for low, high in itertools.pairwise(BANDS)])


def _modes(H: int, W: int) -> Tensor:
    """How many modes each frequency of the half plane stands for in each band that has any, with shape (bands, -1)."""
    twice = torch.full((W // 2 + 1,), 2.0, dtype=torch.float64)
    twice[0] = 1.0
    if W % 2 == 0:
        twice[-1] = 1.0
    weight = (_in_band(H, W) * twice).flatten(1)
    return weight[weight.any(1)]
