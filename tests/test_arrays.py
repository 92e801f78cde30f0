"""Tracks against the geometry of a rotating Earth, noise against the radiometer equation."""

import numpy as np
import pytest

from scoreinv.simulators.arrays import (
    ALMA_LATITUDE,
    SPEED_OF_LIGHT,
    alma_pads,
    alma_track,
    elevation,
    equatorial,
    projection,
    thermal_noise,
    uv_track,
)

FREQUENCY = 230e9
DAY = np.linspace(-12, 12, 97)


@pytest.fixture
def positions():
    return np.random.default_rng(0).normal(size=(6, 3)) * [1000, 1000, 30]


def lengths(positions):
    i, j = np.triu_indices(len(positions), k=1)
    return np.linalg.norm(positions[j] - positions[i], axis=1)


def test_zenith_by_hand():
    """In the zenith, east is u and north is v, from the first antenna to the second."""
    wavelength = SPEED_OF_LIGHT / FREQUENCY
    pads = [[0, 0, 0], [300, 0, 0], [0, 400, 0], [0, 0, 50]]
    uv = uv_track(np.array(pads), -30, -30, FREQUENCY, [0.0])
    expected = [[300, 0], [0, 400], [0, 0], [-300, 400], [-300, 0], [0, -400]]
    np.testing.assert_allclose(uv * wavelength, expected, atol=1e-9)
    assert elevation(-30, -30, [0.0]) == pytest.approx(90, abs=1e-5)


def test_two_hours_west_by_hand():
    """At the equator, 2 h past the meridian, east-west is foreshortened by cos(30 deg)."""
    uv = uv_track(np.array([[0.0, 0, 0], [100, 0, 0]]), 0, 0, SPEED_OF_LIGHT, [2.0])
    np.testing.assert_allclose(uv, [[100 * np.cos(np.pi / 6), 0]], atol=1e-12)


def test_pole_gives_circles(positions):
    """Under the pole the array turns rigidly, once a day: |uv| is constant, its angle is H."""
    uv = uv_track(positions, 90, 40, FREQUENCY, DAY).reshape(len(DAY), -1, 2)
    radius = np.hypot(*np.moveaxis(uv, -1, 0))
    np.testing.assert_allclose(radius, np.broadcast_to(radius[0], radius.shape), rtol=1e-12)
    angle = np.unwrap(np.arctan2(uv[..., 1], uv[..., 0]), axis=0)
    turned = np.deg2rad(15 * (DAY - DAY[0]))[:, None]
    np.testing.assert_allclose(angle - angle[0], np.broadcast_to(turned, angle.shape), atol=1e-9)


@pytest.mark.parametrize("declination", [20.0, 45.0, 75.0])
def test_east_west_baseline_traces_an_ellipse(declination):
    """Semi-axes b and b sin(delta), centred on the origin, whatever the latitude."""
    b = 500.0
    pads = np.array([[0.0, 0, 0], [b, 0, 0]])
    u, v = uv_track(pads, declination, 35, SPEED_OF_LIGHT, DAY, elevation_limit=-90).T
    sine = np.sin(np.deg2rad(declination))
    np.testing.assert_allclose((u / b) ** 2 + (v / (b * sine)) ** 2, 1, rtol=1e-12)
    assert np.abs(v).max() / np.abs(u).max() == pytest.approx(sine, rel=1e-12)


def test_rotations_conserve_length(positions):
    np.testing.assert_allclose(lengths(equatorial(positions, -23)), lengths(positions), rtol=1e-12)
    R = projection(-35, DAY)
    identity = np.broadcast_to(np.eye(3), R.shape)
    np.testing.assert_allclose(R @ R.transpose(0, 2, 1), identity, atol=1e-14)
    np.testing.assert_allclose(np.linalg.det(R), 1, rtol=1e-12)


def test_w_is_the_direction_of_the_source():
    """A vertical baseline has w = sin(elevation): both formulas mean the same source."""
    vertical = equatorial(np.array([[0.0, 0, 1]]), -23)
    w = (projection(-50, DAY) @ vertical[0])[:, 2]
    np.testing.assert_allclose(w, np.sin(np.deg2rad(elevation(-50, -23, DAY))), atol=1e-14)


def test_alma_configuration():
    pads = alma_pads()
    assert pads.shape == (43, 3)
    assert lengths(pads).max() == pytest.approx(3637.8, abs=0.1)
    assert lengths(pads).min() == pytest.approx(64.1, abs=0.1)


def test_uv_range_follows_frequency_and_scale():
    hours = np.linspace(-1, 1, 5)
    uv = alma_track(ALMA_LATITUDE, FREQUENCY, hours)
    assert uv.shape == (5 * 43 * 42 // 2, 2) and uv.dtype == np.float64
    longest = lengths(alma_pads()).max() * FREQUENCY / SPEED_OF_LIGHT
    assert 0.9 * longest < np.hypot(*uv.T).max() <= longest
    np.testing.assert_allclose(alma_track(ALMA_LATITUDE, 2 * FREQUENCY, hours), 2 * uv, rtol=1e-12)
    half = alma_track(ALMA_LATITUDE, FREQUENCY, hours, scale=0.5)
    np.testing.assert_allclose(half, uv / 2, rtol=1e-12)


def test_each_baseline_once():
    """No point of the track is the Hermitian copy of another."""
    uv = alma_track(-30, FREQUENCY, [0.0])
    gaps = np.linalg.norm(uv[:, None] + uv[None], axis=-1)
    assert gaps.min() > 10


def test_low_elevations_are_dropped(positions):
    up = elevation(-30, ALMA_LATITUDE, DAY) >= 20
    assert 0 < up.sum() < len(DAY)
    dropped = uv_track(positions, -30, ALMA_LATITUDE, FREQUENCY, DAY, elevation_limit=20)
    by_hand = uv_track(positions, -30, ALMA_LATITUDE, FREQUENCY, DAY[up])
    np.testing.assert_array_equal(dropped, by_hand)


NOISE = dict(tsys=100.0, efficiency=0.7, area=np.pi * 6**2, bandwidth=7.5e9, integration=60.0)


def test_noise_of_one_visibility_by_hand():
    """SEFD = 2 x 1.380649e-23 x 100 / (0.7 x 113.097) / 1e-26 = 3487.9 Jy; sqrt(9e11) = 948683."""
    assert thermal_noise(**NOISE, polarisations=1) == pytest.approx(3487.9 / 948683, rel=1e-4)


def test_noise_of_correlated_receivers():
    """A simulated correlator: 2 B t samples of two receivers' noise, multiplied and averaged.

    The standard deviation of 4000 correlations has a relative error of 1.1 %; 5 % is 4.5 of them.
    """
    rng = np.random.default_rng(0)
    samples = 400  # 2 B t
    products = rng.standard_normal((4000, samples)) * rng.standard_normal((4000, samples))
    coefficient = products.mean(axis=1)
    antenna = dict(NOISE, bandwidth=1.0, integration=samples / 2)
    flux_per_kelvin = 2 * 1.380649e-23 / (NOISE["efficiency"] * NOISE["area"]) / 1e-26
    simulated = coefficient.std() * NOISE["tsys"] * flux_per_kelvin
    assert simulated == pytest.approx(thermal_noise(**antenna, polarisations=1), rel=0.05)


@pytest.mark.parametrize(
    "name, power",
    [("tsys", 1), ("efficiency", -1), ("area", -1), ("bandwidth", -0.5), ("integration", -0.5)],
)
def test_noise_scales(name, power):
    once = thermal_noise(**NOISE, polarisations=2)
    changed = thermal_noise(**{**NOISE, name: NOISE[name] * 1.3}, polarisations=2)
    assert changed / once == pytest.approx(1.3**power, rel=1e-12)


def test_two_polarisations_halve_the_variance():
    ratio = thermal_noise(**NOISE, polarisations=2) / thermal_noise(**NOISE, polarisations=1)
    assert ratio == pytest.approx(0.5**0.5, rel=1e-12)


def test_image_noise_is_the_array_sensitivity():
    """sigma / sqrt(n (n - 1) / 2) = 2 k T / (eta A sqrt(n (n - 1) n_pol B t)) for n antennas."""
    n, k = 43, 1.380649e-23
    image = thermal_noise(**NOISE, polarisations=2) / np.sqrt(n * (n - 1) / 2)
    textbook = 2 * k * 100 / (0.7 * np.pi * 36 * np.sqrt(n * (n - 1) * 2 * 7.5e9 * 60)) / 1e-26
    assert image == pytest.approx(textbook, rel=1e-12)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(positions=np.zeros((3, 6))), r"positions has shape \(3, 6\), expected \(n, 3\)"),
        (dict(positions=np.zeros((1, 3))), r"expected \(n, 3\) with n >= 2"),
        (dict(positions=np.full((2, 3), np.nan)), "NaN"),
        (dict(declination=100.0), "declination is 100.0, expected degrees"),
        (dict(latitude=-91.0), "latitude is -91.0, expected degrees"),
        (dict(frequency=0.0), r"frequency is 0.0, expected a positive number \[Hz\]"),
        (dict(hour_angles=np.zeros((2, 2))), r"hour_angles has shape \(2, 2\)"),
        (dict(declination=89.0), "highest elevation at these hour angles is -22.0 deg"),
    ],
)
def test_refused_tracks(change, message):
    track = dict(
        positions=np.eye(3), declination=0.0, latitude=-23.0, frequency=1e9, hour_angles=[0.0]
    )
    with pytest.raises(ValueError, match=message):
        uv_track(**{**track, **change})


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(tsys=0.0), "tsys is 0.0, expected a positive"),
        (dict(efficiency=70.0), "efficiency is 70.0, expected a fraction"),
        (dict(polarisations=4), "polarisations is 4, expected 1"),
    ],
)
def test_refused_noise(change, message):
    with pytest.raises(ValueError, match=message):
        thermal_noise(**{**NOISE, "polarisations": 2, **change})


def test_refused_scale():
    with pytest.raises(ValueError, match="scale is -1"):
        alma_track(-30, FREQUENCY, [0.0], scale=-1)
