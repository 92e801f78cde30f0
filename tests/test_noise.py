"""Noise against dense normal distributions, and against what is known of counts, of Student's t and of amplitudes."""

import math

import pytest
import scipy.stats
import torch
from torch.distributions import MultivariateNormal

from scoreinv.gaussian import Dense, Diagonal, Fourier, LowRank, Scalar
from scoreinv.noise import GaussianNoise, PoissonNoise, RiceNoise, StudentNoise
from scoreinv.noise.gaussian import on_grid
from tests.analytic import dense, gaussian, normal, p_value, power_law, spd

SHAPE, D = (2, 4, 5), 40
FALSE_ALARMS = 1e-4  # of each statistical test


def variances(*shape, seed=0):
    u = torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return 0.2 + u


EYE = torch.eye(D, dtype=torch.float64)
PAIR = torch.stack([power_law(4, 5), power_law(4, 5, slope=1.0)])
NOISES = {
    "std": (GaussianNoise(std=0.3), 0.09 * EYE),
    "std-each": (GaussianNoise(std=variances(*SHAPE)), torch.diag(variances(D) ** 2)),
    "variance": (GaussianNoise(variance=0.3), 0.3 * EYE),
    "variance-each": (GaussianNoise(variance=variances(*SHAPE)), torch.diag(variances(D))),
    "variance-each-channel": (
        GaussianNoise(variance=variances(2, 1, 1)),
        torch.diag(variances(2).repeat_interleave(20)),
    ),
    "spectrum": (
        GaussianNoise(spectrum=power_law(4, 5)),
        dense(Fourier(power_law(4, 5)).apply, SHAPE),
    ),
    "spectrum-each-channel": (GaussianNoise(spectrum=PAIR), dense(Fourier(PAIR).apply, SHAPE)),
    "matrix": (GaussianNoise(covariance=spd(D)), spd(D)),
    "low-rank": (
        GaussianNoise(covariance=LowRank(normal(2, *SHAPE), floor=0.3)),
        0.3 * EYE + normal(2, D).T @ normal(2, D),
    ),
}
each = pytest.mark.parametrize("noise, S", NOISES.values(), ids=NOISES)


@each
def test_log_prob(noise, S):
    r = normal(5, *SHAPE, seed=1)
    expected = MultivariateNormal(torch.zeros(D, dtype=torch.float64), S).log_prob(r.flatten(1))
    torch.testing.assert_close(noise.log_prob(r), expected)


@each
def test_chi2_weigh_and_whiten(noise, S):
    r = normal(5, *SHAPE, seed=1)
    weighed = torch.linalg.solve(S, r.flatten(1).T).T
    torch.testing.assert_close(noise.weigh(r).flatten(1), weighed)
    torch.testing.assert_close(noise.whiten(noise.whiten(r)), noise.weigh(r))
    torch.testing.assert_close(noise.chi2(r), (r.flatten(1) * weighed).sum(1))


@each
def test_sample(noise, S):
    like = torch.zeros(4000, *SHAPE, dtype=torch.float64)
    draws = noise.sample(like, torch.Generator().manual_seed(2)).flatten(1)
    zero = torch.zeros(D, dtype=torch.float64)
    assert p_value(draws, gaussian(zero, S)) > FALSE_ALARMS
    # negative control: 10 % too wide in variance
    assert p_value(draws, gaussian(zero, S / 1.1)) < 1e-6


@each
def test_log_prob_of_single_precision_is_double(noise, S):
    r = normal(5, *SHAPE, seed=1).float()
    assert torch.equal(noise.log_prob(r), noise.log_prob(r.double()))


@pytest.mark.parametrize("variance", [0.3, variances(D)], ids=["scalar", "each"])
def test_complex_noise_is_that_of_each_part(variance):
    noise, r = GaussianNoise(variance=variance), normal(4000, D, dtype=torch.complex128)
    real, imag = noise.log_prob(r.real), noise.log_prob(r.imag)
    torch.testing.assert_close(noise.log_prob(r), real + imag)
    torch.testing.assert_close(noise.chi2(r), noise.chi2(r.real) + noise.chi2(r.imag))
    draws = noise.sample(r, torch.Generator().manual_seed(2))
    S = torch.diag(torch.as_tensor(variance, dtype=torch.float64).expand(D))
    both = gaussian(torch.zeros(2 * D, dtype=torch.float64), torch.block_diag(S, S))
    parts = torch.cat([draws.real, draws.imag], 1)
    assert p_value(parts, both) > FALSE_ALARMS
    # negative control: the variance shared out between the parts, as torch.randn does
    assert p_value(parts / math.sqrt(2), both) < 1e-6


def test_masked_data_do_not_count():
    variance = variances(*SHAPE)
    seen = normal(*SHAPE) > 0
    noise = GaussianNoise(variance=torch.where(seen, variance, math.inf))
    r = normal(5, *SHAPE, seed=1)
    kept = GaussianNoise(variance=variance[seen])
    torch.testing.assert_close(noise.log_prob(r), kept.log_prob(r[:, seen]))
    torch.testing.assert_close(noise.chi2(r), kept.chi2(r[:, seen]))
    assert not noise.weigh(r)[:, ~seen].any()
    assert not noise.sample(r, torch.Generator())[:, ~seen].any()


def test_what_is_known_in_which_basis():
    assert GaussianNoise(std=0.5).pixel_precision == 4
    torch.testing.assert_close(
        GaussianNoise(variance=variances(*SHAPE)).pixel_precision, 1 / variances(*SHAPE)
    )
    assert GaussianNoise(spectrum=power_law(4, 5)).pixel_precision is None
    stationary = [name for name, (noise, _) in NOISES.items() if noise.is_stationary]
    assert stationary == ["std", "variance", "spectrum", "spectrum-each-channel"]


def test_spectral_precision():
    P = power_law(4, 5)
    torch.testing.assert_close(GaussianNoise(spectrum=P).spectral_precision((4, 5)), 1 / P)
    white = torch.full((4, 5), 4.0, dtype=torch.float64)
    assert torch.equal(GaussianNoise(std=0.5).spectral_precision((4, 5)), white)
    # a masked half has no weight: the mean precision is half as large
    half = torch.tensor([0.25, math.inf], dtype=torch.float64).repeat(2)[:, None].expand(4, 5)
    precision = GaussianNoise(variance=half.contiguous()).spectral_precision((4, 5))
    torch.testing.assert_close(precision, white / 2)
    assert GaussianNoise(covariance=spd(20)).spectral_precision((4, 5)) is None


# Spectra on other grids


def autocovariance(spectrum):
    """Covariance of pixels at the lag (i, j), at index (i, j) modulo the shape."""
    return torch.fft.ifft2(spectrum).real


SIZES = [(8, 8), (7, 9), (8, 9), (12, 13)]


@pytest.mark.parametrize("own", SIZES)
@pytest.mark.parametrize("other", SIZES)
def test_on_grid_keeps_white_noise(own, other):
    spectrum = on_grid(torch.full(own, 0.7, dtype=torch.float64), other)
    torch.testing.assert_close(spectrum, torch.full(other, 0.7, dtype=torch.float64))


@pytest.mark.parametrize("own", SIZES)
@pytest.mark.parametrize("other", SIZES)
def test_on_grid_keeps_the_covariance_of_neighbours(own, other):
    # noise correlated over one pixel, as drizzling makes it: 1 at lag 0, 0.2 at lags of one;
    # to 1 %, because no frequency gets less power than the least on the own grid
    lags = torch.zeros(own, dtype=torch.float64)
    lags[0, 0] = 1.0
    lags[[1, -1, 0, 0], [0, 0, 1, -1]] = 0.2
    spectrum = on_grid(torch.fft.fft2(lags).real, other)
    expected = torch.zeros(other, dtype=torch.float64)
    expected[0, 0] = 1.0
    expected[[1, -1, 0, 0], [0, 0, 1, -1]] = 0.2
    torch.testing.assert_close(autocovariance(spectrum), expected, rtol=0.0, atol=0.01)


@pytest.mark.parametrize("own", SIZES)
@pytest.mark.parametrize("other", SIZES)
def test_on_grid_gives_a_power_spectrum(own, other):
    # positive and symmetric also where the autocovariance is cut off
    P = power_law(*own, slope=4.0)
    spectrum = on_grid(P.expand(2, *own), other)
    assert spectrum.shape == (2, *other)
    assert spectrum.min() >= P.min()
    Fourier(spectrum)


# Messages


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({}, "exactly one of std, variance, spectrum, covariance; got none"),
        ({"std": 1.0, "variance": 1.0}, r"exactly one of .*; got \['std', 'variance'\]"),
        (
            {"std": 0.0},
            r"noise std has 1 of 1 values that are not positive and finite \(first: 0\)",
        ),
        ({"std": torch.tensor([1.0, math.nan, -2.0])}, r"std has 2 of 3 values .*\(first: nan\)"),
        ({"variance": -1.0}, r"noise variance .* \(first: -1\); mask a datum by variance = inf"),
        ({"spectrum": torch.zeros(4, 4)}, "noise spectrum has 16 of 16 values"),
        ({"spectrum": torch.full((4, 4), math.inf)}, "noise spectrum has 16 of 16 values"),
        ({"covariance": torch.ones(3, 3)}, "noise covariance has [12] of 3 values"),
        ({"covariance": Scalar(-1.0)}, "noise covariance has 1 of 1 values"),
        ({"covariance": torch.ones(3, 4)}, r"covariance has shape \(3, 4\), expected \(d, d\)"),
    ],
)
def test_refusals(arguments, message):
    with pytest.raises(ValueError, match=message):
        GaussianNoise(**arguments)


@pytest.mark.parametrize(
    "covariance, shape, complex, message",
    [
        (
            Diagonal(variances(6)),
            (5,),
            False,
            r"noise has shape \(6,\), the data have shape \(5,\)",
        ),
        (Diagonal(variances(2, 1, 1)), (3, 4, 5), False, r"noise has shape \(2, 1, 1\), the data"),
        (Fourier(power_law(8, 8)), (1, 9, 8), False, r"noise has shape \(8, 8\), the data"),
        (Fourier(power_law(8, 8)), (64,), False, r"noise has shape \(8, 8\), the data"),
        (Dense(spd(6)), (5,), False, r"noise has shape \(6,\), the data have shape \(5,\)"),
        (Dense(spd(5)), (5,), True, "complex data takes std or variance"),
        (Fourier(power_law(8, 8)), (1, 8, 8), True, "complex data takes std or variance"),
    ],
)
def test_misfits_are_refused(covariance, shape, complex, message):
    with pytest.raises(ValueError, match=message):
        GaussianNoise(covariance=covariance).check(shape, complex)


COUNTS = torch.tensor([0.0, 1.0, 4.0, 30.0])


@pytest.mark.parametrize(
    "noise, y, grid",
    [
        (PoissonNoise(2.0), COUNTS, None),
        (
            StudentNoise(torch.tensor([0.7]), 3.0),
            None,
            torch.linspace(-100, 100, 200_001, dtype=torch.float64),
        ),
        (RiceNoise(1.3), None, torch.linspace(-3 + 1e-6, 20, 20_001, dtype=torch.float64)),
    ],
    ids=["Poisson", "Student", "Rice"],
)
def test_densities_sum_to_one(noise, y, grid):
    """Over all counts at a rate of 5, and over all residuals: the tails beyond hold less than 1e-5."""
    clean = torch.full((1,), 3.0, dtype=torch.float64)
    values = torch.arange(200).double() if grid is None else grid + 3
    log_p = noise.log_density(values[:, None], clean.expand(len(values), 1))
    step = 1.0 if grid is None else float(grid[1] - grid[0])
    assert float(log_p.exp().sum()) * step == pytest.approx(1.0, abs=1e-6)


def test_counts_have_the_rate_as_mean_and_variance():
    """100,000 counts: within 4 standard errors, 0.5 % of the mean and 1.8 % of the variance."""
    clean = torch.full((100_000, 1), 3.0)
    y = PoissonNoise(2.0).observe(clean, torch.Generator().manual_seed(0))
    assert float(y.mean()) == pytest.approx(5.0, rel=0.006)
    assert float(y.var()) == pytest.approx(5.0, rel=0.02)


def test_noise_with_outliers_has_the_quartiles_of_students_t():
    """Half of t with two degrees of freedom lies within 0.8165; 100,000 draws leave 0.6 % (4 standard errors: 0.0064)."""
    clean = torch.zeros((50_000, 1), dtype=torch.complex128)
    y = StudentNoise(2.0, 2.0).observe(clean, torch.Generator().manual_seed(0))
    inside = (torch.view_as_real(y).abs() < 2 * 0.8165).double().mean()
    assert float(inside) == pytest.approx(0.5, abs=0.0064)
    assert float(y.real.median()) == pytest.approx(0.0, abs=0.05)


@pytest.mark.parametrize("dof", [1.0, 3.0, 1e6])
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_the_misfit_of_each_datum_with_outliers_is_one(dof, dtype):
    """The mean of 400,000 has a standard error of at most 0.22 %, whatever the tail; with few outliers it is chi^2."""
    noise, clean = (
        StudentNoise(torch.tensor([0.1, 7.0]), dof),
        torch.zeros(200_000, 2, dtype=dtype),
    )
    y = noise.observe(clean, torch.Generator().manual_seed(0))
    parts = 2 if dtype.is_complex else 1
    assert float(noise.misfit(y, clean).mean()) / 2 / parts == pytest.approx(1.0, rel=0.01)
    if dof > 1e3:
        chi2 = GaussianNoise(std=noise.scale).misfit(y, clean)
        torch.testing.assert_close(noise.misfit(y, clean), chi2, rtol=1e-4, atol=0)


def test_the_gaussian_near_many_counts_has_their_likelihood():
    """At 10,000 counts both have the same slope and curvature around the peak, to a few percent; at 4 counts they do not."""
    noise = PoissonNoise(1.0)
    for count, agree in ((10_000.0, True), (4.0, False)):
        y = torch.tensor([count], dtype=torch.float64)
        near, data = noise.nearby(y, (y - 1)[None])
        clean = (y - 1 + 2 * y.sqrt() * torch.linspace(-1, 1, 9).double())[:, None]
        true = noise.log_density(y, clean) - noise.log_density(y, (y - 1)[None])
        gaussian = near.log_density(data, clean) - near.log_density(data, (y - 1)[None])
        assert (float((true - gaussian).abs().max()) < 0.05) == agree


def test_outliers_weigh_little_in_the_gaussian_near_them():
    noise = StudentNoise(1.0, 2.0)
    near, _ = noise.nearby(torch.tensor([0.1, 30.0]).double(), torch.zeros(3, 2).double())
    quiet, loud = near.covariance.variance.tolist()
    assert quiet == pytest.approx((2 + 0.01) / 3) and loud == pytest.approx((2 + 900) / 3)


@pytest.mark.parametrize(
    "noise",
    [GaussianNoise(std=0.7), PoissonNoise(2.0), StudentNoise(0.7, 3.0), RiceNoise(0.1)],
    ids=["Gaussian", "Poisson", "Student", "Rice"],
)
def test_equivalent_noise_has_the_same_information(noise):
    """The mean square of the slope of log p over 200,000 data: within 4 standard errors, 2 %."""
    clean = torch.full((200_000, 1), 5.0, dtype=torch.float64, requires_grad=True)
    y = noise.observe(clean.detach(), torch.Generator().manual_seed(0))
    (slope,) = torch.autograd.grad(noise.log_density(y, clean).sum(), clean)
    like = noise.equivalent(clean[0].detach())
    expected = float(like.pixel_precision)
    assert float(slope.square().mean()) == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("clean", [0.0, 0.5, 2.0, 30.0, 1e6])
def test_amplitudes_of_noisy_visibilities(clean):
    """Against scipy's Rice distribution, or the normal one far above the noise, where scipy's overflows.

    100,000 draws, within 4 standard errors of its mean and its spread.
    """
    high = scipy.stats.norm(clean, 2) if clean > 100 else None
    noise, rice = RiceNoise(2.0), high or scipy.stats.rice(clean / 2, scale=2)
    c = torch.full((100_000, 1), clean, dtype=torch.float64)
    y = noise.observe(c, torch.Generator().manual_seed(0))
    assert float(y.mean()) == pytest.approx(rice.mean(), abs=4 * 2 / 100_000**0.5)
    assert float(y.std()) == pytest.approx(rice.std(), rel=0.01)
    expected = torch.from_numpy(rice.logpdf(y[:50].numpy())[:, 0])
    torch.testing.assert_close(noise.log_density(y[:50], c[:50]), expected, rtol=1e-5, atol=0.0)
    assert float(noise.misfit(y, c).mean()) == pytest.approx(1.0, rel=0.02)


def test_near_the_noise_amplitudes_know_less_than_the_equivalent_ones_say():
    """At c = s the information is 0.521 of that far above, by quadrature; 200,000 data know it to 0.4 %, 4 errors."""
    clean = torch.ones(200_000, 1, dtype=torch.float64, requires_grad=True)
    noise = RiceNoise(1.0)
    y = noise.observe(clean.detach(), torch.Generator().manual_seed(0))
    (slope,) = torch.autograd.grad(noise.log_density(y, clean).sum(), clean)
    assert float(slope.square().mean()) == pytest.approx(0.521, rel=0.016)


def test_an_amplitude_of_what_is_half_known():
    """An error of the image that is as likely along a visibility as across it adds to the noise: that is exact."""
    c, y = torch.tensor([[3.0, 0.2]]).double(), torch.tensor([2.5, 1.0]).double()
    both = torch.full_like(c, 1.5)
    about = RiceNoise(1.0).log_density_about(y, c, both, both)
    torch.testing.assert_close(about, RiceNoise(2.5**0.5).log_density(y, c))


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: PoissonNoise(0.0), "background has 1 of 1 values that are not positive"),
        (lambda: StudentNoise(1.0, -1.0), "dof has 1 of 1 values that are not positive"),
        (lambda: PoissonNoise(torch.ones(3)).check((4,), False), r"background has shape \(3,\)"),
        (lambda: PoissonNoise(1.0).check((4,), True), "counts are real"),
        (lambda: StudentNoise(torch.ones(3), 2).check((4,), True), r"scale has shape \(3,\)"),
        (lambda: PoissonNoise(1.0).check_data(torch.tensor([0.5, 1.0])), "1 of 2 are not whole"),
        (lambda: PoissonNoise(1.0).check_data(torch.tensor([-1.0])), "counts go from -1 to -1"),
        (lambda: RiceNoise(torch.tensor([1.0, math.inf])), "without weight has an infinite std"),
        (lambda: RiceNoise(0.0), "std has 1 of 1 values that are not positive"),
        (lambda: RiceNoise(torch.ones(3)).check((4,), False), r"noise has shape \(3,\)"),
        (lambda: RiceNoise(1.0).check((4,), True), "amplitudes are real"),
        (lambda: RiceNoise(1.0).check_data(torch.tensor([0.0, 1.0])), "1 of 2 amplitudes are not"),
    ],
)
def test_mistakes_in_noise_that_is_not_gaussian(make, message):
    with pytest.raises(ValueError, match=message):
        make()
