"""Visibilities: the Fourier transform of the sky, where an interferometer measured it.

    V_k = sum_j x_j exp(-2 pi i (u_k l_j + v_k m_j)) + n_k,    Re n_k, Im n_k ~ N(0, 1 / w_k)

Reference: Thompson, Moran & Swenson, Interferometry and Synthesis in Radio Astronomy (2017).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from scoreinv.data.grid import Grid
from scoreinv.tensors import as_tensor

ARCSEC = math.pi / 180 / 3600


@dataclass(frozen=True)
class WeightCheck:
    """Scatter of repeated visibilities, divided by what their weights predict.

    Args:
        mean: Mean of |V_k - V_k'|^2 / (2 (1/w_k + 1/w_k')) over neighbours of one baseline.
        robust: The same from the median, so that a few bad rows do not count.
        pairs: Number of pairs.
    """

    mean: float
    robust: float
    pairs: int


@dataclass(frozen=True, eq=False)
class Visibilities:
    """Calibrated visibilities of one sky position, each counted once.

    Args:
        uv: Baselines [lambda], with shape (N, 2).
        data: Visibilities [Jy], with shape (N,), complex.
        weight: Inverse variance of each of the real and the imaginary part [Jy^-2], shape (N,).
        antennas: Numbers of the two antennas, with shape (N, 2).
        time: Julian date of each row [d], with shape (N,).
        frequency: Mean frequency [Hz].
        primary_beam: Full width at half maximum of the primary beam [arcsec].
        ra, dec: Phase centre [deg].
        source: Where the data come from.
        sha256: Hash of the file.
        flagged: Number of visibilities that the reader left out because they are flagged.

    Raises:
        ValueError: If shapes disagree, nothing is left, a number is not finite, or a weight is
            negative.
    """

    uv: Tensor
    data: Tensor
    weight: Tensor
    antennas: Tensor | None = None
    time: Tensor | None = None
    frequency: float | None = None
    primary_beam: float | None = None
    ra: float | None = None
    dec: float | None = None
    source: str = ""
    sha256: str = ""
    flagged: int = 0

    def __post_init__(self) -> None:
        uv = copied(self.uv)
        if uv.ndim != 2 or uv.shape[1] != 2:
            hint = "; transpose it?" if uv.ndim == 2 and uv.shape[0] == 2 else ""
            raise ValueError(f"uv has shape {tuple(uv.shape)}, expected (N, 2){hint}")
        data = copied(self.data)
        if not data.is_complex():
            raise ValueError(
                f"data has dtype {data.dtype}, expected complex visibilities; pass real + 1j * "
                "imag"
            )
        values = {
            "uv": uv.double(),
            "data": data.to(torch.complex128),
            "weight": copied(self.weight).double(),
        }
        if self.antennas is not None:
            values["antennas"] = copied(self.antennas).long()
        if self.time is not None:
            values["time"] = copied(self.time).double()
        _check_shapes(values)
        for name in ("uv", "data", "weight"):
            _check_finite(name, values[name])
        _check_weight(values["weight"])
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def __len__(self) -> int:
        return len(self.data)

    @property
    def std(self) -> Tensor:
        """Noise of each of the real and the imaginary part [Jy], with shape (N,)."""
        return self.weight.rsqrt()

    @property
    def natural_rms(self) -> float:
        """Noise of the naturally weighted map [Jy/beam]."""
        return float(self.weight.sum().rsqrt())

    @property
    def baselines(self) -> Tensor:
        """Lengths of the baselines [lambda], with shape (N,)."""
        return torch.linalg.vector_norm(self.uv, dim=1)

    @property
    def max_baseline(self) -> float:
        """Longest baseline [lambda]."""
        return float(self.baselines.max())

    @property
    def resolution(self) -> float:
        """Angle 1 / B that the longest baseline B resolves [arcsec]."""
        return 1 / (self.max_baseline * ARCSEC)

    @property
    def largest_scale(self) -> float:
        """Angle 1 / B that the shortest baseline B still sees [arcsec]; inf with B = 0."""
        shortest = float(self.baselines.min())
        return 1 / (shortest * ARCSEC) if shortest > 0 else math.inf

    @property
    def largest_pixel(self) -> float:
        """Coarsest pixel that carries every baseline, 1 / (2 max(|u|, |v|)) [arcsec]."""
        return 1 / (2 * float(self.uv.abs().max()) * ARCSEC)

    def grid(self, shape: tuple[int, int], pixel_scale: float) -> Grid:
        """Grid around the phase centre, of shape (H, W) and pixels of the given side [arcsec].

        Raises:
            ValueError: As `check_scale`.
        """
        self.check_scale(pixel_scale, shape)
        return Grid(shape, pixel_scale, self.ra, self.dec, self.frequency, "Jy/pixel")

    def check_scale(self, pixel_scale: float, shape: tuple[int, ...]) -> None:
        """Check that an image can carry these baselines.

        Args:
            pixel_scale: Side of a pixel [arcsec].
            shape: Shape of the image, (H, W) or (C, H, W).

        Raises:
            ValueError: If the pixels have no side, or are too coarse for the longest baseline, or if the whole
                image is smaller than what it resolves, as with u, v in the wrong unit.
        """
        if not pixel_scale > 0:
            raise ValueError(f"pixel_scale is {pixel_scale}, expected a positive number of arcsec")
        field = max(shape[-2:]) * pixel_scale
        if self.resolution > field / 1.2:
            raise ValueError(
                f"the longest baseline of {self.max_baseline:.3g} lambda resolves "
                f"{self.resolution:.3g} arcsec, not less than the field of {field:.3g} arcsec: "
                "u, v in kilolambda? read them with unit='klambda'; in metres? with unit='m' and "
                "frequency=... [Hz]"
            )
        if pixel_scale > self.largest_pixel:
            hint = ""
            if pixel_scale > 100 * self.largest_pixel:
                hint = "; or are u, v smaller than thought: read with unit='klambda' by mistake?"
            raise ValueError(
                f"the pixel scale of {pixel_scale:.4g} arcsec is too coarse: max(|u|, |v|) of "
                f"{float(self.uv.abs().max()):.4g} lambda needs pixels of at most "
                f"{self.largest_pixel:.4g} arcsec{hint}"
            )

    def shifted(self, dra: float, ddec: float) -> Visibilities:
        """The same sky with the phase centre moved by dra to the East and ddec to the North.

        A source at (dra, ddec) comes to the centre: V' = V exp(+2 pi i (u dra + v ddec)). The
        w-term is left out, as everywhere in this package: shifts stay within the primary beam.

        Args:
            dra, ddec: Offset of the new phase centre [arcsec]; dra is an angle on the sky,
                cos(dec) included.

        Raises:
            ValueError: An offset beyond the horizon of the phase centre.
        """
        l, m = dra * ARCSEC, ddec * ARCSEC
        if not math.hypot(l, m) < 1:
            raise ValueError(
                f"a shift by ({dra:g}, {ddec:g}) arcsec leaves the sky; expected a part of the primary beam, in arcsec"
            )
        phase = 2 * math.pi * (self.uv[:, 0] * l + self.uv[:, 1] * m)
        data = self.data * torch.polar(torch.ones_like(phase), phase)
        if self.ra is None:
            return replace(self, data=data)
        ra, dec = _deproject(l, m, self.ra, self.dec)
        return replace(self, data=data, ra=ra, dec=dec)

    def weight_check(self) -> WeightCheck | None:
        """Compare the scatter of neighbouring visibilities of each baseline with their weights.

        Rows of one baseline that follow each other see nearly the same sky, so their difference
        is noise; where dates are known, pairs across gaps of more than three times the median
        are left out. Right weights give 1; a value of c says that the weights are too large by a
        factor c. The mean also counts gain jumps and rapid changes of the sky; the robust value
        does not.

        Returns:
            A `WeightCheck`, or None without antenna numbers or without a repeated baseline.
        """
        if self.antennas is None:
            return None
        first, second, data = self.antennas[:, 0], self.antennas[:, 1], self.data
        data = torch.where(first <= second, data, data.conj())
        keys = torch.minimum(first, second), torch.maximum(first, second)
        order = np.lexsort((keys[1].numpy(), keys[0].numpy()))
        keys, data, weight = torch.stack(keys)[:, order], data[order], self.weight[order]
        same = (keys[:, 1:] == keys[:, :-1]).all(0) & (weight[1:] > 0) & (weight[:-1] > 0)
        if not same.any():
            return None
        if self.time is not None:
            gap = self.time[order].diff().abs()
            same &= gap <= 3 * gap[same].median()
        variance = 1 / weight[1:] + 1 / weight[:-1]
        chi2 = ((data[1:] - data[:-1]).abs() ** 2 / variance)[same]
        # Two degrees of freedom each: mean 2, median 2 ln 2.
        robust = float(chi2.median()) / (2 * math.log(2))
        return WeightCheck(float(chi2.mean()) / 2, robust, int(same.sum()))

    def hermitian_copies(self) -> int:
        """Number of visibilities that repeat another one, as (u, v, V) or as (-u, -v, conj V)."""
        flip = (self.uv[:, 0] < 0) | ((self.uv[:, 0] == 0) & (self.uv[:, 1] < 0))
        uv = torch.where(flip[:, None], -self.uv, self.uv)
        data = torch.where(flip, self.data.conj(), self.data)
        rows = torch.stack([uv[:, 0], uv[:, 1], data.real, data.imag], 1)
        rows = rows + 0.0  # -0.0 and 0.0 are the same number
        return len(rows) - len(torch.unique(rows, dim=0))


def copied(value: Tensor | ArrayLike) -> Tensor:
    """The value as a tensor; arrays are copied, also read-only ones."""
    return value if torch.is_tensor(value) else as_tensor(np.array(value))


def _check_shapes(values: dict[str, Tensor]) -> None:
    rows = {name: len(value) for name, value in values.items() if value.ndim > 0}
    if len(set(rows.values())) > 1 or len(rows) < len(values):
        seen = ", ".join(f"{name} {tuple(value.shape)}" for name, value in values.items())
        raise ValueError(f"the rows disagree: {seen}; expected one row per visibility in each")
    for name, value in values.items():
        shape = (len(value), 2) if name in ("uv", "antennas") else (len(value),)
        if value.shape != shape:
            raise ValueError(f"{name} has shape {tuple(value.shape)}, expected {shape}")
    if not rows["uv"]:
        raise ValueError("there are no visibilities: is everything flagged, or the file empty?")


def _check_finite(name: str, value: Tensor) -> None:
    bad = ~torch.isfinite(value)
    bad = bad.any(1) if bad.ndim == 2 else bad
    if bad.any():
        raise ValueError(
            f"{name} is NaN or infinite in {int(bad.sum())} of {len(bad)} rows, first in row "
            f"{int(bad.nonzero()[0])}; drop these rows, or flag them with weight 0 in the file"
        )


def _check_weight(weight: Tensor) -> None:
    bad = weight < 0
    if bad.any():
        raise ValueError(
            f"weight is negative in {int(bad.sum())} of {len(bad)} rows, first in row "
            f"{int(bad.nonzero()[0])}; weights are inverse variances [Jy^-2]: flag these rows "
            "with weight 0 or drop them"
        )
    if not (weight > 0).any():
        raise ValueError("every weight is 0: all visibilities are flagged")


def _deproject(l: float, m: float, ra: float, dec: float) -> tuple[float, float]:
    """Sky position [deg] at direction cosines (l, m) from (ra, dec): the SIN projection."""
    n = math.sqrt(1 - l * l - m * m)
    sin, cos = math.sin(math.radians(dec)), math.cos(math.radians(dec))
    east = math.degrees(math.atan2(l, n * cos - m * sin))
    return (ra + east) % 360, math.degrees(math.asin(m * cos + n * sin))
