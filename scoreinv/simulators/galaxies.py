"""Galaxies drawn from a parametric model of their structure.

A galaxy is one of seven kinds: spiral, smooth disc, lenticular, edge-on, irregular, elliptical
or merger. Its half-light radius is log-normal. In the plane of a disc (coordinates u, v, r of
`fields`, scale length h = r_e / 1.678) the light is

    I = D(r) F^0.45 + f Y(r, theta) F + knots,    then    I exp(-tau),

with D an exponential disc, often broken, lopsided and barred; Y the young stars, which follow
the arms; F = exp(s g - s^2 / 2) the log-normal texture of star formation, g a Gaussian random
field; and tau a dust lane or, nearer face-on, dust filaments. Spiral arms are logarithmic:
they peak where m (theta - theta_0) = m ln(r / r_0) / tan(pitch), up to a random wobble. A disc
of thickness q_0 seen at inclination i, with cos i uniform, has the axis ratio

    q^2 = q_0^2 + (1 - q_0^2) cos^2 i.

Bulges and ellipticals are Sersic profiles. The images are noiseless and not convolved with any
point-spread function.

References:
    Hubble, "Extragalactic nebulae", ApJ 64, 321 (1926): axis ratio of a thick disc
    Freeman, "On the disks of spiral and S0 galaxies", ApJ 160, 811 (1970): exponential discs
    Pohlen & Trujillo, "The structure of galactic disks", A&A 454, 759 (2006): breaks
    Rix & Zaritsky, "Nonaxisymmetric structures in the stellar disks of galaxies", ApJ 447, 82
        (1995): lopsidedness
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from math import cos, exp, log, pi, radians, sin, sqrt, tan

import numpy as np

from .fields import (
    PIXEL_BLUR,
    azimuth,
    deproject,
    elliptical_radius,
    gaussian_spots,
    pixel_grid,
    radial_gradient,
    random_fields,
    sersic,
    smooth_step,
)

Range = tuple[float, float]
Point = tuple[float, float]


@dataclass(frozen=True)
class DiscKind:
    """What tells one kind of disc from another; ranges are those of uniform distributions."""

    cos_inclination: Range = (0.3, 1.0)
    bar: float = 0.0  # probability
    arms: bool = False
    texture: float = 0.5  # standard deviation of ln F
    young: Range = (0.1, 0.6)  # light of the young stars relative to the old
    knots: float = 0.0  # mean number of star-forming knots
    lopsided: float = 0.2  # mode of the m = 1 amplitude's distribution
    dust: float = 0.0  # probability


SPIRAL = DiscKind(bar=0.45, arms=True, texture=0.9, young=(0.4, 1.4), knots=16, dust=0.7)
SMOOTH = DiscKind(knots=8, dust=0.7)
LENTICULAR = DiscKind(bar=0.18, texture=0.15, young=(0.05, 0.05), lopsided=0.05)
EDGE_ON = DiscKind(cos_inclination=(0.0, 0.25), young=(0.1, 0.5), knots=6, dust=0.7)
IRREGULAR = DiscKind(texture=1.3, young=(0.8, 2.5), knots=14, lopsided=0.3)


@dataclass(frozen=True)
class Plane:
    """The plane of a disc as the pixels see it."""

    u: np.ndarray  # along the major axis [pixel], with shape (size, size)
    v: np.ndarray  # across it, de-projected [pixel]
    h: float  # scale length [pixel]
    q: float  # axis ratio on the sky
    angle: float  # of the major axis [rad]

    @property
    def size(self) -> int:
        return self.u.shape[-1]

    @cached_property
    def r(self) -> np.ndarray:
        return elliptical_radius(self.u, self.v)

    def cos_azimuth_from(self, theta: float) -> np.ndarray:
        """Cosine of the azimuth counted from `theta` [rad]."""
        return (self.u * cos(theta) + self.v * sin(theta)) / self.r


def bounded(value: float, low: float, high: float) -> float:
    return min(max(value, low), high)


def any_angle(rng: np.random.Generator) -> float:
    return rng.uniform(0, 2 * pi)


def unit_peak(image: np.ndarray) -> np.ndarray:
    return image / image.max()


# The plane and the old stars


def inclined_plane(
    rng: np.random.Generator, size: int, centre: Point, r_e: float, kind: DiscKind
) -> Plane:
    """A randomly oriented plane, gently warped so that nothing is exactly elliptical."""
    q_0 = rng.uniform(0.1, 0.25)
    cos_i = rng.uniform(*kind.cos_inclination)
    q = sqrt(q_0**2 + (1 - q_0**2) * cos_i**2)
    angle = any_angle(rng)
    warp = random_fields(rng, size, slope=5.0, k_max=4) * (0.06 * r_e)
    x, y = pixel_grid(size)
    u, v = deproject(x - centre[0] + warp[0], y - centre[1] + warp[1], q, angle)
    return Plane(u, v, r_e / 1.678, q, angle)


def old_disc(rng: np.random.Generator, plane: Plane) -> np.ndarray:
    """Exponential disc; just over half of them bend down (type II) or up (type III)."""
    r, h = plane.r, plane.h
    disc = np.exp(-r / h)
    if rng.random() > 0.55:
        return disc
    r_break = rng.uniform(1.5, 4.0) * h
    h_outer = h * (rng.uniform(0.4, 0.7) if rng.random() < 0.7 else rng.uniform(1.3, 1.8))
    # The outer disc is used beyond the break only; inside, its exponential could overflow.
    outer = np.exp(-r_break / h - np.maximum(r - r_break, -h) / h_outer)
    return disc + smooth_step((r - r_break) / (0.15 * h)) * (outer - disc)


def lopsidedness(rng: np.random.Generator, plane: Plane, mode: float) -> np.ndarray:
    """Factor 1 + A cos(theta - theta_0), A growing outwards to a Rayleigh-distributed value."""
    amplitude = min(rng.rayleigh(mode), 0.7)
    growth = np.minimum(plane.r / (2.5 * plane.h), 1)
    return 1 + amplitude * growth * plane.cos_azimuth_from(any_angle(rng))


def bar(rng: np.random.Generator, plane: Plane, length: float, angle: float) -> np.ndarray:
    """Boxy ellipse of half-length `length` [pixel] that ends at a finite radius."""
    u, v = deproject(plane.u, plane.v, rng.uniform(0.18, 0.4), angle)
    r = elliptical_radius(u, v, exponent=rng.uniform(2.2, 3.5))
    shape = np.maximum(1 - (r / length) ** 2, 0) ** 0.8
    return rng.uniform(0.3, 1.0) * exp(-0.5 * length / plane.h) * shape


def bulge(
    rng: np.random.Generator,
    size: int,
    centre: Point,
    r_e: float,
    n: float,
    q: float,
    angle: float,
) -> np.ndarray:
    """Sersic spheroid, slightly boxy or pointed, its cusp softened below the pixel."""
    x, y = pixel_grid(size)
    u, v = deproject(x - centre[0], y - centre[1], q, angle)
    r = elliptical_radius(u, v, exponent=rng.uniform(1.8, 2.3), softening=0.35)
    return sersic(r, r_e, n)


# The young stars


def arm_window(rng: np.random.Generator, plane: Plane, r_start: float) -> np.ndarray:
    """Arms fade in where the bar ends and out at three to five scale lengths."""
    r, h = plane.r, plane.h
    inner = smooth_step((r - r_start) / (0.2 * h))
    return inner * smooth_step((rng.uniform(3, 5.5) * h - r) / (0.4 * h))


def spiral_arms(
    rng: np.random.Generator, plane: Plane, r_start: float, theta_0: float, wobble: np.ndarray
) -> np.ndarray:
    """m logarithmic arms of unit crest, one side of the galaxy stronger than the other.

    Where pixels cannot resolve the winding, the arms fade to their mean over phase.
    """
    from scipy.special import i0e

    m = (1, 2, 2, 2, 2, 3, 4, 5)[rng.integers(8)]
    pitch = radians(bounded(rng.normal(19, 7), 7, 40))
    winding = (-1, 1)[rng.integers(2)] / tan(pitch)
    r = np.maximum(plane.r, 0.25 * plane.h)
    wander = rng.uniform(0.15, 0.6) * wobble
    theta = azimuth(plane.u, plane.v)
    phase = m * (theta - theta_0 - winding * np.log(r / r_start) + wander)
    sharpness = rng.uniform(1.2, 5.0)
    mean = float(i0e(sharpness))
    phase_blur = PIXEL_BLUR * m / sin(pitch) * radial_gradient(plane.u, plane.v, plane.q) / r
    resolved = np.exp(-0.5 * phase_blur**2)
    crest = mean + resolved * (np.exp(sharpness * (np.cos(phase) - 1)) - mean)
    return crest * (1 + 0.35 * plane.cos_azimuth_from(any_angle(rng)))


def ring(rng: np.random.Generator, plane: Plane) -> np.ndarray:
    """Inner or outer ring of star formation."""
    h = plane.h
    r_ring, width = rng.uniform(0.9, 2.6) * h, rng.uniform(0.1, 0.25) * h
    peak = rng.uniform(0.2, 0.7) * exp(-r_ring / h)
    return peak * np.exp(-0.5 * ((plane.r - r_ring) / width) ** 2)


def knots(rng: np.random.Generator, where: np.ndarray, number: int) -> np.ndarray:
    """Compact star-forming knots, placed in proportion to `where`, fluxes from a power law."""
    size = where.shape[-1]
    cumulative = np.cumsum(where, dtype=np.float64)
    pixel = np.searchsorted(cumulative, rng.random(number) * cumulative[-1])
    row, column = np.divmod(np.minimum(pixel, where.size - 1), size)
    x, y = pixel_grid(size)
    jitter = rng.uniform(-0.5, 0.5, (2, number)).astype(np.float32)
    flux = (rng.pareto(1.2, number) + 0.2).astype(np.float32)
    growth = np.sqrt(np.minimum(flux, 4)) * (size / 128)
    width = 0.35 + growth * rng.uniform(0.45, 1.6, number).astype(np.float32)
    return gaussian_spots(
        size, x[0, column] + jitter[0], y[row, 0] + jitter[1], width, np.minimum(flux, 8)
    )


# Dust


def dust_lane(rng: np.random.Generator, plane: Plane) -> np.ndarray:
    """Optical depth of the lane across an inclined disc, a little off its major axis."""
    h = plane.h
    height = plane.v * plane.q - rng.uniform(-0.05, 0.12) * h
    thickness = rng.uniform(0.05, 0.14) * h + 0.4
    extent = np.exp(-np.abs(plane.u) / (2.2 * h))
    return rng.uniform(0.3, 1.8) * extent * np.exp(-0.5 * (height / thickness) ** 2)


def dust_filaments(rng: np.random.Generator, plane: Plane, field: np.ndarray) -> np.ndarray:
    """Optical depth of filaments: the zero-level contours of a random field."""
    extent = np.exp(-plane.r / (2 * plane.h))
    return rng.uniform(0.1, 0.7) * extent * np.maximum(1 - np.abs(field) / 0.35, 0)


def transmission(
    rng: np.random.Generator, plane: Plane, filaments: np.ndarray, patches: np.ndarray
) -> np.ndarray:
    """Fraction of the light that the dust lets through."""
    if plane.q < 0.45:
        depth = dust_lane(rng, plane)
    else:
        depth = dust_filaments(rng, plane, filaments)
    return np.exp(-depth * np.exp(0.5 * patches))


# Whole components


def disc(
    rng: np.random.Generator, size: int, centre: Point, r_e: float, kind: DiscKind
) -> tuple[np.ndarray, Plane]:
    """Disc of the given kind with its bar, arms, young stars and dust, and its plane."""
    plane = inclined_plane(rng, size, centre, r_e, kind)
    r, h = plane.r, plane.h
    clumps, filaments = random_fields(rng, size, slope=rng.uniform(2.0, 3.2), k_min=2)
    wobble, patches = random_fields(rng, size, slope=3.4, k_max=14)

    old = old_disc(rng, plane)
    theta_0, bar_length = any_angle(rng), 0.0
    if rng.random() < kind.bar:
        bar_length = rng.uniform(0.6, 1.5) * h
        old = old + bar(rng, plane, bar_length, theta_0)
    if kind.arms:
        r_start = max(bar_length, 0.5 * h)
        window = arm_window(rng, plane, r_start)
        arms = spiral_arms(rng, plane, r_start, theta_0, wobble)
        old = old * (1 + 0.35 * window * (arms - arms.mean()))
        young = arms * window * np.exp(-r / (rng.uniform(1.0, 1.6) * h))
        if rng.random() < 0.2:
            young = young + ring(rng, plane)
    else:
        young = 0.5 * np.exp(-r / (1.3 * h))

    s = kind.texture * rng.uniform(0.5, 1.3)
    texture = s * clumps - s**2 / 2
    young = young * np.exp(texture)
    light = old * np.exp(0.45 * texture) + rng.uniform(*kind.young) * young
    number = rng.poisson(kind.knots)
    if number:
        brightness = rng.uniform(0.03, 0.14) * exp(-0.5) * float(old.max())
        light += brightness * knots(rng, young, number)
    light *= lopsidedness(rng, plane, kind.lopsided)
    if rng.random() < kind.dust:
        light *= transmission(rng, plane, filaments, patches)
    return light, plane


def shell(rng: np.random.Generator, plane: Plane, n: float) -> np.ndarray:
    """Tidal shell: sharp outside, fading inwards, limited in azimuth."""
    r_e = plane.h
    r_shell = rng.uniform(1.2, 3) * r_e
    peak = rng.uniform(0.1, 0.5) * float(sersic(r_shell, r_e, n))
    inside = np.minimum(plane.r - r_shell, 0) / (0.25 * r_e)
    azimuthal = 2 * (plane.cos_azimuth_from(any_angle(rng)) - 1)
    return peak * (plane.r < r_shell) * np.exp(inside + azimuthal)


def tidal_arc(
    rng: np.random.Generator, size: int, middle: Point, distance: float, angle: float, width: float
) -> np.ndarray:
    """Arc of stars through both galaxies of a merger, `distance` [pixel] apart along `angle`."""
    radius = rng.uniform(1.0, 2.2) * distance
    x, y = pixel_grid(size)
    dx, dy = x - middle[0] + radius * sin(angle), y - middle[1] - radius * cos(angle)
    r = elliptical_radius(dx, dy)
    along = (dx * sin(angle) - dy * cos(angle)) / r
    ridge = np.exp(-0.5 * ((r - radius) / width) ** 2)
    return rng.uniform(0.03, 0.15) * ridge * np.exp(3 * (along - 1))


def nucleus(size: int, centre: Point) -> np.ndarray:
    """Point-like active nucleus."""
    x0, y0, width, flux = np.float32([[centre[0]], [centre[1]], [0.5], [1.0]])
    return gaussian_spots(size, x0, y0, width, flux)


def companion(rng: np.random.Generator, size: int) -> np.ndarray:
    """Small faint galaxy anywhere in the field."""
    x, y = pixel_grid(size)
    x0, y0 = rng.uniform(-0.42 * size, 0.42 * size, 2).tolist()
    u, v = deproject(x - x0, y - y0, rng.uniform(0.4, 1), any_angle(rng))
    r = elliptical_radius(u, v, softening=0.3)
    peak = 10 ** rng.uniform(-2.2, -0.7)
    return peak * sersic(r, size * rng.uniform(0.012, 0.04), rng.uniform(0.7, 2.5))


# The seven kinds


def elliptical(rng: np.random.Generator, size: int, centre: Point, r_e: float) -> np.ndarray:
    """Sersic spheroid of index about 3; one in five has shells."""
    n = bounded(rng.lognormal(log(3.2), 0.4), 1.0, 7.0)
    q = max(rng.beta(6, 2.4), 0.3)
    image = bulge(rng, size, centre, r_e, n, q, any_angle(rng))
    if rng.random() < 0.2:
        x, y = pixel_grid(size)
        angle = any_angle(rng)
        u, v = deproject(x - centre[0], y - centre[1], q, angle)
        plane = Plane(u, v, r_e, q, angle)
        for _ in range(rng.integers(1, 4)):
            image += shell(rng, plane, n)
    return image


def disc_galaxy(kind: DiscKind, extra_bulge: float = 0.0) -> Callable[..., np.ndarray]:
    """Maker of discs of one kind, most of them with a bulge; `extra_bulge` adds to its share."""

    def make(rng: np.random.Generator, size: int, centre: Point, r_e: float) -> np.ndarray:
        image, plane = disc(rng, size, centre, r_e, kind)
        if rng.random() > 0.85:
            return image
        share = min(rng.beta(1.3, 5) + extra_bulge, 0.8)
        n = bounded(rng.lognormal(log(2.0), 0.45), 0.6, 5.0)
        q = max(plane.q, rng.uniform(0.6, 1.0))
        spheroid = bulge(rng, size, centre, r_e * rng.uniform(0.08, 0.35), n, q, plane.angle)
        image *= (1 - share) / float(image.sum())
        return image + spheroid * (share / float(spheroid.sum()))

    return make


def irregular(rng: np.random.Generator, size: int, centre: Point, r_e: float) -> np.ndarray:
    """Clumpy disc without order and without a bulge."""
    return disc(rng, size, centre, r_e, IRREGULAR)[0]


def merger(rng: np.random.Generator, size: int, centre: Point, r_e: float) -> np.ndarray:
    """Two overlapping discs, usually joined by a tidal arc."""
    first, second = ((SPIRAL, IRREGULAR, SMOOTH)[k] for k in rng.integers(3, size=2))
    distance, angle = rng.uniform(0.8, 3.0) * r_e, any_angle(rng)
    dx, dy = distance * cos(angle), distance * sin(angle)
    image = unit_peak(disc(rng, size, centre, r_e, first)[0])
    other = (centre[0] + dx, centre[1] + dy)
    secondary = disc(rng, size, other, r_e * rng.uniform(0.35, 0.9), second)[0]
    image += rng.uniform(0.15, 1.0) * unit_peak(secondary)
    if rng.random() < 0.7:
        middle = (centre[0] + dx / 2, centre[1] + dy / 2)
        width = rng.uniform(0.08, 0.25) * r_e + 0.5
        image += tidal_arc(rng, size, middle, distance, angle, width)
    return image


KINDS: tuple[tuple[float, Callable[..., np.ndarray]], ...] = (
    (0.34, disc_galaxy(SPIRAL)),
    (0.16, disc_galaxy(SMOOTH)),
    (0.14, elliptical),
    (0.08, disc_galaxy(LENTICULAR, extra_bulge=0.25)),
    (0.12, irregular),
    (0.08, disc_galaxy(EDGE_ON)),
    (0.08, merger),
)
CUMULATIVE = np.cumsum([share for share, _ in KINDS])


def galaxy(rng: np.random.Generator, size: int = 64) -> np.ndarray:
    """One galaxy without noise or point-spread function.

    Arguments:
        rng: Source of randomness.
        size: Side of the image [pixel]; the galaxy scales with it.

    Returns:
        Surface brightness in units of its peak, with shape (size, size), float32, >= 0.
    """
    _, make = KINDS[np.searchsorted(CUMULATIVE, rng.random() * CUMULATIVE[-1])]
    r_e = size * bounded(exp(rng.normal(log(0.11), 0.38)), 0.035, 0.22)
    centre = (rng.normal(0, 0.012 * size), rng.normal(0, 0.012 * size))
    image = make(rng, size, centre, r_e)
    if rng.random() < 0.12:
        image = unit_peak(image) + rng.uniform(0.2, 2.0) * nucleus(size, centre)
    if rng.random() < 0.3:
        image = unit_peak(image)
        for _ in range(rng.integers(1, 3)):
            image += companion(rng, size)
    return unit_peak(image)
