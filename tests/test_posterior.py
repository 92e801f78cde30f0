"""The path of targets, and what is learned about the prior on the way."""

import pytest
import torch

import scoreinv as si
from scoreinv.gaussian import Diagonal, Fourier
from scoreinv.posterior import amplitude_by_evidence
from scoreinv.samplers.anneal import local_precision
from scoreinv.samplers.smc import local_covariance
from scoreinv.streams import stream
from tests import analytic


def noisy(prior, n, s):
    """Draws of the prior at noise level s."""
    x = prior.sample(n, seed=0)
    return x + s * torch.randn(x.shape, generator=stream(1), dtype=x.dtype)


@pytest.mark.parametrize("s", [0.1, 1.0, 10.0])
def test_local_precision_of_a_gaussian(s):
    """1 / (C + s^2): in every direction, up to the width of a band (a factor of 2^1/2) and chance (1 per cent)."""
    C = Diagonal(torch.logspace(-2, 2, 16, dtype=torch.float64).reshape(1, 1, 16))
    prior = si.GaussianPrior(torch.zeros(1, 1, 16, dtype=torch.float64), C)
    P = local_precision(C, prior.score(noisy(prior, 2000, s), torch.full((2000,), s)), s).variance
    ratio = P * (C.variance + s**2)
    assert float(ratio.min()) > 0.99 and float(ratio.max()) < 1.45


def test_local_precision_follows_the_modes():
    """Between far modes of unit variance it is that of one mode, not that of the global covariance."""
    one = torch.ones(1, 1, 4, dtype=torch.float64)
    modes = [si.GaussianPrior(offset * one, 1.0) for offset in (-50.0, 50.0)]
    prior, s = si.MixturePrior([0.5, 0.5], modes), 2.0
    C = prior.moments.covariance
    P = local_precision(C, prior.score(noisy(prior, 4000, s), torch.full((4000,), s)), s)
    v = torch.randn(1, 1, 1, 4, generator=stream(2), dtype=torch.float64)
    torch.testing.assert_close(P.apply(v), v / (1 + s**2), rtol=0.05, atol=0.01)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(
            C.map(lambda c: 1 / (c + s**2)).apply(v), v / (1 + s**2), rtol=0.05, atol=0.01
        )


def measured_covariance(prior, s, n=500):
    """The local covariance around draws of the prior at noise level s."""
    x, C, sigma = noisy(prior, n, s), prior.moments.covariance, torch.full((n,), s)
    z = torch.randn(x.shape, generator=stream(3), dtype=x.dtype)
    response = (prior.denoise(x + 0.1 * s * z, sigma) - prior.denoise(x, sigma)) / (0.1 * s)
    return C, local_covariance(C, z, response, s)


@pytest.mark.parametrize("s", [0.1, 1.0, 10.0])
def test_local_covariance_of_a_gaussian(s):
    """C itself in every direction, whatever the bands."""
    C = Diagonal(torch.logspace(-2, 2, 16, dtype=torch.float64).reshape(1, 1, 16))
    prior = si.GaussianPrior(torch.zeros(1, 1, 16, dtype=torch.float64), C)
    measured = measured_covariance(prior, s)[1].variance
    torch.testing.assert_close(measured, C.variance, rtol=1e-5, atol=0.0)


def test_local_covariance_follows_the_modes():
    """Between far modes of unit variance it is that of one mode, once they can be told apart."""
    one = torch.ones(1, 1, 4, dtype=torch.float64)
    modes = [si.GaussianPrior(offset * one, 1.0) for offset in (-50.0, 50.0)]
    prior = si.MixturePrior([0.5, 0.5], modes)
    v = torch.randn(1, 1, 1, 4, generator=stream(2), dtype=torch.float64)
    C, local = measured_covariance(prior, 2.0)
    torch.testing.assert_close(local.apply(v), v, rtol=0.02, atol=0.02)
    assert float(C.apply(v).norm()) > 100 * float(v.norm())


@pytest.mark.parametrize("amplitude", [1e-4, 3.0])
def test_amplitude_by_evidence(amplitude):
    """Of a Gaussian sky of 256 pixels at high S/N the amplitude is known to (2 * 256)^-1/2 = 4.4 per cent; 5 of them."""
    prior = si.GaussianPrior(
        torch.zeros(1, 16, 16, dtype=torch.float64), Fourier(analytic.power_law(16, 16))
    )
    truth = amplitude * prior.sample(1, seed=3)
    noise = si.GaussianNoise(std=1e-3 * float(truth.std()))
    likelihood = si.Likelihood(si.Identity(prior.shape), noise)
    found, evidence = amplitude_by_evidence(
        prior, likelihood, likelihood.simulate(truth, seed=4)[0]
    )
    assert found == pytest.approx(amplitude, rel=0.22)
    y = likelihood.simulate(truth, seed=4)[0]
    exact = si.Posterior(prior.rescaled(found), likelihood, y).gaussian_log_evidence
    assert evidence == pytest.approx(exact, abs=1e-3)


@pytest.mark.parametrize(
    "noise",
    [si.PoissonNoise(50.0), si.StudentNoise(scale=1.0, dof=3.0)],
    ids=["counts", "outliers"],
)
def test_amplitude_of_data_that_are_not_gaussian(noise):
    """A sky that varies by 20, at S/N 2 to 20 a pixel: 5 times the 4.4 per cent that 256 pixels leave at most."""
    prior = si.GaussianPrior(
        torch.full((1, 16, 16), 5.0, dtype=torch.float64), Fourier(analytic.power_law(16, 16))
    )
    amplitude = 20.0 / float(prior.sample(64, 0).std())
    truth = amplitude * prior.sample(1, seed=3)
    likelihood = si.Likelihood(si.Identity(prior.shape), noise)
    found, _ = amplitude_by_evidence(prior, likelihood, likelihood.simulate(truth, seed=4)[0])
    assert found == pytest.approx(amplitude, rel=0.22)


def test_no_amplitude_without_information():
    prior = si.GaussianPrior(torch.zeros(1, 4, 4, dtype=torch.float64), 1.0)
    likelihood = si.Likelihood(
        si.Mask(torch.zeros(1, 4, 4, dtype=torch.bool)), si.GaussianNoise(std=1.0)
    )
    with pytest.raises(ValueError, match="carry no information"):
        amplitude_by_evidence(prior, likelihood, torch.zeros(1, 4, 4, dtype=torch.float64))
