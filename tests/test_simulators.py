"""Facts about the simulated skies.

Statistical tests have a fixed seed and a tolerance of five standard errors, unless stated: a
correct simulator would fail one of them with another seed less than once in a million times.
"""

import numpy as np
import pytest
from scipy import stats
from scipy.integrate import cumulative_trapezoid

from scoreinv.simulators import simulate_images
from scoreinv.simulators.discs import Plane, annulus
from scoreinv.simulators.fields import (
    deproject,
    elliptical_radius,
    gaussian_spots,
    pixel_grid,
    radial_gradient,
    random_fields,
    sersic,
    wavenumber,
)


@pytest.fixture(scope="module")
def galaxies() -> np.ndarray:
    return simulate_images("galaxy", 1500, 32, seed=7)[:, 0].astype(np.float64)


@pytest.fixture(scope="module")
def discs() -> np.ndarray:
    return simulate_images("disc", 1000, 64, seed=7)[:, 0].astype(np.float64)


@pytest.fixture(scope="module")
def fields() -> np.ndarray:
    """64 random fields with slope 2.5, with shape (32, 2, 64, 64), in float64."""
    rng = np.random.default_rng(11)
    return np.stack([random_fields(rng, 64, slope=2.5) for _ in range(32)]).astype(np.float64)


def second_moments(images, aspect=1.0):
    """Qxx, Qyy, Qxy about the centroid; `aspect` is the width of a pixel over its height."""
    x, y = (np.asarray(c, np.float64) for c in pixel_grid(images.shape[-1]))
    x = aspect * x
    weight = images / images.sum((1, 2), keepdims=True)
    mean = lambda a: (weight * a).sum((1, 2))
    x0, y0 = mean(x), mean(y)
    return mean(x * x) - x0**2, mean(y * y) - y0**2, mean(x * y) - x0 * y0


# Fields and profiles


def test_field_has_the_requested_slope(fields):
    # ln |F_k|^2 of a Gaussian field is ln P(k) plus noise of standard deviation pi / sqrt(6),
    # the same for all modes, so ordinary regression on ln k is unbiased. A mode and its
    # mirror image carry the same number, which halves the count.
    k, log_k = wavenumber(64)
    power = np.abs(np.fft.fft2(fields)) ** 2
    inside = k > 0
    slope = np.polyfit(log_k[inside], np.log(power[:, :, inside]).mean((0, 1)), 1)[0]
    independent = 64 * inside.sum() / 2
    error = np.pi / np.sqrt(6 * independent) / log_k[inside].std()
    assert error < 0.01
    assert abs(slope + 2.5) < 5 * error


def test_field_has_unit_variance_and_its_partner_is_independent(fields):
    # Sum over modes: var(mean f^2) = 2 sum P^2 / (sum P)^2, var(mean f g) = half of it.
    k, _ = wavenumber(64)
    spectrum = np.where(k > 0, k.clip(min=1) ** -2.5, 0)
    concentration = (spectrum**2).sum() / spectrum.sum() ** 2
    assert abs((fields**2).mean() - 1) < 5 * np.sqrt(2 * concentration / 64)
    assert abs((fields[:, 0] * fields[:, 1]).mean()) < 5 * np.sqrt(concentration / 32)
    assert np.abs(fields.mean((-1, -2))).max() < 1e-5


def test_field_prefers_no_direction(fields):
    # Relative power along the rows, the columns and both diagonals: one, with the scatter of
    # an exponential variable. A half-plane transform of white noise gives 0.5 along one axis.
    k, _ = wavenumber(64)
    power = (np.abs(np.fft.fft2(fields)) ** 2).mean((0, 1)) * k**2.5
    power /= power[k > 0].mean()
    m = np.arange(1, 32)
    for modes in (power[0, m], power[m, 0], power[m, m], power[m, -m]):
        assert abs(modes.mean() - 1) < 5 / np.sqrt(64 * len(m))


def test_field_respects_its_band():
    k, _ = wavenumber(64)
    field = random_fields(np.random.default_rng(0), 64, slope=2.0, k_min=3, k_max=5)[0]
    power = np.abs(np.fft.fft2(field.astype(np.float64))) ** 2
    assert power[k < 3].sum() < 1e-8 * power.sum()
    assert power[k > 20].sum() < 1e-6 * power.sum()


@pytest.mark.parametrize("n", [0.6, 1.0, 2.0, 4.0, 7.0])
def test_sersic_encloses_half_its_light(n):
    # Trapezoids in ln r from far inside to where nothing is left. The series for b_n is good
    # to 2e-4 at n = 0.6 and better beyond, the fraction to half of that.
    r_e = 3.0
    log_r = np.linspace(np.log(1e-6), np.log(r_e * 40**n), 20001)
    r = np.exp(log_r)
    light = cumulative_trapezoid(sersic(r, r_e, n) * r**2, log_r, initial=0)
    fraction = np.interp(np.log(r_e), log_r, light / light[-1])
    assert fraction == pytest.approx(0.5, abs=1e-4)


def test_elliptical_radius_is_constant_on_its_ellipse():
    q, angle, a = 0.4, 0.7, 5.0
    t = np.linspace(0, 2 * np.pi, 50)
    for c in (2.0, 3.0):
        u = a * np.sign(np.cos(t)) * np.abs(np.cos(t)) ** (2 / c)
        w = q * a * np.sign(np.sin(t)) * np.abs(np.sin(t)) ** (2 / c)
        x, y = u * np.cos(angle) - w * np.sin(angle), u * np.sin(angle) + w * np.cos(angle)
        r = elliptical_radius(*deproject(x, y, q, angle), exponent=c)
        np.testing.assert_allclose(r, a, rtol=1e-6)


def test_radial_gradient_is_the_derivative_of_the_radius():
    x, y = np.array([3.0, -1.0, 0.5]), np.array([0.3, 2.0, -4.0])
    radius = lambda x, y: elliptical_radius(*deproject(x, y, 0.3, 0.4))
    d = 1e-5
    along_x = (radius(x + d, y) - radius(x - d, y)) / (2 * d)
    along_y = (radius(x, y + d) - radius(x, y - d)) / (2 * d)
    gradient = radial_gradient(*deproject(x, y, 0.3, 0.4), 0.3)
    np.testing.assert_allclose(gradient, np.hypot(along_x, along_y), rtol=1e-5)


def test_spots_hold_the_light_of_gaussians():
    width, flux = np.float32([1.0, 1.7]), np.float32([2.0, 0.5])
    spots = gaussian_spots(32, np.float32([0.3, -4.2]), np.float32([2.6, 0]), width, flux)
    assert spots.sum() == pytest.approx(2 * np.pi * (flux * width**2).sum(), rel=1e-4)
    y, x = np.unravel_index(spots.argmax(), spots.shape)
    grid_x, grid_y = pixel_grid(32)
    assert abs(grid_x[0, x] - 0.3) <= 0.5 and abs(grid_y[y, 0] - 2.6) <= 0.5


@pytest.mark.parametrize("shift", [0.0, 0.25, 0.5])
def test_narrow_annulus_keeps_its_light_wherever_the_pixels_fall(shift):
    # 0.1 pixel wide: sampled without blur, its light would depend on the shift by tens of
    # per cent. Curvature adds (blur / radius)^2, well under the tolerance.
    x, y = (c.astype(np.float64) for c in pixel_grid(32))
    plane = Plane(*np.broadcast_arrays(x - shift, y + 0.3 * shift), q=1.0, pixel=1.0)
    light = annulus(plane, plane.s, 8.0, 0.1).sum()
    assert light == pytest.approx(2 * np.pi * 8.0 * 0.1 * np.sqrt(2 * np.pi), rel=0.02)


# Images


@pytest.mark.parametrize("kind", ["galaxies", "discs"])
def test_brightness_is_in_units_of_the_peak(kind, request):
    images = request.getfixturevalue(kind)
    assert images.min() >= 0
    np.testing.assert_array_equal(images.max((1, 2)), 1)


@pytest.mark.parametrize("kind", ["galaxy", "disc"])
def test_scale_follows_the_image(kind):
    # Half-light radii in units of the image: the same at 32 and at 64 pixels, but for the
    # pixel-scale softening of cusps, which is worth some per cent.
    radii = []
    for size in (32, 64):
        images = simulate_images(kind, 200, size, seed=1)[:, 0].astype(np.float64)
        xx, yy, _ = second_moments(images)
        radii.append(np.median(np.sqrt(xx + yy)) / size)
    assert radii[0] == pytest.approx(radii[1], rel=0.15)


def test_galaxies_prefer_no_direction(galaxies):
    def significance(aspect):
        xx, yy, xy = second_moments(galaxies, aspect)
        e = np.stack([xx - yy, 2 * xy]) / (xx + yy)
        return np.abs(e.mean(1)) / (e.std(1) / np.sqrt(len(galaxies)))

    assert significance(1.0).max() < 4
    # Pixels 10 % wider than high must be noticed.
    assert significance(1.1)[0] > 5


def test_discs_are_inclined_at_random(discs):
    # The axis ratio of a round, thin disc is cos i, uniform on [0.25, 1]. Crescents, spirals
    # and finite thickness move single discs; 0.06 is the Kolmogorov-Smirnov distance that chance
    # exceeds once in 700 sets of 1000, and far below that of the negative controls: uniform
    # inclination, and uniform cos i without the limit.
    xx, yy, xy = second_moments(discs)
    mean, difference = (xx + yy) / 2, np.hypot((xx - yy) / 2, xy)
    q = np.sqrt((mean - difference) / (mean + difference))
    distance = lambda cdf: stats.kstest(q, cdf).statistic
    assert distance(stats.uniform(0.25, 0.75).cdf) < 0.06
    i_max = np.arccos(0.25)
    assert distance(lambda q: 1 - np.arccos(np.clip(q, 0.25, 1)) / i_max) > 0.1
    assert distance(stats.uniform(0, 1).cdf) > 0.1


# Sets of images


@pytest.mark.parametrize("kind", ["galaxy", "disc"])
def test_set_does_not_depend_on_workers_or_length(kind):
    one = simulate_images(kind, 300, 16, seed=5)
    two = simulate_images(kind, 300, 16, seed=5, workers=2)
    np.testing.assert_array_equal(one, two)
    for n in (40, 270):
        np.testing.assert_array_equal(simulate_images(kind, n, 16, seed=5), one[:n])


def test_seeds_and_blocks_differ():
    images = simulate_images("disc", 258, 16, seed=5)
    assert not np.array_equal(images[:2], images[256:])
    assert not np.array_equal(images[:2], simulate_images("disc", 2, 16, seed=6))


def test_set_has_one_channel_in_half_precision():
    images = simulate_images("galaxy", 3, 32, seed=0)
    assert images.shape == (3, 1, 32, 32) and images.dtype == np.float16


def test_unknown_kind_names_the_valid_ones():
    with pytest.raises(ValueError, match=r"'galaxies'.*galaxy, disc.*did you mean 'galaxy'"):
        simulate_images("galaxies", 1, 32, seed=0)


@pytest.mark.parametrize("change", [{"n": 0}, {"workers": 0}, {"seed": -1}, {"size": 4}])
def test_numbers_out_of_range_are_refused(change):
    request = {"n": 1, "size": 32, "seed": 0, **change}
    with pytest.raises(ValueError, match="expected at least"):
        simulate_images("disc", **request)
