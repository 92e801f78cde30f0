"""The result on one page: data, mean, standard deviation, draws, residual, and the truth if known.

Brightness is drawn on an asinh scale (Lupton, Gunn & Szalay, A Modified Magnitude System that
Produces Well-Behaved Magnitudes, 1999, AJ 118, 1406): linear below a softening, logarithmic above.
North is up and East is left where the grid says so. pyplot and its global state are not touched.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import AsinhNorm, Normalize
from matplotlib.figure import Figure
from torch import Tensor

from scoreinv.data.grid import Grid
from scoreinv.diagnostics.pixels import pixel_coverage

if TYPE_CHECKING:
    from scoreinv.samplers.samples import Samples

BRIGHTNESS, SPREAD, SIGNED = "inferno", "viridis", "RdBu_r"
INK, FAINT, TRUE, DRAWN = "#1b1b1f", "#6f6f78", "#d1495b", "#30638e"
PREFIXES = {0: "", -3: "m", -6: "µ", -9: "n", -12: "p"}
# Inches: side of a panel, from one panel to the next, and the margins.
SIDE, PITCH, ROW_GAP = 2.4, 3.22, 0.52
LEFT, TOP, BOTTOM, FOOT_LINE = 0.7, 0.82, 0.62, 0.165
FOOT_WIDTH = 150  # characters of the footer


def result_figure(samples: Samples, truth: Tensor | None = None, stretch: float = 0.03) -> Figure:
    """Draw a result on one page.

    Args:
        samples: The result; of several channels the first is drawn.
        truth: The true image, with shape (C, H, W); left out, `samples.truth`.
        stretch: Softening of the asinh scale, over the peak; larger values show less of the faint.

    Returns:
        A figure with an Agg canvas: `savefig` writes it.

    Raises:
        ValueError: A truth of another shape, or a stretch that is not positive.
    """
    truth = samples.truth if truth is None else truth
    if truth is not None and tuple(truth.shape) != tuple(samples.x.shape[1:]):
        raise ValueError(
            f"truth has shape {tuple(truth.shape)}, the draws {tuple(samples.x.shape[1:])}"
        )
    if not stretch > 0:
        raise ValueError(f"stretch is {stretch}, expected a positive fraction of the peak")
    footer = list(_footer(samples))
    page = _Page(samples, truth, stretch, rows=2 if truth is None else 3, foot=len(footer))
    page.overview()
    page.draws(row=1)
    if truth is not None:
        page.against_the_truth(row=2)
    page.write(samples.meta.get("data", {}).get("source", "Posterior"), footer)
    return page.figure


class _Page:
    """The figure under construction: rows of four square panels, a title and a footer."""

    def __init__(
        self, samples: Samples, truth: Tensor | None, stretch: float, rows: int, foot: int
    ) -> None:
        self.samples, self.truth, self.stretch = samples, truth, stretch
        self.sky = Sky.of(samples.grid, tuple(samples.x.shape[-2:]))
        self.side = SIDE * min(1.6, samples.x.shape[-2] / samples.x.shape[-1])
        self.foot = foot * FOOT_LINE
        self.width = LEFT + 4 * PITCH
        self.height = TOP + rows * self.side + (rows - 1) * ROW_GAP + BOTTOM + self.foot
        self.figure = Figure(figsize=(self.width, self.height), facecolor="white")
        FigureCanvasAgg(self.figure)
        self.mean, self.std = (_plain(image) for image in (samples.mean, samples.std))
        images = [self.mean, *map(_plain, samples.x[:4])]
        images += [] if truth is None else [_plain(truth)]
        self.scale = Scale.of(max(float(x.max()) for x in images), self._unit())
        self.brightness = self.scale.asinh(stretch)
        self.last = rows - 1

    def _unit(self) -> str:
        return self.samples.grid.unit if self.samples.grid is not None else ""

    # ------------------------------------------------------------ rows of panels

    def overview(self) -> None:
        """Row 0: truth or nothing, data, mean, standard deviation, residual."""
        panels = [self._data, self._mean, self._std]
        panels = [*panels, self._residual] if self.truth is None else [self._truth, *panels]
        for column, panel in enumerate(panels):
            panel(0, column)

    def draws(self, row: int) -> None:
        """Four draws on the scale of the mean."""
        for column, x in enumerate(self.samples.x[:4]):
            self._sky_panel(row, column, f"Draw {column + 1}", _plain(x), self.brightness)

    def against_the_truth(self, row: int) -> None:
        """Residual, error in units of the posterior's spread, coverage, total flux."""
        self._residual(row, 0)
        # draws that are all one have no spread
        std = np.where(self.std > 0, self.std, np.nan)
        error = (self.mean - _plain(self.truth)) / std
        norm = Normalize(-4, 4)
        self._image(row, 1, "(Mean − truth) / std", error, norm, SIGNED, Scale(0, "σ"), [-4, 0, 4])
        self._coverage(row, 2)
        self._flux(row, 3)

    def _truth(self, row: int, column: int) -> None:
        self._sky_panel(row, column, "Truth", _plain(self.truth), self.brightness)

    def _mean(self, row: int, column: int) -> None:
        axes = self._sky_panel(row, column, "Posterior mean", self.mean, self.brightness)
        self.sky.draw_ruler(axes)

    def _std(self, row: int, column: int) -> None:
        scale = Scale.of(float(self.std.max()), self._unit())
        norm = scale.asinh(3 * self.stretch)
        self._image(row, column, "Standard deviation", self.std, norm, SPREAD, scale)

    def _data(self, row: int, column: int) -> None:
        data = self.samples.data_image
        if data is None:
            return
        record = self.samples.meta.get("data", {})
        image, unit = _plain(data), record.get("unit", "")
        scale = Scale.of(float(np.nanmax(image)), unit)
        peak, rms = scale.to(float(np.nanmax(image))), scale.to(record.get("rms", 0.0))
        norm = AsinhNorm(max(3 * self.stretch * peak, 3 * rms), -3 * rms, peak)
        title = "Dirty image" if unit == "Jy/beam" else "Data"
        title = "Data, with phases of 0" if record.get("phases") == "lost" else title
        self._image(row, column, title, image, norm, BRIGHTNESS, scale)

    def _residual(self, row: int, column: int) -> None:
        residual = self.samples.residual_image
        if residual is None:
            return
        image, rms = _plain(residual), self.samples.meta.get("data", {}).get("rms")
        if rms is None:
            scale = Scale.of(float(np.nanmax(np.abs(image))), "")
            norm = Normalize(*(s * scale.to(np.nanmax(np.abs(image))) for s in (-1, 1)))
            self._image(row, column, "Residual", image, norm, SIGNED, scale)
            return
        norm, ticks = Normalize(-5, 5), [-5, 0, 5]
        title = "Residual / noise"
        self._image(row, column, title, image / rms, norm, SIGNED, Scale(0, "σ"), ticks)

    def _sky_panel(
        self, row: int, column: int, title: str, image: np.ndarray, norm: Normalize
    ) -> Axes:
        return self._image(row, column, title, image, norm, BRIGHTNESS, self.scale)

    def _coverage(self, row: int, column: int) -> None:
        axes = self._axes(row, column, "Coverage of the true pixels")
        nominal = interval_levels(len(self.samples.x))
        x, truth = self.samples.x, self.truth.to(self.samples.x.dtype)
        bright = self.samples.mean > 3 * self.samples.std
        curves = {"all pixels": (x, truth, DRAWN)}
        if bool(bright.any()):
            curves["mean > 3 std"] = (x[:, bright], truth[bright], TRUE)
        axes.plot([0, 1], [0, 1], color=FAINT, lw=1, ls=(0, (4, 3)))
        for i, (label, (draws, true, colour)) in enumerate(curves.items()):
            observed = list(pixel_coverage(draws, true, nominal).values())
            axes.plot(nominal, observed, color=colour, lw=1.8, solid_capstyle="round")
            axes.text(0.95, 0.05 + 0.09 * i, label, color=colour, fontsize=8.5, ha="right")
        axes.set(xlim=(0, 1), ylim=(0, 1), xticks=[0, 0.5, 1], yticks=[0, 0.5, 1])
        axes.set_xlabel("nominal", fontsize=8.5, color=INK, labelpad=2)
        axes.set_ylabel("observed", fontsize=8.5, color=INK, labelpad=1)

    def _flux(self, row: int, column: int) -> None:
        unit = self._unit().removesuffix("/pixel")
        flux = self.samples.x.double()[:, 0].flatten(1).sum(1).numpy()
        true = float(self.truth.double()[0].sum())
        scale = Scale.of(max(abs(true), float(np.abs(flux).max())), unit)
        axes = self._axes(row, column, f"Total flux{scale.label and f' [{scale.label}]'}")
        values = scale.to(flux)
        axes.hist(values, bins=max(5, int(math.sqrt(len(flux)) * 1.5)), color=DRAWN, alpha=0.8)
        axes.axvline(scale.to(true), color=TRUE, lw=1.8)
        axes.annotate(
            "truth", (scale.to(true), 0.97), (4, 0), ("data", "axes fraction"), "offset points",
            color=TRUE, fontsize=8.5, va="top",
        )  # fmt: skip
        low, high = min(values.min(), scale.to(true)), max(values.max(), scale.to(true))
        margin = 0.2 * (high - low or abs(high) or 1)
        axes.set(xlim=(low - margin, high + margin), ylim=(0, 1.2 * axes.get_ylim()[1]), yticks=[])
        axes.locator_params(axis="x", nbins=4)

    # ------------------------------------------------------------ panels

    def _axes(self, row: int, column: int, title: str) -> Axes:
        left = LEFT + column * PITCH
        bottom = self.height - TOP - (row + 1) * self.side - row * ROW_GAP
        axes = self.figure.add_axes(self._inches(left, bottom, SIDE, self.side))
        axes.set_title(title, fontsize=10, color=INK, loc="left", pad=5)
        axes.tick_params(labelsize=8, colors=INK, length=3, width=0.6)
        for spine in axes.spines.values():
            spine.set(linewidth=0.6, color=FAINT)
        return axes

    def _inches(self, *box: float) -> tuple[float, ...]:
        """Left, bottom, width, height [inch] as fractions of the page."""
        return tuple(v / d for v, d in zip(box, (self.width, self.height) * 2, strict=True))

    def _image(
        self,
        row: int,
        column: int,
        title: str,
        image: np.ndarray,
        norm: Normalize,
        colours: str,
        scale: Scale,
        ticks: list[float] | None = None,
    ) -> Axes:
        axes = self._axes(row, column, title)
        drawn = axes.imshow(
            scale.to(image),
            norm=norm,
            cmap=colours,
            origin="lower",
            extent=self.sky.extent,
            interpolation="nearest",
            aspect="auto",
        )
        axes.set_facecolor("#d9d9de")
        self.sky.label(axes, left=column == 0, below=row == self.last)
        left, bottom, width, height = axes.get_position().bounds
        bar = self.figure.add_axes(
            (left + width + 0.07 / self.width, bottom, 0.085 / self.width, height)
        )
        ticks = asinh_ticks(norm) if ticks is None and isinstance(norm, AsinhNorm) else ticks
        legend = self.figure.colorbar(drawn, cax=bar, ticks=ticks)
        legend.outline.set(linewidth=0.4, edgecolor=FAINT)
        bar.minorticks_off()
        bar.tick_params(labelsize=7.5, colors=INK, length=2, width=0.5, pad=2)
        if ticks is not None:
            bar.set_yticklabels([f"{t:g}".replace("-", "−") for t in ticks])
        if scale.label:
            x, y = 1.0, 1.0 + 0.045 * SIDE / self.side
            bar.text(x, y, scale.label, transform=bar.transAxes, fontsize=7.5, color=FAINT,
                     ha="right", va="bottom")  # fmt: skip
        return axes

    def write(self, title: str, footer: list[str]) -> None:
        """Title above, footer below."""
        left, top = LEFT / self.width, 1 - 0.2 / self.height
        write = self.figure.text
        write(left, top, title, fontsize=13, weight="bold", color=INK, va="top")
        for i, line in enumerate(footer):
            y = (self.foot - i * FOOT_LINE + 0.02) / self.height
            write(left, y, line, fontsize=8, color=FAINT, va="center")


@dataclass(frozen=True)
class Scale:
    """A power of ten taken out of the values of a panel, with what is left of the unit."""

    power: int
    label: str
    peak: float = 1.0

    @classmethod
    def of(cls, peak: float, unit: str) -> Scale:
        """The scale on which a peak lies between 1 and 1000 of a prefixed unit, or of 10^k."""
        power = math.floor(math.log10(peak)) if 0 < peak < math.inf else 0
        if unit.startswith("Jy"):
            power = min(0, max(-12, 3 * math.floor(power / 3)))
            return cls(power, PREFIXES[power] + unit, peak / 10.0**power)
        power = 0 if -2 < power < 4 else power
        factor = f"$10^{{{power}}}$" if power else ""
        return cls(power, f"{factor} {unit}".strip(), peak / 10.0**power)

    def to(self, values: Any) -> Any:
        """Values on this scale."""
        return values / 10.0**self.power

    def asinh(self, stretch: float) -> AsinhNorm:
        """From zero to the peak, linear below `stretch` of it."""
        peak = self.peak if self.peak > 0 else 1.0
        return AsinhNorm(stretch * peak, 0.0, peak)


@dataclass(frozen=True)
class Sky:
    """Where the pixels lie on the page.

    Args:
        extent: Left, right, bottom and top edge.
        names: Names of the two axes, with their unit.
        compass: Directions of North and East on the page, where neither is along an axis.
    """

    extent: tuple[float, float, float, float]
    names: tuple[str, str]
    compass: tuple[np.ndarray, np.ndarray] | None = None

    @classmethod
    def of(cls, grid: Grid | None, shape: tuple[int, int]) -> Sky:
        """Offsets from the reference pixel [arcsec]; pixel numbers without a grid.

        A cutout keeps the orientation of its file: a compass shows what its WCS says of it, and
        without a WCS the directions stay unnamed.
        """
        if grid is None:
            rows, columns = shape
            return cls((-0.5, columns - 0.5, -0.5, rows - 0.5), ("column", "row"))
        east, north = grid.offsets()
        half = grid.pixel_scale / 2
        extent = (east[0] + half, east[-1] - half, north[0] - half, north[-1] + half)
        if grid.wcs_header is None and (grid.ra is not None or grid.unit.startswith("Jy")):
            return cls(extent, ("East [arcsec]", "North [arcsec]"))
        extent = (-extent[0], -extent[1], *extent[2:])
        wcs = grid.wcs()
        compass = _compass(wcs.celestial.pixel_scale_matrix) if wcs.has_celestial else None
        return cls(extent, ("offset [arcsec]", "offset [arcsec]"), compass)

    def label(self, axes: Axes, left: bool, below: bool) -> None:
        """Ticks everywhere, their labels at the edge of the page."""
        axes.locator_params(nbins=5)
        axes.tick_params(labelleft=left, labelbottom=below)
        if below:
            axes.set_xlabel(self.names[0], fontsize=8.5, color=INK, labelpad=2)
        if left:
            axes.set_ylabel(self.names[1], fontsize=8.5, color=INK, labelpad=1)

    def draw_ruler(self, axes: Axes) -> None:
        """A bar of a round length, and the compass."""
        left, right, bottom, top = self.extent
        width, height = right - left, top - bottom
        length = _round_length(abs(width) / 4)
        unit = "″" if "arcsec" in self.names[0] else " px"
        x, y = left + 0.07 * width, bottom + 0.07 * height
        axes.plot([x, x + math.copysign(length, width)], [y, y], color="white", lw=1.6)
        middle = x + math.copysign(length, width) / 2
        text = f"{length:g}{unit}"
        axes.text(middle, y + 0.025 * height, text, color="white", fontsize=8.5, ha="center")
        for name, arrow in zip("NE", self.compass or (), strict=False):
            tip = np.array([0.86, 0.14]) + 0.1 * arrow
            axes.annotate(
                name, tip, (0.86, 0.14), "axes fraction", "axes fraction", color="white",
                fontsize=8, ha="center", va="center",
                arrowprops={"arrowstyle": "<-", "color": "white", "lw": 1},
            )  # fmt: skip
        axes.set(xlim=(left, right), ylim=(bottom, top))


def _compass(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Unit vectors on the page to the North and to the East, from degrees per pixel."""
    directions = np.linalg.inv(matrix)
    north, east = directions @ [0, 1], directions @ [1, 0]
    return north / np.linalg.norm(north), east / np.linalg.norm(east)


def _round_length(length: float) -> float:
    """The largest of 1, 2, 5 times a power of ten below a length."""
    power = 10.0 ** math.floor(math.log10(length))
    return max(f * power for f in (1, 2, 5) if f * power <= length * (1 + 1e-9))


def interval_levels(n: int, most: int = 24) -> tuple[float, ...]:
    """Probabilities of the central intervals that n draws can tell apart, at most so many."""
    levels = [k / (n + 1) for k in range(1 + n % 2, n + 1, 2)]
    return tuple(levels[:: math.ceil(len(levels) / most)])


def asinh_ticks(norm: AsinhNorm, apart: float = 0.14) -> list[float]:
    """Round values for a colour bar, from the top down, none closer than `apart` of its length."""
    powers = range(math.floor(math.log10(norm.vmax)) - 3, math.floor(math.log10(norm.vmax)) + 1)
    values = [f * 10.0**p for p in powers for f in (1, 2, 5)]
    values = [v for v in values if v <= norm.vmax]
    ticks: list[float] = [0.0]
    for value in sorted(values, reverse=True):
        if all(abs(float(norm(value)) - float(norm(t))) >= apart for t in ticks):
            ticks.append(value)
    return sorted(float(f"{t:.6g}") for t in ticks)


def _plain(image: Tensor) -> np.ndarray:
    """The first channel, with shape (H, W)."""
    return image[0].double().numpy()


def _footer(samples: Samples) -> Iterator[str]:
    """What to know before believing the draws, in a few lines."""
    meta, prior = samples.meta, samples.meta.get("prior", {})
    evidence = f"log evidence {samples.log_evidence:.2f}"
    if math.isfinite(samples.log_evidence_std):
        evidence += f" ± {samples.log_evidence_std:.2f}"
    parts = [
        f"{len(samples.x)} draws",
        f"{samples.evaluations:.0f} network evaluations each",
        f"{samples.seconds:.0f} s",
        f"{evidence} nat",
    ]
    acceptance = samples.acceptance[~samples.acceptance.isnan()]
    if len(acceptance):
        parts.append(f"acceptance of moves {float(acceptance.mean()):.2f}")
    ess = samples.ess[~samples.ess.isnan()]
    if len(ess):
        parts.append(f"lowest ESS / n {float(ess.min()):.2f}")
    yield "  ·  ".join(parts)
    yield from textwrap.wrap(f"Weights {samples.weights}", FOOT_WIDTH)
    origin = [str(meta[key]) for key in ("sampler",) if key in meta]
    origin += [f"prior {prior['prior']}"] if "prior" in prior else []
    origin += [f"sha256 {prior['sha256'][:12]}"] if "sha256" in prior else []
    origin += [f"seed {meta['seed']}"] if "seed" in meta else []
    if origin:
        yield "  ·  ".join(origin)
