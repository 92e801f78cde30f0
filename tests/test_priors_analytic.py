"""Priors in closed form, against dense distributions, and the sampler that all priors share."""

import math

import pytest
import torch

from scoreinv.gaussian import Dense, Diagonal, Fourier, LowRank
from scoreinv.priors import GaussianPrior, MixturePrior, Prior
from scoreinv.streams import stream
from tests.analytic import Mixture, dense, gaussian, normal, p_value, power_law, spd, uniform

SHAPE, D = (2, 4, 5), 40
FALSE_ALARMS = 1e-4  # of each statistical test


def mixture(covariances, weights=(0.2, 0.5, 0.3), shape=SHAPE, spread=1.0):
    means = spread * normal(len(covariances), *shape, seed=9)
    components = [GaussianPrior(m, C) for m, C in zip(means, covariances, strict=True)]
    return MixturePrior(weights, components)


GAUSSIANS = {
    "number": GaussianPrior(normal(*SHAPE), 0.5),
    "diagonal": GaussianPrior(normal(*SHAPE), Diagonal(0.2 + uniform(*SHAPE))),
    "fourier": GaussianPrior(normal(*SHAPE), Fourier(power_law(4, 5))),
    "low-rank": GaussianPrior(normal(*SHAPE), LowRank(normal(3, *SHAPE), floor=0.2)),
    "dense": GaussianPrior(normal(*SHAPE), Dense(spd(D))),
}
MIXTURES = {
    "numbers": mixture([0.5, 0.2, 1.0]),
    "pixels": mixture([Diagonal(0.2 + uniform(*SHAPE, seed=i)) for i in range(2)] + [0.5]),
    "stationary": mixture([Fourier(power_law(4, 5, slope)) for slope in (1.0, 3.0)] + [0.5]),
    "dense": mixture([Dense(spd(D, seed=i)) for i in range(3)]),
    "mixed": mixture([Fourier(power_law(4, 5)), Dense(spd(D)), Diagonal(0.2 + uniform(*SHAPE))]),
    "one": mixture([0.5], weights=[3.0]),
}
PRIORS = GAUSSIANS | {f"mixture-{name}": prior for name, prior in MIXTURES.items()}
each = pytest.mark.parametrize("prior", PRIORS.values(), ids=PRIORS)
LEVELS = (0.1, 1.0, 20.0)


def exact(prior, sigma=0.0):
    """The distribution of x_sigma, from dense matrices."""
    components = getattr(prior, "components", [prior])
    weights = prior.log_weights.exp() if isinstance(prior, MixturePrior) else torch.ones(1)
    means = torch.stack([c.moments.mean.flatten() for c in components])
    covariances = torch.stack([dense(c.moments.covariance.apply, prior.shape) for c in components])
    noise = sigma**2 * torch.eye(means.shape[1], dtype=torch.float64)
    return Mixture(weights.double(), means, covariances + noise)


def at(x, sigma):
    return torch.full((len(x),), sigma, dtype=x.dtype)


@each
@pytest.mark.parametrize("sigma", (0.0, *LEVELS))
def test_log_prob(prior, sigma):
    x = prior.sample(4, seed=1) + sigma * normal(4, *SHAPE)
    torch.testing.assert_close(
        prior.log_prob(x, sigma), exact(prior, sigma).log_prob(x.flatten(1))
    )


@each
@pytest.mark.parametrize("sigma", LEVELS)
def test_tweedie(prior, sigma):
    # D(x, sigma) = x + sigma^2 grad log p_sigma(x), of the dense density
    x = (prior.sample(4, seed=1) + sigma * normal(4, *SHAPE)).requires_grad_()
    (score,) = torch.autograd.grad(exact(prior, sigma).log_prob(x.flatten(1)).sum(), x)
    denoised = prior.denoise(x.detach(), at(x, sigma))
    torch.testing.assert_close(denoised, (x + sigma**2 * score).detach(), rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(prior.score(x.detach(), at(x, sigma)), score, rtol=1e-7, atol=1e-9)


@each
def test_levels_may_differ_within_a_batch(prior):
    x, sigma = prior.sample(6, seed=1), torch.tensor([0.1, 3.0, 0.1, 1.0, 3.0, 0.5]).double()
    alone = torch.cat([prior.denoise(x[i : i + 1], sigma[i : i + 1]) for i in range(6)])
    torch.testing.assert_close(prior.denoise(x, sigma), alone)


@each
def test_without_noise_nothing_is_denoised(prior):
    x = prior.sample(3, seed=1)
    torch.testing.assert_close(prior.denoise(x, at(x, 0.0)), x)


@each
def test_single_precision_stays_single(prior):
    x = prior.sample(3, seed=1)
    denoised = prior.denoise(x.float(), at(x, 0.5).float())
    assert denoised.dtype == torch.float32
    torch.testing.assert_close(
        denoised.double(), prior.denoise(x, at(x, 0.5)), rtol=1e-4, atol=1e-5
    )


@each
def test_moments(prior):
    truth = exact(prior)
    torch.testing.assert_close(prior.moments.mean.flatten(), truth.mean)
    torch.testing.assert_close(dense(prior.moments.covariance.apply, SHAPE), truth.covariance)


@each
def test_exact_samples(prior):
    draws = prior.sample(4000, seed=2).flatten(1)
    assert p_value(draws, exact(prior)) > FALSE_ALARMS
    # negative control: 10 % too wide in variance about the mean, or components shared out evenly
    wide = exact(prior).mean + 1.1**0.5 * (draws - exact(prior).mean)
    if isinstance(prior, GaussianPrior) or len(prior.components) == 1:
        assert p_value(wide, exact(prior)) < 1e-6
    else:
        even = torch.full((3,), 1 / 3, dtype=torch.float64)
        truth = exact(prior)
        assert p_value(draws, Mixture(even, truth.means, truth.covariances)) < 1e-6


@each
def test_samples_depend_on_the_seed_alone(prior):
    state = torch.random.get_rng_state()
    assert torch.equal(prior.sample(3, seed=1), prior.sample(3, seed=1))
    assert not torch.equal(prior.sample(3, seed=1), prior.sample(3, seed=2))
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("kind", ["numbers", "stationary"])
def test_moments_of_large_mixtures_stay_structured(kind):
    # beyond 1024 pixels the means' spread is kept in the components' own basis: the variance of
    # each pixel, or the power at each frequency, is still exact
    shape = (1, 36, 32)
    covariances = {
        "numbers": [0.5, 0.2, 1.0],
        "stationary": [Fourier(power_law(36, 32)), 0.5, 0.2],
    }
    prior = mixture(covariances[kind], shape=shape)
    d, means = math.prod(shape), torch.stack([c.moments.mean for c in prior.components])
    weights = prior.log_weights.exp()[:, None]
    offsets = (means - prior.moments.mean).reshape(3, d)
    values = torch.stack([c.moments.covariance.eigenvalues(shape) for c in prior.components])
    if kind == "stationary":
        offsets = torch.fft.fft2(offsets.reshape(3, *shape), norm="ortho").reshape(3, d)
    expected = (weights * (values + offsets.abs().square())).sum(0)
    torch.testing.assert_close(prior.moments.covariance.eigenvalues(shape), expected)
    pixels = (weights * (means - prior.moments.mean).reshape(3, d).square()).sum()
    total = float(pixels + (weights * values).sum()) / d
    assert prior.moments.covariance.marginal_variance(shape) == pytest.approx(total)


# Other units


@each
def test_rescaled_denoiser(prior):
    scaled, x = prior.rescaled(3.0), prior.sample(4, seed=1)
    for sigma in LEVELS:
        denoised = scaled.denoise(3 * x, at(x, 3 * sigma))
        torch.testing.assert_close(denoised, 3 * prior.denoise(x, at(x, sigma)))
        torch.testing.assert_close(
            scaled.score(3 * x, at(x, 3 * sigma)), prior.score(x, at(x, sigma)) / 3
        )


@each
def test_rescaled_moments_and_levels(prior):
    scaled = prior.rescaled(3.0)
    torch.testing.assert_close(scaled.moments.mean, 3 * prior.moments.mean)
    covariance = dense(prior.moments.covariance.apply, SHAPE)
    torch.testing.assert_close(dense(scaled.moments.covariance.apply, SHAPE), 9 * covariance)
    assert (scaled.sigma_min, scaled.sigma_max) == (3 * prior.sigma_min, 3 * prior.sigma_max)
    assert scaled.identity["amplitude"] == "3"


@each
def test_rescaled_samples_are_exact(prior):
    assert torch.equal(prior.rescaled(3.0).sample(4, seed=1), 3 * prior.sample(4, seed=1))


# The sampler of the base class


def flow_error(prior, steps):
    """Distance of `Prior.sample` from the exact flow down to sigma_min, denoised there."""
    s = prior.sigma_min
    z = torch.stack(
        [torch.randn(SHAPE, generator=stream(5, -2, i), dtype=torch.float64) for i in range(8)]
    )
    end = prior.moments.mean + prior.moments.covariance.map(
        lambda v: v * (v + s**2).rsqrt()
    ).apply(z)
    return float(
        (Prior.sample(prior, 8, seed=5, steps=steps, churn=0.0) - end).square().mean().sqrt()
    )


@pytest.mark.parametrize("name", GAUSSIANS)
def test_flow_converges_at_second_order(name):
    errors = [flow_error(GAUSSIANS[name], steps) for steps in (40, 80, 160)]
    assert errors[-1] < 0.001
    for coarse, fine in zip(errors[:-1], errors[1:], strict=True):
        assert math.log2(coarse / fine) == pytest.approx(2.0, abs=0.2)


@pytest.mark.parametrize("churn", [0.0, 0.1])
def test_flow_reaches_the_prior(churn):
    prior = GAUSSIANS["fourier"]
    draws = Prior.sample(prior, 2000, seed=3, steps=80, churn=churn).flatten(1)
    assert p_value(draws, exact(prior)) > FALSE_ALARMS
    # negative control: too few steps leave the draws too narrow or too wide
    coarse = Prior.sample(prior, 2000, seed=3, steps=8, churn=churn).flatten(1)
    assert p_value(coarse, exact(prior)) < 1e-6


def test_flow_draws_depend_on_seed_and_index_alone():
    prior = GAUSSIANS["fourier"]
    many = Prior.sample(prior, 70, seed=3, steps=5)
    torch.testing.assert_close(
        Prior.sample(prior, 3, seed=3, steps=5), many[:3], rtol=1e-12, atol=1e-12
    )
    assert not torch.equal(many[0], many[64])


def test_streams_are_unrelated():
    # 1000 neighbouring seeds: correlations of white noise, sum n r^2 ~ chi^2
    z = torch.stack(
        [torch.randn(50, generator=stream(i // 10, i % 10)) for i in range(1000)]
    ).double()
    assert p_value(z, gaussian(torch.zeros(50).double(), torch.eye(50).double())) > FALSE_ALARMS
    assert len({stream(a, b).initial_seed() for a in range(50) for b in range(50)}) == 2500


# Messages


@pytest.mark.parametrize(
    "build, message",
    [
        (
            lambda: GaussianPrior(normal(1, 8, 8), Fourier(power_law(8, 9))),
            r"covariance has shape \(8, 9\), the mean \(1, 8, 8\)",
        ),
        (lambda: GaussianPrior(normal(1, 4, 5), Dense(spd(21))), r"\(21,\), the mean \(1, 4, 5\)"),
        (lambda: GaussianPrior(normal(1, 4, 5), -1.0), "eigenvalues >= 0, .* between -1 and -1"),
        (lambda: GaussianPrior(normal(1, 4, 5) * math.nan, 1.0), "a mean between nan and nan"),
        (
            lambda: mixture([0.5, 0.2], weights=[1.0]),
            "1 weights for 2 components, expected one positive",
        ),
        (lambda: mixture([0.5, 0.2], weights=[1.0, 0.0]), "expected one positive weight each"),
        (
            lambda: mixture([0.5, 0.2], weights=[1.0, math.nan]),
            "expected one positive weight each",
        ),
        (lambda: MixturePrior([], []), "0 weights for 0 components"),
        (
            lambda: MixturePrior([1, 1], [GaussianPrior(normal(1, 4, n), 1.0) for n in (4, 5)]),
            r"components have shapes \[\(1, 4, 4\), \(1, 4, 5\)\]",
        ),
        (
            lambda: GAUSSIANS["dense"].rescaled(-2.0),
            "amplitude is -2, expected a finite number > 0",
        ),
        (lambda: GAUSSIANS["dense"].rescaled(math.inf), "amplitude is inf, expected a finite"),
    ],
)
def test_refusals(build, message):
    with pytest.raises(ValueError, match=message):
        build()


@each
def test_wrong_shapes_are_refused(prior):
    x = normal(3, 2, 4, 6)
    with pytest.raises(
        ValueError, match=r"images have shape \(3, 2, 4, 6\), expected \(B, 2, 4, 5\)"
    ):
        prior.denoise(x, at(x, 1.0))


def test_levels_heed_only_directions_that_vary():
    """A prior that knows the sky's mean level has the levels of one that does not."""
    spectrum = torch.ones(8, 8, dtype=torch.float64)
    spectrum[0, 0] = 0.0
    flat = GaussianPrior(torch.zeros(1, 8, 8), Fourier(spectrum))
    assert (flat.sigma_min, flat.sigma_max) == pytest.approx((0.01, 100.0))
