"""Interferometer tracks: where in the uv plane an array measures, and with how much noise.

Pads are given in the local tangent plane (east E, north N, up U) at latitude phi. In the
equatorial frame, X towards (hour angle H = 0, declination delta = 0), Y towards (H = -6 h,
delta = 0), Z towards the north pole,

    X = -sin(phi) N + cos(phi) U,    Y = E,    Z = cos(phi) N + sin(phi) U,

and a source at (H, delta) sees the baseline (X, Y, Z) from antenna i to antenna j > i as

    u =             sin(H) X +             cos(H) Y
    v = -sin(delta) cos(H) X + sin(delta) sin(H) Y + cos(delta) Z
    w =  cos(delta) cos(H) X - cos(delta) sin(H) Y + sin(delta) Z

with u towards the east, v towards the north and w towards the source, in wavelengths [lambda].
Small fields have no use for w. Every baseline appears once; its Hermitian copy (-u, -v) carries
no information.

Reference: Thompson, Moran & Swenson, Interferometry and Synthesis in Radio Astronomy (3rd edition,
2017), chapter 4, equation 4.1 (tracks), and section 6.2 (noise).
"""

from __future__ import annotations

from importlib import resources

import numpy as np

SPEED_OF_LIGHT = 299_792_458.0  # [m/s]
BOLTZMANN = 1.380649e-23  # [J/K]
JANSKY = 1e-26  # [W/m^2/Hz]
ALMA_LATITUDE = -23.0229  # [deg]


def alma_pads() -> np.ndarray:
    """The 43 pads of ALMA's configuration C43-7, whose baselines are 64 m to 3.6 km long.

    Returns:
        East, north, up [m], with shape (43, 3).
    """
    table = resources.files("scoreinv.simulators").joinpath("alma_c43_7.txt")
    return np.loadtxt(table.read_text().splitlines(), usecols=(1, 2, 3))


def alma_track(
    declination: float,
    frequency: float,
    hour_angles: np.ndarray,
    scale: float = 1.0,
    elevation_limit: float = 0.0,
) -> np.ndarray:
    """The uv track of ALMA in configuration C43-7, or of a copy of it shrunk or stretched.

    Args:
        declination: Declination of the source [deg].
        frequency: Observing frequency [Hz].
        hour_angles: Hour angles of the integrations [hour], with shape (T,).
        scale: Factor on all pad positions; 0.5 gives an array half as long, and twice the beam.
        elevation_limit: Integrations with the source below this elevation are dropped [deg].

    Returns:
        Baselines [lambda], with shape (N, 2), as from `uv_track`.
    """
    if not scale > 0:
        raise ValueError(f"scale is {scale}, expected a positive factor on the pad positions.")
    pads = scale * alma_pads()
    return uv_track(
        pads, declination, ALMA_LATITUDE, frequency, hour_angles, elevation_limit=elevation_limit
    )


def uv_track(
    positions: np.ndarray,
    declination: float,
    latitude: float,
    frequency: float,
    hour_angles: np.ndarray,
    elevation_limit: float = 0.0,
) -> np.ndarray:
    """The points of the uv plane that an array measures while it tracks a source.

    Args:
        positions: Antenna positions east, north, up [m], with shape (n, 3).
        declination: Declination of the source [deg].
        latitude: Latitude of the array [deg].
        frequency: Observing frequency [Hz].
        hour_angles: Hour angles of the integrations [hour], with shape (T,).
        elevation_limit: Integrations with the source below this elevation are dropped [deg].

    Returns:
        Baselines [lambda], with shape (N, 2) and N = T n (n - 1) / 2 for the T integrations that
        are left: the baselines (0, 1), (0, 2), ..., (n - 2, n - 1) of the first integration first.

    Raises:
        ValueError: If a shape or a value makes no sense, or if the source never rises above
            the limit.
    """
    positions = np.asarray(positions, dtype=np.float64)
    hour_angles = np.atleast_1d(np.asarray(hour_angles, dtype=np.float64))
    _check_geometry(positions, declination, latitude, frequency, hour_angles)

    elevations = elevation(declination, latitude, hour_angles)
    up = elevations >= elevation_limit
    if not up.any():
        raise ValueError(
            f"At latitude {latitude} deg, a source at declination {declination} deg stays below "
            f"the elevation_limit of {elevation_limit} deg: its highest elevation at these hour "
            f"angles is {elevations.max():.1f} deg. Choose another declination, hour angles "
            "closer to 0 or a lower limit."
        )

    i, j = np.triu_indices(len(positions), k=1)
    xyz = equatorial(positions, latitude)
    uvw = (xyz[j] - xyz[i]) @ projection(declination, hour_angles[up]).transpose(0, 2, 1)
    return uvw[..., :2].reshape(-1, 2) * frequency / SPEED_OF_LIGHT


def equatorial(positions: np.ndarray, latitude: float) -> np.ndarray:
    """East, north, up in the equatorial frame X, Y, Z.

    Args:
        positions: East, north, up [m], with shape (n, 3).
        latitude: Latitude of the array [deg].

    Returns:
        X, Y, Z [m], with shape (n, 3).
    """
    sin, cos = np.sin(np.deg2rad(latitude)), np.cos(np.deg2rad(latitude))
    east, north, up = np.moveaxis(np.asarray(positions, dtype=np.float64), -1, 0)
    return np.stack([-sin * north + cos * up, east, cos * north + sin * up], axis=-1)


def projection(declination: float, hour_angles: np.ndarray) -> np.ndarray:
    """The rotation from X, Y, Z to u, v, w (equation 4.1).

    Args:
        declination: Declination of the source [deg].
        hour_angles: Hour angles [hour], with shape (T,).

    Returns:
        Rotation matrices, with shape (T, 3, 3).
    """
    H = np.deg2rad(15.0 * np.asarray(hour_angles, dtype=np.float64))
    sin_d, cos_d = np.sin(np.deg2rad(declination)), np.cos(np.deg2rad(declination))
    zero, one = np.zeros_like(H), np.ones_like(H)
    rows = [
        [np.sin(H), np.cos(H), zero],
        [-sin_d * np.cos(H), sin_d * np.sin(H), cos_d * one],
        [cos_d * np.cos(H), -cos_d * np.sin(H), sin_d * one],
    ]
    return np.moveaxis(np.array(rows), -1, 0)


def elevation(declination: float, latitude: float, hour_angles: np.ndarray) -> np.ndarray:
    """Elevation of a source [deg], with shape (T,).

        sin(elevation) = sin(phi) sin(delta) + cos(phi) cos(delta) cos(H)

    Args:
        declination: Declination of the source [deg].
        latitude: Latitude of the array [deg].
        hour_angles: Hour angles [hour], with shape (T,).
    """
    delta, phi = np.deg2rad(declination), np.deg2rad(latitude)
    H = np.deg2rad(15.0 * np.asarray(hour_angles, dtype=np.float64))
    sine = np.sin(phi) * np.sin(delta) + np.cos(phi) * np.cos(delta) * np.cos(H)
    # Rounding takes a source in the zenith past 1.
    return np.rad2deg(np.arcsin(np.clip(sine, -1.0, 1.0)))


def thermal_noise(
    tsys: float,
    efficiency: float,
    area: float,
    bandwidth: float,
    integration: float,
    *,
    polarisations: int,
) -> float:
    """Standard deviation of each of the real and the imaginary part of a visibility [Jy].

    A source of flux density S gives each polarisation of an antenna the power per unit bandwidth
    k T_A = S efficiency area / 2, hence the correlation coefficient T_A / T_sys between two
    antennas. Each part of it is a mean over 2 bandwidth integration independent products of
    variance 1 (Nyquist), hence known to 1 / sqrt(2 bandwidth integration). In flux density, and
    after averaging independent polarisations into Stokes I,

        sigma = (2 k T_sys / (efficiency area)) / sqrt(2 polarisations bandwidth integration).

    The natural image of n antennas then has the noise sigma / sqrt(n (n - 1) / 2) per beam. The
    weight of the visibility is 1 / sigma^2.

    Args:
        tsys: System temperature above the atmosphere [K].
        efficiency: Aperture efficiency times correlator efficiency, in (0, 1].
        area: Geometric area of one antenna [m^2]; pi 6^2 for 12 m dishes.
        bandwidth: Bandwidth that is averaged into the visibility [Hz].
        integration: Time that is averaged into the visibility [s].
        polarisations: 1 for a single hand, 2 for Stokes I from both parallel hands.

    Raises:
        ValueError: If a value is not positive, the efficiency exceeds 1 or polarisations is
            neither 1 nor 2.
    """
    values = {
        "tsys": tsys,
        "efficiency": efficiency,
        "area": area,
        "bandwidth": bandwidth,
        "integration": integration,
    }
    for name, value in values.items():
        if not 0 < value < np.inf:
            raise ValueError(f"{name} is {value}, expected a positive finite number.")
    if efficiency > 1:
        raise ValueError(f"efficiency is {efficiency}, expected a fraction; divide by 100?")
    if polarisations not in (1, 2):
        raise ValueError(
            f"polarisations is {polarisations}, expected 1 (a single hand) or 2 (Stokes I "
            "from both parallel hands)."
        )
    flux = 2 * BOLTZMANN * tsys / (efficiency * area) / JANSKY
    return flux / np.sqrt(2 * polarisations * bandwidth * integration)


def _check_geometry(
    positions: np.ndarray,
    declination: float,
    latitude: float,
    frequency: float,
    hour_angles: np.ndarray,
) -> None:
    if positions.ndim != 2 or positions.shape[1] != 3 or len(positions) < 2:
        raise ValueError(
            f"positions has shape {positions.shape}, expected (n, 3) with n >= 2: the east, "
            "north, up [m] of each antenna."
        )
    if hour_angles.ndim != 1 or len(hour_angles) == 0:
        raise ValueError(
            f"hour_angles has shape {hour_angles.shape}, expected (T,) with T >= 1; try "
            "numpy.linspace(-2, 2, 60)."
        )
    if not (np.isfinite(positions).all() and np.isfinite(hour_angles).all()):
        raise ValueError("positions or hour_angles hold NaN or infinity; remove them first.")
    for name, angle in {"declination": declination, "latitude": latitude}.items():
        if not -90 <= angle <= 90:
            raise ValueError(f"{name} is {angle}, expected degrees between -90 and 90.")
    if not 0 < frequency < np.inf:
        raise ValueError(f"frequency is {frequency}, expected a positive number [Hz]; try 230e9.")
