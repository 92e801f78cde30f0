"""Protoplanetary discs in dust continuum, as millimetre interferometers see them.

With s = r / r_out the radius in the plane of the disc, the profile starts from a tapered power
law, and substructure multiplies or adds to it: pairs of gap and ring, the cavity of a
transition disc, spiral arms, the crescent of a vortex. The brightness saturates where the dust
is optically thick and follows a falling temperature,

    P(s) = s^-gamma exp(-s^p) * gaps + rings ...,
    I = (1 - exp(-tau P / P_ref)) s^-beta.

Discs are oriented at random, cos i uniform on [0.25, 1]. A geometrical thickness shifts the
emitting surface along the minor axis, by the height over radius times sin i.

References:
    Andrews et al., "The Disk Substructures at High Angular Resolution Project (DSHARP). I.
        Motivation, Sample, Calibration, and Overview", ApJL 869, L41 (2018), arXiv:1812.04040
    Huang et al., "The Disk Substructures at High Angular Resolution Project (DSHARP). II.
        Characteristics of Annular Substructures", ApJL 869, L42 (2018), arXiv:1812.04041
"""

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
    smooth_step,
)

# Number of gap-and-ring pairs, 0 to 7, and how often.
RINGS = np.cumsum([0.12, 0.16, 0.2, 0.18, 0.14, 0.1, 0.06, 0.04])


@dataclass(frozen=True)
class Plane:
    """The plane of a disc in units of its outer radius."""

    u: np.ndarray  # along the major axis, with shape (size, size)
    v: np.ndarray  # across it, de-projected
    q: float  # axis ratio on the sky, cos i
    pixel: float  # side of a pixel

    @cached_property
    def s(self) -> np.ndarray:
        return elliptical_radius(self.u, self.v)

    @cached_property
    def log_s(self) -> np.ndarray:
        """ln s, its cusp cut at half a pixel."""
        return np.log(np.maximum(self.s, 0.5 * self.pixel))

    @cached_property
    def blur_squared(self) -> np.ndarray:
        """Variance in s that a pixel adds to a narrow ring."""
        return (PIXEL_BLUR * self.pixel * radial_gradient(self.u, self.v, self.q)) ** 2

    def cos_azimuth_from(self, theta: float) -> np.ndarray:
        """Cosine of the azimuth counted from `theta` [rad]."""
        return (self.u * cos(theta) + self.v * sin(theta)) / self.s


def any_angle(rng: np.random.Generator) -> float:
    return rng.uniform(0, 2 * pi)


def annulus(plane: Plane, s: np.ndarray, s_0: float, width: float) -> np.ndarray:
    """Gaussian annulus exp(-(s - s_0)^2 / 2 width^2) as pixels see it: wider, and fainter."""
    variance = width**2 + plane.blur_squared
    return width / np.sqrt(variance) * np.exp(-0.5 * (s - s_0) ** 2 / variance)


def inclined_plane(
    rng: np.random.Generator, size: int, centre: tuple[float, float], r_out: float
) -> Plane:
    """Plane of a randomly oriented disc whose surface rises in proportion to radius."""
    cos_i = rng.uniform(0.25, 1.0)
    x, y = pixel_grid(size)
    u, v = deproject((x - centre[0]) / r_out, (y - centre[1]) / r_out, cos_i, any_angle(rng))
    height = rng.uniform(0.0, 0.08) * elliptical_radius(u, v)
    return Plane(u, v + height * (sqrt(1 - cos_i**2) / cos_i), cos_i, 1 / r_out)


def tapered_power_law(rng: np.random.Generator, plane: Plane, gamma: float) -> np.ndarray:
    """s^-gamma out to an edge that is soft (p = 2) or sharp (p = 8)."""
    taper = rng.uniform(2.0, 8.0)
    return np.exp(-gamma * plane.log_s - np.exp(taper * plane.log_s))


def gap_and_ring(
    rng: np.random.Generator, plane: Plane, profile: np.ndarray, s_gap: float, gamma: float
) -> np.ndarray:
    """Carve a gap at s_gap and pile part of what it held into a ring just outside."""
    width = s_gap * exp(rng.uniform(log(0.06), log(0.45)))
    depth = rng.beta(0.9, 1.1)
    s = plane.s
    if rng.random() < 0.3:
        s = s * (1 + rng.uniform(0, 0.06) * plane.cos_azimuth_from(any_angle(rng)))
    gap = 1 - depth * annulus(plane, s, s_gap, 0.5 * width)
    peak = rng.uniform(0.2, 1.6) * depth * s_gap**-gamma * exp(-(s_gap**4))
    ring = annulus(plane, s, s_gap + 0.9 * width, 0.5 * width * rng.uniform(0.3, 0.8))
    return profile * gap + peak * ring


def cavity(rng: np.random.Generator, plane: Plane) -> np.ndarray:
    """Factor that empties the inner part, as in a transition disc."""
    edge = rng.uniform(0.15, 0.6)
    depth = rng.uniform(0.85, 1.0)
    return 1 - depth * smooth_step((edge - plane.s) / (0.06 * edge + 0.01))


def spiral_arms(rng: np.random.Generator, plane: Plane) -> np.ndarray:
    """Factor with the crests of m logarithmic arms, weaker towards the centre."""
    m = (1, 2, 2, 2, 3)[rng.integers(5)]
    winding = (-1, 1)[rng.integers(2)] / tan(radians(rng.uniform(8, 25)))
    log_s = np.maximum(plane.log_s, log(0.05))
    phase = m * (azimuth(plane.u, plane.v) - any_angle(rng) - winding * log_s)
    crest = np.exp(2.5 * (np.cos(phase) - 1))
    return 1 + rng.uniform(0.4, 2.0) * crest * np.minimum(plane.s / 0.3, 1)


def crescent(rng: np.random.Generator, plane: Plane, s_c: float, gamma: float) -> np.ndarray:
    """Dust trapped in a vortex at radius s_c: a ring that is bright on one side."""
    radial = annulus(plane, plane.s, s_c, rng.uniform(0.04, 0.12))
    along = rng.uniform(1, 8) * (plane.cos_azimuth_from(any_angle(rng)) - 1)
    return rng.uniform(0.4, 3.0) * s_c**-gamma * radial * np.exp(along)


def dust_profile(rng: np.random.Generator, plane: Plane) -> np.ndarray:
    """Column of dust, in arbitrary units, with all its substructure."""
    gamma = rng.uniform(0.2, 0.9)
    profile = tapered_power_law(rng, plane, gamma)
    number = int(np.searchsorted(RINGS, rng.random() * RINGS[-1]))
    gaps = sorted(exp(rng.uniform(log(0.12), log(0.98))) for _ in range(number))
    for s_gap in gaps:
        profile = gap_and_ring(rng, plane, profile, s_gap, gamma)
    if rng.random() < 0.22:
        profile = profile * cavity(rng, plane)
    if rng.random() < 0.17:
        profile = profile * spiral_arms(rng, plane)
    if rng.random() < 0.14:
        on_a_gap = gaps and rng.random() < 0.6
        s_c = gaps[-1] if on_a_gap else rng.uniform(0.25, 0.9)
        profile = profile + crescent(rng, plane, s_c, gamma)
    return profile


def emission(rng: np.random.Generator, plane: Plane, profile: np.ndarray) -> np.ndarray:
    """Brightness of dust that is opaque where its column is largest and warm near the star."""
    # The brightest 0.3 % of the pixels set no scale: a single cusp would dim all the rest.
    rank = int(0.997 * profile.size)
    reference = float(np.partition(profile, rank, axis=None)[rank])
    opacity = 1 - np.exp(-rng.uniform(0.3, 6) / reference * profile)
    temperature = np.exp(-rng.uniform(0.2, 0.6) * plane.log_s)
    tilt = 1 + rng.uniform(0, 0.12) * plane.cos_azimuth_from(any_angle(rng))
    return opacity * temperature * tilt


def circumplanetary(
    rng: np.random.Generator, size: int, centre: tuple[float, float], r_out: float
) -> np.ndarray:
    """Unresolved dust around a companion just outside the disc."""
    angle = any_angle(rng)
    x0, y0 = centre[0] + 1.1 * r_out * cos(angle), centre[1] + 1.1 * r_out * sin(angle)
    return gaussian_spots(size, *np.float32([[x0], [y0], [0.7], [1.0]]))


def protoplanetary_disc(rng: np.random.Generator, size: int = 64) -> np.ndarray:
    """One protoplanetary disc in dust continuum, without noise or beam.

    Arguments:
        rng: Source of randomness.
        size: Side of the image [pixel]; the disc scales with it.

    Returns:
        Surface brightness in units of its peak, with shape (size, size), float32, >= 0.
    """
    centre = (rng.normal(0, 0.01 * size), rng.normal(0, 0.01 * size))
    r_out = size * min(max(exp(rng.normal(log(0.26), 0.3)), 0.1), 0.42)
    plane = inclined_plane(rng, size, centre, r_out)
    image = emission(rng, plane, dust_profile(rng, plane))
    if rng.random() < 0.03:
        image += 0.2 * float(image.max()) * circumplanetary(rng, size, centre, r_out)
    return image / image.max()
