"""The published samplers do what their equations say, in the cases that are known."""

import math

import pytest
import torch

import scoreinv as si
from scoreinv.bench.problems import grid_mixture
from scoreinv.gaussian import Diagonal
from scoreinv.kernels import bridge, conditional
from scoreinv.samplers.baselines import (
    DAPS,
    DPS,
    MMPS,
    TDS,
    ConvolvedLikelihood,
    DiffPIR,
    PiGDM,
    PnPDM,
)
from scoreinv.streams import stream

SHAPE = (1, 4, 4)
GUIDES = {"MMPS": MMPS(10, 16), "PiGDM": PiGDM(10), "convolved": ConvolvedLikelihood(10)}


def observe(prior, noise=0.3, seed=1):
    """Half as many data as pixels."""
    A = torch.randn(8, 16, generator=stream(seed), dtype=torch.float64) / 4
    likelihood = si.Likelihood(si.DenseOperator(A, prior.shape), si.GaussianNoise(std=noise))
    return si.Posterior(prior, likelihood, likelihood.simulate(prior.sample(1, 2), 3)[0])


def white_prior(variance):
    return si.GaussianPrior(torch.zeros(SHAPE, dtype=torch.float64), variance)


def answered(steps, posterior):
    """What a generator returns whose requests are answered by the prior."""
    try:
        x, s, _ = next(steps)
        while True:
            x, s, _ = steps.send(posterior.prior.denoise(x, x.new_full((len(x),), s)))
    except StopIteration as end:
        return end.value


def started(sampler, posterior, n=5):
    island = sampler.island(posterior, n, stream(4))
    answered(island._begin(), posterior)
    return island


def conditional_mean(posterior, x, s):
    """E[x_0 | x_s, y] for a Gaussian prior."""
    D = posterior.prior.denoise(x, x.new_full((len(x),), s))
    C = conditional(posterior.moments.covariance, s)
    return D + posterior.conditioner.given(C).shift(D)


@pytest.mark.parametrize(
    ("name", "variance"), [("MMPS", 2.0), ("PiGDM", 2.0), ("convolved", 1e8), ("MMPS", None)]
)
def test_estimates_are_exact_where_their_assumption_holds(name, variance):
    """MMPS for any Gaussian prior, pseudoinverse guidance for a white one, the convolved likelihood for a flat one."""
    ramp = Diagonal(torch.linspace(0.1, 3.0, 16, dtype=torch.float64).reshape(SHAPE))
    posterior = observe(white_prior(ramp if variance is None else variance))
    island = started(GUIDES[name], posterior)
    island.x = 2 * torch.randn(5, *SHAPE, generator=stream(5), dtype=torch.float64)
    m = answered(island._estimate(1.5), posterior)
    torch.testing.assert_close(m, conditional_mean(posterior, island.x, 1.5), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["PiGDM", "convolved"])
def test_estimates_are_off_where_it_does_not(name):
    """Negative control of the test above."""
    ramp = Diagonal(torch.linspace(0.1, 3.0, 16, dtype=torch.float64).reshape(SHAPE))
    posterior = observe(white_prior(ramp))
    island = started(GUIDES[name], posterior)
    m = answered(island._estimate(1.5), posterior)
    off = (m - conditional_mean(posterior, island.x, 1.5)).abs().max()
    assert float(off) > 0.05


def test_the_weighted_pull_is_that_of_a_gaussian_times_its_share():
    """r^2 / sigma^2 = v / (v + sigma^2) of what is right for a white prior of variance v."""
    posterior = observe(white_prior(2.0))
    pulled = {}
    for sampler in (PiGDM(10), PiGDM(10, weighted=True)):
        island = started(sampler, posterior)
        x = island.x = 2 * torch.randn(5, *SHAPE, generator=stream(5), dtype=torch.float64)
        D = posterior.prior.denoise(x, x.new_full((5,), 1.5))
        pulled[sampler.weighted] = answered(island._estimate(1.5), posterior) - D
    torch.testing.assert_close(pulled[True], pulled[False] * 2.0 / (2.0 + 1.5**2))


def test_dps_steps_along_the_gradient_of_its_misfit():
    """Against central differences of |y - A D(x)|, on a prior whose denoiser is far from linear."""
    posterior = grid_mixture(8, 2, seed=1).posterior
    A, y, s = posterior.likelihood.operator, posterior.y, 3.0

    def misfit(x):
        return (y - A(posterior.prior.denoise(x, x.new_full((len(x),), s)))).norm(dim=1)

    island = started(DPS(10, zeta=0.7), posterior, n=3)
    x = island.x = 8 * torch.randn(3, 1, 1, 8, generator=stream(6), dtype=torch.float64)
    z = torch.randn_like(x)
    island._white = lambda: z
    step = answered(island._next(s, 2.0), posterior)
    step = step - bridge(x, posterior.prior.denoise(x, x.new_full((3,), s)), s, 2.0, z)
    h = 1e-5 * torch.eye(8, dtype=torch.float64).reshape(8, 1, 1, 8)
    slope = torch.stack([(misfit(x + e) - misfit(x - e)) / 2e-5 for e in h], dim=1)
    torch.testing.assert_close(step.flatten(1), -0.7 * slope, rtol=1e-5, atol=1e-7)
    assert island.trace.evaluations == 1 and island.trace.vjps == 1


def test_jacobian_is_symmetric():
    posterior = grid_mixture(8, 2, seed=1).posterior
    island = started(DPS(10), posterior, n=1)
    island.x = torch.full((1, 1, 1, 8), 3.0, dtype=torch.float64)
    at = answered(island._linearised(4.0), posterior)
    unit = torch.eye(8, dtype=torch.float64).reshape(8, 1, 1, 1, 8)
    J = torch.stack([at.transpose(e).flatten() for e in unit])
    torch.testing.assert_close(J, J.T)
    assert float(J.diagonal().max()) > 0.1


@pytest.mark.parametrize(
    ("sampler", "bound"),
    [(DAPS(20), 0.06), (PnPDM(200, 30), 0.1), (DiffPIR(20), None), (TDS(50), 0.06)],
)
def test_a_flat_prior_leaves_the_likelihood(sampler, bound):
    """Full data, a prior 10 times wider than they allow: the mean within four Monte-Carlo errors (one false alarm in 1,000
    over its 16 pixels), and for all but DiffPIR, which returns an estimate, the width within 6 per cent (four standard
    errors of 4,096 residuals of which the weights of TDS leave a third). The ancestral steps of PnP-DM lose some of it."""
    prior = white_prior(100.0)
    likelihood = si.Likelihood(si.Identity(SHAPE), si.GaussianNoise(std=1.0))
    y = likelihood.simulate(prior.sample(1, 2), 3)[0]
    draws = si.sample(si.Posterior(prior, likelihood, y), 256, sampler, seed=1, island=256)
    w = draws.x - 100 / 101 * y
    spread = 1.0 if isinstance(sampler, TDS) else 1 / 16
    assert float(w.mean(0).abs().max()) < 4 * max(spread, 1 / 16)
    if bound is not None:
        assert float(w.square().mean().sqrt()) == pytest.approx(1.0, abs=bound)


def test_tds_knows_the_evidence():
    """Means over 512 particles and their weights: the evidence of 4 data within 0.3 nat, of a mixture with far modes."""
    problem = grid_mixture(8, 1, seed=2)
    draws = si.sample(problem.posterior, 512, TDS(100), seed=0, island=512)
    assert draws.log_evidence == pytest.approx(problem.log_evidence, abs=0.3)
    assert draws.vjps == 100 and draws.evaluations == 100


def test_evidence_of_a_guide_is_unknown():
    draws = si.sample(observe(white_prior(1.0)), 4, PiGDM(5), seed=0, island=4)
    assert math.isnan(draws.log_evidence) and "baseline" in draws.weights
