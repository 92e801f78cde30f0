"""The likelihood of linear measurements against dense normal distributions."""

import math

import pytest
import torch
from torch.distributions import MultivariateNormal

from scoreinv.likelihood import Likelihood
from scoreinv.noise import GaussianNoise, PoissonNoise, RiceNoise, StudentNoise
from scoreinv.operators import NUFFT, Amplitude, DenseOperator, Identity, PSFConvolution
from tests.analytic import dense, flat, gaussian, normal, p_value

SHAPE, D = (1, 4, 5), 20
FALSE_ALARMS = 1e-4  # of each statistical test


def variances(*shape):
    return 0.2 + torch.rand(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


SPD = normal(9, 9) @ normal(9, 9).T + torch.eye(9)
LIKELIHOODS = {
    "white": Likelihood(DenseOperator(normal(9, D), SHAPE), GaussianNoise(std=0.3)),
    "matrix": Likelihood(DenseOperator(normal(9, D), SHAPE), GaussianNoise(covariance=SPD)),
    "psf": Likelihood(
        PSFConvolution(variances(3, 3), SHAPE), GaussianNoise(variance=variances(*SHAPE))
    ),
    "visibilities": Likelihood(
        NUFFT(1e5 * normal(12, 2), SHAPE, 0.1), GaussianNoise(variance=variances(12))
    ),
}
each = pytest.mark.parametrize("likelihood", LIKELIHOODS.values(), ids=LIKELIHOODS)


def model(likelihood):
    """A and S as matrices; the two parts of complex data are rows one after the other."""
    A = dense(likelihood.operator, SHAPE)
    S = dense(likelihood.noise.covariance.apply, likelihood.operator.data_shape)
    if likelihood.operator.complex:
        S = torch.kron(S, torch.eye(2, dtype=torch.float64))
    return A, S


@each
def test_log_prob(likelihood):
    A, S = model(likelihood)
    x = normal(3, *SHAPE, seed=1)
    y = likelihood.simulate(normal(3, *SHAPE, seed=2), seed=0)
    means = x.flatten(1) @ A.T
    expected = torch.stack(
        [MultivariateNormal(m, S).log_prob(flat(r)) for m, r in zip(means, y, strict=True)]
    )
    torch.testing.assert_close(likelihood.log_prob(y, x), expected)
    expected = MultivariateNormal(means, S).log_prob(flat(y[0]))
    torch.testing.assert_close(likelihood.log_prob(y[0], x), expected)


@each
def test_log_prob_of_single_precision_is_double(likelihood):
    x = normal(3, *SHAPE, seed=1).float()
    y = likelihood.simulate(normal(3, *SHAPE, seed=2), seed=0)
    exact = likelihood.log_prob(y, x.double())
    torch.testing.assert_close(likelihood.log_prob(y, x), exact, rtol=1e-12, atol=0.0)


@each
def test_simulated_data(likelihood):
    A, S = model(likelihood)
    x = normal(1, *SHAPE, seed=1)
    y = likelihood.simulate(x.expand(4000, *SHAPE), seed=3)
    y = torch.stack([flat(r) for r in y])
    assert p_value(y, gaussian(A @ x.flatten(), S)) > FALSE_ALARMS
    # negative control: noise of 10 % more variance
    assert p_value(y, gaussian(A @ x.flatten(), S / 1.1)) < 1e-6


def test_simulated_visibilities_of_single_precision_are_exact():
    """A source in the corner of 256 x 256: within the rounding of the numbers, not that of the phases of the transform."""
    uv = 4e5 * torch.rand(300, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    operator = NUFFT(uv, (1, 256, 256), 0.2)
    x = torch.zeros(1, 1, 256, 256)
    x[..., 250, 250] = 1.0
    y = Likelihood(operator, GaussianNoise(std=1e-12)).simulate(x, seed=0)
    assert y.dtype == torch.complex64
    torch.testing.assert_close(y.to(torch.complex128), operator(x.double()), rtol=0.0, atol=3e-7)


@each
def test_simulations_depend_on_the_seed_alone(likelihood):
    x = normal(2, *SHAPE)
    state = torch.random.get_rng_state()
    assert torch.equal(likelihood.simulate(x, seed=1), likelihood.simulate(x, seed=1))
    assert not torch.equal(likelihood.simulate(x, seed=1), likelihood.simulate(x, seed=2))
    assert torch.equal(torch.random.get_rng_state(), state)


@each
def test_chi2(likelihood):
    A, S = model(likelihood)
    x = normal(3, *SHAPE, seed=1)
    y = likelihood.simulate(normal(1, *SHAPE, seed=2), seed=0)[0]
    r = flat(y) - x.flatten(1) @ A.T
    expected = (r * torch.linalg.solve(S, r.T).T).sum(1)
    torch.testing.assert_close(likelihood.chi2(y, x), expected)


OTHERS = {
    "outliers": Likelihood(DenseOperator(normal(9, D), SHAPE), StudentNoise(0.3, 3.0)),
    "counts": Likelihood(Identity(SHAPE), PoissonNoise(5.0)),
    "amplitudes": Likelihood(Amplitude(NUFFT(1e5 * normal(12, 2), SHAPE, 0.1)), RiceNoise(0.5)),
}


@pytest.mark.parametrize("likelihood", [*LIKELIHOODS.values(), *OTHERS.values()])
def test_log_slope(likelihood):
    """Against central differences."""
    x, v = normal(2, *SHAPE, seed=1), normal(2, *SHAPE, seed=2)
    y = likelihood.simulate(normal(2, *SHAPE, seed=3), seed=0)
    up, down = (likelihood.log_prob(y, x + h * v) for h in (1e-5, -1e-5))
    slope = (likelihood.log_slope(y, x) * v).flatten(1).sum(1)
    torch.testing.assert_close(slope, (up - down) / 2e-5, rtol=1e-6, atol=1e-6)
    single = likelihood.log_slope(y, x.float())
    assert single.dtype == torch.float32 and not single.requires_grad


def test_a_sky_of_nothing_has_amplitudes_without_slope():
    likelihood, nothing = OTHERS["amplitudes"], torch.zeros(1, *SHAPE)
    y = likelihood.simulate(nothing, seed=0)
    assert not bool(likelihood.log_slope(y, nothing).any())


def test_amplitudes_know_half_of_what_visibilities_do():
    x = normal(*SHAPE, seed=1)
    near = OTHERS["amplitudes"].equivalent(x)
    assert near.gaussian and near.operator is OTHERS["amplitudes"].operator.inner
    assert float(near.noise.pixel_precision.max()) == pytest.approx(0.5 / 0.5**2)
    assert LIKELIHOODS["psf"].equivalent(x) is LIKELIHOODS["psf"]


@each
def test_projection(likelihood):
    A, S = model(likelihood)
    y = likelihood.simulate(normal(1, *SHAPE), seed=0)[0]
    expected = A.T @ torch.linalg.solve(S, flat(y))
    torch.testing.assert_close(likelihood.projection(y).flatten(), expected)


@each
def test_information_is_prepared_once_for_each_precision(likelihood):
    A, S = model(likelihood)
    x = normal(2, *SHAPE)
    H = likelihood.information(torch.float64)
    torch.testing.assert_close(
        H.apply(x).flatten(1), x.flatten(1) @ (A.T @ torch.linalg.solve(S, A))
    )
    assert likelihood.information(torch.float64) is H
    assert likelihood.information(torch.float32) is not H


def test_each_part_of_complex_data_has_the_full_weight():
    # V = 3 + 4i with std 2 in each part: chi^2 = 9 / 4 + 16 / 4
    A = DenseOperator(torch.zeros(1, D, dtype=torch.complex128), SHAPE)
    likelihood = Likelihood(A, GaussianNoise(std=2.0))
    y, x = torch.tensor([3 + 4j], dtype=torch.complex128), normal(1, *SHAPE)
    assert likelihood.chi2(y, x).item() == pytest.approx(25 / 4)
    expected = -25 / 8 - math.log(2 * math.pi * 4)
    assert likelihood.log_prob(y, x).item() == pytest.approx(expected)


def test_data_size_leaves_masked_data_out():
    variance = torch.tensor([1.0, math.inf, 2.0], dtype=torch.float64)
    uv = 1e5 * normal(3, 2)
    assert Likelihood(NUFFT(uv, SHAPE, 0.1), GaussianNoise(variance=variance)).data_size == 4
    A = DenseOperator(normal(3, D), SHAPE)
    assert Likelihood(A, GaussianNoise(variance=variance)).data_size == 2
    assert Likelihood(A, GaussianNoise(std=1.0)).data_size == 3


def test_masked_data_do_not_count():
    seen = normal(*SHAPE) > 0
    variance = torch.where(seen, 0.5, math.inf).double()
    likelihood = Likelihood(Identity(SHAPE), GaussianNoise(variance=variance))
    x, y = normal(3, *SHAPE, seed=1), normal(*SHAPE, seed=2)
    expected = GaussianNoise(variance=0.5).log_prob((y - x)[:, seen])
    torch.testing.assert_close(likelihood.log_prob(y, x), expected)
    torch.testing.assert_close(likelihood.log_prob(y + 10 * ~seen, x), expected)


def test_misfits_are_refused():
    A = DenseOperator(normal(9, D), SHAPE)
    with pytest.raises(ValueError, match=r"noise has shape \(8,\), the data have shape \(9,\)"):
        Likelihood(A, GaussianNoise(variance=variances(8)))
    likelihood = Likelihood(A, GaussianNoise(std=1.0))
    with pytest.raises(ValueError, match=r"data have shape \(8,\), expected \(9,\), or \(3, 9\)"):
        likelihood.log_prob(normal(8), normal(3, *SHAPE))
    with pytest.raises(
        ValueError, match=r"data have shape \(2, 9\), expected \(9,\), or \(3, 9\)"
    ):
        likelihood.log_prob(normal(2, 9), normal(3, *SHAPE))
    with pytest.raises(ValueError, match="RiceNoise is that of amplitudes"):
        Likelihood(A, RiceNoise(1.0))
    with pytest.raises(ValueError, match="a StudentNoise, expected RiceNoise or GaussianNoise"):
        Likelihood(OTHERS["amplitudes"].operator, StudentNoise(1.0, 3.0))
    with pytest.raises(ValueError, match=r"image has shape \(1, 4, 5\), expected \(B, 1, 4, 5\)"):
        likelihood.simulate(normal(*SHAPE), seed=0)
