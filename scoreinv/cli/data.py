"""The data sections of a configuration: where an observation comes from.

Each section is a dataclass of keys, and `observe` makes an `Observation` of it on the canvas of a
prior: likelihood, data, sky coordinates, and how the data are drawn as an image.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import singledispatch
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import scoreinv as si
from scoreinv.operators import gaussian_psf
from scoreinv.simulators.arrays import alma_track, thermal_noise

ENVIRONMENT = "SCOREINV_DATA"
COUNTS = "counts"  # noise of photons
DISH = math.pi * 6.0**2  # area of an ALMA antenna [m^2]


@dataclass(frozen=True)
class VisibilityData:
    """Visibilities in a file: UVFITS, visilens .bin, .npz or a text table.

    Args:
        path: File, below the folder $SCOREINV_DATA or the working directory.
        pixel_scale: Side of a pixel of the image [arcsec]; of several, the one whose canvas makes the data likeliest.
        unit: Unit of u, v in .npz and text: lambda (the default), klambda, or m with frequency.
        frequency: Frequency where the file has none [Hz].
        format: uvfits, visilens, npz or text; seen from the content if left out.
        sign: Sign of the Fourier exponent in the file, -1 or 1; known for uvfits and visilens.
        shift: Offset of the image's centre from the phase centre, to the East and to the North
            [arcsec].
        amplitudes: Keep only |V|, where phases are not to be trusted; the amplitude of the prior must be given.
    """

    path: str
    pixel_scale: float | tuple[float, ...]
    unit: str | None = None
    frequency: float | None = None
    format: str | None = None
    sign: int | None = None
    shift: tuple[float, float] = (0.0, 0.0)
    amplitudes: bool = False


@dataclass(frozen=True)
class CutoutData:
    """A piece of an optical image with its PSF and its noise: FITS, .npz, .npy or HDF5.

    Args:
        path: File with the image, below the folder $SCOREINV_DATA or the working directory.
        psf: File with the PSF at the same pixel scale.
        noise: Standard deviation of white noise [unit of the image]; or measured: the power
            spectrum of the blank sky in all images of the file; or counts: pixels are counts of
            photons, on the background, which must be known.
        hdu: Number or name of the FITS HDU; name of the array in .npz and HDF5.
        psf_hdu: The same of the PSF; what the catalogue says, or the only one, if left out.
        psf_size: Largest side of the PSF to keep around its centre [pixel].
        normalise_psf: Divide the PSF by its sum.
        size: Side, or [rows, columns], of the part to keep [pixel]; everything if left out.
        centre: Pixel [row, column] of the file in the centre of that part.
        catalogue: GalSim catalogue: pixel scale, HDU of the PSF, noise variance.
        pixel_scale: Side of a pixel [arcsec], for files that do not state it.
        background: Number to subtract, or median-of-border; nothing if left out. Counts keep it.
        mask_nan: Leave NaN pixels out of the fit.
        plane: Which image of a three-dimensional array.
    """

    path: str
    psf: str
    noise: float | str
    hdu: int | str = 0
    psf_hdu: int | str | None = None
    psf_size: int | None = None
    normalise_psf: bool = False
    size: int | tuple[int, int] | None = None
    centre: tuple[int, int] | None = None
    catalogue: str | None = None
    pixel_scale: float | None = None
    background: float | str | None = None
    mask_nan: bool = False
    plane: int | None = None


@dataclass(frozen=True)
class ThermalNoise:
    """Noise of a visibility of two 12 m antennas, both polarisations averaged.

    Args:
        tsys: System temperature above the atmosphere [K].
        bandwidth: Bandwidth of a visibility [Hz].
        integration: Integration time of a visibility [s].
        efficiency: Aperture times correlator efficiency.
    """

    tsys: float
    bandwidth: float
    integration: float
    efficiency: float = 0.7

    @property
    def std(self) -> float:
        """Of each of the real and the imaginary part [Jy]."""
        return thermal_noise(
            self.tsys, self.efficiency, DISH, self.bandwidth, self.integration, polarisations=2
        )


@dataclass(frozen=True)
class Simulation:
    """A simulated sky seen by ALMA (configuration C43-7, 43 antennas); the truth is known.

    Args:
        kind: galaxy or disc.
        flux: Total flux of the sky [Jy].
        pixel_scale: Side of a pixel [arcsec].
        declination: Of the source [deg].
        hour_angles: First and last integration [h].
        integrations: How many there are from the first to the last.
        frequency: Observing frequency [Hz].
        noise: Thermal noise.
        scale: Factor on the antenna positions; 0.5 doubles the beam.
        elevation_limit: Integrations with the source below are dropped [deg].
        amplitudes: Only |V| is measured, phases are lost.
        seed: Decides the sky and the noise.
    """

    kind: str
    flux: float
    pixel_scale: float
    declination: float
    hour_angles: tuple[float, float]
    integrations: int
    frequency: float
    noise: ThermalNoise
    scale: float = 1.0
    elevation_limit: float = 20.0
    amplitudes: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        _check_flux("simulation", self.flux)
        if self.integrations < 1:
            raise ValueError(
                f"simulation.integrations is {self.integrations}, expected at least 1"
            )


@dataclass(frozen=True)
class SimulatedCutout:
    """A simulated sky behind a Gaussian PSF, in white noise; the truth is known.

    Args:
        kind: galaxy or disc.
        flux: Total flux of the sky [unit of the image].
        fwhm: Width of the PSF [pixel].
        noise: Standard deviation of a pixel [unit of the image].
        pixel_scale: Side of a pixel [arcsec].
        seed: Decides the sky and the noise.
    """

    kind: str
    flux: float
    fwhm: float
    noise: float
    pixel_scale: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        _check_flux("exposure", self.flux)
        if not self.fwhm > 0:
            raise ValueError(f"exposure.fwhm is {self.fwhm:g}, expected above 0")


@dataclass(frozen=True)
class Speckle:
    """A simulated sky by speckle interferometry; the truth is known.

    Many short exposures tell the amplitudes of its Fourier transform, on a grid up to the diffraction limit.
    The atmosphere has taken the phases.

    Args:
        kind: galaxy or disc.
        flux: Total flux of the sky [count].
        pixel_scale: Side of a pixel [arcsec].
        diameter: Of the telescope [m].
        wavelength: Of the light [m].
        noise: Standard deviation of each part of a Fourier component, before its phase is lost [count].
        oversampling: Components for each cycle across the canvas; with 2 they know the sky's autocorrelation.
        seed: Decides the sky and the noise.
    """

    kind: str
    flux: float
    pixel_scale: float
    diameter: float
    wavelength: float
    noise: float
    oversampling: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        _check_flux("speckle", self.flux)
        for key in ("pixel_scale", "diameter", "wavelength", "noise"):
            if not getattr(self, key) > 0:
                raise ValueError(f"speckle.{key} is {getattr(self, key):g}, expected above 0")
        if self.oversampling < 1:
            raise ValueError(f"speckle.oversampling is {self.oversampling}, expected at least 1")


def _check_flux(section: str, flux: float) -> None:
    if not flux >= 0:
        raise ValueError(f"{section}.flux is {flux:g}, expected 0, a blank sky, or more")


@dataclass(frozen=True)
class Observation:
    """One observation, ready to be put under a prior.

    Attributes:
        likelihood: p(y | x) on the canvas of the prior.
        y: Data, with shape (*data).
        grid: Sky coordinates of the canvas.
        image: Draws data, with shape (*data), as an image, with shape (C, H, W).
        unit: Unit of that image.
        rms: Its noise [unit].
        origin: Where the data come from, for the record.
        truth: The true sky, with shape (C, H, W), if this is a simulation.
    """

    likelihood: si.Likelihood
    y: Tensor
    grid: si.Grid
    image: Callable[[Tensor], Tensor]
    unit: str
    rms: float
    origin: dict[str, Any] = field(default_factory=dict)
    truth: Tensor | None = None


def candidates(section: Any) -> list[Any]:
    """The sections that a section with several pixel scales stands for."""
    if not isinstance(section, VisibilityData) or isinstance(section.pixel_scale, float | int):
        return [section]
    if section.amplitudes and len(section.pixel_scale) > 1:
        raise ValueError(
            "pixel scales are compared by the evidence of linear data; give one pixel_scale with amplitudes"
        )
    if not section.pixel_scale:
        raise ValueError("pixel_scale is empty, expected a number or several [arcsec]")
    return [replace(section, pixel_scale=scale) for scale in section.pixel_scale]


@singledispatch
def observe(section: Any, shape: tuple[int, ...]) -> Observation:
    """The observation that a data section describes, on a canvas of this shape (C, H, W)."""
    raise TypeError(f"no data section: {section}")


@observe.register
def _(section: VisibilityData, shape: tuple[int, ...]) -> Observation:
    vis = si.read_visibilities(
        located(section.path), section.unit, section.frequency, section.format, section.sign
    )
    if any(section.shift):
        vis = vis.shifted(*section.shift)
    grid = vis.grid(shape[-2:], section.pixel_scale)
    linear = si.Likelihood(
        si.NUFFT(vis.uv, shape, section.pixel_scale), si.GaussianNoise(std=vis.std)
    )
    likelihood = phaseless(linear) if section.amplitudes else linear
    y = vis.data.abs() if section.amplitudes else vis.data
    origin = {"source": vis.source, "sha256": vis.sha256, "flagged": vis.flagged}
    return _visibilities(likelihood, linear, y, grid, origin)


@observe.register
def _(section: Simulation, shape: tuple[int, ...]) -> Observation:
    truth = _simulated_sky(section, shape)
    hours = np.linspace(*section.hour_angles, section.integrations)
    uv = torch.from_numpy(
        alma_track(
            section.declination, section.frequency, hours, section.scale, section.elevation_limit
        )
    )
    std = torch.full((len(uv),), section.noise.std, dtype=torch.float64)
    linear = si.Likelihood(si.NUFFT(uv, shape, section.pixel_scale), si.GaussianNoise(std=std))
    likelihood = phaseless(linear) if section.amplitudes else linear
    y = likelihood.simulate(truth[None], section.seed)[0]
    grid = si.Grid(shape[-2:], section.pixel_scale, frequency=section.frequency, unit="Jy/pixel")
    origin = {"source": f"Simulated {section.kind}, seed {section.seed}"}
    return _visibilities(likelihood, linear, y, grid, origin, truth)


@observe.register
def _(section: Speckle, shape: tuple[int, ...]) -> Observation:
    truth = _simulated_sky(section, shape)
    uv = speckle_grid(section, shape[-1])
    linear = si.Likelihood(
        si.NUFFT(uv, shape, section.pixel_scale), si.GaussianNoise(std=section.noise)
    )
    likelihood = phaseless(linear)
    y = likelihood.simulate(truth[None], section.seed)[0]
    grid = si.Grid(shape[-2:], section.pixel_scale, unit="count/pixel")
    origin = {"source": f"Simulated {section.kind}, seed {section.seed}"}
    return _visibilities(likelihood, linear, y, grid, origin, truth)


def speckle_grid(section: Speckle, size: int) -> Tensor:
    """Half of the grid of spatial frequencies up to the diffraction limit, with shape (N, 2) [lambda]."""
    limit = section.diameter / section.wavelength
    cell = 1 / (section.oversampling * size * math.radians(section.pixel_scale / 3600))
    k = torch.arange(-int(limit / cell), int(limit / cell) + 1, dtype=torch.float64)
    u, v = (k[:, None] * cell).expand(-1, len(k)), (k * cell).expand(len(k), -1)
    # the other half is the same of a real sky
    half = (v > 0) | ((v == 0) & (u >= 0))
    seen = half & (u.square() + v.square() <= limit**2)
    return torch.stack([u[seen], v[seen]], 1)


@observe.register
def _(section: SimulatedCutout, shape: tuple[int, ...]) -> Observation:
    truth = _simulated_sky(section, shape)
    psf = gaussian_psf(section.fwhm, 2 * math.ceil(2 * section.fwhm) + 1)
    operator = si.PSFConvolution(psf, shape)
    likelihood = si.Likelihood(operator, si.GaussianNoise(std=section.noise))
    return Observation(
        likelihood,
        likelihood.simulate(truth[None], section.seed)[0],
        si.Grid(shape[-2:], section.pixel_scale, unit="count/pixel"),
        lambda data: data,
        "count/pixel",
        section.noise,
        {"source": f"Simulated {section.kind}, seed {section.seed}"},
        truth,
    )


def _simulated_sky(
    section: Simulation | SimulatedCutout | Speckle, shape: tuple[int, ...]
) -> Tensor:
    """An image that no prior was trained on, with shape (1, H, H)."""
    if shape[0] != 1 or shape[1] != shape[2]:
        raise ValueError(f"the prior makes images of shape {shape}, simulations are (1, H, H)")
    sky = si.simulators.simulate_images(section.kind, 1, shape[-1], section.seed)[0]
    truth = torch.from_numpy(sky.astype(np.float64))
    return truth * section.flux / truth.sum()


def phaseless(likelihood: si.Likelihood) -> si.Likelihood:
    """The likelihood of |V|, for that of V with independent noise."""
    std = likelihood.noise.pixel_precision.rsqrt()
    return si.Likelihood(si.Amplitude(likelihood.operator), si.RiceNoise(std))


def _visibilities(
    likelihood: si.Likelihood,
    linear: si.Likelihood,
    y: Tensor,
    grid: si.Grid,
    origin: dict[str, Any],
    truth: Tensor | None = None,
) -> Observation:
    """Drawn as the naturally weighted map, of noise 1 / sqrt(sum of weights); amplitudes as if their phases were 0."""
    total = weights = float(linear.noise.pixel_precision.expand(y.shape).sum())
    if not likelihood.linear:
        # one part of each visibility is measured
        origin, weights = {**origin, "phases": "lost"}, 2 * weights
    return Observation(
        likelihood,
        y,
        grid,
        lambda data: linear.projection(data) / total,
        grid.unit.replace("/pixel", "/beam"),
        weights**-0.5,
        origin,
        truth,
    )


@observe.register
def _(section: CutoutData, shape: tuple[int, ...]) -> Observation:
    photons = section.noise == COUNTS
    cutout = si.read_cutout(
        located(section.path),
        hdu=section.hdu,
        psf=located(section.psf),
        psf_hdu=section.psf_hdu,
        size=section.size,
        centre=section.centre,
        noise=None if photons else section.noise,
        catalogue=None if section.catalogue is None else located(section.catalogue),
        pixel_scale=section.pixel_scale,
        background=section.background,
        mask_nan=section.mask_nan,
        psf_size=section.psf_size,
        plane=section.plane,
    )
    field = cutout.grid.shape
    if shape[0] != 1 or any(n > m for n, m in zip(field, shape[-2:], strict=True)):
        raise ValueError(
            f"the cutout is {field[0]} x {field[1]} pixels, the prior makes images of shape "
            f"{shape}; keep a part with cutout.size={min(shape[-2:])}, or choose a larger prior"
        )
    operator = si.PSFConvolution(cutout.psf, shape, field, normalise=section.normalise_psf)
    low = [(m - n) // 2 for n, m in zip(field, shape[-2:], strict=True)]
    sky = cutout.background if photons else 0.0
    if photons:
        noise, y = photon_noise(cutout), (cutout.data + cutout.background).round(decimals=6)
    else:
        noise, y = pixel_noise(cutout), cutout.data
    return Observation(
        likelihood=si.Likelihood(operator, noise),
        y=y,
        grid=cutout.grid.cropped(-low[0], -low[1], tuple(shape[-2:])),
        image=lambda data: _framed(data - sky, cutout.mask, shape, low),
        unit=cutout.grid.unit,
        rms=cutout.background**0.5 if photons else cutout.std,
        origin={"source": cutout.source, "sha256": cutout.sha256},
    )


def pixel_noise(cutout: si.Cutout) -> si.GaussianNoise:
    """Noise of a cutout; masked pixels have infinite variance.

    Raises:
        ValueError: Masked pixels in correlated noise.
    """
    masked = cutout.mask is not None and not bool(cutout.mask.all())
    if cutout.noise_spectrum is None:
        variance = torch.full(cutout.data.shape, cutout.std**2, dtype=torch.float64)
        return si.GaussianNoise(
            variance=variance.masked_fill(~cutout.mask, math.inf) if masked else cutout.std**2
        )
    if masked:
        raise ValueError(
            f"{int((~cutout.mask).sum())} pixels are masked, and the spectrum of correlated noise "
            "needs all of them; give cutout.noise as a number, or cut the masked pixels away"
        )
    return si.GaussianNoise(spectrum=cutout.noise_spectrum)


def photon_noise(cutout: si.Cutout) -> si.PoissonNoise:
    """Noise of a cutout of counts.

    Raises:
        ValueError: No background, or masked pixels.
    """
    if not cutout.background > 0:
        raise ValueError(
            f"the background is {cutout.background:g} counts in a pixel, expected more than 0: photons of the sky and the "
            "detector are noise too; give cutout.background as a number, or median-of-border"
        )
    if cutout.mask is not None and not bool(cutout.mask.all()):
        raise ValueError(
            f"{int((~cutout.mask).sum())} pixels are masked, and counts need all of them; cut the masked pixels away"
        )
    return si.PoissonNoise(cutout.background)


def _framed(data: Tensor, mask: Tensor | None, shape: tuple[int, ...], low: list[int]) -> Tensor:
    """Data in their place on the canvas, NaN where nothing was measured."""
    canvas = torch.full(shape, math.nan, dtype=torch.float64)
    rows, columns = (slice(a, a + n) for a, n in zip(low, data.shape[-2:], strict=True))
    canvas[..., rows, columns] = data if mask is None else data.masked_fill(~mask, math.nan)
    return canvas


def located(path: str) -> Path:
    """The file below $SCOREINV_DATA if it is there, otherwise below the working directory.

    Raises:
        FileNotFoundError: It is at neither place; the message says how to fetch public data.
    """
    root = os.environ.get(ENVIRONMENT)
    places = [*([Path(root) / path] if root else []), Path.cwd() / path]
    for place in places:
        if place.exists():
            return place
    seen = " nor ".join(str(place) for place in dict.fromkeys(places))
    raise FileNotFoundError(
        f"{path} is not there: looked for {seen}{'' if root else f' ({ENVIRONMENT} is unset)'}. "
        f"Fetch public data with `python data_scripts/fetch.py --to DIR`, then "
        f"`export {ENVIRONMENT}=DIR`"
    )
