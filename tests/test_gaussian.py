"""Structured covariances, and the solver, against dense matrices."""

import math

import pytest
import torch
from torch.distributions import MultivariateNormal

from scoreinv.gaussian import (
    Blocks,
    Dense,
    Diagonal,
    Fourier,
    Gaussian,
    LowRank,
    Scalar,
    blocks,
    conjugate_gradients,
    dot,
    joint,
)
from tests.analytic import dense, gaussian, normal, p_value, power_law, rng, spd

SHAPE, D = (2, 4, 5), 40
FALSE_ALARMS = 1e-4  # of each statistical test


def variances(*shape, seed=0):
    return 0.2 + torch.rand(shape, generator=rng(seed), dtype=torch.float64)


COVARIANCES = {
    "scalar": (Scalar(0.7), 0.7 * torch.eye(D, dtype=torch.float64)),
    "diagonal": (Diagonal(variances(*SHAPE)), torch.diag(variances(*SHAPE).flatten())),
    "diagonal-each-channel": (
        Diagonal(variances(2, 1, 1)),
        torch.diag(variances(2, 1, 1).expand(SHAPE).flatten()),
    ),
    "low-rank": (
        LowRank(normal(3, *SHAPE), floor=0.3),
        0.3 * torch.eye(D, dtype=torch.float64) + normal(3, D).T @ normal(3, D),
    ),
    "dense": (Dense(spd(D)), spd(D)),
}


def autocovariance_matrix(spectrum, channels):
    """C_pq = sum_k P_k cos(2 pi k (p - q)) / N, each channel on its own, term by term."""
    spectrum = spectrum.expand(channels, *spectrum.shape[-2:])
    H, W = spectrum.shape[-2:]
    i, j = (
        a.flatten().double()
        for a in torch.meshgrid(torch.arange(H), torch.arange(W), indexing="ij")
    )
    phase = i[:, None] * i / H + j[:, None] * j / W
    F = torch.exp(-2j * math.pi * phase) / math.sqrt(H * W)
    return torch.block_diag(*((F.mH * P.flatten()) @ F for P in spectrum)).real


COVARIANCES["fourier"] = (Fourier(power_law(4, 5)), autocovariance_matrix(power_law(4, 5), 2))
PAIR = torch.stack([power_law(4, 5), power_law(4, 5, slope=1.0)])
COVARIANCES["fourier-each-channel"] = (Fourier(PAIR), autocovariance_matrix(PAIR, 2))
each = pytest.mark.parametrize("C, matrix", COVARIANCES.values(), ids=COVARIANCES)


@each
def test_apply(C, matrix):
    torch.testing.assert_close(dense(C.apply, SHAPE), matrix, rtol=1e-10, atol=1e-12)


@each
def test_solve(C, matrix):
    torch.testing.assert_close(dense(C.solve, SHAPE) @ matrix, torch.eye(D, dtype=torch.float64))


@each
def test_sqrt_is_symmetric_and_squares_to_the_covariance(C, matrix):
    root = dense(C.sqrt, SHAPE)
    torch.testing.assert_close(root, root.T)
    torch.testing.assert_close(root @ root, matrix)


@each
def test_logdet_and_trace(C, matrix):
    assert C.logdet(SHAPE) == pytest.approx(float(torch.logdet(matrix)), rel=1e-10)
    assert C.marginal_variance(SHAPE) == pytest.approx(float(matrix.trace()) / D, rel=1e-10)


@each
def test_map_is_a_function_of_the_matrix(C, matrix):
    values, basis = torch.linalg.eigh(matrix)
    f = lambda v: v / (v + 0.5**2)
    torch.testing.assert_close(dense(C.map(f).apply, SHAPE), basis * f(values) @ basis.T)


@each
def test_power_is_the_mean_square_along_each_eigenvector(C, matrix):
    # f(lambda) summed over `power` is x^T f(C) x for any f, if each value counts its directions
    x = normal(3, *SHAPE, seed=5)
    power, seen = C.power(x).flatten(), []
    C.map(lambda v: (seen.append(v.flatten()), v)[1])
    f = lambda v: v / (v + 0.5**2)
    multiplicity = torch.full_like(power, D / len(power))
    if isinstance(C, LowRank):
        multiplicity = torch.ones_like(power)
        multiplicity[-1] = D - 3
    total = float((multiplicity * power * f(seen[0])).sum())
    assert total == pytest.approx(float(dot(x, C.map(f).apply(x)).mean()), rel=1e-10)


@each
def test_single_precision_stays_single(C, matrix):
    x = normal(3, *SHAPE)
    y = C.apply(x.float())
    assert y.dtype == torch.float32
    torch.testing.assert_close(y.double(), C.apply(x), rtol=1e-5, atol=1e-5)


@each
def test_fits(C, matrix):
    assert C.fits(SHAPE)
    if C.shape:
        assert not C.fits((3, 4, 6))


def test_fourier_tells_sizes_apart_that_share_a_half_spectrum():
    # 8 and 9 columns both have 5 in the half-spectrum of a real FFT
    assert Fourier(power_law(4, 8)).fits((1, 4, 8))
    assert not Fourier(power_law(4, 8)).fits((1, 4, 9))


@pytest.mark.parametrize(
    "names", [("scalar", "diagonal"), ("scalar", "fourier"), ("dense", "fourier")]
)
def test_blocks_act_side_by_side(names):
    chosen, matrices = zip(*(COVARIANCES[name] for name in names), strict=True)
    x = normal(3, 2, *SHAPE)
    together = blocks(chosen, SHAPE)
    for C in (together, together.map(torch.sqrt).map(torch.square), Blocks(chosen)):
        for k in range(2):
            torch.testing.assert_close(C.apply(x)[:, k], chosen[k].apply(x[:, k]))
        assert C.fits((2, *SHAPE)) and not C.fits((3, *SHAPE))
    expected = sum(float(torch.logdet(m)) for m in matrices)
    assert together.logdet((2, *SHAPE)) == pytest.approx(expected, rel=1e-10)
    power = Blocks(chosen).power(x)
    expected = [C.power(x[:, k]).flatten() for k, C in enumerate(chosen)]
    torch.testing.assert_close(power, torch.cat(expected))


def test_joint_combines_eigenvalues_in_a_common_basis():
    f = lambda a, b, c: a + b * c
    for kind, values in ((Diagonal, variances(1, 4, 5)), (Fourier, power_law(4, 5))):
        C = joint(f, Scalar(2.0), kind(values), kind(values**2))
        assert isinstance(C, kind)
        torch.testing.assert_close(
            C.apply(normal(2, 1, 4, 5)), kind(2 + values**3).apply(normal(2, 1, 4, 5))
        )
    assert joint(f, Scalar(2.0), Scalar(3.0), Scalar(4.0)).variance == 14


def test_joint_refuses_different_bases():
    f = lambda a, b: a + b
    assert joint(f, Diagonal(variances(1, 4, 5)), Fourier(power_law(4, 5))) is None
    assert joint(f, Dense(spd(D)), Dense(spd(D))) is None


@pytest.mark.parametrize("preconditioned", [False, True])
def test_conjugate_gradients(preconditioned):
    A, b = spd(D), normal(3, *SHAPE, seed=1)
    A = A + torch.diag(torch.logspace(0, 4, D, dtype=torch.float64))
    H = lambda x: (x.flatten(1) @ A).reshape(x.shape)
    jacobi = lambda r: ((r.flatten(1) / A.diagonal()).reshape(r.shape), torch.zeros_like(r))
    extra = {"preconditioner": jacobi} if preconditioned else {}
    x, used = conjugate_gradients(H, b, error=1e-10, **extra)
    torch.testing.assert_close(x.flatten(1), torch.linalg.solve(A, b.flatten(1).T).T)
    assert used < (20 if preconditioned else 200)


def test_conjugate_gradients_add_the_inverse_behind_the_preconditioner():
    # K = diag(k) with k = 0 in one direction: nothing moves there
    k, H = torch.logspace(-3, 3, D, dtype=torch.float64), spd(D)
    k[0] = 0.0
    b = normal(3, D, seed=1)
    x, _ = conjugate_gradients(lambda x: x @ H, b, lambda r: (k * r, (k > 0) * r), error=1e-8)
    expected = torch.linalg.solve(k[1:].reciprocal().diag() + H[1:, 1:], b[:, 1:].T).T
    torch.testing.assert_close(x[:, 1:], expected)
    assert not x[:, 0].any()


def test_conjugate_gradients_of_zero_is_zero():
    x, used = conjugate_gradients(lambda x: 2 * x, torch.zeros(2, 1, 4, 4))
    assert used == 0 and not x.any()


@pytest.mark.parametrize("error", [1.0, 1e-2, 1e-4])
def test_conjugate_gradients_know_their_error(error):
    """So many iterations are within the error of the solution, one less is not; the condition number is 10^4."""
    A = torch.logspace(0, 4, D, dtype=torch.float64)
    b = 100 * normal(1, D, seed=1)
    H, noise = lambda x: A * x, lambda x: float((A * (x - b / A).square()).sum().sqrt())
    _, needed = conjugate_gradients(H, b, error=error)
    at, before = (
        conjugate_gradients(H, b, error=0.0, iterations=k)[0] for k in (needed, needed - 1)
    )
    assert noise(at) < error <= noise(before)


def test_conjugate_gradients_goes_on_past_convergence():
    # a fixed number of iterations: those that have converged must stay where they are
    A, b = spd(D), normal(2, D)
    x, used = conjugate_gradients(lambda x: x @ A, b, error=0.0, iterations=3 * D)
    assert used == 3 * D
    torch.testing.assert_close(x, torch.linalg.solve(A, b.T).T)


@each
def test_log_prob(C, matrix):
    mean, x = normal(*SHAPE, seed=1), normal(4, *SHAPE, seed=2)
    expected = MultivariateNormal(mean.flatten(), matrix).log_prob(x.flatten(1))
    torch.testing.assert_close(Gaussian(mean, C).log_prob(x), expected)


def test_log_prob_of_single_precision_is_double():
    mean, C = normal(*SHAPE).float(), Diagonal(variances(*SHAPE).float())
    expected = Gaussian(mean.double(), Diagonal(C.variance.double())).log_prob(mean[None] + 1)
    actual = Gaussian(mean, C).log_prob(mean[None] + 1)
    torch.testing.assert_close(actual, expected, rtol=1e-8, atol=0.0)


@each
def test_sample(C, matrix):
    mean = normal(*SHAPE, seed=1)
    draws = Gaussian(mean, C).sample(4000, rng(3)).flatten(1)
    assert p_value(draws, gaussian(mean.flatten(), matrix)) > FALSE_ALARMS
    # negative control: 10 % too wide in variance
    assert p_value(draws, gaussian(mean.flatten(), matrix / 1.1)) < 1e-6


@each
def test_rescaled(C, matrix):
    mean, x = normal(*SHAPE, seed=1), normal(4, *SHAPE, seed=2)
    scaled = Gaussian(mean, C).rescaled(3.0)
    expected = Gaussian(mean, C).log_prob(x) - D * math.log(3)
    torch.testing.assert_close(scaled.log_prob(3 * x), expected)


def test_asymmetric_spectrum_is_refused():
    shifted = torch.fft.fftshift(power_law(5, 7))
    with pytest.raises(ValueError, match=r"P\(k\) = P\(-k\).*Was it shifted with fftshift\?"):
        Fourier(shifted)


@pytest.mark.parametrize(
    "matrix, message",
    [
        (torch.ones(3, 4), r"shape \(3, 4\), expected \(d, d\)"),
        (torch.diag(torch.tensor([1.0, 1.0, -0.5])), "negative eigenvalue, -0.5"),
        (torch.linalg.cholesky(spd(5)), "a Cholesky factor L\\? pass L @ L.T"),
        (torch.full((2, 2), math.nan), "up to nan, expected a finite, symmetric matrix"),
    ],
)
def test_dense_refuses(matrix, message):
    with pytest.raises(ValueError, match=message):
        Dense(matrix)
