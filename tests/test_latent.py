"""Images made of a few latent numbers: the Sersic profile, its data, and controls of its latent space."""

import math

import pytest
import torch

import scoreinv as si
from scoreinv.finetune.amortised import untrained
from scoreinv.finetune.control import guidance_by_gradient
from scoreinv.operators import gaussian_psf
from scoreinv.simulators import SersicGalaxy
from tests.analytic import normal

GALAXY = SersicGalaxy(size=48, flux=30.0)


def latents(n, seed=0):
    return 0.5 * normal(n, *GALAXY.shape, seed=seed)


def test_a_sersic_galaxy_has_its_flux_and_its_centre():
    """Total light within 2 % (what lies beyond the edge, and the rounded centre), the centre within 0.02 pixels."""
    z = latents(20)
    z[:, ..., 1] *= 0.5  # radii of about 5 pixels
    x, p = GALAXY(z)[:, 0], GALAXY.parameters(z)
    assert x.shape == (20, 48, 48) and bool((x > 0).all())
    torch.testing.assert_close(x.sum((1, 2)), p[:, 0], rtol=0.03, atol=0.0)
    place = torch.arange(48).double() - 24
    for axis, found in ((5, x.sum(1)), (6, x.sum(2))):
        centre = (found * place).sum(1) / found.sum(1)
        torch.testing.assert_close(centre, p[:, axis], rtol=0.02, atol=0.02)


@pytest.mark.parametrize(("e1", "e2"), [(0.4, 0.0), (-0.4, 0.0), (0.0, 0.3), (0.2, -0.3)])
def test_half_of_the_light_lies_within_an_ellipse_of_the_half_light_radius(e1, e2):
    """Of the same area as a circle, of axis ratio q = (1 - e) / (1 + e), turned by half the angle of (e1, e2)."""
    z = torch.zeros(1, *GALAXY.shape, dtype=torch.float64)
    e = math.hypot(e1, e2)
    # e = 0.3 z 0.8 / sqrt(0.64 + 0.09 z^2), solved for z
    raw = 0.8 * e / math.sqrt(0.64 - e**2) / 0.3
    z[0, 0, 0, 3:5] = raw * torch.tensor([e1, e2], dtype=torch.float64) / e
    p = GALAXY.parameters(z)[0]
    torch.testing.assert_close(p[3:5], torch.tensor([e1, e2]).double())
    axis = torch.arange(48).double() - 24
    x, y = axis, axis[:, None]
    angle, q = 0.5 * math.atan2(e2, e1), (1 - e) / (1 + e)
    along = x * math.cos(angle) + y * math.sin(angle)
    across = -x * math.sin(angle) + y * math.cos(angle)
    inside = q * along**2 + across**2 / q < p[1] ** 2
    image = GALAXY(z)[0, 0]
    assert float(image[inside].sum() / image.sum()) == pytest.approx(0.5, abs=0.03)


def measured(noise, complex=False):
    shape = (1, 48, 48)
    if complex:
        inner = si.NUFFT(1e5 * normal(40, 2), shape, 0.1)
    else:
        inner = si.PSFConvolution(gaussian_psf(3.0, 9), shape)
    return si.Likelihood(si.Generated(inner, GALAXY, GALAXY.shape), noise)


@pytest.mark.parametrize(
    "likelihood",
    [
        measured(si.GaussianNoise(std=0.3)),
        measured(si.GaussianNoise(std=0.3), complex=True),
        measured(si.PoissonNoise(2.0)),
    ],
    ids=["PSF", "visibilities", "counts"],
)
def test_the_information_of_data_on_latents(likelihood):
    """The slope against central differences, and the mean square of slopes of log p over 400 data: 4 errors, 0.3."""
    z, v, A = latents(2), latents(2, seed=1), likelihood.operator
    slope = (A.slope(z).flatten(2) * v.flatten(1)[..., None]).sum(1)
    torch.testing.assert_close(
        slope, ((A(z + 1e-5 * v) - A(z - 1e-5 * v)) / 2e-5).flatten(1), rtol=1e-5, atol=1e-7
    )
    one = z[:1].expand(400, *GALAXY.shape)
    slopes = likelihood.log_slope(likelihood.simulate(one, seed=2), one).flatten(1)
    found, expected = slopes.T @ slopes / 400, likelihood.curvature(z[:1])[0]
    size = expected.diagonal().sqrt()
    assert float(((found - expected) / size / size[:, None]).abs().max()) < 0.3
    near = likelihood.equivalent(z[0]).information(torch.float64).apply
    eye = torch.eye(7, dtype=torch.float64).reshape(7, *GALAXY.shape)
    torch.testing.assert_close(near(eye).reshape(7, 7), expected)


def linear(d=4):
    """y = A M z for a matrix M: a generator whose posterior is known."""
    M = normal(9, d, seed=3)
    generator = lambda z: (z.flatten(1) @ M.T).reshape(-1, 1, 3, 3)
    A, noise = si.Identity((1, 3, 3)), si.GaussianNoise(std=0.3)
    prior = si.GaussianPrior(torch.zeros(1, 1, d, dtype=torch.float64), 1.0)
    return prior, si.Likelihood(si.Generated(A, generator, (1, 1, d)), noise), M


def test_a_linear_generator_has_the_evidence_of_a_gaussian():
    """Guidance around each z is exact there, but for the noise of the steps: 4 errors of 2,000 weighted paths."""
    prior, likelihood, M = linear()
    y = likelihood.simulate(prior.sample(1, 1), 2)[0]
    S = M @ M.T + 0.09 * torch.eye(9, dtype=torch.float64)
    exact = torch.distributions.MultivariateNormal(torch.zeros(9).double(), S).log_prob(
        y.flatten()
    )
    start = untrained(prior, likelihood, prior.sample(64, 0), 0, steps=40)
    found = start.condition(y).evidence(2000, seed=3)
    assert found.log_z == pytest.approx(float(exact), abs=4 * found.std / 2000**0.5 + 0.05)
    assert float(exact) - found.elbo < 6


def test_guidance_around_each_latent_is_closer_than_the_bare_gradient():
    likelihood = measured(si.GaussianNoise(std=0.3))
    prior = si.GaussianPrior(torch.zeros(GALAXY.shape, dtype=torch.float64), 1.0)
    start = untrained(prior, likelihood, prior.sample(64, 0), 0, steps=10)
    gap = lambda: sum(r.gap for r in start.bounds(3, 16, 1)) / 3
    known = gap()
    reward = lambda x, y: likelihood.log_prob(y, x)
    start.control._guide = guidance_by_gradient(start.chain, reward)
    assert known < 0.5 * gap()


def test_latents_of_another_shape_are_refused():
    with pytest.raises(ValueError, match="latents has shape"):
        measured(si.GaussianNoise(std=0.3)).operator(torch.zeros(2, 7))
