"""The covariance-aware reverse kernel is exact for a Gaussian prior; all checks are dense."""

import pytest
import torch

from scoreinv.gaussian import Dense, Diagonal, Fourier, LowRank, Scalar
from scoreinv.kernels import bridge, conditional, expectation, inverse, noise_levels
from tests.analytic import dense, normal, power_law

SHAPE, D = (1, 4, 5), 20
EYE = torch.eye(D, dtype=torch.float64)


COVARIANCES = {
    "scalar": Scalar(0.5),
    "diagonal": Diagonal(normal(*SHAPE).exp()),
    "fourier": Fourier(power_law(4, 5)),
    "low-rank": LowRank(normal(2, *SHAPE), floor=0.3),
    "dense": Dense(normal(D, D) @ normal(D, D).T / D),
}
each = pytest.mark.parametrize("C", COVARIANCES.values(), ids=COVARIANCES)
levels = pytest.mark.parametrize("sigma, s", [(10.0, 3.0), (1.0, 0.9), (0.5, 0.01), (2.0, 0.0)])


def step(C, sigma, s, mean, covariance):
    """Mean and covariance of x_s for x_sigma ~ N(mean, covariance) under the prior N(0, C)."""
    W, K = expectation(C, sigma), conditional(C, sigma)
    drift = dense(lambda x: bridge(x, W.apply(x), sigma, s), SHAPE)
    spread = dense(lambda z: bridge(0 * z, K.sqrt(z), sigma, s), SHAPE)
    fresh = dense(lambda z: bridge(0 * z, 0 * z, sigma, s, z), SHAPE)
    return drift @ mean, drift @ covariance @ drift.T + spread @ spread.T + fresh @ fresh.T


@each
@levels
def test_marginals_are_exact(C, sigma, s):
    # x_sigma ~ N(0, C + sigma^2) must become x_s ~ N(0, C + s^2), and x_s, x_sigma have covariance
    # C + s^2: the forward process adds independent noise
    matrix = dense(C.apply, SHAPE)
    mean, covariance = step(
        C, sigma, s, torch.zeros(D, dtype=torch.float64), matrix + sigma**2 * EYE
    )
    torch.testing.assert_close(covariance, matrix + s**2 * EYE)
    W = expectation(C, sigma)
    drift = dense(lambda x: bridge(x, W.apply(x), sigma, s), SHAPE)
    torch.testing.assert_close(drift @ (matrix + sigma**2 * EYE), matrix + s**2 * EYE)


@each
@levels
def test_mean_is_the_conditional_mean(C, sigma, s):
    # E[x_s | x_sigma = x] = (C + s^2) (C + sigma^2)^-1 x for a prior of mean zero
    matrix, x = dense(C.apply, SHAPE), normal(D, seed=1)
    mean, _ = step(C, sigma, s, x, 0 * EYE)
    torch.testing.assert_close(
        mean, (matrix + s**2 * EYE) @ torch.linalg.solve(matrix + sigma**2 * EYE, x)
    )


@each
@pytest.mark.parametrize("end", [0.1, 0.0])
def test_two_steps_equal_one(C, end):
    # conditionally on x_sigma = x, so that means and covariances of both paths must agree
    start = normal(D, seed=1), 0 * EYE
    direct = step(C, 3.0, end, *start)
    for actual, expected in zip(
        step(C, 1.0, end, *step(C, 3.0, 1.0, *start)), direct, strict=True
    ):
        torch.testing.assert_close(actual, expected)


def test_ancestral_step_is_not_exact():
    # negative control of the tests above: with C_sigma left out the marginal is too narrow
    C = Fourier(power_law(4, 5))
    W, matrix = expectation(C, 1.0), dense(C.apply, SHAPE)
    drift = dense(lambda x: bridge(x, W.apply(x), 1.0, 0.5), SHAPE)
    covariance = drift @ (matrix + EYE) @ drift.T + 0.5**2 * (1 - 0.5**2) * EYE
    assert covariance.trace() < 0.95 * (matrix + 0.25 * EYE).trace()


@each
def test_conditional_gaussian(C):
    matrix, sigma = dense(C.apply, SHAPE), 0.7
    slope = torch.linalg.solve(matrix + sigma**2 * EYE, matrix)
    torch.testing.assert_close(dense(expectation(C, sigma).apply, SHAPE), slope)
    torch.testing.assert_close(dense(conditional(C, sigma).apply, SHAPE), matrix - matrix @ slope)


def test_conditional_gaussian_of_a_singular_prior_at_zero():
    # directions without variance have no slope at sigma = 0 either: 0, not 0 / 0
    C = Diagonal(torch.tensor([[[0.0, 2.0]]], dtype=torch.float64))
    assert expectation(C, 0.0).variance.tolist() == [[[0.0, 1.0]]]
    assert conditional(C, 0.0).variance.tolist() == [[[0.0, 0.0]]]


def test_inverse_of_a_singular_covariance():
    C = Diagonal(torch.tensor([[[0.0, 2.0]]], dtype=torch.float64))
    assert inverse(C).variance.tolist() == [[[0.0, 0.5]]]


def test_noise_levels():
    sigma = torch.tensor(noise_levels(30, 80.0, 0.002, rho=7.0))
    assert len(sigma) == 30
    assert sigma[0] == pytest.approx(80.0) and sigma[-1] == pytest.approx(0.002)
    steps = (sigma ** (1 / 7)).diff()
    torch.testing.assert_close(steps, steps.mean().expand(29), rtol=1e-3, atol=0.0)


@pytest.mark.parametrize("low, high", [(1.0, 0.5), (0.0, 1.0), (1.0, 1.0), (float("nan"), 1.0)])
def test_noise_levels_refuse(low, high):
    with pytest.raises(ValueError, match="expected 0 < sigma_min < sigma_max, got"):
        noise_levels(5, high, low)
