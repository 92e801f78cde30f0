"""Posteriors of measurements that are not linear and Gaussian: the references, and `SMC` against them."""

import math

import pytest
import torch

import scoreinv as si
from scoreinv.bench.exact import reference, score
from scoreinv.bench.scores import sliced_wasserstein
from scoreinv.bench.tempered import amplitudes, counts, outliers
from scoreinv.gaussian import Scalar
from scoreinv.samplers.run import fingerprint


def test_amplitudes_of_two_pixels_against_quadrature():
    """Evidence, mean and second moments by a sum over a fine grid; 4,000 chains: 4 standard errors are 6 % of a sd."""
    problem = amplitudes(2, seed=3)
    posterior, axis = problem.posterior, torch.linspace(-14, 14, 1401).double()
    x = torch.cartesian_prod(axis, axis)
    images = x.reshape(-1, 1, 1, 2)
    log_p = posterior.prior.log_prob(images) + posterior.likelihood.log_prob(posterior.y, images)
    exact = float(torch.logsumexp(log_p, 0)) + 2 * math.log(float(axis[1] - axis[0]))
    assert problem.log_evidence == pytest.approx(exact, abs=0.15)
    p, draws = torch.softmax(log_p, 0), problem.draws(4000, seed=9)
    for f in (lambda x: x, lambda x: x.square()):
        mean = p @ f(x)
        width = (p @ (f(x) - mean).square()).sqrt()
        assert float(((f(draws).mean(0) - mean) / width).abs().max()) < 0.1


def test_counts_against_importance_sampling():
    """A million draws of the prior know the evidence of eight counts; the chains agree."""
    problem = counts(16, 8, seed=1)
    posterior = problem.posterior
    x = posterior.prior.sample(1_000_000, seed=2)
    log_p = posterior.likelihood.log_prob(posterior.y, x)
    assert 1 / float(torch.softmax(log_p, 0).square().sum()) > 2000
    exact = float(torch.logsumexp(log_p, 0)) - math.log(len(x))
    assert problem.log_evidence == pytest.approx(exact, abs=0.1)


def test_smc_meets_the_true_likelihood_of_counts():
    """As exact draws within 1.8 floors (one set of them in 200 scatters so far); without the true likelihood it is not."""
    problem = counts(64, 32, seed=0)
    against = reference(problem, 300, 0)
    right = score(problem, si.SMC(), 300, 0, 100, against=against)
    assert right.wasserstein < 1.8 and right.chi == pytest.approx(1.0, abs=0.05)
    assert right.evidence_error == pytest.approx(0.0, abs=0.2)
    wrong = score(problem, si.Guided(), 300, 0, 300, against=against)
    assert wrong.wasserstein > 2.5
    draws = si.sample(problem.posterior, 4, si.Guided(4), seed=0)
    assert "in the place of the PoissonNoise the Gaussian near the data" in draws.weights
    floor = sliced_wasserstein(problem.draws(300, 50), against.x) / against.floor
    assert floor < 1.8


def test_smc_on_amplitudes():
    """Two signs of a signal whose phases are lost: every mode in its share, which DPS misses."""
    problem = amplitudes(2, seed=0)
    against = reference(problem, 500, 0)
    draws = si.sample(problem.posterior, 500, si.SMC(40), seed=0, island=500)
    distance = sliced_wasserstein(draws.x.flatten(1), against.x) / against.floor
    assert distance < 2.5
    assert draws.log_evidence == pytest.approx(problem.log_evidence, abs=0.3)


def test_outliers_have_an_evidence():
    """Where a few data are far off the weights still find log p(y) to a nat (0.3 nat of it is the scatter of islands)."""
    problem = outliers(64, 16, seed=0)
    draws = si.sample(problem.posterior, 400, si.SMC(), seed=0, island=100)
    assert draws.log_evidence == pytest.approx(problem.log_evidence, abs=1.0)


def test_samplers_that_go_by_the_gaussian_refuse_amplitudes():
    posterior = amplitudes(2, seed=0).posterior
    with pytest.raises(ValueError, match="Amplitude is not linear.*take SMC"):
        si.sample(posterior, 4, si.Guided(), seed=0)


def test_amplitudes_know_their_slope_and_their_blur():
    """The slope against autograd; mean and variance of |v + e| against 200,000 draws, where |v| is three errors long."""
    g = torch.Generator().manual_seed(0)
    inner = si.DenseOperator(torch.randn(3, 4, generator=g, dtype=torch.complex128), (1, 2, 2))
    A = si.Amplitude(inner)
    x = torch.randn(2, 1, 2, 2, generator=g, dtype=torch.float64, requires_grad=True)
    y = torch.randn(2, 3, generator=g, dtype=torch.float64)
    (exact,) = torch.autograd.grad((A(x) * y).sum(), x)
    torch.testing.assert_close(A.pull(x.detach(), y), exact)
    far = 10 * x.detach()[:1]
    error = 0.5 * torch.randn(200_000, 1, 2, 2, generator=g, dtype=torch.float64)
    seen = A(far + error)
    size, along, across = A.blurred(far, error)
    mean = (size.square() + across).sqrt()
    torch.testing.assert_close(mean[0], seen.mean(0), rtol=0.01, atol=0.0)
    torch.testing.assert_close(along[0], seen.var(0), rtol=0.1, atol=0.0)
    square = size.square() + along + across
    torch.testing.assert_close(square[0], seen.square().mean(0), rtol=0.01, atol=0.0)


def test_masked_amplitudes_do_not_count():
    """An error of no width leaves the likelihood, with and without a datum of infinite variance."""
    problem = amplitudes(8, seed=0).posterior
    x, none = problem.prior.sample(3, seed=1), Scalar(1e-20)
    for variance in (torch.ones(5), torch.tensor([1.0, math.inf, 1.0, 1.0, 1.0])):
        noise = si.GaussianNoise(variance=variance)
        likelihood = si.Likelihood(problem.likelihood.operator, noise)
        about = likelihood.log_prob_about(problem.y, x, none)
        torch.testing.assert_close(about, likelihood.log_prob(problem.y, x))


@pytest.mark.parametrize(
    "make, change",
    [(lambda: counts(16, 8, seed=1), si.PoissonNoise(0.6)),
     (lambda: outliers(64, 16, seed=1), si.StudentNoise(0.05, 2.5)),
     (lambda: amplitudes(2, seed=1), si.GaussianNoise(std=0.31))],
    ids=["counts", "outliers", "amplitudes"],
)  # fmt: skip
def test_islands_of_other_noise_are_not_taken_up(make, change):
    """The same data under other noise are another problem."""
    one = make().posterior
    likelihood = si.Likelihood(one.likelihood.operator, change)
    two = si.Posterior(one.prior, likelihood, one.y)
    assert fingerprint(one, si.SMC(), 0, 4) == fingerprint(make().posterior, si.SMC(), 0, 4)
    assert fingerprint(one, si.SMC(), 0, 4) != fingerprint(two, si.SMC(), 0, 4)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: si.Amplitude(si.Identity((1, 2, 2))), "Identity makes real data"),
        (
            lambda: si.Likelihood(
                amplitudes(2, 0).posterior.likelihood.operator, si.PoissonNoise(1.0)
            ),
            "noise of amplitudes is a PoissonNoise",
        ),
        (
            lambda: si.Likelihood(
                amplitudes(2, 0).posterior.likelihood.operator,
                si.GaussianNoise(covariance=torch.eye(2).double()),
            ),
            "takes std or variance, not a spectrum or a matrix",
        ),
    ],
)
def test_mistakes_with_amplitudes(make, message):
    with pytest.raises(ValueError, match=message):
        make()
