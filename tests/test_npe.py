"""Posteriors of scalar parameters against those that are known in closed form."""

import json
import math
import re

import pytest
import torch
from torch.distributions import (
    AffineTransform,
    Cauchy,
    Exponential,
    ExpTransform,
    Gamma,
    HalfCauchy,
    HalfNormal,
    Kumaraswamy,
    Laplace,
    LogNormal,
    MultivariateNormal,
    Normal,
    Pareto,
    TransformedDistribution,
    Uniform,
    Weibull,
)

from scoreinv.diagnostics import coverage
from scoreinv.npe import (
    MLP,
    NLE,
    NPE,
    NRE,
    DeepSet,
    Fitting,
    Named,
    ParameterPrior,
    ResNet1D,
    ResNet2D,
)
from scoreinv.npe.data import Standardise
from scoreinv.npe.estimator import stacked
from scoreinv.npe.featurizers import featurizer_for
from scoreinv.npe.fitting import Progress
from scoreinv.npe.flows import EXPLICIT, KINDS, new_flow
from scoreinv.npe.mixture import Mixture
from scoreinv.npe.weights import Average, joined
from scoreinv.streams import seeded, stream

D, M, NOISE = 2, 4, 0.5
A = torch.tensor([[1.0, 0.3], [-0.5, 1.0], [0.8, 0.8], [0.2, -1.0]], dtype=torch.float64)
GAUSSIAN = ParameterPrior(a=Normal(0.0, 1.0), b=Normal(1.0, 2.0))
MEAN, SPREAD = torch.tensor([0.0, 1.0]).double(), torch.tensor([1.0, 2.0]).double()
QUICK = Fitting(epochs=40, batch=100, rate=1e-3, patience=10)


def simulated(theta, seed):
    g = torch.Generator().manual_seed(seed)
    return theta @ A.T + NOISE * torch.randn(len(theta), M, generator=g, dtype=torch.float64)


def exact(x):
    """Mean and covariance of theta given x."""
    P = A.T @ A / NOISE**2 + torch.diag(SPREAD**-2)
    C = torch.linalg.inv(P)
    return C @ (A.T @ x / NOISE**2 + MEAN / SPREAD**2), C


def log_likelihood(x):
    return lambda theta: (
        -0.5 * ((x - theta @ A.T) / NOISE).square().sum(1) - M * math.log(NOISE * math.tau**0.5)
    )


@pytest.fixture(scope="module")
def pairs():
    theta = GAUSSIAN.sample(4000, seed=0)
    return theta, simulated(theta, 1)


@pytest.fixture(scope="module")
def fitted(pairs):
    return NPE(GAUSSIAN, flow="maf").fit(*pairs, seed=0, plan=QUICK)


# --- the space of the parameters -----------------------------------------------------------------

MIXED = ParameterPrior(
    inclination=Uniform(0.0, 90.0),
    flux=LogNormal(0.0, 1.0),
    width=HalfNormal(2.0),
    x=Normal(3.0, 0.1),
)


def test_parameters_are_normal_in_their_own_space():
    """20,000 draws: mean and variance of u within 4 standard errors; there and back again; the density, against torch's."""
    theta = MIXED.sample(20_000, seed=0)
    u = MIXED.to_normal(theta)
    assert float(u.mean(0).abs().max()) < 4 / 20_000**0.5
    assert float((u.var(0) - 1).abs().max()) < 4 * (2 / 20_000) ** 0.5
    torch.testing.assert_close(MIXED.from_normal(u), theta, rtol=1e-6, atol=1e-6)
    each = [Uniform(0.0, 90.0), LogNormal(0.0, 1.0), HalfNormal(2.0), Normal(3.0, 0.1)]
    expected = sum(p.log_prob(t) for p, t in zip(each, theta.T, strict=True))
    torch.testing.assert_close(MIXED.log_prob(theta), expected.double(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("ends", [(-5.7, 2.4), (10.0, 11.0), (0.0, 0.7), (1e-5, 0.1)])
def test_no_number_leads_out_of_the_prior(ends):
    """Uniform and log-uniform, whose ends single precision does not know; at the ends, too, the density is not zero."""
    low, high = ends
    either = [Uniform(low, high)]
    if low > 0:
        either.append(
            TransformedDistribution(Uniform(math.log(low), math.log(high)), ExpTransform())
        )
    for p in either:
        prior = ParameterPrior(a=p, b=LogNormal(0.0, 1.0))
        u = torch.tensor([-1e9, -8.0, -5.3, -1.0, 5.3, 5.5, 8.0, 40.0]).double()[:, None]
        theta = prior.from_normal(u.expand(8, 2))
        assert bool(prior.inside(theta).all()) and bool(prior.log_prob(theta).isfinite().all())
        back = prior.to_normal(theta)[2:6]
        torch.testing.assert_close(back, u[2:6].expand(4, 2), rtol=1e-4, atol=0.0)
        at = torch.tensor([[low, 1.0], [high, 1.0]])
        if isinstance(p, Uniform):
            assert bool(prior.log_prob(at).isfinite().all())
            assert bool(prior.to_normal(at).isfinite().all())
        out = torch.tensor([[low - 1e-3, 1.0], [high + 1e-3, 1.0], [low, -1.0]])
        assert not bool(prior.inside(out).all(1).any())
        assert bool((prior.log_prob(out) == -math.inf).all())


def number(v):
    return torch.tensor(v, dtype=torch.float64)


def log_uniform(low, high):
    return TransformedDistribution(
        Uniform(number(math.log(low)), number(math.log(high)), validate_args=False),
        ExpTransform(),
        validate_args=False,
    )


WIDE = {
    "log-uniform of 14 decades": log_uniform(1e-10, 1e4),
    "log-uniform of a ten-thousandth": log_uniform(1e10, 1.0001e10),
    "uniform": Uniform(number(1000.0), number(1001.0)),
    "wide uniform": Uniform(number(-1e300), number(1e-3)),
    "normal": Normal(number(1e3), number(1e-3)),
    "log-normal": LogNormal(number(0.0), number(30.0)),
    "half-normal": HalfNormal(number(2.0)),
    "half-Cauchy": HalfCauchy(number(1.0)),
    "Cauchy": Cauchy(number(0.0), number(1.0)),
    "Laplace": Laplace(number(0.0), number(1.0)),
    "exponential": Exponential(number(2.0)),
    "Pareto": Pareto(number(1.0), number(2.0)),
    "Weibull": Weibull(number(1.0), number(0.5)),
    "Weibull that vanishes at 0": Weibull(number(1.0), number(3.0)),
    "Kumaraswamy": Kumaraswamy(number(2.0), number(3.0)),
}


@pytest.mark.parametrize("name", WIDE)
def test_priors_of_any_range_keep_their_tails(name):
    """Numbers are the quantiles that torch knows, no two of 20,000 alike; there and back again.

    The density is torch's own, and neither zero nor infinite anywhere that a number u leads to.
    """
    p = WIDE[name]
    prior = ParameterPrior(a=p)
    u = torch.linspace(-6, 5, 45).double()[:, None]
    theta = prior.from_normal(u)
    torch.testing.assert_close(theta, p.icdf(torch.special.ndtr(u)), rtol=1e-9, atol=0)
    coarse = name in (
        "log-uniform of a ten-thousandth",
        "uniform",
    )  # far from zero beside its width
    torch.testing.assert_close(prior.to_normal(theta), u, rtol=0, atol=0.02 if coarse else 1e-6)
    known, found = p.log_prob(theta)[:, 0], prior.log_prob(theta)
    there = known.isfinite()  # what is rounded to an end has none
    assert coarse or bool(there.all())
    torch.testing.assert_close(found[there], known[there], rtol=1e-9, atol=0)
    assert coarse or len(prior.sample(20_000, 0).unique()) == 20_000
    far = prior.from_normal(torch.tensor([-40.0, -8.0, 8.0, 40.0]).double()[:, None])
    assert bool(prior.inside(far).all()) and bool(prior.log_prob(far).isfinite().all())


def test_densities_go_on_where_no_draw_comes():
    """Of N(0, 1) at 9 and of a Cauchy at 10^15: no share of the prior that counts lies beyond."""
    for p, far in ((Normal(0.0, 1.0), 9.0), (HalfCauchy(1.0), 1e15)):
        at = torch.tensor([[far]]).double()
        expected = p.log_prob(at).double()[0]
        torch.testing.assert_close(ParameterPrior(a=p).log_prob(at), expected)


def test_each_end_of_a_prior_is_known_to_its_own_digits():
    """One at 10^-4 in single precision, however far the other is."""
    prior = ParameterPrior(a=log_uniform(1e-4, 1e4))
    theta = torch.tensor([[-1e-3], [0.0], [9.99e-5], [1e-4], [1e4], [1.0001e4]])
    assert prior.inside(theta)[:, 0].tolist() == [False, False, False, True, True, False]
    with pytest.raises(ValueError, match=r"does not allow \(first: -0.001\)"):
        prior.to_normal(theta)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ParameterPrior(), "a prior without parameters"),
        (lambda: ParameterPrior(a=Gamma(1.0, 1.0)), "a is a Gamma, which has no inverse"),
        (
            lambda: ParameterPrior(a=Normal(torch.zeros(2), 1.0)),
            r"a has shape \(2,\), expected one",
        ),
        (lambda: MIXED.to_normal(torch.zeros(3, 2)), r"expected \(n, 4\): inclination, flux"),
        (
            lambda: MIXED.to_normal(torch.tensor([[10.0, 1.0, 1.0, 3.0], [91.0, 1.0, 1.0, 3.0]])),
            r"inclination has 1 of 2 values that its prior does not allow \(first: 91\); expected 0 to 90",
        ),
    ],
)
def test_mistakes_in_parameters(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# --- posteriors ----------------------------------------------------------------------------------


def test_a_conjugate_posterior_is_found(fitted):
    """Over 30 data, root mean square: means within 0.3 of the exact spread, spreads within 10 %; 4,000 pairs know no more.

    Negative control: the draws for the data of another.
    """
    theta = GAUSSIAN.sample(30, seed=5)
    x = simulated(theta, 6)
    draws = torch.stack([fitted.condition(v.float()).sample(2000, seed=7) for v in x])
    mean = torch.stack([exact(v)[0] for v in x])
    sd = exact(x[0])[1].diagonal().sqrt()
    rms = lambda v: float((v / sd).square().mean().sqrt())
    assert rms(draws.mean(1) - mean) < 0.3 and rms(draws.std(1) - sd) < 0.1
    assert rms(draws.mean(1) - mean.roll(1, 0)) > 1


def test_ranks_of_truths_are_uniform(fitted):
    """Scores of 300 fresh simulations among 99 draws have unit variance, within 4.5 errors; too narrow ones have not."""
    theta = GAUSSIAN.sample(300, seed=8)
    x = simulated(theta, 9).float()
    draws = torch.stack([fitted.condition(v).sample(99, seed=i) for i, v in enumerate(x)])
    scores = lambda d: torch.special.ndtri(((d < theta[:, None]).sum(1) + 0.5) / 100.0)
    chi2 = lambda d: float((scores(d).square().sum(0) / 300 - 1).abs().max()) / (2 / 300) ** 0.5
    assert chi2(draws) < 4.5
    narrow = draws.mean(1, keepdim=True) + 0.7 * (draws - draws.mean(1, keepdim=True))
    assert chi2(narrow) > 6


def test_the_density_is_one_and_that_of_the_draws(fitted, pairs):
    """Its integral over a grid; its mean over its own draws is minus the entropy, near that of the exact Gaussian."""
    x = pairs[1][0].float()
    given, (mean, C) = fitted.condition(x), exact(pairs[1][0])
    side = torch.linspace(-6, 6, 161).double()
    grid = mean + torch.cartesian_prod(side, side) * C.diagonal().sqrt()
    cell = float((side[1] - side[0]) ** 2 * C.diagonal().sqrt().prod())
    assert float(given.log_prob(grid).exp().sum()) * cell == pytest.approx(1, abs=0.01)
    draws = given.sample(4000, seed=1)
    entropy = float(MultivariateNormal(mean, C).entropy())
    assert -float(given.log_prob(draws).mean()) == pytest.approx(entropy, abs=0.15)


def test_weights_make_an_estimate_exact(fitted, pairs):
    """The evidence of a linear Gaussian model, and its posterior mean, within 5 standard errors of 4,000 weighted draws."""
    x = pairs[1][3]
    found = fitted.condition(x.float()).reweighted(log_likelihood(x), 4000, seed=2)
    S = A @ torch.diag(SPREAD**2) @ A.T + NOISE**2 * torch.eye(M).double()
    log_z = float(MultivariateNormal(A @ MEAN, S).log_prob(x))
    assert found.n_eff > 2000 and found.evidence.k_hat < 0.7
    error = (1 / found.n_eff - 1 / 4000) ** 0.5
    assert found.evidence.log_z == pytest.approx(log_z, abs=5 * error)
    mean, C = exact(x)
    w = torch.softmax(found.log_w, 0)
    error = (w @ found.theta - mean) / C.diagonal().sqrt()
    assert float(error.abs().max()) < 5 / found.n_eff**0.5


def test_draws_far_off_are_refined(fitted, pairs):
    """Of the estimate for other data few count; drawn anew most do, and the evidence is exact within 5 standard errors."""
    x, other = pairs[1][3], pairs[1][3] + 3 * NOISE
    given, known = fitted.condition(other.float()), log_likelihood(x)
    S = A @ torch.diag(SPREAD**2) @ A.T + NOISE**2 * torch.eye(M).double()
    log_z = float(MultivariateNormal(A @ MEAN, S).log_prob(x))
    rough, fine = (given.reweighted(known, 4000, seed=2, refine=r) for r in (0, 3))
    assert rough.n_eff < 400 < 2000 < fine.n_eff
    error = (1 / fine.n_eff - 1 / 4000) ** 0.5
    assert fine.evidence.log_z == pytest.approx(log_z, abs=5 * error)
    mean, C = exact(x)
    off = (torch.softmax(fine.log_w, 0) @ fine.theta - mean) / C.diagonal().sqrt()
    assert float(off.abs().max()) < 5 / fine.n_eff**0.5


def test_what_is_refined_asks_the_likelihood_for_nothing_beyond_the_prior(fitted, pairs):
    """Data that draw parameters six standard deviations off: the mixture's tails reach farther, and are not asked for."""
    asked = []

    def known(theta):
        u = GAUSSIAN.to_normal(theta)
        asked.append(float(u.abs().max()))
        return 6 * u[:, 0]

    found = fitted.condition(pairs[1][3].float()).reweighted(known, 4000, seed=2, refine=8)
    assert 7 < max(asked) <= 8 + 1e-9
    assert bool((found.log_w == -math.inf).any())
    assert found.evidence.log_z == pytest.approx(18, abs=0.3)


def test_a_mixture_finds_modes_of_weighted_draws():
    """Two narrow ones in a wide cloud; its density has the integral 1, and is that of its draws (within 5 errors)."""
    wide = 4 * torch.randn(20000, 2, generator=stream(1), dtype=torch.float64)
    modes = torch.tensor([[3.0, 0.0], [-3.0, 1.0]], dtype=torch.float64)
    log_p = torch.logsumexp(-0.5 * ((wide[:, None] - modes) / 0.3).square().sum(2), 1)
    mixture = Mixture.fitted(wide, log_p + wide.square().sum(1) / 32, stream(2))
    drawn = mixture.sample(20000, stream(3))
    near = (drawn[:, None] - modes).norm(dim=2) < 1.5
    assert float(near.double().mean(0).min()) > 0.4
    side = torch.linspace(-8, 8, 401, dtype=torch.float64)
    grid = torch.cartesian_prod(side, side)
    density = mixture.log_prob(grid).exp() * 0.04**2
    assert float(density.sum()) == pytest.approx(1, abs=5e-3)
    entropy = -float((density * (density / 0.04**2).log()).sum())
    found = -mixture.log_prob(drawn)
    assert float(found.mean()) == pytest.approx(
        entropy, abs=5 * float(found.std()) / 20000**0.5 + 0.02
    )


def test_arrays_count_like_tensors(fitted, pairs):
    """A log-likelihood and weights of pairs in NumPy."""
    theta, x = pairs[0][:200], pairs[1][:200]
    known, given = log_likelihood(x[3]), fitted.condition(x[3].float())
    one = given.reweighted(lambda theta: known(theta).numpy(), 100, seed=2)
    assert torch.equal(one.log_w, given.reweighted(known, 100, seed=2).log_w)
    w, plan = torch.linspace(0.5, 1.5, 200).double(), Fitting(epochs=1)
    fits = [NPE(GAUSSIAN, "maf").fit(theta, x, 0, plan, pair_weights=v) for v in (w, w.numpy())]
    assert fits[0].history == fits[1].history


def test_no_draws_and_no_numbers_are_refused(fitted, others, pairs):
    """Of an estimate that draws at once, and of one that has to be tempered."""
    nothing = torch.tensor([[0.0, 1.0], [math.nan, 0.0]]).double()
    for estimator in (fitted, others("marginals")):
        given = estimator.condition(pairs[1][3].float())
        for n in (0, -1):
            with pytest.raises(ValueError, match=f"n is {n}, expected 1 draw or more"):
                given.sample(n, seed=0)
        with pytest.raises(ValueError, match="n is 1 and refine 0, expected 10 draws or more"):
            given.reweighted(log_likelihood(pairs[1][3]), 1, seed=0)
        with pytest.raises(ValueError, match="1 of 2 parameters are nan"):
            given.log_prob(nothing)
    infinite = torch.tensor([[math.inf, 1.0], [-math.inf, 0.0]]).double()
    wide = ParameterPrior(a=LogNormal(0.0, 1.0), b=Weibull(1.0, 3.0))
    assert bool((wide.log_prob(infinite.abs()) == -math.inf).all())


def test_draws_that_the_likelihood_forbids_weigh_nothing(fitted, pairs):
    given = fitted.condition(pairs[1][3].float())
    half = lambda theta: torch.where(theta[:, 0] > theta[:, 0].median(), 0.0, -math.inf)
    found = given.reweighted(half, 1000, seed=2)
    w = torch.softmax(found.log_w, 0)
    assert float(w[found.theta[:, 0] <= found.theta[:, 0].median()].sum()) == 0
    for wrong in (math.nan, math.inf):
        with pytest.raises(ValueError, match=f"of 100 of 100 draws is {wrong}.*first: theta"):
            given.reweighted(lambda theta, w=wrong: torch.full((len(theta),), w), 100, seed=2)
    with pytest.raises(ValueError, match="of all 100 draws is -inf"):
        given.reweighted(lambda theta: torch.full((len(theta),), -math.inf), 100, seed=2)


@pytest.mark.parametrize("kind", KINDS)
def test_flows_are_densities(kind):
    """Untrained, on a grid: their integral is one; draws depend on the seed alone, and leave the global one as it was."""
    with seeded(0):
        flow = new_flow(kind, 2, 3, hidden=(16,), transforms=2)
    # one that follows a differential equation is smoother, and takes longer
    points = 101 if kind in ("matching", "score") else 301
    side = torch.linspace(-9, 9, points)
    with torch.no_grad():
        q = flow(torch.tensor([0.1, -0.4, 0.7]))
        total = (
            float(q.log_prob(torch.cartesian_prod(side, side)).exp().sum())
            * (18 / (points - 1)) ** 2
        )
    assert total == pytest.approx(1, abs=0.02)
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    with seeded(1), torch.no_grad():
        one = q.sample((5,))
    assert torch.equal(torch.random.get_rng_state(), before)
    with seeded(1):
        assert torch.equal(one, q.sample((5,)))


@pytest.mark.parametrize("kind", [NPE, NLE])
@pytest.mark.parametrize("flow", EXPLICIT)
def test_flows_have_the_size_that_is_asked_for(kind, flow):
    made = kind(GAUSSIAN, flow, hidden=(9, 7), transforms=2).fit(THETA, X, 0, Fitting(epochs=1))
    biases = [len(v) for v in made.members[0].flow.parameters() if v.ndim == 1]
    layers = 1 if flow == "mixture" else 2
    assert biases.count(9) == biases.count(7) == layers and len(biases) == 3 * layers
    if flow == "mixture":
        d = 2 if kind is NPE else 4
        covariances = d * (d + 1) // 2
        assert biases[-1] == 4 * (1 + d + covariances)


def test_an_ensemble_is_a_mixture(pairs):
    theta, x = pairs
    plan = Fitting(epochs=3, batch=200)
    both = NPE(GAUSSIAN, flow="maf", members=2).fit(theta[:1000], x[:1000], seed=0, plan=plan)
    given, u = both.condition(x[0].float()), GAUSSIAN.to_normal(theta[:50])
    same = {"x": x[:1].float().expand(50, M)}
    with torch.no_grad():
        each = torch.stack([m.scores(u, same).double().exp() for m in both.members])
    ratio = GAUSSIAN.log_prob(theta[:50]) + 0.5 * (u.square() + math.log(math.tau)).sum(1)
    expected = (both.weights[:, None] * each).sum(0).log() + ratio
    torch.testing.assert_close(given.log_prob(theta[:50]), expected, rtol=1e-5, atol=1e-5)
    # and the draws are of it: with members far apart in the first number, each has its share
    for member, shift in zip(both.members, (-3.0, 3.0), strict=True):
        member.flow = Shifted(member.flow, shift)
    both.weights = torch.tensor([0.2, 0.8], dtype=torch.float64)
    draws = GAUSSIAN.to_normal(given.sample(4000, seed=1))
    share = float((draws[:, 0] > 0).double().mean())
    assert share == pytest.approx(0.8, abs=0.04)
    entropy = -float(given.log_prob(GAUSSIAN.from_normal(draws)).mean())
    alone = [-float(given.log_ratio(draws[draws[:, 0].sign() == side]).mean()) for side in (-1, 1)]
    assert math.isfinite(entropy) and alone[0] != alone[1]


class Shifted(torch.nn.Module):
    """A flow whose first number is moved."""

    def __init__(self, flow, shift):
        super().__init__()
        self.flow, self.shift = flow, torch.tensor([shift, 0.0])

    def forward(self, features):
        moved = AffineTransform(self.shift, 1.0)
        return TransformedDistribution(self.flow(features), [moved], validate_args=False)


def test_everything_random_follows_the_seed(pairs):
    """Dropout, too; the global state stays as it was, and draws of one seed are no copies of those of the next."""
    theta, x = pairs
    dropping = lambda: WithDropout(M)
    plan = Fitting(epochs=2, batch=200)
    before = torch.random.get_rng_state()
    fits = [
        NPE(GAUSSIAN, "maf", dropping, members=2).fit(theta[:500], x[:500], seed=s, plan=plan)
        for s in (0, 0, 1)
    ]
    draws = [f.condition(x[0]).sample(50, seed=2) for f in fits]
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    first = [p.flatten() for p in (fits[0].members[1].state_dict() | {}).values()]
    other = [p.flatten() for p in (fits[2].members[0].state_dict() | {}).values()]
    assert any(not torch.equal(a, b) for a, b in zip(first, other, strict=True))
    given = fits[0].condition(x[0])
    one, two = (GAUSSIAN.to_normal(given.sample(50, seed=s)) for s in (3, 4))
    joint = torch.cat([one, two], 0)
    assert len(joint.unique(dim=0)) == 100
    assert abs(float(torch.corrcoef(torch.stack([one[:, 0], two[:, 0]]))[0, 1])) < 0.6


class WithDropout(MLP):
    def forward(self, x):
        return torch.nn.functional.dropout(super().forward(x), 0.2, self.training)


def test_members_weigh_by_what_they_say_of_held_out_pairs():
    """Of a good one, a bad one, and one that is right for every third pair."""
    good, bad = torch.zeros(600).double(), torch.full((600,), -3.0).double()
    third = torch.where(torch.arange(600) % 3 == 0, 2.0, -4.0).double()
    even = torch.ones(600).double()
    w = stacked(torch.stack([good, bad, third]), torch.neg, even)
    assert float(w.sum()) == pytest.approx(1)
    assert float(w[1]) < 0.01 and 0.1 < float(w[2]) < 0.5 < float(w[0])
    # where each third pair hardly counts, so does the third member
    rare = torch.where(torch.arange(600) % 3 == 0, 0.01, 1.5).double()
    assert float(stacked(torch.stack([good, bad, third]), torch.neg, rare)[2]) < 0.05


# --- likelihoods and ratios ----------------------------------------------------------------------


OTHERS = {
    "likelihood": lambda: NLE(GAUSSIAN),
    "ratio": lambda: NRE(GAUSSIAN),
    "contrasts": lambda: NRE(GAUSSIAN, contrasts=4, gamma=2.0),
    "balanced": lambda: NRE(GAUSSIAN, balance=100.0),
    "marginals": lambda: NRE(GAUSSIAN, marginals=True),
    "ensemble": lambda: NRE(GAUSSIAN, members=2),
    "matching": lambda: NPE(GAUSSIAN, "matching"),
    "score": lambda: NPE(GAUSSIAN, "score"),
}

LONG = {"contrasts", "ensemble", "score", "marginals", "balanced"}  # beside one that is not


@pytest.fixture(scope="module")
def others(pairs):
    """Each of them fitted, once it is asked for."""
    kept = {}

    def fitted(kind):
        if kind not in kept:
            kept[kind] = OTHERS[kind]().fit(*pairs, seed=0, plan=QUICK)
        return kept[kind]

    return fitted


@pytest.mark.parametrize(
    "kind",
    [pytest.param(kind, marks=pytest.mark.slow if kind in LONG else ()) for kind in OTHERS],
)
def test_every_estimator_finds_a_conjugate_posterior(kind, others, pairs):
    """Over 10 data: means within half a standard deviation, widths within a third, and weights that make both exact.

    One that is balanced may be wider.
    """
    estimator, off, width = others(kind), [], []
    for x in simulated(GAUSSIAN.sample(10, seed=7), 8):
        mean, C = exact(x)
        draws = estimator.condition(x).sample(1000, seed=1)
        off.append((draws.mean(0) - mean) / C.diagonal().sqrt())
        width.append(draws.std(0) / C.diagonal().sqrt())
    assert float(torch.stack(off).square().mean()) < 0.25
    wide = 1.6 if kind == "balanced" else 1.33
    assert 0.75 < float(torch.stack(width).mean()) < wide
    x = pairs[1][3]
    mean, C = exact(x)
    weighted = estimator.condition(x).reweighted(log_likelihood(x), 4000, seed=2)
    w = torch.softmax(weighted.log_w, 0)[:, None]
    assert weighted.n_eff > 400
    middle = (w * weighted.theta).sum(0)
    spread = (w * (weighted.theta - middle).square()).sum(0).sqrt()
    # five standard errors of the mean of 400 draws
    assert float(((middle - mean) / C.diagonal().sqrt()).abs().max()) < 0.25
    torch.testing.assert_close(spread, C.diagonal().sqrt(), rtol=0.2, atol=0)
    assert weighted.evidence.log_z == pytest.approx(log_evidence(x), abs=0.2)


def covered(estimator, sims, draws, noise=NOISE):
    """The battery on fresh simulations of that noise, in the space where the prior is normal."""
    theta = GAUSSIAN.sample(sims, seed=21)
    x = theta @ A.T + noise * torch.randn(sims, M, generator=stream(22), dtype=torch.float64)
    found = [estimator.condition(v).sample(draws, seed=i) for i, v in enumerate(x)]
    normal = torch.stack([GAUSSIAN.to_normal(v) for v in found])
    return coverage(normal, GAUSSIAN.to_normal(theta), seed=23, swaps=999)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["maf", *OTHERS])
def test_every_estimator_covers_the_truths(kind, others, fitted):
    """SBC and all else on 150 simulations of 63 draws: no family at a level of 0.01, by which one in a hundred would fail.

    A balanced ratio is wide on purpose; it must not be narrow. A matched flow wants four times the pairs of the others: of
    4,000 it learns posteriors that are narrow by 9 %, and is found out.
    """
    if kind == "matching":
        theta = GAUSSIAN.sample(16_000, seed=0)
        plan = Fitting(epochs=100, batch=200, rate=1e-3, patience=40)
        estimator = NPE(GAUSSIAN, kind).fit(theta, simulated(theta, 1), seed=0, plan=plan)
    else:
        estimator = fitted if kind == "maf" else others(kind)
    report = covered(estimator, 150, 63)
    if kind == "balanced":
        assert report.dispersion[2] > 1
        return
    assert report.flagged(0.01) == [], str(report)


@pytest.mark.slow
def test_an_ensemble_that_is_too_narrow_is_found(pairs):
    """Learned of simulations whose noise is 0.7 of that of the data: both members agree, and both are wrong."""
    theta, _ = pairs
    x = theta @ A.T + 0.7 * NOISE * torch.randn(len(theta), M, generator=stream(24)).double()
    ensemble = NPE(GAUSSIAN, "coupling", members=2).fit(theta, x, seed=1, plan=QUICK)
    assert covered(ensemble, 150, 63, noise=0.7 * NOISE).flagged(0.01) == []
    report = covered(ensemble, 150, 63)
    assert report.flagged(0.002) != []
    assert report.dispersion[2] < 1 and "narrow" in report.verdict


def log_evidence(x):
    C = A @ torch.diag(SPREAD**2) @ A.T + NOISE**2 * torch.eye(M).double()
    return float(MultivariateNormal(A @ MEAN, C).log_prob(x))


def test_a_likelihood_knows_the_evidence_in_the_units_of_the_data(others, pairs):
    """As it should be to half a nat, on average over ten data; and of data in other units, that much less."""
    estimator, x = others("likelihood"), pairs[1][:10]
    found = torch.tensor([estimator.condition(v).log_evidence() for v in x])
    exactly = torch.tensor([log_evidence(v) for v in x])
    assert float((found - exactly).mean()) == pytest.approx(0, abs=0.5)
    theta, x = pairs[0][:500], pairs[1][:500]
    few = Fitting(epochs=2, batch=200)
    one, ten = (NLE(GAUSSIAN).fit(theta, c * x, seed=0, plan=few) for c in (1.0, 10.0))
    less = [e.condition(c * x[0]).log_evidence() for e, c in ((one, 1.0), (ten, 10.0))]
    assert less[0] - less[1] == pytest.approx(M * math.log(10), abs=0.01)


def test_inputs_may_come_in_any_order(pairs, tmp_path):
    """A likelihood takes all numbers as one list; its inputs by name are the same data in whatever order, and once kept."""
    theta, x = pairs[0][:500], {"first": pairs[1][:500, :1], "rest": pairs[1][:500, 1:]}
    estimator = NLE(GAUSSIAN).fit(theta, x, seed=0, plan=Fitting(epochs=2, batch=200))
    estimator.save(tmp_path)
    again = NLE(GAUSSIAN).load(tmp_path)
    one = {name: v[0] for name, v in x.items()}
    turned = dict(reversed(one.items()))
    expected = estimator.condition(one).log_prob(theta)
    for given in (estimator.condition(turned), again.condition(turned)):
        torch.testing.assert_close(given.log_prob(theta), expected, rtol=0, atol=0)
        assert given.strangeness() == estimator.condition(one).strangeness()


def test_marginals_are_those_of_the_joint_posterior(others):
    """Over 20 data: means within half a standard deviation and widths within a third."""
    estimator, off, width = others("marginals"), [], []
    for x in simulated(GAUSSIAN.sample(20, seed=9), 10):
        mean, C = exact(x)
        draws = estimator.marginal(x, ["b"]).sample(500, seed=1)
        assert draws.shape == (500, 1)
        off.append((draws.mean(0) - mean[1:]) / C[1, 1].sqrt())
        width.append(draws.std(0) / C[1, 1].sqrt())
    assert float(torch.stack(off).square().mean()) < 0.25
    assert 0.75 < float(torch.stack(width).mean()) < 1.33
    # the density of one number, up to a constant, which the draws know
    b = torch.linspace(-9, 11, 2000).double()[:, None]
    given = estimator.marginal(x, ["b"])
    total = float(given.log_prob(b).exp().sum()) * 0.01
    assert math.log(total) == pytest.approx(given.log_evidence(), abs=0.1)
    with pytest.raises(ValueError, match=r"of is \['c'\], expected different ones of a, b"):
        estimator.marginal(x, ["c"])
    with pytest.raises(ValueError, match="make it with marginals=True"):
        NRE(GAUSSIAN).marginal(x, ["b"])


def test_the_contrastive_loss_is_that_of_a_classifier_for_one_contrast():
    """And for more of them it is least at the true ratio, up to the noise of 4,000 pairs, for any g."""
    theta, x = GAUSSIAN.sample(4000, seed=0), None
    x = simulated(theta, 1)
    u = GAUSSIAN.to_normal(theta)
    for contrasts, gamma in ((1, 1.0), (3, 0.5), (3, 4.0)):
        member = NRE(GAUSSIAN, contrasts=contrasts, gamma=gamma)
        member.alone, member.shapes = True, {"x": [M]}
        member = member._new(0)
        pairs = [GAUSSIAN.from_normal(u.roll(-k, 0)) for k in range(contrasts + 1)]
        f = torch.stack([true_log_ratio(t, x) for t in pairs], 1)
        loss = float(member.criterion(f).mean())
        if contrasts == 1:
            label = torch.nn.functional.logsigmoid
            expected = -0.5 * float((label(f[:, 0]) + label(-f[:, 1])).mean())
            assert loss == pytest.approx(expected, rel=1e-6)
        for wrong in (0.8 * f, 1.2 * f, f + 0.3, f - 0.3):
            assert float(member.criterion(wrong).mean()) > loss


def true_log_ratio(theta, x):
    noise = (-0.5 * ((x - theta @ A.T) / NOISE).square()).sum(1) - M * math.log(
        NOISE * math.tau**0.5
    )
    C = A @ torch.diag(SPREAD**2) @ A.T + NOISE**2 * torch.eye(M).double()
    return noise - MultivariateNormal(A @ MEAN, C).log_prob(x)


def test_pairs_of_another_distribution_count_by_their_weights(pairs):
    """Parameters of N(1, 1) in place of N(0, 1) for the first: unweighted, posteriors of wide data move with them."""
    wide = lambda theta, seed: (
        theta[:, :1]
        + 1.5
        * torch.randn(
            len(theta), 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
        )
    )
    theta = GAUSSIAN.sample(4000, seed=3)
    theta[:, 0] += 1
    x, x_seen = wide(theta, 4), torch.tensor([0.5, 0.5]).double()
    log_w = -0.5 * (theta[:, 0].square() - (theta[:, 0] - 1).square())
    found = {}
    for name, w in (("weighted", log_w.exp()), ("not", None)):
        estimator = NPE(GAUSSIAN, "maf").fit(theta, x, seed=0, plan=QUICK, pair_weights=w)
        found[name] = float(estimator.condition(x_seen).sample(2000, 1)[:, 0].mean())
    precision = 1 + 2 / 1.5**2
    assert found["weighted"] == pytest.approx((1.0 / 1.5**2) / precision, abs=0.15)
    assert found["not"] == pytest.approx((1 + 1.0 / 1.5**2) / precision, abs=0.15)


def test_what_learns_no_prior_takes_no_weights_and_loses_no_simulations(pairs):
    """A likelihood of the finite simulations alone would not know how often they are finite."""
    theta, x = pairs[0][:200], pairs[1][:200].clone()
    with pytest.raises(ValueError, match="pair_weights are for NPE, not for NRE"):
        NRE(GAUSSIAN).fit(theta, x, seed=0, pair_weights=torch.ones(200))
    x[0, 0] = math.nan
    with pytest.raises(
        ValueError, match="1 simulations are not finite; without them NLE would not"
    ):
        NLE(GAUSSIAN, invalid="drop").fit(theta, x, seed=0)
    with pytest.raises(ValueError, match="pairs beside 300 contrasts"):
        NRE(GAUSSIAN, contrasts=300).fit(theta[1:], x[1:], seed=0, plan=QUICK)
    outside = torch.full((2, 2), math.inf).double()
    few = NPE(GAUSSIAN, "maf").fit(theta[1:], x[1:], seed=0, plan=Fitting(epochs=1))
    assert bool((few.condition(pairs[1][5]).log_prob(outside) == -math.inf).all())


class Stopped(Exception):
    pass


def test_averages_of_the_weights_lag_behind_as_they_should():
    """Of weights that rise by 1 a step: by share / (1 - share), at first by a tenth of the steps; 0: the last."""
    for share, lag in ((0.9, 9.0), (0.5, 1.0), (0.0, 0.0)):
        network = torch.nn.BatchNorm1d(1, affine=False)
        network.register_parameter("rising", torch.nn.Parameter(torch.zeros(1).double()))
        with joined(network) as weights:
            average = Average(network, weights, share)
            for n in range(1, 400):
                weights[0] += 1
                network.num_batches_tracked += 1
                average.update()
                if n == 40 and share > 0.8:
                    assert 3.0 < 40 - float(average.network().rising.detach()) < 6.0
            judged = average.network()
            assert 399 - float(judged.rising.detach()) == pytest.approx(lag, abs=0.01)
            assert int(judged.num_batches_tracked) == 399


def test_a_step_of_joined_weights_is_that_of_each():
    """Of two types and a layer that does not learn; and all stand alone afterwards, also where the fit breaks off."""
    make = lambda: torch.nn.Sequential(
        torch.nn.Linear(3, 4), torch.nn.Linear(4, 4), torch.nn.Linear(4, 2).double()
    )
    with seeded(0):
        each, network = make(), make()
    network.load_state_dict(each.state_dict())
    for layers in (each, network):
        layers[1].requires_grad_(False)
    x = torch.linspace(-1, 1, 15).reshape(5, 3)
    loss = lambda layers: layers[2](layers[1](layers[0](x)).double()).square().sum()

    def descended(layers, weights):
        optimiser = torch.optim.AdamW(weights, lr=0.1, weight_decay=0.1)
        for _ in range(5):
            optimiser.zero_grad(set_to_none=False)
            loss(layers).backward()
            optimiser.step()

    descended(each, [v for v in each.parameters() if v.requires_grad])
    with pytest.raises(KeyboardInterrupt), joined(network) as weights:
        assert {v.dtype: v.numel() for v in weights} == {torch.float32: 16, torch.float64: 10}
        descended(network, weights)
        raise KeyboardInterrupt
    for a, b in zip(each.parameters(), network.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
    apart = {v.untyped_storage().data_ptr() for v in network.parameters()}
    assert len(apart) == 6 and all(v.grad is None for v in network.parameters())


def test_averages_are_what_is_kept_and_decay_pulls_weights_in(pairs):
    theta, x = pairs[0][:1000], pairs[1][:1000]

    def weights(**options):
        plan = Fitting(epochs=3, batch=100, rate=1e-2, **options)
        fitted = NPE(GAUSSIAN, flow="maf").fit(theta, x, seed=0, plan=plan)
        named = fitted.members[0].named_parameters()
        return torch.cat([v.detach().flatten() for k, v in named if k.endswith("weight")])

    last, averaged = weights(average=0), weights(average=0.9)
    decayed = weights(average=0, decay=3.0)
    assert 0 < float((averaged - last).norm()) < 0.5 * float(last.norm())
    assert float(decayed.norm()) < 0.7 * float(last.norm())


def test_the_rate_is_halved_where_nothing_is_gained_and_falls_at_the_end():
    """As by torch's own schedule, but for the last fifth of the epochs."""
    plan, network = Fitting(epochs=60, rate=2e-3, patience=6), torch.nn.Linear(1, 1)
    optimiser = torch.optim.SGD(network.parameters(), lr=plan.rate)
    theirs = torch.optim.lr_scheduler.ReduceLROnPlateau(
        optimiser, patience=3, factor=0.5, threshold=1e-4, threshold_mode="abs"
    )
    progress, g = Progress(network.state_dict()), torch.Generator().manual_seed(0)
    rates, expected = [], []
    for epoch in range(plan.epochs):
        rates.append(progress.rate(plan))
        expected.append(optimiser.param_groups[0]["lr"] * min(1, (60 - epoch) / 12))
        held_out = math.exp(-epoch / 5) + 0.01 * float(torch.rand(1, generator=g))
        progress.add({"held out": held_out}, network, plan)
        theirs.step(held_out)
    assert rates == pytest.approx(expected, rel=1e-12)
    assert rates[20] == plan.rate > 2 * rates[45] and rates[-1] < rates[47] / 11


def test_a_fit_goes_on_where_it_was_interrupted(pairs, tmp_path):
    """To the same bits; and not with other pairs."""
    theta, x = pairs[0][:600], pairs[1][:600]
    plan, epochs = Fitting(epochs=6, batch=100), 0

    def noise(batch, generator):
        nonlocal epochs
        epochs += 1
        if epochs == 25:
            raise Stopped
        return batch + 0.1 * torch.randn(batch.shape, generator=generator, dtype=batch.dtype)

    make = lambda: NPE(GAUSSIAN, "maf", lambda: WithDropout(M))
    go = lambda **options: make().fit(theta, x, seed=0, plan=plan, noise=noise, **options)
    with pytest.raises(Stopped):
        go(checkpoint=tmp_path)
    resumed, epochs = go(checkpoint=tmp_path), 100
    whole = go()
    assert resumed.history == whole.history and len(whole.history[0]) == 6
    for a, b in zip(resumed.members.parameters(), whole.members.parameters(), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(ValueError, match="is of the fit .*'pairs': 600.* remove it to begin anew"):
        make().fit(theta[:500], x[:500], seed=0, plan=plan, checkpoint=tmp_path)
    # nor with other data of the same parameters
    with pytest.raises(ValueError, match="is of the fit"):
        make().fit(theta, x + 1, seed=0, plan=plan, checkpoint=tmp_path)
    (tmp_path / "member-0.pt").write_bytes(b"broken")
    with pytest.raises(ValueError, match="cannot be read"):
        go(checkpoint=tmp_path)


class Odd(torch.nn.Module):
    """Features that do not tell their layers from others."""

    features = M

    def __init__(self, *shape):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(shape))

    def forward(self, x):
        return self.scale.mean() * x


MAF, RATIO = (lambda **o: NPE(GAUSSIAN, "maf", **o)), (lambda **o: NRE(GAUSSIAN, **o))
HALF = (torch.arange(100) % 2 + 0.5).double()


@pytest.mark.parametrize(
    ("one", "other", "said"),
    [
        ((RATIO, {}), (RATIO, {"balance": 100.0}), "'balance': 0.0}, expected {'balance': 100.0}"),
        ((RATIO, {}), (RATIO, {"contrasts": 4}), "'contrasts': 1}, expected {'contrasts': 4}"),
        ((MAF, {}), (RATIO, {}), "'kind': 'npe'.* expected .*'kind': 'nre'"),
        (
            (MAF, {}),
            (lambda: NPE(GAUSSIAN, "nsf"), {}),
            "'flow': 'maf'.* expected .*'flow': 'nsf'",
        ),
        (
            (MAF, {}),
            (MAF, {"pair_weights": HALF}),
            "{'pair weights': '.*'}, expected {'pair weights",
        ),
        (
            (MAF, {"featurizer": lambda: MLP(M)}),
            (MAF, {"featurizer": lambda: WithDropout(M)}),
            r"'network': '\d+ weights, \w+'}, expected {'network'",
        ),
        (
            (MAF, {"featurizer": lambda: Odd(2, 6)}),
            (MAF, {"featurizer": lambda: Odd(3, 4)}),
            r"another network \(Error\(s\) in loading",
        ),
    ],
)
def test_a_fit_does_not_go_on_as_another(one, other, said, pairs, tmp_path):
    """What is fitted, how its pairs count and what looks at the data: told apart, if it is not the same call."""
    theta, x = pairs[0][:100], pairs[1][:100]

    def go(make, options):
        w = {k: v for k, v in options.items() if k == "pair_weights"}
        estimator = make(**{k: v for k, v in options.items() if k not in w})
        return estimator.fit(theta, x, 0, Fitting(epochs=1), checkpoint=tmp_path, **w)

    assert go(*one).history == go(*one).history
    with pytest.raises(
        ValueError, match=f"(?s)member-0.pt is of the fit.*{said}.* remove it to begin"
    ):
        go(*other)


@pytest.mark.parametrize("kind", [pytest.param("likelihood", marks=pytest.mark.slow), "marginals"])
def test_others_are_kept_and_found_again(kind, others, pairs, tmp_path):
    others(kind).save(tmp_path)
    again = OTHERS[kind]().load(tmp_path)
    x = pairs[1][0]
    draws = [e.condition(x).sample(100, seed=3) for e in (others(kind), again)]
    assert torch.equal(*draws)
    with pytest.raises(ValueError, match="holds an estimator of"):
        NPE(GAUSSIAN).load(tmp_path)


# --- data ----------------------------------------------------------------------------------------


def test_features_of_every_kind_of_data():
    sets, images = DeepSet(3, 8), ResNet2D(2, 8, widths=(8, 16))
    series = ResNet1D(2, 8, widths=(8, 16), recurrent=True)
    x = {
        "set": torch.randn(5, 3, 7),
        "image": torch.randn(5, 2, 20, 20),
        "series": torch.randn(5, 2, 31),
    }
    named = Named(set=sets, image=images, series=series)
    assert named(x).shape == (5, 24) == (5, named.features)
    assert torch.equal(Named(**{"self": sets})({"self": x["set"]}), sets(x["set"]))
    order = torch.randperm(7)
    torch.testing.assert_close(sets(x["set"]), sets(x["set"][:, :, order]))
    assert MLP(4, 6)(torch.randn(3, 4)).shape == (3, 6)


def test_features_know_the_level_of_data_and_where_in_a_series_something_happens():
    """A negative control: means and maxima of a series are those of the same one, eight samples later."""
    pulse = torch.exp(-0.5 * ((torch.arange(96.0) - 40) / 2) ** 2)[None, None]
    later = pulse.roll(8, 2)
    with seeded(0):
        placed, pooled = ResNet1D(1, 8, (8, 16), length=96), ResNet1D(1, 8, (8, 16))
        flat = ResNet2D(1, 8, (8, 16))
    apart = lambda network, a, b: float((network(a) - network(b)).detach().norm())
    assert apart(pooled, pulse, later) < 1e-4 < 1e-2 < apart(placed, pulse, later)
    image = torch.ones(1, 1, 16, 16)
    for network, x in ((pooled, pulse), (flat, image)):
        assert apart(network, x, 1.5 * x) > 1e-2
    long = featurizer_for((2, 4096))
    assert long(torch.randn(3, 2, 4096)).shape == (3, long.features)
    assert sum(p.numel() for p in long.parameters()) < 1_000_000
    with pytest.raises(ValueError, match="a series has length 95, expected 96"):
        placed(pulse[:, :, 1:])
    with pytest.raises(ValueError, match="recurrent and length"):
        ResNet1D(1, recurrent=True, length=96)


@pytest.mark.parametrize("layers", [0, 2])
def test_absent_members_are_no_part_of_a_set(layers):
    """Whatever their numbers, and wherever they stand; how many there are is told; none at all has features, too."""
    sets = DeepSet(4, 8, (16, 16), layers, masked=True).eval()
    x = torch.cat([torch.randn(5, 2, 7), torch.zeros(5, 2, 7)], 1)
    x[:, 2:, 4:] = 1
    other = x.clone()
    other[:, :2, 4:] = 50.0
    order = torch.randperm(7)
    torch.testing.assert_close(sets(x), sets(other))
    torch.testing.assert_close(sets(x), sets(other[:, :, order]))
    assert not torch.allclose(sets(x), sets(x[:, :, :6]))
    other[:, 2, 4:] = 0  # a number that is there
    assert not torch.allclose(sets(x), sets(other), atol=1e-3)
    assert bool(sets(torch.ones_like(x)).isfinite().all())


@pytest.mark.parametrize(
    ("layers", "epochs"), [(0, 30), pytest.param(1, 40, marks=pytest.mark.slow)]
)
def test_a_larger_set_says_more(layers, epochs):
    """Means of up to 16 numbers of noise 1, of which 4 or 16 are there, are known to 1 / 5^1/2 and 1 / 17^1/2.

    30 sets of each size: widths on average, and means off the exact ones by less than half of that, rms.
    """
    prior = ParameterPrior(mean=Normal(0.0, 1.0))
    theta = prior.sample(3000, seed=0)
    g = torch.Generator().manual_seed(1)
    x = theta[:, :, None] + torch.randn(3000, 1, 16, generator=g, dtype=torch.float64)
    size = torch.randint(2, 17, (3000, 1, 1), generator=g)
    x = x.masked_fill(torch.arange(16) >= size, math.nan)
    sets = lambda: DeepSet(2, 16, (32, 32), layers, masked=True)
    estimator = NPE(prior, "mixture", sets, invalid="mask")
    estimator.fit(theta, x, 0, Fitting(epochs=epochs, batch=100, rate=2e-3))
    for n in (4, 16):
        seen = prior.sample(30, seed=n)[:, :, None] + torch.randn(30, 1, 16, generator=g)
        seen[:, :, n:] = math.nan
        draws = torch.stack([estimator.condition(v).sample(500, seed=1) for v in seen])[..., 0]
        exact, width = seen[:, 0, :n].sum(1) / (n + 1), (n + 1) ** -0.5
        assert float(draws.std(1).mean()) == pytest.approx(width, rel=0.2)
        assert float((draws.mean(1) - exact).square().mean().sqrt()) < 0.5 * width


def test_data_of_several_kinds_with_missing_numbers_and_fresh_noise():
    """An image whose noise differs from one to the next, and a series with gaps: the amplitude of both is found."""
    prior = ParameterPrior(amplitude=Uniform(0.0, 4.0))
    theta = prior.sample(2000, seed=0)
    g = torch.Generator().manual_seed(1)
    wave = torch.sin(torch.linspace(0, 6, 24))
    series = theta[:, :, None].float() * wave
    gaps = torch.rand(2000, 1, 24, generator=g) < 0.3
    level = 0.5 + torch.rand(2000, 1, 1, generator=g)

    def noise(x, generator):
        e = torch.randn(x["series"].shape, generator=generator)
        return {"series": x["series"] + x["level"][:, :, None] * e, "level": x["level"]}

    x = {"series": series.masked_fill(gaps, math.nan), "level": level[:, :, 0]}
    plan = Fitting(epochs=25, batch=100, rate=3e-3)
    estimator = NPE(prior, flow="mixture", invalid="mask")
    estimator.featurizer = lambda: Named(series=ResNet1D(2, 16, (8, 16)), level=MLP(2, 4, (8,)))
    estimator.fit(theta, x, seed=0, plan=plan, noise=noise)
    found = []
    for truth in (0.5, 2.0, 3.5):
        seen = truth * wave[None] + 0.5 * torch.randn(1, 24, generator=g)
        seen[0, ::4] = math.nan
        given = estimator.condition({"series": seen, "level": torch.tensor([0.5])})
        draws = given.sample(500, seed=1)
        assert bool(((draws >= 0) & (draws <= 4)).all())
        found.append(float(draws.mean()))
        # 18 points of noise 0.5 know it to 0.17
        assert found[-1] == pytest.approx(truth, abs=0.6) and 0.1 < float(draws.std()) < 0.35
    assert found == sorted(found)


@pytest.mark.parametrize("count", [200, 660, 1000])
def test_data_unlike_any_simulation_are_strange(pairs, count):
    """Of 200 fresh simulations few are beyond the reach, which 20 to 100 held-out ones set; data far away are."""
    plan = Fitting(epochs=5, batch=50)
    some = NPE(GAUSSIAN, "maf", members=2).fit(pairs[0][:count], pairs[1][:count], 0, plan)
    fresh = simulated(GAUSSIAN.sample(200, seed=11), 12)
    like = torch.tensor([some.condition(x).strangeness() for x in fresh])
    assert float((like > 1).double().mean()) < 0.12 and float(like.max()) < 3
    assert some.condition(torch.full((M,), 200.0)).strangeness() > 3


def test_estimators_are_kept_and_found_again(fitted, pairs, tmp_path):
    fitted.save(tmp_path)
    found = NPE(GAUSSIAN, flow="maf").load(tmp_path)
    x = pairs[1][0].float()
    assert torch.equal(
        found.condition(x).sample(20, seed=1), fitted.condition(x).sample(20, seed=1)
    )
    assert found.condition(x).strangeness() == fitted.condition(x).strangeness()
    others = [
        dict(a=Normal(0.0, 1.0), c=Normal(1.0, 2.0)),
        dict(b=Normal(1.0, 2.0), a=Normal(0.0, 1.0)),
        dict(a=Normal(0.0, 1.0), b=Normal(1.0, 2.5)),
        dict(a=Normal(0.0, 1.0), b=LogNormal(1.0, 2.0)),
    ]
    for other in (NPE(GAUSSIAN), *(NPE(ParameterPrior(**p), "maf") for p in others)):
        with pytest.raises(ValueError, match="holds an estimator of (flow|parameters)"):
            other.load(tmp_path)
    with pytest.raises(ValueError, match="of transforms 5, expected transforms 3"):
        NPE(GAUSSIAN, "maf", transforms=3).load(tmp_path)
    card = json.loads((tmp_path / "estimator.json").read_text())
    (tmp_path / "estimator.json").write_text(json.dumps({**card, "format": 0}))
    with pytest.raises(ValueError, match="format 0, expected format 3"):
        NPE(GAUSSIAN, flow="maf").load(tmp_path)
    (tmp_path / "estimator.safetensors").write_bytes(b"broken")
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(ValueError, match="holds no estimator that can be read"):
            NPE(GAUSSIAN, flow="maf").load(folder)
    with pytest.raises(ValueError, match="nothing to save"):
        NPE(GAUSSIAN).save(tmp_path)


def fit(theta, x, **options):
    return lambda: NPE(GAUSSIAN, **options).fit(theta, x, seed=0)


def test_a_hole_in_one_number_needs_no_hole_in_the_others(pairs):
    """Masks that never change are no mistake; what a number misses in some data is not known of others less."""
    theta, x = pairs[0][:1500], pairs[1][:1500].clone()
    x[::3, 1] = math.nan
    plan = Fitting(epochs=20, batch=100, rate=2e-3)
    estimator = NPE(GAUSSIAN, "maf", invalid="mask").fit(theta, x, 0, plan)
    whole, holed = pairs[1][1], pairs[1][1].clone()
    holed[1] = math.nan
    spread = [float(estimator.condition(v).sample(2000, 1).std(0)[1]) for v in (whole, holed)]
    assert spread[1] > 1.1 * spread[0]  # 1.26 times, if both are exact
    with pytest.raises(ValueError, match=r"x has shape \(3,\), unlike the simulations: \(4,\)"):
        estimator.condition(holed[:3])


def test_large_numbers_keep_their_digits():
    """Times of a Julian date, which single precision knows to a quarter of a day."""
    prior = ParameterPrior(a=Uniform(0.0, 1.0))
    theta = prior.sample(400, 0)
    x = torch.cat([2459000 + theta, theta], 1)
    estimator = NPE(prior, "maf").fit(theta, x, 0, Fitting(epochs=1))
    standard = estimator.members[0].units["x"](x)
    assert len(standard[:, 0].unique()) > 390
    torch.testing.assert_close(standard[:, 0], standard[:, 1], rtol=1e-3, atol=1e-3)


THETA = GAUSSIAN.sample(60, seed=0)
X = simulated(THETA, 1)
HOLED = torch.where(torch.arange(60)[:, None] < 3, math.nan, X)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: NPE(GAUSSIAN).fit(THETA, X, 0, validation=0.999),
            "validation is 0.999, which leaves 0 of 60 pairs to learn from, expected 25",
        ),
        (fit(THETA, X[:30]), "60 parameters and 30 data"),
        (fit(THETA[:10], X[:10]), "10 pairs, expected at least 50"),
        (
            fit(THETA, torch.cat([X, torch.ones(60, 1)], 1)),
            r"1 of 5 features of x are the same .*number 4",
        ),
        (fit(THETA, {"a": X, "b": X[:3]}), "inputs have the lengths {'a': 60, 'b': 3}"),
        (fit(THETA, HOLED), "3 of 60 simulations are not finite; pass invalid='drop'"),
        (fit(THETA, X * math.nan, invalid="drop"), "none of 60 simulations is finite"),
        (
            fit(THETA, X, invalid="ignore"),
            "invalid is 'ignore', expected one of raise, drop, mask",
        ),
        (fit(THETA, X, flow="glow"), "flow is 'glow', expected one of maf, nsf"),
        (lambda: new_flow("coupling", 1, 3), "a coupling needs two parameters"),
        (fit(THETA, X, hidden=()), r"hidden is \[\] and transforms 5, expected one width"),
        (fit(THETA, X, hidden=(64, 0)), r"hidden is \[64, 0\]"),
        (
            fit(THETA, X, flow=lambda d, c: None, hidden=(32,)),
            "a flow of your own has its own sizes",
        ),
        (lambda: NLE(GAUSSIAN, transforms=0), "and transforms 0, expected .* at least 1"),
        (lambda: NPE(GAUSSIAN).condition(X[0]), "has not been fitted"),
        (lambda: NPE(GAUSSIAN, members=0), "members is 0"),
        (fit(THETA[:, 0], X), r"theta has shape \(60,\), expected \(n, 2\)"),
        (fit(THETA, X[:, 0]), r"x has shape \(60,\), expected \(n, numbers\)"),
        (fit(THETA, X + 1j), "x is complex; give its real and imaginary parts"),
        *(
            (fit(THETA, {name: X}), f"an input cannot be called {re.escape(repr(name))}, for")
            for name in ("type", "training", "_modules", "a.b", "a/b", "", 3)
        ),
        (fit(THETA, X, featurizer=MLP(4)), "featurizer is a module, expected a function"),
        (
            fit(THETA, X, featurizer=lambda: torch.nn.Linear(4, 3)),
            "a Linear, does not say how many",
        ),
        (lambda: Fitting(epochs=0), "epochs is 0"),
        (lambda: Fitting(average=1.0), "average is 1"),
        (lambda: Fitting(decay=-1.0), "decay -1"),
    ],
)
def test_mistakes_in_fits(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def holed(share):
    """Noise that loses a number of some data."""

    def noise(x, generator):
        lost = torch.rand(len(x), generator=generator) < share
        return torch.where(lost[:, None] & (torch.arange(M) == 1), math.nan, x)

    return noise


@pytest.mark.parametrize("share", [0.01, 1.0])
def test_noise_is_held_to_the_policy_for_missing_numbers(pairs, share):
    """A few data that it spoils, in whichever epoch, or all; where they may be masked, and some are left, that is a fit."""
    theta, x = pairs[0][:400], pairs[1][:400]
    for invalid, said in (
        ("raise", r"noise made \d+ of \d+ data of x that are not finite, .*mend `noise`, or pass"),
        ("drop", r"noise made \d+ of \d+ data of x .* pairs cannot be dropped from one epoch"),
    ):
        make = lambda invalid=invalid: NPE(GAUSSIAN, "maf", invalid=invalid)
        with pytest.raises(ValueError, match=said):
            make().fit(theta, x, 0, Fitting(epochs=3), noise=holed(share))
    masking = NPE(GAUSSIAN, "maf", invalid="mask")
    if share < 1:
        masking.fit(theta, x, 0, Fitting(epochs=1), noise=holed(share))
        assert masking.condition(x[0]).sample(5, 0).isfinite().all()


def test_numbers_too_large_are_not_called_equal(pairs):
    for most in (1e200, math.inf):
        x = torch.cat([pairs[1][:60], most * torch.linspace(-1, 1, 60).double()[:, None]], 1)
        measure = lambda x=x: Standardise([M + 1]).measure(x, "x")
        with pytest.raises(ValueError, match="1 of 5 features of x are not finite, or too large"):
            measure()


def test_dropped_simulations_are_counted_and_odd_data_refused():
    plan = Fitting(epochs=1)
    estimator = NPE(GAUSSIAN, flow="maf", invalid="drop").fit(THETA, HOLED, seed=0, plan=plan)
    assert estimator.dropped == 3
    with pytest.raises(ValueError, match=r"x has shape \(3,\), unlike the simulations: \(4,\)"):
        estimator.condition(X[0, :3])
    with pytest.raises(ValueError, match="x has 4 numbers that are not finite"):
        estimator.condition(HOLED[0])
    with pytest.raises(ValueError, match=r"inputs are \['y'\], expected \['x'\]"):
        estimator.condition({"y": X[0]})
