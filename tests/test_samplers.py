"""The samplers against posteriors known in closed form."""

import math

import pytest
import torch

import scoreinv as si
from scoreinv.bench.exact import score
from scoreinv.bench.problems import (
    four_fields,
    grid_mixture,
    power_law_mixture,
)
from scoreinv.conditioning.local import DOUBT
from scoreinv.gaussian import Dense, Diagonal, Fourier, Gaussian, Scalar
from scoreinv.operators import gaussian_psf
from scoreinv.priors.base import Prior
from scoreinv.samplers import guided
from scoreinv.samplers.path import Trace, Twisted, descend_together, path_integral
from scoreinv.samplers.run import _worn
from scoreinv.samplers.smc import (
    effective,
    in_order,
    per_e_fold,
    spread,
    systematic,
    variance_rate,
)
from scoreinv.streams import stream
from tests import analytic
from tests.analytic import dense
from tests.priors import Knowing


def gaussian_prior(shape, kind="fourier", seed=0):
    g = torch.Generator().manual_seed(seed)
    mean = torch.randn(shape, generator=g, dtype=torch.float64)
    if kind == "fourier":
        return si.GaussianPrior(mean, Fourier(analytic.power_law(*shape[-2:])))
    if kind == "diagonal":
        return si.GaussianPrior(mean, Diagonal(torch.rand(shape, generator=g).double() + 0.1))
    d = math.prod(shape)
    F = torch.randn(d, d, generator=g, dtype=torch.float64) / math.sqrt(d)
    return si.GaussianPrior(mean, Dense(F @ F.T + 0.1 * torch.eye(d, dtype=torch.float64)))


def operators(shape):
    g = torch.Generator().manual_seed(1)
    d = math.prod(shape)
    yield (
        "dense",
        si.DenseOperator(
            torch.randn(max(1, d // 2), d, generator=g, dtype=torch.float64) / math.sqrt(d), shape
        ),
    )
    yield "mask", si.Mask(torch.rand(shape, generator=g) < 0.6)
    if d >= 64:
        k = torch.rand(5, 5, generator=g, dtype=torch.float64)
        yield "blur", si.PSFConvolution(k / k.sum(), shape)
        uv = (torch.rand(150, 2, generator=g, dtype=torch.float64) - 0.5) * 3e5
        yield "uv", si.NUFFT(uv, shape, 0.4) @ si.PSFConvolution(k / k.sum(), shape)


def exact_posterior(prior, likelihood, y):
    """The Gaussian posterior as dense matrices, and its log-evidence."""
    A = analytic.dense(likelihood.operator, prior.shape)
    S = torch.eye(len(A), dtype=torch.float64) * float(likelihood.noise.covariance.variance)
    C = analytic.dense(prior.moments.covariance.apply, prior.shape)
    truth = analytic.gaussian(prior.moments.mean.flatten(), C)
    return analytic.posterior(truth, A, S, analytic.flat(y))


def whitened(draws, exact):
    """Draws as white residuals of the exact posterior, with shape (n, d)."""
    r = (draws.x.double().flatten(1) - exact.mean).T
    return torch.linalg.solve_triangular(torch.linalg.cholesky(exact.covariance), r, upper=False).T


CASES = [
    (shape, name, ratio)
    for shape in ((1, 1, 1), (1, 2, 2), (1, 8, 8))
    for name, _ in operators(shape)
    for ratio in (1e-4, 1.0, 1e2)
] + [((1, 16, 16), "blur", 1e-2), ((1, 32, 32), "mask", 1.0), ((1, 32, 32), "uv", 1e-2)]


# with exact scores of a Gaussian every weighted step and every move is exact, however few there are; guided steps are of
# second order
SAMPLERS = {"smc": si.SMC(3), "anneal": si.Anneal(3, 1), "guided": si.Guided()}


@pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS)
@pytest.mark.parametrize(("shape", "name", "ratio"), CASES)
def test_linear_gaussian_suite(shape, name, ratio, sampler):
    """Mean, width and evidence of a Gaussian posterior.

    Of N white residuals the rms has the standard error (2 N)^-1/2 = 0.007; the bound of 0.03 is four of them, one false
    alarm in 16,000 per case.
    """
    A = dict(operators(shape))[name]
    prior = gaussian_prior(shape, "dense" if math.prod(shape) < 64 else "fourier")
    x = prior.sample(1, seed=1)
    power = (A(x).abs() ** 2).mean()
    likelihood = si.Likelihood(A, si.GaussianNoise(std=float((ratio * power).sqrt())))
    y = likelihood.simulate(x, seed=2)[0]
    exact, evidence = exact_posterior(prior, likelihood, y)
    d = math.prod(shape)
    n = max(64, math.ceil(10_000 / d))
    posterior = si.Posterior(prior, likelihood, y)
    draws = si.sample(posterior, n, sampler, seed=3, island=min(n, 512))
    w = whitened(draws, exact)
    assert float(w.square().mean().sqrt()) == pytest.approx(1.0, abs=0.03)
    offset = float(w.mean(0).square().mean().sqrt())
    monte_carlo = 1 / math.sqrt(n)
    assert offset < 0.03 + monte_carlo * (1 + 4 / math.sqrt(2 * d))
    assert draws.log_evidence == pytest.approx(evidence, abs=0.3 if d <= 64 else 1.0)
    assert (draws.weights == "used throughout") == isinstance(sampler, si.SMC)


@pytest.mark.slow
@pytest.mark.parametrize("ratio", [1e-4, 1e-2, 1.0, 1e2])
@pytest.mark.parametrize("name", ["mask", "blur", "uv"])
def test_linear_gaussian_suite_at_64x64(name, ratio):
    """d = 4,096: width and mean; 64 draws of 4,096 white residuals have a standard error of 0.14 % and 1/8."""
    shape = (1, 64, 64)
    A = dict(operators(shape))[name]
    prior = gaussian_prior(shape)
    x = prior.sample(1, seed=1)
    power = (A(x).abs() ** 2).mean()
    likelihood = si.Likelihood(A, si.GaussianNoise(std=float((ratio * power).sqrt())))
    y = likelihood.simulate(x, seed=2)[0]
    exact, _ = exact_posterior(prior, likelihood, y)
    posterior = si.Posterior(prior, likelihood, y)
    draws = si.sample(posterior, 64, si.SMC(levels=2), seed=3, island=64)
    w = whitened(draws, exact)
    assert float(w.square().mean().sqrt()) == pytest.approx(1.0, abs=0.01)
    assert float(w.mean(0).square().mean().sqrt()) < 0.03 + 1 / 8


def informed_mean(island):
    """Instead of a draw of x_0 given the data."""
    return island.denoised + island.level.conditioned.shift(island.denoised)


def test_a_kernel_without_covariance_is_caught(monkeypatch):
    """Negative control: steps towards the mean of x_0, as if it were known, fail the suite's bound by far."""
    prior = gaussian_prior((1, 8, 8))
    likelihood = si.Likelihood(dict(operators(prior.shape))["blur"], si.GaussianNoise(std=0.3))
    y = likelihood.simulate(prior.sample(1, seed=1), seed=2)[0]
    posterior = si.Posterior(prior, likelihood, y, tolerance=1e-6)
    exact, _ = exact_posterior(prior, likelihood, y)
    right = si.sample(posterior, 256, si.Anneal(3, 0), seed=3, island=256)
    assert float(whitened(right, exact).square().mean().sqrt()) == pytest.approx(1.0, abs=0.03)
    monkeypatch.setattr(Twisted, "_informed", informed_mean)
    wrong = si.sample(posterior, 256, si.Anneal(3, 0), seed=3, island=256)
    assert abs(float(whitened(wrong, exact).square().mean().sqrt()) - 1) > 0.1


def test_rescaling_everything_changes_nothing():
    """Units: data, operator and prior times any factor give the same draws, rescaled."""
    prior = si.MixturePrior([0.3, 0.7], [gaussian_prior((1, 1, 8), "diagonal", s) for s in (0, 1)])
    matrix = torch.randn(3, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y = torch.tensor([0.3, -1.0, 0.5], dtype=torch.float64)
    plain = si.Posterior(
        prior, si.Likelihood(si.DenseOperator(matrix, prior.shape), si.GaussianNoise(std=0.2)), y
    )
    scaled = si.Posterior(
        prior.rescaled(1e-6),
        si.Likelihood(si.DenseOperator(1e9 * matrix, prior.shape), si.GaussianNoise(std=0.2e3)),
        1e3 * y,
    )
    a, b = (si.sample(p, 32, si.SMC(20), seed=0) for p in (plain, scaled))
    torch.testing.assert_close(1e-6 * a.x, b.x, rtol=1e-6, atol=1e-12)
    assert a.log_evidence - 3 * math.log(1e3) == pytest.approx(b.log_evidence, abs=1e-6)


@pytest.mark.parametrize("batch", [3, 10])
@pytest.mark.parametrize("sampler", [si.SMC(12), si.Anneal(6, 1), si.Guided(8)], ids=repr)
def test_islands_in_one_batch(batch, sampler):
    """The posterior is the same from 1, 3 or 10 islands in a call of the network; so is the cost of a draw."""
    posterior = grid_mixture(8, 1, seed=0).posterior
    one = si.sample(posterior, 40, sampler, seed=4, island=4)
    many = si.sample(posterior, 40, sampler, seed=4, island=4, batch=batch)
    torch.testing.assert_close(many.x, one.x, rtol=0.0, atol=1e-8)
    torch.testing.assert_close(many.island_log_evidence, one.island_log_evidence)
    assert many.evaluations == one.evaluations and many.weights == one.weights


def test_islands_do_not_know_of_each_other():
    """The draws of island j are the same however many others there are, and differ from those of another seed."""
    prior = gaussian_prior((1, 8, 8))
    A = dict(operators(prior.shape))["blur"]
    likelihood = si.Likelihood(A, si.GaussianNoise(std=0.1))
    posterior = si.Posterior(prior, likelihood, likelihood.simulate(prior.sample(1, 0), 1)[0])
    one, three, ten = (
        si.sample(posterior, n, si.Anneal(5, 1), seed=4, island=4).x for n in (4, 12, 40)
    )
    assert torch.equal(one, ten[:4]) and torch.equal(three, ten[:12])
    assert not torch.equal(one, si.sample(posterior, 4, si.Anneal(5, 1), seed=5, island=4).x)


class Misinformed(Prior):
    """A prior whose moments are wrong."""

    def __init__(self, prior, moments):
        self.prior, self.moments = prior, moments
        self.shape, self.dtype, self.identity = prior.shape, prior.dtype, prior.identity
        self.sigma_min, self.sigma_max = prior.sigma_min, prior.sigma_max

    def denoise(self, x, sigma):
        return self.prior.denoise(x, sigma)


def misleading():
    """A posterior whose twist is far too sure."""
    prior = gaussian_prior((1, 8, 8))
    wrong = si.GaussianPrior(0 * prior.moments.mean, 0.01).moments
    likelihood = si.Likelihood(si.Identity(prior.shape), si.GaussianNoise(std=0.3))
    y = likelihood.simulate(prior.sample(1, 0), 1)[0]
    return si.Posterior(Misinformed(prior, wrong), likelihood, y)


def test_collapsed_weights_are_dropped_and_the_result_says_so():
    draws = si.sample(misleading(), 8, si.SMC(10), seed=0, island=4)
    assert "dropped: at sigma" in draws.weights and "rose above 20" in draws.weights
    assert "path integral" in draws.weights and not draws.ess.isfinite().any()
    # 2 * 40 - 1 evaluations of the guided path, and two scouts of 32 particles over 10 levels at most, shared by 8 draws
    assert 79 < draws.evaluations <= 79 + 2 * 10 * 32 / 8


def test_islands_whose_weights_collapse_follow_the_guided_path(tmp_path):
    """The draws are those of `Guided`, on a second run too, which finds the scouts' verdict in the first island."""
    posterior, settings = misleading(), {"seed": 0, "island": 4, "folder": tmp_path}
    whole = si.sample(posterior, 12, si.SMC(10), **settings)
    for name in ("island-00001", "island-00002"):
        (tmp_path / f"{name}.safetensors").unlink()
    again = si.sample(posterior, 12, si.SMC(10), batch=2, **settings)
    torch.testing.assert_close(again.x, whole.x, rtol=0.0, atol=1e-5)
    assert again.evaluations == whole.evaluations and again.weights == whole.weights
    guided = si.sample(posterior, 12, si.Guided(), seed=0, island=4)
    torch.testing.assert_close(guided.x, whole.x)


def test_one_scout_alone_does_not_drop_weights(monkeypatch):
    """Weights are used where any scout keeps them."""
    from scoreinv.samplers import run

    problem = grid_mixture(8, 1, seed=3)
    verdicts = iter([3.0, 0.0])
    walk = run.descend_together

    def doubtful(prior, islands):
        yield from walk(prior, islands)
        for island in islands:
            if math.isfinite(getattr(island, "drop_above", math.inf)):
                island.trace.collapsed_at = next(verdicts)

    monkeypatch.setattr(run, "descend_together", doubtful)
    draws = si.sample(problem.posterior, 32, si.SMC(20), seed=1)
    assert draws.weights == "used throughout" and next(verdicts, None) is None
    verdicts = iter([3.0, 2.0])
    draws = si.sample(problem.posterior, 32, si.SMC(20), seed=1)
    assert "dropped: at sigma = 2" in draws.weights


def test_weights_are_ratios_of_likelihoods():
    """The factors of a step, before and after the covariance of the prior is measured, against dense Gaussians."""
    problem = power_law_mixture(16, 4, seed=2).posterior
    island = si.SMC(5).island(problem, 6, stream(0))
    walk, s = island.descend(), 0.7
    next(walk)
    island.level = problem.level(s)
    island.x = problem.gaussian_draw(6, stream(1))
    sigma = torch.full((6,), s, dtype=torch.float64)
    island.denoised = problem.prior.denoise(island.x, sigma)
    foreseen = island.denoised + 0.1 * torch.randn(6, 1, 1, 16, generator=stream(2))
    A, std = dense_operator(problem), 0.05

    def log_likelihood(m, K):
        covariance = A @ dense(K.apply, (1, 1, 16)) @ A.T + std**2 * torch.eye(4)
        Am = m.flatten(1).double() @ A.T
        return torch.distributions.MultivariateNormal(Am, covariance).log_prob(problem.y)

    before, weigh = island.level, island._weigh(foreseen, measure=True)
    x, level, _ = next(weigh)
    with pytest.raises(StopIteration) as stop:
        weigh.send(problem.prior.denoise(x, sigma))
    assert level == s and island.level.prior is not before.prior
    after = log_likelihood(island.denoised, island.level.covariance)
    expected = after - log_likelihood(foreseen, before.covariance)
    torch.testing.assert_close(stop.value.value, expected, rtol=1e-6, atol=1e-6)


def dense_operator(posterior):
    """The operator's matrix, with shape (m, d)."""
    return dense(posterior.likelihood.operator.forward, posterior.shape)


def test_choosing_a_mode_is_no_collapse():
    """Most particles of a scout may lose their mode at once; those that stay carry on."""
    verdicts = []
    for seed in range(20):
        scout = si.SMC().scout(grid_mixture(80, 1, seed).posterior, 32, stream(seed))
        for _ in descend_together(scout.posterior.prior, [scout]):
            pass
        verdicts.append(scout.trace.collapsed_at > 0)
    assert sum(verdicts) <= 1


def test_guided_steps_are_of_second_order():
    """Twice the levels, a quarter of the error in the width of a Gaussian posterior; first order would halve it.

    With the widths exact to 0.1 per cent (2^20 values) the ratio of the errors is good to a few per cent.
    """
    prior = si.GaussianPrior(torch.zeros(1, 1, 16, dtype=torch.float64), 1.0)
    likelihood = si.Likelihood(si.Identity(prior.shape), si.GaussianNoise(std=3.0))
    posterior = si.Posterior(prior, likelihood, torch.zeros(1, 1, 16, dtype=torch.float64))
    exact = (1 / (1 + 1 / 9)) ** 0.5
    errors = [
        float(si.sample(posterior, 2**16, si.Guided(levels), seed=0, island=2**16).x.std()) / exact
        - 1
        for levels in (4, 8)
    ]
    assert 2.8 < errors[0] / errors[1] < 5.6


@pytest.mark.parametrize(
    ("sampler", "options"),
    [(si.SMC, {"levels": 0}), (si.Anneal, {"moves": -1}), (si.Guided, {"levels": 1})],
)
def test_refused_options(sampler, options):
    with pytest.raises(ValueError, match="expected at least 2 levels and no fewer than 0 moves"):
        sampler(**options)


def test_unweighted_samplers_are_labelled():
    prior = gaussian_prior((1, 4, 4), "dense")
    likelihood = si.Likelihood(si.Identity(prior.shape), si.GaussianNoise(std=0.3))
    posterior = si.Posterior(prior, likelihood, likelihood.simulate(prior.sample(1, 0), 1)[0])
    assert "moves only" in si.sample(posterior, 4, si.Anneal(4, 1), seed=0, island=4).weights
    guided = si.sample(posterior, 4, si.Guided(4), seed=0, island=4)
    assert "approximate" in guided.weights and guided.evaluations == 15


def test_path_integral_agrees_with_the_weights():
    """Evidence by the path integral and by the weights, on a mixture; both against the exact value.

    The standard errors come from the islands; 5 of them allow one false alarm in a million.
    """
    problem = power_law_mixture(16, 4, seed=2)
    weighted = si.sample(problem.posterior, 128, si.SMC(60), seed=0)
    path = si.sample(problem.posterior, 128, si.Anneal(60, 2), seed=0)
    assert abs(weighted.log_evidence - problem.log_evidence) < 0.1 + 5 * weighted.log_evidence_std
    assert abs(path.log_evidence - problem.log_evidence) < 0.3 + 5 * path.log_evidence_std


def mean_scores(problem, sampler):
    """Sliced Wasserstein over its noise floor and Mahalanobis radius, means of four runs of 192 draws."""
    scores = [score(problem, sampler, n=192, seed=seed) for seed in range(4)]
    return sum(s.wasserstein for s in scores) / 4, sum(s.mahalanobis for s in scores) / 4


@pytest.mark.parametrize("problem", [grid_mixture(8, 1, 11), power_law_mixture(16, 4, 11)])
def test_mixture_posteriors(problem):
    """Such means scatter by 0.3 around 1.1 on the first problem, where modes are far apart; the bound is four of that."""
    wasserstein, mahalanobis = mean_scores(problem, si.SMC())
    assert wasserstein < 2.3
    assert mahalanobis == pytest.approx(1.0, abs=0.1)


def test_guided_draws_miss_the_weights_of_far_modes():
    """Negative control of the test above."""
    assert mean_scores(grid_mixture(8, 1, 11), si.Guided(20))[0] > 2.3


@pytest.mark.slow
def test_four_fields_at_64x64():
    result = score(four_fields(5), si.SMC(25), n=96, seed=0)
    assert result.mahalanobis == pytest.approx(1.0, abs=0.03)
    assert abs(result.evidence_error) < 0.3 + 4 * result.evidence_std


def test_steps_are_fine_only_where_there_is_news():
    """A Gaussian prior brings none: a step and a measurement from each of 10 levels to the next; far modes bring some."""
    prior = gaussian_prior((1, 8, 8))
    likelihood = si.Likelihood(si.Identity(prior.shape), si.GaussianNoise(std=0.3))
    y = likelihood.simulate(prior.sample(1, 0), 1)[0]
    plain, far = si.Posterior(prior, likelihood, y), grid_mixture(8, 2, seed=3).posterior
    costs = []
    for posterior in (plain, far):
        island = si.SMC(10).island(posterior, 32, stream(0))
        for _ in descend_together(posterior.prior, [island]):
            pass
        costs.append(island.trace.evaluations)
    assert costs[0] == 2 * 10 and 2 * 10 < costs[1] < 5 * 10


def test_evaluations_are_those_of_all_particles():
    """Ten draws need an island of sixteen, all of which cost."""
    prior = gaussian_prior((1, 4, 4), "dense")
    likelihood = si.Likelihood(si.Identity(prior.shape), si.GaussianNoise(std=0.3))
    posterior = si.Posterior(prior, likelihood, likelihood.simulate(prior.sample(1, 0), 1)[0])
    assert si.sample(posterior, 10, si.Guided(4), seed=0).evaluations == pytest.approx(15 * 1.6)


def test_spare_particles_make_draws_distinct():
    problem = grid_mixture(8, 2, seed=3)
    distinct = [
        len(si.sample(problem.posterior, 128, si.SMC(20, particles=k), seed=1).x.unique(dim=0))
        for k in (1, 3)
    ]
    assert distinct[0] < 110 and distinct[1] > 120


def test_resampling_in_order_keeps_the_shares_of_modes():
    """Two far modes of 300 and 200 particles in any order: each gets its share of 50 draws to within one, every time.

    Systematic resampling of shuffled particles would be off by more, half of the time.
    """
    g = stream(0)
    x = torch.randn(500, 1, 1, 8, generator=g, dtype=torch.float64)
    upper = torch.randperm(500, generator=g) < 200
    x[upper] += 100
    C, w = si.GaussianPrior(torch.zeros(1, 1, 8), 1.0).moments.covariance, torch.full((500,), 2e-3)
    order = in_order(x, C)
    kept = [upper[order[systematic(w, 50, stream(1, i))]].sum() for i in range(40)]
    assert all(abs(int(k) - 20) <= 1 for k in kept)
    kept = [upper[systematic(w, 50, stream(1, i))].sum() for i in range(40)]
    assert sum(abs(int(k) - 20) > 1 for k in kept) > 10


def test_systematic_resampling_is_unbiased():
    """Every particle is copied floor(n w) or one more times."""
    w = torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=torch.float64)
    for seed in range(20):
        copies = torch.bincount(systematic(w, 4, stream(seed)), minlength=4)
        assert bool(((copies - 4 * w).abs() < 1).all())


@pytest.mark.parametrize("steps", [5, 50, 500])
def test_collapse_does_not_depend_on_the_number_of_levels(steps):
    """Log-weights with d log w / d log sigma = v z, z standard normal, have the spread v dt in a step of dt e-folds."""
    levels = torch.logspace(1, -1, steps).tolist()
    dt = math.log(levels[0] / levels[1])
    assert variance_rate([1.5 * dt] * (steps - 1), levels) == pytest.approx(1.5**2, rel=1e-4)


def test_collapse_is_a_matter_of_the_last_e_fold():
    levels = torch.logspace(2, -2, 80).tolist()
    dt = math.log(levels[0] / levels[1])
    assert variance_rate([9 * dt] * 20 + [dt] * 59, levels) == pytest.approx(1.0, rel=1e-4)


def test_one_short_step_is_no_e_fold():
    """Particles lost in the first step count for an e-fold, not for the step's share of one."""
    assert per_e_fold([2.0], [1.0, 0.9]) == pytest.approx(2.0)
    assert per_e_fold([2.0, 3.0, 3.0], [8.0, 2.0, 1.0, 0.25]) == pytest.approx(6.0 / math.log(8))


def test_the_spread_of_weights_ignores_a_stray_particle():
    z = torch.randn(100_001, generator=stream(0), dtype=torch.float64)
    assert spread(2 * z) == pytest.approx(2.0, rel=0.02)
    z[0] = -1e6
    assert spread(2 * z) == pytest.approx(2.0, rel=0.02)


def test_effective_sample_size_of_known_weights():
    assert effective(torch.zeros(10)) == pytest.approx(1.0)
    assert effective(torch.tensor([0.0, -1e9])) == pytest.approx(0.5)


def test_path_integral_of_a_known_slope():
    """A slope of s^2 integrates to (s_max^2 - 0) / 2."""
    levels = torch.logspace(0, -3, 400).tolist()
    assert path_integral(levels, [s**2 for s in levels]) == pytest.approx(0.5, rel=1e-3)


def test_guided_draws_follow_the_error_that_a_prior_knows():
    """Exact for a Gaussian prior: width within 2 % (0.4 % statistical), in 6 evaluations.

    A prior that takes itself for four times as sure is found out: its draws heed the data too late.
    """
    C = Fourier(analytic.power_law(8, 8))
    prior = Knowing(torch.zeros(1, 8, 8), C)
    likelihood = si.Likelihood(si.Identity(prior.shape), si.GaussianNoise(std=0.3))
    y = likelihood.simulate(prior.sample(1, 0), 1)[0]
    P = C.spectrum
    exact = float((0.09 * P / (P + 0.09)).mean()) ** 0.5
    posterior = si.Posterior(prior, likelihood, y)
    draws = si.sample(posterior, 2000, si.Guided(6), seed=0, island=2000)
    assert draws.evaluations == 6
    assert float(draws.x.var(0).mean()) ** 0.5 == pytest.approx(exact, rel=0.02)
    finer = si.sample(posterior, 2000, si.Guided(20), seed=0, island=500)
    assert finer.log_evidence == pytest.approx(posterior.gaussian_log_evidence, abs=1.0)
    prior.factor = 0.25
    knows_less = si.Posterior(prior, likelihood, y)
    wrong = si.sample(knows_less, 500, si.Guided(6), seed=0, island=500)
    assert abs(float(wrong.x.var(0).mean()) ** 0.5 / exact - 1) > 0.1
    for other in (si.Guided(6, local=False), si.SMC(6)):
        assert si.sample(posterior, 4, other, seed=0).evaluations != 6


class Pixels(si.Prior):
    """Independent pixels, dark or bright, that know the variance of their errors."""

    shape, dtype, sigma_min, sigma_max = (1, 8, 8), torch.float64, 1e-3, 20.0
    identity = {"prior": "pixels"}
    share, at, width = (torch.tensor(v).double() for v in ([0.7, 0.3], [0.0, 1.0], [0.1, 0.3]))
    variance = float((share * (width**2 + at**2)).sum() - (share * at).sum() ** 2)
    moments = Gaussian(torch.full(shape, 0.3).double(), Scalar(variance))

    def given(self, x, sigma):
        """Mean and variance of x_0, and the logarithm of the density of x."""
        x, v, s2 = x[..., None], self.width**2, sigma[..., None] ** 2
        log_p = self.share.log() - 0.5 * ((x - self.at) ** 2 / (v + s2) + (v + s2).log())
        share, mean = log_p.softmax(-1), (v * x + s2 * self.at) / (v + s2)
        D = (share * mean).sum(-1)
        variance = (share * (v * s2 / (v + s2) + mean**2)).sum(-1) - D**2
        return D, variance, log_p.logsumexp(-1) - 0.5 * math.log(2 * math.pi)

    def denoise(self, x, sigma):
        return self.given(x, sigma.reshape(-1, 1, 1, 1))[0]

    def denoise_with_error(self, x, sigma):
        D, variance, _ = self.given(x, sigma.reshape(-1, 1, 1, 1))
        return D, variance.clamp_min(1e-12).sqrt()[:, None]

    def correlation(self, sigma):
        return Fourier(torch.ones(1, *self.shape, dtype=torch.float64))


@pytest.mark.parametrize("noise", [0.3, 0.1, 0.03])
def test_local_steps_know_the_evidence_of_a_prior_that_is_not_gaussian(noise, monkeypatch):
    """log p(y) of 64 bimodal pixels within 6 nat: their errors are not Gaussian.

    Half as much learned of them, the negative control, would be off by more.
    """
    prior = Pixels()
    likelihood = si.Likelihood(si.Identity(prior.shape), si.GaussianNoise(std=noise))
    bright = torch.rand(1, *prior.shape, generator=stream(1), dtype=torch.float64) < 0.3
    z = torch.randn(1, *prior.shape, generator=stream(2), dtype=torch.float64)
    truth = torch.where(bright, 1 + 0.3 * z, 0.1 * z)
    y = likelihood.simulate(truth, 3)[0]
    exact = float(prior.given(y, torch.full_like(y, noise))[2].sum())
    posterior = si.Posterior(prior, likelihood, y)
    settings = {"n": 1000, "sampler": si.Guided(), "seed": 0, "island": 250}
    off = si.sample(posterior, **settings).log_evidence - exact
    half = lambda levels, slopes: 0.5 * path_integral(levels, slopes)
    monkeypatch.setattr(guided, "path_integral", half)
    short = si.sample(posterior, **settings).log_evidence - exact
    assert abs(off) < 6 < abs(short)


def test_excess_noise_makes_up_for_detail_that_a_prior_loses():
    """Draws of an exact prior have the posterior's variance, within 2 % (0.3 % statistical); more in each step widens them.

    What data know well it leaves alone. The noise of these ratios is 0.3 %.
    """
    prior = Knowing(torch.zeros(1, 8, 8), Fourier(analytic.power_law(8, 8)))
    images, P = prior.sample(1, 1), prior.moments.covariance.spectrum

    def widths():
        for std in (0.3, 0.03):
            likelihood = si.Likelihood(si.Identity(prior.shape), si.GaussianNoise(std=std))
            posterior = si.Posterior(prior, likelihood, likelihood.simulate(images, 1)[0])
            x = si.sample(posterior, 2000, si.Guided(20), seed=0, island=2000).x
            yield float(x.var(0).sum()) / float((std**2 * P / (P + std**2)).sum())

    data, good_data = widths()
    assert data == pytest.approx(1, rel=0.02) and good_data == pytest.approx(1, rel=0.02)
    prior.excess_noise = 1.0
    more_data, more_good_data = widths()
    assert more_data > 1.01 * data
    assert more_good_data < 1.01 * good_data
    assert prior.rescaled(2.0).excess_noise == 1.0
    for s, share in ((0.1, 0), (0.2, 1), (1.4, 1), (1.6, 1 / 3), (50, 1 / 3)):
        assert prior.widening(s * prior.deviation) == pytest.approx((1 + share) ** 0.5)


@pytest.mark.parametrize(
    ("name", "levels", "row", "column", "peak"),
    [("galaxy64", 15, 9, 52, 0.15), ("disc64", 20, 2, 58, 0.15)],
)
def test_a_companion_that_the_prior_does_not_expect_is_found(
    name, levels, row, column, peak, monkeypatch
):
    """A second source far from the first, of 10 standard deviations in the data; every draw must have it."""
    prior = si.load_prior(name)
    galaxy = prior.sample(1, seed=11, steps=20)
    companion = torch.zeros_like(galaxy)
    companion[0, 0, row : row + 3, column : column + 3] = peak
    around = (slice(None), 0, slice(max(row - 4, 0), row + 7), slice(column - 4, column + 7))
    likelihood = si.Likelihood(
        si.PSFConvolution(gaussian_psf(3.8), prior.shape), si.GaussianNoise(std=0.02)
    )
    y = likelihood.simulate(galaxy + companion, seed=6)[0]
    seen = {}
    for doubt in (DOUBT, math.inf):
        monkeypatch.setattr("scoreinv.conditioning.local.DOUBT", doubt)
        draws = si.sample(
            si.Posterior(prior, likelihood, y), 8, si.Guided(levels), seed=7, island=8
        )
        seen[doubt] = draws.x[around].sum((1, 2)) / companion.sum()
    # the posterior's own scatter is about 0.2; what is lost is lost altogether
    assert (seen[DOUBT] > 0.5).all()
    # without the data's doubt some draws lose it: the test can fail
    assert (seen[math.inf] < 0.1).any()


def test_draws_that_are_copies_of_a_few_say_so():
    """A resampled handful is no posterior, whatever the weights were called."""
    x = torch.randn(2, 1, 4, 4).repeat_interleave(8, 0)
    sound = Trace(ess=[0.6, 0.9])
    fine, all_of_it = torch.randn(16, 1, 4, 4), 16.0
    assert _worn(fine, [(x, sound, 0.0)], all_of_it) == ""
    assert _worn(fine, [(x, Trace(), 0.0)], all_of_it) == ""  # no weights on the way
    assert "2 of 16 draws differ" in _worn(x, [(x, sound, 0.0)], all_of_it)
    assert "0.8 particles" in _worn(fine, [(x, Trace(ess=[0.05]), 0.0)], all_of_it)
    assert "1.5 particles" in _worn(fine, [(x, sound, 0.0)], 1.5)


def test_options_of_weights_are_checked():
    for wrong in ({"resample_below": 5}, {"resample_below": -1}, {"drop_above": float("nan")}):
        with pytest.raises(ValueError, match="expected 0 to 1, and above 0"):
            si.SMC(**wrong)


class Lattice(Knowing):
    """A prior whose denoiser sees too much light in every other row and column, as upsampling may leave it."""

    def denoise(self, x, sigma):
        denoised = super().denoise(x, sigma)
        denoised[..., ::2, ::2] += 0.3
        return denoised


def grid(x):
    """How much brighter the lit pixels are on average, with shape (C, H, W), than their dark neighbours."""
    return float((x.mean(0)[0, ::2, ::2] - x.mean(0)[0, 1::2, 1::2]).mean())


def test_what_a_network_does_to_single_pixels_averages_out_where_it_is_symmetric():
    """The grid in the mean of 500 draws is four times weaker or better when images are turned; the light is the same."""
    prior = Lattice(torch.zeros(1, 8, 8), Fourier(analytic.power_law(8, 8)))
    likelihood = si.Likelihood(si.Identity(prior.shape), si.GaussianNoise(std=0.3))
    y = likelihood.simulate(si.GaussianPrior.sample(prior, 1, 1), 1)[0]
    found, light = [], []
    for symmetric in (False, True):
        prior.symmetric = symmetric
        posterior = si.Posterior(prior, likelihood, y)
        x = si.sample(posterior, 500, si.Guided(20), seed=0, island=500).x
        x = x - posterior.gaussian_draw(500, stream(3))
        found.append(grid(x))
        light.append(float(x.mean()))
    assert found[0] > 0.1
    assert abs(found[1]) < 0.25 * found[0]
    assert light[1] == pytest.approx(light[0], abs=0.03)


def test_draws_of_a_symmetric_prior_have_no_grid_either():
    """The noise of the mean of 2,000 draws leaves a grid of about 0.01."""
    prior = Lattice(torch.zeros(1, 8, 8), Fourier(analytic.power_law(8, 8)))
    plain = si.Prior.sample(prior, 2000, 0, steps=20)
    prior.symmetric = True
    turned = si.Prior.sample(prior, 2000, 0, steps=20)
    assert grid(plain) > 0.1
    assert abs(grid(turned)) < 0.25 * grid(plain)
    torch.testing.assert_close(si.Prior.sample(prior, 3, 0, steps=20), turned[:3])


@pytest.mark.parametrize("shape", [(1, 6, 6), (2, 4, 8)])
def test_turned_images_are_turned_back(shape):
    prior = Knowing(torch.zeros(shape), Fourier(torch.ones(shape, dtype=torch.float64)))
    x = torch.randn(200, 3, *shape, generator=stream(1))
    assert torch.equal(prior.turns([stream(2)] * 200).there(x), x)
    prior.symmetric = True
    for twin in (prior, prior.rescaled(2.0)):
        turns = twin.turns([stream(2)] * 200)
        turned = turns.there(x)
        assert turned.shape == x.shape and torch.equal(turns.back(turned), x)
        corner = torch.zeros(200, *shape)
        corner[:, :, 0, 1] = 1
        seen = turns.there(corner).flatten(1).argmax(1).unique()
        assert len(seen) == (8 if shape[-1] == shape[-2] else 4)
