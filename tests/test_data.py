"""Facts about grids, visibilities and their weights.

Statistical tests have a fixed seed and a tolerance of five standard errors: a correct program
would fail one of them with another seed less than once in a million times.
"""

import numpy as np
import pytest
import torch
from astropy.coordinates import SkyCoord

from scoreinv.data import Grid, Visibilities

ARCSEC = np.pi / 180 / 3600


def point_source(uv, east, north):
    """Visibilities of 1 Jy at an offset [arcsec], in the package's convention."""
    return np.exp(-2j * np.pi * (uv @ np.array([east, north])) * ARCSEC)


@pytest.fixture
def rng():
    return np.random.default_rng(3)


@pytest.fixture
def uv(rng):
    return rng.normal(0, 3e4, (60, 2))


@pytest.fixture
def vis(uv):
    return Visibilities(uv, point_source(uv, 0.5, -0.3), np.ones(len(uv)), ra=53.0, dec=-27.0)


@pytest.mark.parametrize("shape", [(64, 64), (33, 50)])
def test_source_falls_on_its_pixel(shape):
    """SIN: l = cos(dec) sin(dra), m = sin(dec) cos(dec0) - cos(dec) sin(dec0) cos(dra)."""
    grid = Grid(shape, 0.1, ra=53.0, dec=-27.0, frequency=1e11)
    i, j = 40 % shape[0], 12
    l, m = -(j - shape[1] // 2) * 0.1 * ARCSEC, (i - shape[0] // 2) * 0.1 * ARCSEC
    ra, dec = np.radians(grid.wcs().all_pix2world(j, i, 0))
    dra, dec0 = ra - np.radians(53.0), np.radians(-27.0)
    assert np.cos(dec) * np.sin(dra) == pytest.approx(l, abs=1e-6 * ARCSEC)
    north = np.sin(dec) * np.cos(dec0) - np.cos(dec) * np.sin(dec0) * np.cos(dra)
    assert north == pytest.approx(m, abs=1e-6 * ARCSEC)
    east, up = grid.offsets()
    assert (east[j], up[i]) == pytest.approx((l / ARCSEC, m / ARCSEC))


def test_optical_grid_is_tangential():
    grid = Grid((64, 64), 0.03, ra=150.0, dec=2.0)
    assert [grid.header(k)["CTYPE1"] for k in (None, "optical", "radio")] == [
        "RA---TAN",
        "RA---TAN",
        "RA---SIN",
    ]
    centre, west = SkyCoord.from_pixel([32, 42], [32, 32], grid.wcs())
    assert (centre.ra.deg, centre.dec.deg) == pytest.approx((150.0, 2.0))
    assert centre.separation(west).arcsec == pytest.approx(0.3, rel=1e-6)
    assert centre.position_angle(west).deg == pytest.approx(270, abs=1e-3)


def test_grid_without_position_has_offsets_in_arcsec():
    grid = Grid((20, 30), 0.5, unit="Jy/pixel")
    header = grid.header()
    assert header["BUNIT"] == "Jy/pixel" and header["CUNIT1"] == "arcsec"
    np.testing.assert_allclose(grid.wcs().all_pix2world(14, 12, 0), (0.5, 1.0))
    part = grid.cropped(4, 7, (8, 8))
    np.testing.assert_allclose(part.wcs().all_pix2world(7, 8, 0), (0.5, 1.0))


def test_cropped_grid_keeps_the_sky():
    grid = Grid((64, 64), 0.03, ra=150.0, dec=2.0).cropped(10, 20, (16, 16))
    whole = Grid((64, 64), 0.03, ra=150.0, dec=2.0).wcs()
    np.testing.assert_allclose(
        grid.wcs().all_pix2world(3, 5, 0), whole.all_pix2world(23, 15, 0), rtol=1e-12
    )
    np.testing.assert_allclose((grid.ra, grid.dec), whole.all_pix2world(28, 18, 0), rtol=1e-12)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(shape=(0, 3), pixel_scale=1), r"shape is \(0, 3\), expected \(rows, columns\)"),
        (dict(shape=(3, 3), pixel_scale=-1), "pixel_scale is -1, expected a positive number"),
        (dict(shape=(3, 3), pixel_scale=1, ra=3), "dec is None: give both"),
    ],
)
def test_grid_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        Grid(**arguments)
    with pytest.raises(ValueError, match="expected one of .'optical', 'radio'"):
        Grid((3, 3), 1).header("xray")


def test_oblong_pixels_are_refused():
    header = Grid((8, 8), 1.0, ra=1.0, dec=1.0).header()
    header["CDELT1"] *= 1.1
    with pytest.raises(ValueError, match="measure 1.1 x 1 arcsec, expected squares; resample"):
        Grid.from_header(header, (8, 8))


def broken(baselines, **changes):
    fields = dict(uv=baselines, data=np.ones(60, complex), weight=np.ones(60))
    for name, change in changes.items():
        fields[name] = change(fields[name].copy())
    return fields


def put(index, value):
    def change(array):
        array[index] = value
        return array

    return change


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(uv=np.transpose), r"uv has shape \(2, 60\), expected \(N, 2\); transpose it\?"),
        (dict(uv=lambda x: x[:, 0]), r"uv has shape \(60,\), expected \(N, 2\)$"),
        (dict(data=np.real), "data has dtype torch.float64, expected complex .* 1j . imag"),
        (
            dict(data=put([4, 9], np.nan)),
            "data is NaN or infinite in 2 of 60 rows, first in row 4",
        ),
        (dict(uv=put((7, 1), np.inf)), "uv is NaN or infinite in 1 of 60 rows, first in row 7"),
        (dict(weight=put(5, np.nan)), "weight is NaN .* row 5; drop these rows, or flag them"),
        (dict(weight=put([3, 8], -1.0)), "weight is negative in 2 of 60 rows, first in row 3; "),
        (dict(weight=put(0, -1.0)), "flag these rows with weight 0 or drop them"),
        (dict(weight=lambda x: 0 * x), "every weight is 0: all visibilities are flagged"),
        (
            dict(weight=lambda x: x[:5]),
            r"rows disagree: uv \(60, 2\), data \(60,\), weight \(5,\)",
        ),
        (dict(weight=lambda x: np.ones(())), "expected one row per visibility"),
        (dict(weight=lambda x: x[:, None]), r"weight has shape \(60, 1\), expected \(60,\)"),
        ({k: lambda x: x[:0] for k in ("uv", "data", "weight")}, "there are no visibilities"),
    ],
)
def test_visibility_errors(uv, changes, message):
    with pytest.raises(ValueError, match=message):
        Visibilities(**broken(uv, **changes))


def test_arrays_are_copied_and_read_in_any_byte_order(uv):
    stored = uv.astype(">f8")
    stored.flags.writeable = False
    vis = Visibilities(stored, np.ones(60, "complex64"), np.full(60, 4, "int32"))
    np.testing.assert_array_equal(vis.uv, uv)
    assert (vis.uv.dtype, vis.data.dtype, vis.weight.dtype) == (
        torch.float64,
        torch.complex128,
        torch.float64,
    )
    assert vis.std.unique() == 0.5 and vis.natural_rms == pytest.approx((4 * 60) ** -0.5)
    assert vis.resolution == pytest.approx(1 / np.hypot(*uv.T).max() / ARCSEC)


def test_scale_is_checked(uv):
    vis = Visibilities(750 * uv / np.abs(uv).max(), np.ones(60, complex), np.ones(60))
    with pytest.raises(
        ValueError, match="not less than the field of 6.4 arcsec: .* unit='klambda'"
    ):
        vis.check_scale(0.1, (64, 64))
    vis = Visibilities(1000 * vis.uv, vis.data, vis.weight)
    vis.check_scale(0.1, (1, 64, 64))
    vis.check_scale(vis.largest_pixel, (64, 64))
    with pytest.raises(ValueError, match="pixel_scale is -0.1, expected a positive"):
        vis.grid((64, 64), -0.1)
    with pytest.raises(ValueError, match=r"a shift by \(1e\+06, 0\) arcsec leaves the sky"):
        vis.shifted(1e6, 0.0)
    with pytest.raises(ValueError, match="0.2 arcsec is too coarse: .* at most 0.1375 arcsec$"):
        vis.grid((64, 64), 0.2)
    with pytest.raises(ValueError, match="smaller than thought: read with unit='klambda'"):
        Visibilities(1000 * vis.uv, vis.data, vis.weight).check_scale(0.1, (64, 64))
    assert vis.grid((64, 64), 0.1) == Grid((64, 64), 0.1, unit="Jy/pixel")


def test_phase_centre_moves_to_the_source(vis):
    """A source at the new phase centre has real visibilities, and the shift can be undone."""
    shifted = vis.shifted(0.5, -0.3)
    np.testing.assert_allclose(shifted.data, np.ones(len(vis)), atol=1e-12)
    source = SkyCoord(53.0, -27.0, unit="deg").directional_offset_by(0, 0)
    moved = SkyCoord(shifted.ra, shifted.dec, unit="deg")
    east, north = source.spherical_offsets_to(moved)
    assert (east.arcsec, north.arcsec) == pytest.approx((0.5, -0.3), abs=1e-5)
    np.testing.assert_allclose(shifted.shifted(-0.5, 0.3).data, vis.data, atol=1e-12)
    x, y = vis.grid((64, 64), 0.1).wcs().all_world2pix(shifted.ra, shifted.dec, 0)
    assert (x, y) == pytest.approx((32 - 5, 32 - 3), abs=1e-4)


def noisy(rng, rows=200, antennas=10, factor=1.0):
    """Noise on every baseline, with weights that are `factor` times too large."""
    pairs = np.array([(a, b) for a in range(antennas) for b in range(a + 1, antennas)])
    pairs = np.tile(pairs, (rows, 1))
    flip = rng.random(len(pairs)) < 0.5
    sigma = rng.uniform(0.5, 2, len(pairs))
    data = (1 + 2j) + sigma * (rng.normal(size=len(pairs)) + 1j * rng.normal(size=len(pairs)))
    data = np.where(flip, data.conj(), data)
    pairs = np.where(flip[:, None], pairs[:, ::-1], pairs)
    return Visibilities(rng.normal(size=pairs.shape), data, factor / sigma**2, antennas=pairs)


@pytest.mark.parametrize("factor", [1.0, 1.5])
def test_weight_check_finds_the_factor(rng, factor):
    """9,000 pairs share members: the variance of their mean is 1.5 / 9,000, a bound for both."""
    check = noisy(rng, factor=factor).weight_check()
    assert check.pairs == 45 * 199
    tolerance = 5 * factor * (1.5 / check.pairs) ** 0.5
    assert check.mean == pytest.approx(factor, abs=tolerance)
    assert check.robust == pytest.approx(factor, abs=1.5 * tolerance)


def test_weight_check_survives_bad_rows(rng):
    vis = noisy(rng)
    data = vis.data.clone()
    data[::97] += 1000
    check = Visibilities(vis.uv, data, vis.weight, antennas=vis.antennas).weight_check()
    assert check.mean > 100 and check.robust == pytest.approx(1, abs=0.1)
    assert Visibilities(vis.uv, data, vis.weight).weight_check() is None


def test_weight_check_skips_gaps(rng):
    """Two scans of different sky: only pairs within a scan count."""
    vis = noisy(rng)
    time = torch.arange(200).repeat_interleave(45).double()
    time[100 * 45 :] += 1000
    data = vis.data + 1e4 * (time > 1000)
    check = Visibilities(vis.uv, data, vis.weight, antennas=vis.antennas, time=time).weight_check()
    assert check.pairs == 45 * 198 and check.mean == pytest.approx(1, abs=0.1)


def test_hermitian_copies_are_counted(vis):
    double = Visibilities(
        torch.cat([vis.uv, -vis.uv]), torch.cat([vis.data, vis.data.conj()]), torch.ones(120)
    )
    assert (vis.hermitian_copies(), double.hermitian_copies()) == (0, 60)
