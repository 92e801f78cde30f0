"""The three ways to condition a Gaussian on data, against dense linear algebra."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from scoreinv.conditioning import (
    CommutingConditioner,
    DataSpaceConditioner,
    IterativeConditioner,
    LocalConditioned,
    choice,
    conditioner,
    lanczos_logdet,
)
from scoreinv.conditioning.local import bent
from scoreinv.gaussian import Dense, Diagonal, Fourier, Gaussian, LowRank, Modulated, Scalar, dot
from scoreinv.kernels import conditional, expectation, inverse
from scoreinv.likelihood import Likelihood
from scoreinv.noise import GaussianNoise
from scoreinv.operators import NUFFT, DenseOperator, Identity, Mask, PSFConvolution
from tests.analytic import (
    PIXEL,
    baselines,
    dense,
    flat,
    gaussian,
    normal,
    p_value,
    posterior,
    power_law,
    rng,
    spd,
    uniform,
    visibilities,
)

SHAPE, D = (1, 6, 7), 42
S = 0.4  # noise level of the path
FALSE_ALARMS = 1e-4  # of each statistical test


def blob(n, width=1.0):
    """A round kernel with shape (n, n), of sum one."""
    r2 = (torch.arange(n, dtype=torch.float64) - n // 2) ** 2
    psf = torch.exp(-(r2[:, None] + r2) / (2 * width**2))
    return psf / psf.sum()


STATIONARY = Fourier(power_law(*SHAPE[-2:]))
PARTS = Fourier(torch.stack([power_law(*SHAPE[-2:]), torch.ones(SHAPE[-2:])])[:, None])
EACH = Diagonal(0.2 + uniform(*SHAPE))
MASKED = torch.where(uniform(*SHAPE) > 0.3, 0.1 + uniform(*SHAPE, seed=1), math.inf)
PERIODIC = PSFConvolution(blob(5), SHAPE, boundary="circular")
SEEN = NUFFT(baselines(15), SHAPE, PIXEL)
WEIGHTS = GaussianNoise(variance=0.5 + uniform(15))

# prior covariance, operator, noise
COMMUTING = {
    "white": (Scalar(0.5), Identity(SHAPE), GaussianNoise(std=0.3)),
    "pixels": (EACH, Mask(uniform(*SHAPE) > 0.5), GaussianNoise(variance=MASKED)),
    "stationary": (STATIONARY, PERIODIC, GaussianNoise(spectrum=power_law(6, 7, 1.0))),
    "stationary-white": (STATIONARY, Identity(SHAPE), GaussianNoise(std=0.3)),
}
DATA_SPACE = {
    "dense-few": (Dense(spd(D)), DenseOperator(normal(5, D), SHAPE), GaussianNoise(std=0.3)),
    "dense-many": (Dense(spd(D)), DenseOperator(normal(60, D), SHAPE), GaussianNoise(std=3.0)),
    "matrix": (EACH, DenseOperator(normal(9, D), SHAPE), GaussianNoise(covariance=spd(9))),
    "complex": (
        Scalar(0.5),
        DenseOperator(normal(9, D, dtype=torch.complex128), SHAPE),
        GaussianNoise(variance=0.5 + uniform(9)),
    ),
    "low-rank": (LowRank(normal(3, *SHAPE), floor=0.3), SEEN, WEIGHTS),
    "visibilities": (STATIONARY, SEEN, WEIGHTS),
    "masked": (STATIONARY, Identity(SHAPE), GaussianNoise(variance=MASKED)),
}
ITERATIVE = {
    "visibilities": (STATIONARY, SEEN, WEIGHTS),
    "many": (STATIONARY, NUFFT(baselines(90), SHAPE, PIXEL), GaussianNoise(std=3.0)),
    "blurred": (STATIONARY, SEEN @ PSFConvolution(blob(5), SHAPE), WEIGHTS),
    "cutout": (STATIONARY, PSFConvolution(blob(5), SHAPE, (4, 4)), GaussianNoise(std=0.3)),
    "masked": (
        STATIONARY,
        Mask(uniform(1, 4, 4) > 0.3) @ PSFConvolution(blob(5), SHAPE, (4, 4)),
        GaussianNoise(std=0.3),
    ),
    "pixels": (EACH, PSFConvolution(blob(5), SHAPE), GaussianNoise(variance=MASKED)),
}
PROBLEMS = {
    f"{kind.__name__.removesuffix('Conditioner')} {name}": (kind, *problem)
    for kind, problems in (
        (CommutingConditioner, COMMUTING),
        (DataSpaceConditioner, DATA_SPACE),
        (IterativeConditioner, ITERATIVE),
    )
    for name, problem in problems.items()
}


class Problem:
    """One observation, its conditioner and its matrices."""

    def __init__(self, kind, C, A, noise):
        likelihood = Likelihood(A, noise)
        self.prior = Gaussian(normal(*SHAPE, seed=3), C)
        self.y = likelihood.simulate(self.prior.sample(1, rng(4)), seed=5)[0]
        with pytest.MonkeyPatch.context() as patch:
            if kind is IterativeConditioner:
                patch.setattr(choice, "FEW_DATA", 0)
            self.solver = conditioner(likelihood, self.y, C, torch.float64, tolerance=1e-8)
        assert type(self.solver) is kind
        parts = torch.eye(2 if A.complex else 1, dtype=torch.float64)
        weights, variance = (
            torch.kron(dense(f, A.data_shape), parts)
            for f in (noise.weigh, noise.covariance.apply)
        )
        # unit vectors meet 0 * inf where data are masked
        self.S = torch.where(variance.isnan(), 0.0, variance)
        self.A, self.C = dense(A.forward, SHAPE), dense(C.apply, SHAPE)
        self.weights, self.H = weights, self.A.T @ weights @ self.A

    def shift(self, K, m):
        """(K^-1 + H)^-1 A^T S^-1 (y - A m), with shape (B, d)."""
        residual = flat(self.y) - m.flatten(1) @ self.A.T
        D = residual @ self.weights @ self.A
        return torch.linalg.solve(torch.eye(D.shape[1]) + K @ self.H, (D @ K).T).T


@pytest.fixture(params=PROBLEMS.values(), ids=PROBLEMS, scope="module")
def problem(request):
    return Problem(*request.param)


def test_shift(problem):
    m = normal(3, *SHAPE, seed=6)
    for K in (problem.prior.covariance, conditional(problem.prior.covariance, S)):
        actual = problem.solver.given(K).shift(m).flatten(1)
        torch.testing.assert_close(
            actual, problem.shift(dense(K.apply, SHAPE), m), rtol=0.0, atol=1e-7
        )


def test_perturbed_data_give_draws_of_the_posterior(problem):
    # Matheron's rule: shift a draw of the prior towards perturbed data
    n, prior = 2000, problem.prior
    x = prior.sample(n, rng(7))
    noise = problem.solver.noise(n, rng(8))
    draws = (x + problem.solver.given(prior.covariance).shift(x, noise)).flatten(1)
    exact, _ = posterior(
        gaussian(prior.mean.flatten(), problem.C), problem.A, problem.S, flat(problem.y)
    )
    assert p_value(draws, exact) > FALSE_ALARMS
    # negative control: without the perturbation the draws are too narrow
    narrow = (x + problem.solver.given(prior.covariance).shift(x)).flatten(1)
    assert p_value(narrow, exact) < 1e-6


def test_log_evidence(problem):
    prior = gaussian(problem.prior.mean.flatten(), problem.C)
    _, expected = posterior(prior, problem.A, problem.S, flat(problem.y))
    assert problem.solver.log_evidence(problem.prior) == pytest.approx(expected, abs=1e-6)


def test_log_growth(problem):
    for K in (problem.prior.covariance, conditional(problem.prior.covariance, S)):
        eye = torch.eye(D, dtype=torch.float64)
        expected = torch.linalg.slogdet(eye + problem.H @ dense(K.apply, SHAPE)).logabsdet
        assert problem.solver.given(K).log_growth() == pytest.approx(float(expected), abs=1e-6)


def mobility_of(problem):
    """The mobility at level S, and the matrix (Q + W P W)^-1, P = A^T (S + A K A^T)^-1 A."""
    C = problem.prior.covariance
    K, W, Q = conditional(C, S), expectation(C, S), C.map(lambda v: 1 / (v + 0.5 * S**2))
    eye, w = torch.eye(D, dtype=torch.float64), dense(W.apply, SHAPE)
    P = problem.H @ torch.linalg.inv(eye + dense(K.apply, SHAPE) @ problem.H)
    exact = torch.linalg.inv(dense(Q.apply, SHAPE) + w @ P @ w)
    return problem.solver.given(K).mobility(Q, W), exact


def test_mobility(problem):
    mobility, exact = mobility_of(problem)
    M = dense(mobility.apply, SHAPE)
    if isinstance(problem.solver, IterativeConditioner):
        # any fixed symmetric positive M will do; a filter near the exact one
        torch.testing.assert_close(M, M.T)
        assert torch.linalg.eigvalsh(M)[0] > 0
    else:
        torch.testing.assert_close(M, exact)


def test_draws_of_the_mobility(problem):
    mobility, _ = mobility_of(problem)
    M, zero = dense(mobility.apply, SHAPE), torch.zeros(D, dtype=torch.float64)
    draws = mobility.draw(2000, rng(1)).flatten(1)
    assert p_value(draws, gaussian(zero, M)) > FALSE_ALARMS
    # negative control: 10 % too wide in variance
    assert p_value(draws, gaussian(zero, M / 1.1)) < 1e-6


# Which one is chosen


def chosen(C, A, noise):
    y = torch.zeros(A.data_shape, dtype=torch.complex128 if A.complex else torch.float64)
    return type(conditioner(Likelihood(A, noise), y, C, torch.float32))


def test_choice():
    shape, noise = (1, 24, 24), GaussianNoise(std=1.0)
    white, few, many = Scalar(1.0), baselines(200), baselines(300)
    assert chosen(white, Identity(shape), noise) is CommutingConditioner
    assert chosen(white, NUFFT(few, shape, PIXEL), noise) is DataSpaceConditioner
    assert chosen(white, NUFFT(many, shape, PIXEL), noise) is IterativeConditioner
    assert chosen(white, DenseOperator(normal(600, 576), shape), noise) is DataSpaceConditioner


def test_few_data_of_a_large_image():
    # 10 visibilities of 256 x 256 pixels: a matrix of 20 rows, not a unit matrix of 34 GB
    uv, shape = baselines(10), (1, 256, 256)
    likelihood = Likelihood(NUFFT(uv, shape, PIXEL), GaussianNoise(std=1.0))
    y = normal(10, dtype=torch.complex128)
    solver = conditioner(likelihood, y, Scalar(2.0), torch.float64)
    actual = solver.given(Scalar(2.0)).shift(torch.zeros(1, *shape, dtype=torch.float64))
    A = dense(lambda y: likelihood.operator.adjoint(torch.view_as_complex(y)), (10, 2)).T
    gram = torch.eye(20, dtype=torch.float64) + 2 * A @ A.T
    torch.testing.assert_close(actual.flatten(), 2 * A.T @ torch.linalg.solve(gram, flat(y)))


# Conjugate gradients at image size


@pytest.fixture(scope="module")
def image():
    """300 visibilities of 40 x 40 pixels: too many data to factorise, too many pixels to count."""
    shape, uv = (1, 40, 40), 0.5 * baselines(300)
    likelihood = Likelihood(NUFFT(uv, shape, PIXEL), GaussianNoise(std=3.0))
    prior = Gaussian(0.1 * normal(*shape), Fourier(power_law(40, 40)))
    return likelihood, prior, likelihood.simulate(prior.sample(1, rng(4)), seed=5)[0]


def solver_of(image, dtype=torch.float64, tolerance=0.05):
    likelihood, prior, y = image
    return conditioner(likelihood, y, prior.covariance, dtype, tolerance)


def test_log_evidence_by_lanczos(image):
    likelihood, prior, y = image
    A = dense(lambda x: visibilities(x, likelihood.operator.uv, PIXEL), prior.mean.shape)
    CA = prior.covariance.apply(A.reshape(600, *prior.mean.shape)).flatten(1)
    predicted = torch.distributions.MultivariateNormal(
        A @ prior.mean.flatten(), A @ CA.T + 9 * torch.eye(600, dtype=torch.float64)
    )
    solver = solver_of(image)
    assert isinstance(solver, IterativeConditioner)
    expected = float(predicted.log_prob(flat(y)))
    # the probes estimate 285 of its nats; with so few visibilities they reach an error of 1
    assert solver.log_evidence(prior) == pytest.approx(expected, abs=4.0)


def test_all_amplitudes_share_the_krylov_spaces_of_one(image):
    """Against dense algebra over two decades of the amplitude, and where the evidence is largest."""
    likelihood, prior, y = image
    A = dense(lambda x: visibilities(x, likelihood.operator.uv, PIXEL), prior.mean.shape)
    ACA = A @ prior.covariance.apply(A.reshape(600, *prior.mean.shape)).flatten(1).T
    seen = flat(y)

    def exact(a):
        S = 9 * torch.eye(600, dtype=torch.float64) + a**2 * ACA
        return float(
            torch.distributions.MultivariateNormal(a * A @ prior.mean.flatten(), S).log_prob(seen)
        )

    curve = solver_of(image).evidence_curve(prior, near=1.0)
    amplitudes = torch.logspace(-1.5, 0.5, 21, dtype=torch.float64).tolist()
    error = torch.tensor([curve(a) - exact(a) for a in amplitudes])
    # 16 probes for every determinant: what they miss changes slowly with the amplitude
    assert error.diff().abs().max() < 1.2
    found, best = ([f(a) for a in amplitudes] for f in (curve, exact))
    assert found.index(max(found)) == best.index(max(best))
    assert 0 < best.index(max(best)) < 20


@pytest.mark.parametrize("error", [0.5, 2.0])
def test_the_error_of_a_determinant_is_known(error):
    G = spd(400)
    exact = float(torch.linalg.slogdet(G).logabsdet)
    operator = lambda x: (x.flatten(1) @ G).reshape(x.shape)
    value, reached = lanczos_logdet(operator, (1, 20, 20), error, most=256)
    assert reached < error
    # four standard errors: false alarms in 1 of 16,000 seeds
    assert value == pytest.approx(exact, abs=4 * reached)
    assert abs(value - exact) < 0.5 * abs(400 * float(G.diagonal().log().mean()) - exact)


@pytest.mark.parametrize("s", [10.0, 0.3])
def test_tolerance_is_kept(image, s):
    """Errors in standard deviations of the posterior, <e, (K^-1 + H) e>^1/2, for images that are as far off as K allows."""
    likelihood, prior, y = image
    K = conditional(prior.covariance, s)
    truth = prior.sample(1, rng(4))
    m = truth + K.sqrt(normal(3, *truth.shape[1:]))
    exact = solver_of(image, tolerance=1e-8).given(K).shift(m)
    for tolerance in (1.0, 1e-1, 1e-3):
        solver = solver_of(image, tolerance=tolerance)
        e = solver.given(K).shift(m) - exact
        error = dot(e, inverse(K).apply(e) + solver.information.apply(e)).sqrt()
        assert float(error.max()) < 2 * tolerance


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("s", [2.0, 0.1])
def test_a_particle_does_not_depend_on_its_neighbours(image, dtype, s):
    likelihood, prior, y = image
    conditioned = solver_of(image, dtype).given(conditional(prior.covariance, s))
    m = prior.sample(5, rng(1)).to(dtype)
    far = torch.cat([m[:1], 1e6 * m[1:]])
    together, among_far = conditioned.shift(m)[0], conditioned.shift(far)[0]
    assert torch.equal(together, among_far)
    # alone: rounding may differ, in FFTs that work on several images at once, and conjugate
    # gradients amplify it, up to their tolerance
    alone = conditioned.shift(m[:1])[0]
    torch.testing.assert_close(alone, together, rtol=0.0, atol=1e-3 * float(together.abs().max()))


def iterations(A, noise, C):
    y = torch.zeros(A.data_shape, dtype=torch.complex128 if A.complex else torch.float64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(choice, "FEW_DATA", 0)
        solver = conditioner(Likelihood(A, noise), y, C, torch.float64)
    near = solver.given(C).iterations
    solver.information = replace(solver.information, nearby=None)
    return near, solver.given(C).iterations


CANVAS = (1, 24, 24)
BLUR = PSFConvolution(blob(9, 1.5), CANVAS, data_shape=(18, 18))
NEAR = {
    "visibilities": (NUFFT(baselines(2000), CANVAS, PIXEL), 0.3),
    "blurred visibilities": (
        NUFFT(baselines(2000), CANVAS, PIXEL) @ PSFConvolution(blob(5), CANVAS),
        0.3,
    ),
    "convolution": (PSFConvolution(blob(9, 1.5), CANVAS), 0.3),
    # a field smaller than the canvas is not stationary, and gains little
    "cutout": (BLUR, 1.0),
    "masked cutout": (Mask(uniform(1, 18, 18) > 0.1) @ BLUR, 1.0),
}


@pytest.mark.parametrize("A, share", NEAR.values(), ids=NEAR)
def test_the_nearby_circulant_saves_iterations(A, share):
    noise = GaussianNoise(std=1.0 if A.complex else 0.05)
    near, without = iterations(A, noise, Fourier(power_law(24, 24)))
    assert near < share * without


def test_directions_without_variance_stay_put():
    # a prior that knows the sky's mean level: its spectrum vanishes at k = 0
    spectrum = power_law(*SHAPE[-2:])
    spectrum[0, 0] = 0.0
    problem = Problem(IterativeConditioner, Fourier(spectrum), SEEN, WEIGHTS)
    m = normal(3, *SHAPE, seed=6)
    u = problem.solver.given(Fourier(spectrum)).shift(m)
    torch.testing.assert_close(u.flatten(1), problem.shift(problem.C, m), rtol=0.0, atol=1e-5)
    prior = gaussian(problem.prior.mean.flatten(), problem.C)
    _, expected = posterior(prior, problem.A, problem.S, flat(problem.y))
    assert problem.solver.log_evidence(problem.prior) == pytest.approx(expected, abs=1e-6)


def test_lanczos_logdet():
    # probes of +-1 are exact for a diagonal operator
    v = torch.logspace(-0.3, 0.3, 1600, dtype=torch.float64)[torch.randperm(1600, generator=rng())]
    v = v.reshape(1, 40, 40)
    value, error = lanczos_logdet(lambda x: v * x, v.shape)
    assert value == pytest.approx(float(v.log().sum()), abs=2e-3)
    assert error < 1e-6


def test_lanczos_stops_when_nothing_is_left():
    # a Krylov space of two dimensions
    v = torch.tensor([3.0, 0.5], dtype=torch.float64).repeat(8).reshape(1, 4, 4)
    expected = 8 * math.log(3.0 * 0.5)
    assert lanczos_logdet(lambda x: v * x, v.shape)[0] == pytest.approx(expected, rel=1e-10)


def sum_of_parts(a):
    """sum_b a_b rho_b a_b as a matrix, for the standard deviations of one image."""
    rho = [dense(Fourier(power).apply, SHAPE) for power in PARTS.spectrum[:, 0]]
    return sum(v.flatten()[:, None] * r * v.flatten() for v, r in zip(a, rho, strict=True))


@pytest.mark.parametrize("name", ["stationary", "dense-few", "visibilities"])
def test_a_gaussian_for_each_image(name):
    """Shifts of two images, each with two modulated parts of its own, against dense algebra; solves to 1e-8."""
    C, A, noise = {**COMMUTING, **DATA_SPACE, **ITERATIVE}[name]
    likelihood = Likelihood(A, noise)
    y = likelihood.simulate(normal(1, *SHAPE), 3)[0]
    solver = conditioner(likelihood, y, C, torch.float64)
    a, m = 0.2 + uniform(2, 2, *SHAPE), normal(2, *SHAPE)
    local = LocalConditioned(solver, Modulated(a, PARTS), 1.0, 1e-8)
    H = dense(A.information(noise, torch.float64).apply, SHAPE)
    D = likelihood.projection(y).flatten()
    for i, shift in enumerate(local.shift(m)):
        K = sum_of_parts(a[i])
        exact = torch.linalg.solve(torch.linalg.inv(K) + H, D - H @ m[i].flatten())
        torch.testing.assert_close(shift.flatten(), exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("wider", [1.0, 1.5])
def test_draws_of_a_gaussian_for_each_image(wider):
    """Mean and covariance of 40,000 draws around one image, wider if asked to be: p-values above 1e-4.

    Half of it is the Gaussian's own, which the data narrow; the other half comes on top.
    """
    likelihood = Likelihood(PERIODIC, GaussianNoise(std=0.5))
    y = likelihood.simulate(normal(1, *SHAPE), 3)[0]
    solver = conditioner(likelihood, y, STATIONARY, torch.float64)
    n, a = 40_000, 0.2 + uniform(2, *SHAPE)
    local = LocalConditioned(solver, Modulated(a.expand(n, 2, *SHAPE), PARTS), 1.0, 1e-3)
    draws = local.draw(torch.zeros(n, *SHAPE, dtype=torch.float64), rng(4), wider)[0]
    K = sum_of_parts(a)
    H = dense(PERIODIC.information(likelihood.noise, torch.float64).apply, SHAPE)
    C = torch.linalg.inv(torch.linalg.inv(wider * K) + H)
    mean = C @ likelihood.projection(y).flatten()
    white = torch.linalg.solve_triangular(
        torch.linalg.cholesky(wider * C), (draws.flatten(1) - mean).T, upper=False
    )
    assert float((white.mean(1) * n**0.5).abs().max()) < 5.0  # one in 4e4 of 42
    assert float(white.square().sum(0).mean() / D) == pytest.approx(1.0, abs=0.005)


@pytest.mark.parametrize("skewness", [2.0, 0.7, 0.0, -1.0])
def test_a_skewed_pixel_is_moved_as_a_gamma_variable_would_be(skewness):
    """The force of data so noisy that they do not learn from the pixel: the mean of a shifted Gamma variable under it.

    All parts of a pixel are widened by one factor.
    """
    z, a = normal(1, *SHAPE), 0.2 + uniform(1, 2, *SHAPE)
    K = Modulated(a, Fourier(torch.ones(2, 1, *SHAPE[-2:], dtype=torch.float64)))
    d = K.deviation
    torch.testing.assert_close(d, a.square().sum(1).sqrt())
    noise = 1e4
    likelihood = Likelihood(Identity(SHAPE), GaussianNoise(std=noise))
    e = 0.3 * z.tanh() / d
    solver = conditioner(likelihood, noise**2 * e[0], STATIONARY, torch.float64)
    local = LocalConditioned(solver, K, 1.0, 1e-12, torch.full_like(z, skewness))
    tilted = local.tilted(0 * z)
    if skewness == 0:
        expected = d.square() * e
    else:
        # shape k and scale theta of Gamma variables with this variance and skewness, turned round if it is negative
        k, theta = 4 / skewness**2, 0.5 * abs(skewness) * d
        turn = math.copysign(1.0, skewness)
        expected = turn * (k / (1 / theta - turn * e) - k * theta)
    torch.testing.assert_close(tilted.deviation.square() * e, expected, rtol=1e-5, atol=1e-9)
    factor = tilted.a / a
    torch.testing.assert_close(factor[:, 0], factor[:, 1])


@pytest.mark.parametrize(
    ("skewness", "std", "raised", "shape"),
    [
        (1.0, 1.0, 0.1, (1, 64, 64)),
        (1.0, 1.0, 0.1, (2, 32, 64)),
        (4.0, 0.5, 0.05, (1, 64, 64)),
        (3.0, 1.5, 0.1, (1, 64, 64)),
        (-2.0, 1.0, 0.1, (1, 64, 64)),
    ],
)
def test_what_the_tilt_raises_is_known(skewness, std, raised, shape, monkeypatch):
    """Draws given data of ten times 4,096 Gamma pixels, all of it taken off: their mean within 0.03 sd of the truth's.

    That one's error is 0.004. With nothing taken off, as the negative control, draws are raised by more (lowered, where the
    skewness is negative).
    """
    copies, k = 4, 4 / skewness**2
    ones = torch.ones(copies, 1, *shape, dtype=torch.float64)
    K = Modulated(ones, Fourier(ones[0]))
    likelihood = Likelihood(Identity(shape), GaussianNoise(std=std))
    bias = {0.0: [], 1.0: []}
    for seed in range(10):
        at = torch.tensor(np.random.default_rng(seed).gamma(k, k**-0.5, (1, *shape))) - k**0.5
        at = math.copysign(1.0, skewness) * at
        y = likelihood.simulate(at, seed)[0]
        solver = conditioner(likelihood, y, Scalar(1.0), torch.float64)
        local = LocalConditioned(solver, K, 1.0, 1e-6, torch.full_like(ones[:, 0], skewness))
        for taken, found in bias.items():
            monkeypatch.setattr("scoreinv.conditioning.local.TAKEN", taken)
            draws = local.draw(torch.zeros_like(ones[:, 0]), rng(seed))[0]
            found.append(float(draws.mean() - at.mean()))
    assert abs(np.mean(bias[1.0])) < 0.03
    assert math.copysign(1.0, skewness) * np.mean(bias[0.0]) > raised


@pytest.mark.parametrize("g", [5.0, 1.0, 0.3, 0.0, -2.0])
def test_bent_variables_have_the_skewness_asked_for(g):
    """By quadrature over a normal variable; mean and variance are those of the Gaussian."""
    z, w = (torch.from_numpy(v) for v in np.polynomial.hermite_e.hermegauss(200))
    w, d = w / w.sum(), torch.tensor(0.7).double()
    k = bent(d * z, d, torch.tensor(g).double())
    assert float((w * k).sum()) == pytest.approx(0, abs=1e-6)
    assert float((w * k.square()).sum()) == pytest.approx(0.49, rel=1e-6)
    assert float((w * k**3).sum()) / 0.7**3 == pytest.approx(g, abs=1e-4)


@pytest.mark.parametrize(("skewness", "std"), [(3.0, 20.0), (1.0, 20.0)])
def test_draws_of_skewed_errors_are_as_skewed(skewness, std):
    """Of 16,384 Gamma pixels that data say little of: as many bright ones as truths have, within a fifth and 4 sd of counts.

    The Gaussian, as the negative control, has a third of them or fewer; draws vary as much as they are off within a tenth.
    """
    shape, k, copies = (1, 64, 64), 4 / skewness**2, 4
    ones = torch.ones(copies, 1, *shape, dtype=torch.float64)
    K = Modulated(ones, Fourier(torch.ones(1, *shape, dtype=torch.float64)))
    likelihood = Likelihood(Identity(shape), GaussianNoise(std=std))
    bright = {"truth": 0, "skewed": 0, "Gaussian": 0}
    error, width = [], []
    for seed in range(4):
        at = torch.tensor(np.random.default_rng(seed).gamma(k, k**-0.5, (1, *shape))) - k**0.5
        y = likelihood.simulate(at, seed)[0]
        solver = conditioner(likelihood, y, Scalar(1.0), torch.float64)
        bright["truth"] += copies * int((at > 3).sum())
        for name, g in (("skewed", skewness), ("Gaussian", 0.0)):
            local = LocalConditioned(solver, K, 1.0, 1e-6, torch.full_like(ones[:, 0], g))
            draws = local.draw(torch.zeros_like(ones[:, 0]), rng(seed))[0]
            bright[name] += int((draws > 3).sum())
            if g:
                error.append(float((draws.mean(0) - at).square().mean()))
                width.append(float(draws.var(0).mean()) * (1 + 1 / copies))
    slack = 4 * (copies * bright["truth"]) ** 0.5
    assert abs(bright["skewed"] - bright["truth"]) < 0.2 * bright["truth"] + slack
    assert bright["Gaussian"] < bright["truth"] / 3 + slack
    assert sum(width) == pytest.approx(sum(error), rel=0.1)


def test_data_that_an_error_does_not_foresee_are_believed():
    """A source of 30 standard deviations on a sky that is thought to be blank; a blank sky stays as it was."""
    likelihood = Likelihood(PERIODIC, GaussianNoise(std=0.02))
    H = dense(PERIODIC.information(likelihood.noise, torch.float64).apply, SHAPE)
    noise = H.diagonal().sqrt().reshape(SHAPE)
    n, s = 400, 1.0
    a = torch.full((n, 2, *SHAPE), 1e-3, dtype=torch.float64)
    found, y = {}, {}
    for flux in (0.0, 1.0):
        truth = torch.zeros(1, *SHAPE, dtype=torch.float64)
        truth[0, 0, 3, 3] = flux
        y[flux] = likelihood.simulate(truth, 3)[0]
        solver = conditioner(likelihood, y[flux], STATIONARY, torch.float64)
        for scale in (1.0, math.inf):
            local = LocalConditioned(solver, Modulated(a, PARTS), s, 1e-6, noise=scale * noise)
            found[flux, scale] = local.draw(0 * a[:, 0], rng(4))[0]
    chi2 = lambda scale: float(likelihood.chi2(y[1.0], found[1.0, scale]).mean()) / D
    assert chi2(math.inf) > 5
    assert chi2(1.0) < 1.5
    # one pixel in 16,000 of a blank sky is beyond 4 standard deviations, of wider draws, too
    solver = conditioner(likelihood, y[0.0], STATIONARY, torch.float64)
    for wider in (1.0, 2.0):
        first, second = (
            LocalConditioned(solver, Modulated(a, PARTS), s, 1e-6, noise=scale * noise)
            for scale in (1.0, math.inf)
        )
        drawn = [each.draw(0 * a[:, 0], rng(4), wider)[0] for each in (first, second)]
        changed = drawn[0] != drawn[1]
        assert float(changed.flatten(1).any(1).double().mean()) < 0.02
