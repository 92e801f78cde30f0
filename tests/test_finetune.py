"""Path weights relative to a reference process: exact where the answer is known, trained where it is not."""

import json
import math
import re
import statistics

import pytest
import torch

import scoreinv as si
from scoreinv.cli import main
from scoreinv.finetune import Steered, training
from scoreinv.finetune import paths as engine_of_paths
from scoreinv.finetune.amortised import control_of, data_image, new_twist, span, untrained
from scoreinv.finetune.chain import PriorChain, TwistedChain, measured_chain
from scoreinv.finetune.control import (
    Control,
    ImageControl,
    VectorControl,
    guidance,
    guidance_by_gradient,
)
from scoreinv.finetune.evidence import evidence, extrapolated, k_hat
from scoreinv.finetune.free import Brownian, OrnsteinUhlenbeck
from scoreinv.finetune.objectives import ForwardKL, LogVariance, TrajectoryBalance
from scoreinv.finetune.paths import Engine
from scoreinv.finetune.proposals import (
    Backtracking,
    Given,
    JointSimulations,
    LocalSearch,
    OnPolicy,
)
from scoreinv.finetune.reference import GaussianStep
from scoreinv.finetune.sdes import SamplerControl, sampler_bounds
from scoreinv.finetune.text import Denoiser
from scoreinv.finetune.training import Plan, Recipe, train_control
from scoreinv.gaussian import Dense, Diagonal, Fourier, Scalar
from scoreinv.operators import gaussian_psf
from scoreinv.priors.unet import UNet, initialise
from scoreinv.priors.zoo import save_prior
from scoreinv.samplers.baselines import DPS, PiGDM
from scoreinv.samplers.path import descend_together
from scoreinv.samplers.smc import systematic
from scoreinv.streams import stream
from tests.analytic import power_law
from tests.priors import Knowing

SHAPE = (1, 1, 2)


def gaussian(d=2, seed=0):
    root = torch.randn(d, d, generator=stream(seed), dtype=torch.float64)
    return si.GaussianPrior(
        torch.ones(1, 1, d).double(), Dense(root @ root.T + 0.3 * torch.eye(d))
    )


def grid():
    """25 modes on a grid, each of variance 0.3."""
    v = torch.tensor([-10.0, -5.0, 0.0, 5.0, 10.0])
    means = torch.cartesian_prod(v, v)
    return si.MixturePrior(
        torch.ones(25), [si.GaussianPrior(m.reshape(SHAPE), 0.3) for m in means]
    )


def measured(matrix, std):
    matrix = torch.as_tensor(matrix, dtype=torch.float64)
    return si.Likelihood(
        si.DenseOperator(matrix, (1, 1, matrix.shape[1])), si.GaussianNoise(std=std)
    )


def grid_evidence(matrix, y, std):
    """log p(y) of data on the grid of modes."""
    A = torch.as_tensor(matrix, dtype=torch.float64)
    v = torch.tensor([-10.0, -5.0, 0.0, 5.0, 10.0], dtype=torch.float64)
    S = 0.3 * A @ A.T + std**2 * torch.eye(len(A), dtype=torch.float64)
    each = torch.distributions.MultivariateNormal(torch.cartesian_prod(v, v) @ A.T, S).log_prob(y)
    return float(each.logsumexp(0)) - math.log(25)


def for_one(guide, y):
    """Guidance of one y for all paths."""
    return lambda step, k, _: guide(step, k, y.expand(len(k), *y.shape))


def engine(prior, likelihood, y, steps, covariance=None, guided=True, **options):
    chain = PriorChain(prior, steps, covariance, **options)
    guide = for_one(guidance(chain, likelihood), y) if guided else None
    return Engine(chain, VectorControl(chain, guide=guide), lambda x, _: likelihood.log_prob(y, x))


def nothing(n, seed):
    return torch.zeros(n, *SHAPE, dtype=torch.float64), None


@pytest.mark.parametrize("covariance", [None, Scalar(math.inf), Scalar(0.1)])
@pytest.mark.parametrize("steps", [2, 7])
def test_without_data_and_control_every_path_weighs_the_same(covariance, steps):
    chain = PriorChain(grid(), steps, covariance)
    _, log_w = Engine(chain, VectorControl(chain), lambda x, _: torch.zeros(len(x))).paths(
        50, None, stream(1)
    )
    assert log_w.abs().max() == 0
    assert evidence(log_w).ess == pytest.approx(1)


def test_a_free_process_reaches_its_own_density_with_equal_weights():
    processes = (
        Brownian(SHAPE, 9, 4.0),
        Brownian(SHAPE, 9, 4.0, last=0.01),
        OrnsteinUhlenbeck(SHAPE, 9, 4.0),
    )
    for reference in processes:
        reward = torch.distributions.Normal(0.0, torch.tensor(2.0, dtype=torch.float64))
        free = Engine(
            reference,
            VectorControl(reference),
            lambda x, _, r=reward: r.log_prob(x).sum((1, 2, 3)),
        )
        paths, log_w = free.paths(20000, None, stream(2))
        assert log_w.abs().max() < 1e-9
        # 5 standard errors of a variance
        assert paths.x.var(0).sub(4).abs().max() < 5 * 4 * math.sqrt(2 / 20000)


def test_the_weight_of_a_step_is_the_ratio_of_two_gaussian_densities():
    g = stream(3)
    u, z = (torch.randn(6, 1, 3, 4, generator=g, dtype=torch.float64) for _ in range(2))
    normal = torch.distributions.Normal(torch.zeros_like(u), 1.0)
    expected = (normal.log_prob(z - u) - normal.log_prob(z)).sum((1, 2, 3))
    assert torch.allclose(GaussianStep.log_density(u, z), expected, atol=1e-12)


@pytest.mark.parametrize("kind", ["dense", "diagonal", "fourier", "white"])
def test_steps_of_every_level_have_the_kernel_of_a_gaussian_prior(kind):
    """x_s of an exact reverse step from x_sigma ~ p_sigma is distributed as p_s, whatever the steps of a batch."""
    g = torch.Generator().manual_seed(0)
    ky, kx = torch.fft.fftfreq(2)[:, None].double(), torch.fft.fftfreq(4).double()
    C = {
        "dense": Dense(torch.diag(torch.linspace(0.1, 3, 8)).double()),
        "diagonal": Diagonal(torch.linspace(0.1, 3, 8).double().reshape(1, 2, 4)),
        "fourier": Fourier(1 / (0.2 + ky**2 + kx**2)),
        "white": Scalar(0.7),
    }[kind]
    prior = si.GaussianPrior(torch.zeros(1, 2, 4), C)
    chain = PriorChain(prior, 5)
    n = 40000
    x0 = prior.sample(n, seed=1)
    k = torch.arange(n) % 5
    sigma = torch.tensor([*chain.levels, 0.0], dtype=torch.float64)
    x = x0 + sigma[k].reshape(-1, 1, 1, 1) * torch.randn(
        x0.shape, generator=g, dtype=torch.float64
    )
    step = chain.step(x, k, None)
    new = step.taken(torch.randn(x0.shape, generator=g, dtype=torch.float64))
    for i in range(5):
        total = C.map(lambda v, i=i: v + sigma[i + 1] ** 2)
        seen = total.map(torch.rsqrt).apply(new[k == i])
        # 5 standard errors of each of 8 variances
        assert (seen.var(0) - 1).abs().max() < 5 * math.sqrt(2 / (n / 5))
    assert torch.allclose(step.noise(step.taken(x0)), x0, atol=1e-8)


def test_paths_through_images_have_the_marginals_of_the_chain():
    chain, x = PriorChain(gaussian(), 6), gaussian().sample(20000, seed=4)
    states = chain.noised(x, 6, stream(5))
    assert states.shape == (7, 20000, *SHAPE)
    assert torch.equal(states[-1], x)
    for k, s in enumerate(chain.levels):
        spread = (states[k] - x).var(0)
        assert (spread / s**2 - 1).abs().max() < 5 * math.sqrt(2 / 20000)
    motion = Brownian(SHAPE, 8, 3.0).noised(2 + 0 * x, 8, stream(6))
    assert motion[0].abs().max() == 0
    assert motion[4].mean() == pytest.approx(1.0, abs=0.03)
    assert motion[4].var() == pytest.approx(0.75, rel=0.05)
    # 3, 1.5, 0.75, ... of the variance left: of x_2 a quarter of v is to come
    shorter = Brownian(SHAPE, 6, 3.0, last=3 / 2**5).noised(2 + 0 * x, 6, stream(6))
    assert shorter[2].mean() == pytest.approx(1.5, abs=0.03)
    assert shorter[2].var() == pytest.approx(3 * 0.25 * 0.75, rel=0.05)
    for last in (0.0, 0.6):
        with pytest.raises(ValueError, match="equal steps"):
            Brownian(SHAPE, 6, 3.0, last)


def test_what_noising_leads_to_is_known_of_its_ends():
    """A regression of x_{k+1} on x_k and x_T has the weights of `towards`, within 5 standard errors."""
    n, prior = 40000, si.GaussianPrior(torch.zeros(SHAPE).double(), 1.0)
    x = prior.sample(n, seed=4)
    for chain in (
        PriorChain(prior, 6),
        Brownian(SHAPE, 6, 3.0, last=0.05),
        OrnsteinUhlenbeck(SHAPE, 6, 1.0),
    ):
        states = chain.noised(x, 6, stream(5))
        for k in range(1, 6):
            off = states[k + 1] - chain.towards(states[k], x, torch.full((n,), k))
            for v in (states[k], x):
                error = (off * v).std() / math.sqrt(2 * n)
                assert abs(float((off * v).mean())) <= 5 * float(error) + 1e-12


def test_the_mean_over_ways_to_noise_an_image_has_the_gradient_of_one_way_with_less_noise(
    monkeypatch,
):
    """Of 4 of 40 steps, over 300 batches: means within 5 standard errors, and a variance of less than a half."""
    prior, chain = gaussian(), Brownian(SHAPE, 40, 3.0, last=0.01)
    engine = Engine(chain, VectorControl(chain, width=4, layers=1), lambda x, _: 0 * x[:, 0, 0, 0])
    with torch.no_grad():
        engine.control.last.weight.fill_(0.1)  # at zero the other layers would have no gradient

    def gradients(i, steps=None):
        """And by how much such paths are likelier."""
        engine.control.zero_grad()
        gain = engine.imitate_noised(prior.sample(16, seed=i), None, stream(6, i), steps)
        parts = [p.grad.flatten() for p in engine.control.parameters() if p.grad is not None]
        return torch.cat([*parts, torch.tensor([gain])]).double()

    # whole paths, one by one
    paths, log_w = engine.through(prior.sample(16, seed=0), None, stream(6, 0))
    engine.control.zero_grad()
    engine.learn(paths, torch.full((16,), -1 / 16, dtype=torch.float64))
    known = torch.cat(
        [p.grad.flatten() for p in engine.control.parameters() if p.grad is not None]
    )
    all_steps = gradients(0)
    torch.testing.assert_close(all_steps[:-1], known.double(), rtol=1e-3, atol=1e-4)
    assert float(all_steps[-1]) == pytest.approx(float(paths.spent.sum(0).mean()), rel=1e-4)
    mean = torch.stack([gradients(i, 4) for i in range(300)])
    monkeypatch.setattr(Brownian, "towards", lambda *_: None)
    one = torch.stack([gradients(i, 4) for i in range(300)])
    scale = (one - mean).std(0) / math.sqrt(300)
    assert ((one - mean).mean(0).abs() <= 5 * scale + 1e-9).all()
    assert float(mean.var(0).sum()) < 0.5 * float(one.var(0).sum())


def test_steps_scatter_as_a_prior_says_of_each_image():
    """Pixels as uneven as the error is, going together as they do there; draws and densities are of one law."""
    C = Fourier(power_law(8, 8).expand(1, 8, 8).contiguous())
    prior = Uneven(torch.zeros(1, 8, 8), C)
    chain, n = PriorChain(prior, 6), 20000
    i, x = 3, prior.sample(1, seed=1)
    step = chain.step(x.expand(n, -1, -1, -1), torch.full((n,), i), None)
    z = torch.randn(step.mean.shape, generator=stream(2), dtype=step.mean.dtype)
    new = step.taken(z)
    torch.testing.assert_close(step.noise(new), z, atol=1e-5, rtol=1e-5)
    a, s = (chain.levels[i + 1] / chain.levels[i]) ** 2, chain.levels[i]
    d = prior.error_covariance(step.error[:1], s).deviation[0]
    expected = a * (1 - a) * s**2 + (1 - a) ** 2 * d**2
    assert float(d.max() / d.min()) == pytest.approx(5)
    # 5 standard errors of a variance
    assert ((new - step.mean).var(0) / expected - 1).abs().max() < 5 * math.sqrt(2 / n)
    where = d.square() / expected / d.square().sum()
    power = a * (1 - a) * s**2 * where.sum() + (1 - a) ** 2 * (where * d.square()).sum() * (
        prior.correlation(s).spectrum
    )
    torch.testing.assert_close(step.covariance.spectrum[0], power.double(), rtol=1e-4, atol=1e-6)
    assert float(power.mean()) == pytest.approx(1, rel=1e-4)


class Uneven(Knowing):
    """A prior that is surer of the left half of an image."""

    def denoise_with_error(self, x, sigma):
        denoised, a = super().denoise_with_error(x, sigma)
        a = a.clone()
        a[..., : a.shape[-1] // 2] *= 0.2
        return denoised, a


class Exact(Control):
    """The control of Brownian motion that ends as a prior's images, whose denoiser is known."""

    def __init__(self, reference, prior):
        super().__init__(reference)
        self.prior = prior

    def forward(self, x, denoised, g, k, y):
        v, passed = self.reference.variance, self.reference.passed
        column = lambda q: q[k].reshape(-1, 1, 1, 1)
        if int(k[0]) == 0:  # nothing is known of where it ends
            end = self.prior.moments.mean
        else:
            end = self.prior.denoise(x * v / column(passed), (v * (v - passed) / passed).sqrt()[k])
        return column(passed.diff().sqrt() / (v - passed[:-1])) * (end - x)


def test_short_last_steps_bring_the_exact_control_near_the_evidence():
    """25 modes, whose log Z is 0: the ELBO is -2.8 with 40 equal steps, -0.19 with falling ones (+- 0.06, 0.01)."""
    modes = grid()
    means = torch.stack([c.moments.mean.flatten() for c in modes.components])
    each = torch.distributions.MultivariateNormal(means, 0.3 * torch.eye(2, dtype=means.dtype))
    reward = lambda x, _: each.log_prob(x.flatten(1)[:, None]).logsumexp(1) - math.log(25)
    found = []
    for last in (None, 0.05):
        motion = Brownian(SHAPE, 40, 50.0, last)
        _, log_w = Engine(motion, Exact(motion, modes), reward).paths(4000, None, stream(1))
        assert abs(evidence(log_w).log_z) < 0.2
        found.append(float(log_w.mean()))
    assert found[0] < -2.5
    assert -0.3 < found[1] < -0.1


def test_guided_paths_find_the_evidence_of_a_gaussian_and_their_bound_closes_with_the_steps():
    prior, likelihood = gaussian(), measured([[1.0, -0.5]], 0.4)
    y = torch.tensor([1.7], dtype=torch.float64)
    exact = si.Posterior(prior, likelihood, y).gaussian_log_evidence
    gaps, fine = [], []
    for steps in (20, 40, 80):
        _, log_w = engine(prior, likelihood, y, steps).paths(4000, None, stream(7))
        found = evidence(log_w)
        error = (log_w - log_w.max()).exp()
        assert (
            abs(found.log_z - exact)
            < 4 * float(error.std() / error.mean()) / math.sqrt(4000) + 1e-3
        )
        gaps.append(exact - found.elbo)
        fine.append(found.log_z)
    assert 1.6 < gaps[0] / gaps[1] < 2.4
    assert 1.6 < gaps[1] / gaps[2] < 2.4
    assert extrapolated(fine[1], fine[2]) == pytest.approx(exact, abs=0.05)
    # negative control: without the data's pull the bound is far off, and says so
    _, log_w = engine(prior, likelihood, y, 20, guided=False).paths(4000, None, stream(7))
    assert exact - evidence(log_w).elbo > 3 * gaps[0]


def test_samplers_are_controls_whose_paths_weigh_the_evidence():
    """On a Gaussian prior, 40 steps: `Guided` is the guidance of controls; log Z within four standard errors.

    The error that PiGDM takes for white costs it a tenth of a nat or more. DPS, whose steps are as long however small the
    misfit is, is off by hundreds, and its bounds say so.
    """
    prior, likelihood = gaussian(), measured([[1.0, -0.5]], 0.4)
    y = torch.tensor([1.7], dtype=torch.float64)
    exact = si.Posterior(prior, likelihood, y).gaussian_log_evidence
    chain = PriorChain(prior, 40)
    elbo, gap = {}, {}
    for sampler in (si.Guided(), PiGDM(), DPS(zeta=0.2)):
        control = SamplerControl(chain, likelihood, sampler)
        steered = Engine(chain, control, lambda x, y: likelihood.log_prob(y, x))
        _, log_w = steered.paths(4000, y.expand(4000, 1), stream(7))
        name, found = type(sampler).__name__, evidence(log_w)
        elbo[name] = found.elbo - exact
        gap[name] = [
            r.gap
            for r in sampler_bounds(
                sampler, prior, likelihood, seed=0, steps=40, sims=10, paths=100
            )
        ]
        if name == "DPS":
            continue
        w = (log_w - log_w.max()).exp()
        error = float(w.std() / w.mean()) / math.sqrt(len(w))
        assert error < 0.02 and abs(found.log_z - exact) < 4 * error + 1e-3
        if name == "Guided":
            _, guided = engine(prior, likelihood, y, 40).paths(4000, None, stream(7))
            torch.testing.assert_close(log_w, guided)
    assert elbo["DPS"] < -50 < elbo["PiGDM"] < elbo["Guided"] - 0.1 < 0
    assert max(gap["Guided"]) < 1 and min(gap["DPS"]) > 50


@pytest.mark.parametrize("shape", [(1, 8, 8), (2, 6, 8)])
def test_guidance_follows_the_error_that_a_prior_knows(shape):
    """For a Gaussian prior it is the guidance by C_sigma, up to what a solve leaves out: mean log-weights within 0.3 nat.

    A prior that takes itself for twice as sure is moved too little, and pays for it; what it says goes into every use.
    """
    C = Fourier(power_law(*shape[1:]).expand(shape).contiguous())
    zero, noise = torch.zeros(shape), si.GaussianNoise(std=0.3)
    plain, prior = si.GaussianPrior(zero, C), Knowing(zero, C)
    likelihood = si.Likelihood(si.PSFConvolution(torch.ones(3, 3) / 9, plain.shape), noise)
    y = likelihood.simulate(plain.sample(1, 0), 1)[0]

    def log_w(prior, local=True):
        chain = PriorChain(prior, 12)
        control = SamplerControl(chain, likelihood, si.Guided(local=local))
        steered = Engine(chain, control, lambda x, y: likelihood.log_prob(y, x))
        return steered.paths(200, y.expand(200, *y.shape), stream(7))[1]

    exact = log_w(plain)
    assert float((exact - log_w(prior)).mean()) == pytest.approx(0, abs=0.3)
    # the steps themselves are those of C_sigma, too
    torch.testing.assert_close(log_w(prior, local=False), exact, rtol=0, atol=1e-3)
    prior.factor = 0.5
    assert float((exact - log_w(prior)).mean()) > 1
    prior.factor = 1.0
    plan = Plan(iterations=1, simulated=1, groups=2, paths=2, rate=1e-12)
    learned = si.finetune(prior, likelihood, seed=0, steps=12, plan=plan)
    assert type(learned.chain) is PriorChain and learned.control.guided
    draws = learned.condition(y).sample(400, seed=1, effective=0, island=400)
    assert draws.evaluations == 12 + 6  # half of the steps are walked anew
    known = si.Posterior(plain, likelihood, y).gaussian_log_evidence
    assert draws.log_evidence == pytest.approx(known, abs=1.0)  # four standard deviations
    # paths of the chain carry the errors: their steps are pulled as those of the control are
    pool = learned.engine.unsteered(3, stream(2))
    assert pool.errors.shape == (12, 3, 1, *shape)
    data = likelihood.simulate(pool.x, 3)
    gain = learned.engine.imitate(pool, torch.arange(3), data, stream(4))
    states = learned.engine.onwards(pool.states, data, stream(5))[0]
    assert gain == pytest.approx(float(states.spent.sum(0).mean()), rel=1e-4)


def test_samplers_without_a_density_have_no_bounds():
    prior, likelihood = gaussian(), measured([[1.0, -0.5]], 0.4)
    chain = PriorChain(prior, 4)
    with pytest.raises(ValueError, match="SMC have no density.* Guided, PiGDM, DPS"):
        SamplerControl(chain, likelihood, si.SMC())
    counts = si.Likelihood(likelihood.operator, si.PoissonNoise(background=1.0))
    with pytest.raises(ValueError, match="PoissonNoise: .*linear data with Gaussian noise"):
        SamplerControl(chain, counts, si.Guided())


def test_the_covariance_aware_kernel_raises_the_effective_size_at_few_steps():
    """The same guided control on a Gaussian prior of uneven variances, 10 steps."""
    prior = si.GaussianPrior(
        torch.zeros(SHAPE), Dense(torch.diag(torch.tensor([9.0, 0.04])).double())
    )
    likelihood, y = measured([[1.0, 1.0]], 0.5), torch.tensor([2.0], dtype=torch.float64)
    ess = {}
    for name, C in {"aware": None, "large": Scalar(math.inf), "small": Scalar(1e-3)}.items():
        _, log_w = engine(prior, likelihood, y, 10, C).paths(4000, None, stream(8))
        ess[name] = evidence(log_w).ess
    assert ess["aware"] > 1.2 * max(ess["large"], ess["small"])


def test_the_gradient_is_that_of_the_log_variance_however_it_is_chunked(monkeypatch):
    likelihood, y = measured([[1.0, 1.0]], 1.0), torch.tensor([5.0], dtype=torch.float64)
    learner = engine(grid(), likelihood, y, 6)
    with torch.no_grad():
        learner.control.last.weight.normal_(0, 0.3, generator=stream(9))
    paths, log_w = learner.paths(12, None, stream(10))

    def weights():
        """log w with a gradient, all steps at once."""
        total = paths.log_reward
        for i in range(6):
            k = torch.full((12,), i)
            u = learner.control(paths.states[i], paths.denoised[i], paths.guidance[i], k, None)
            total = total - GaussianStep.log_density(u, paths.z[i])
        return total

    assert torch.allclose(weights(), log_w, atol=1e-5)
    learner.control.zero_grad()
    groups = weights().reshape(3, 4)
    (0.5 * groups.var(1)).mean().backward()
    expected = [p.grad.clone() for p in learner.control.parameters()]
    c = LogVariance(huber=1e9).coefficients(log_w.reshape(3, 4), None).flatten()
    for chunk in (1, 4096):
        monkeypatch.setattr(engine_of_paths, "CHUNK", chunk)
        learner.control.zero_grad()
        learner.learn(paths, c)
        for p, e in zip(learner.control.parameters(), expected, strict=True):
            assert torch.allclose(p.grad, e, rtol=1e-3, atol=1e-4 * float(e.abs().max()) + 1e-9)
    # a part of the steps is right on average: over all steps, one by one
    learner.control.zero_grad()
    for i in range(6):
        learner.learn(paths, c, torch.tensor([i]))
    for p, e in zip(learner.control.parameters(), expected, strict=True):
        assert torch.allclose(p.grad / 6, e, rtol=1e-3, atol=1e-4 * float(e.abs().max()) + 1e-9)


def test_other_objectives_have_the_gradients_of_their_losses():
    log_w = torch.tensor(
        [[1.0, 2.0, 4.0], [0.0, 0.5, -1.0]], dtype=torch.float64, requires_grad=True
    )
    balance = TrajectoryBalance(huber=1e9)
    c = balance.coefficients(log_w.detach(), None)
    assert float(balance.level.detach()) == pytest.approx(float(log_w.detach().mean()))
    balance.level.data.fill_(0.3)
    balance.zero_grad()
    c = balance.coefficients(log_w.detach(), None)
    level = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    (0.5 * (level - log_w).square()).mean().backward()
    assert torch.allclose(-c, log_w.grad)
    assert float(balance.level.grad) == pytest.approx(float(level.grad))
    with pytest.raises(ValueError, match="OnPolicy know no draws.*JointSimulations or Given"):
        Recipe(ForwardKL())
    with pytest.raises(ValueError, match="at least 2 paths"):
        LogVariance().coefficients(log_w[:, :1].detach(), None)


def test_a_line_through_the_grid_is_learned_to_its_floor():
    likelihood, y = measured([[1.0, 1.0]], 1.0), torch.tensor([5.0], dtype=torch.float64)
    exact = grid_evidence([[1.0, 1.0]], y, 1.0)
    learner = engine(grid(), likelihood, y, 20, sigma_max=30.0)
    train_control(learner, nothing, Plan(iterations=250))
    paths, log_w = learner.paths(4000, None, stream(11))
    found = evidence(log_w)
    assert found.elbo - exact > -1.6
    assert abs(found.log_z - exact) < 0.25
    # the four modes have equal weights once the paths are weighed
    means = torch.cartesian_prod(*[torch.tensor([-10.0, -5.0, 0.0, 5.0, 10.0]).double()] * 2)
    near = torch.cdist(paths.x.flatten(1), means).argmin(1)
    share = torch.zeros(25).double().index_add(0, near, torch.softmax(log_w, 0))
    on_line = means.sum(1) == 5
    assert (share[on_line] - 0.25).abs().sum() / 2 < 0.06


def test_a_collapsed_control_is_found_out_by_the_upper_bound():
    """Trained on one of two modes: bound and effective size look well, the gap does not."""
    prior = si.MixturePrior(
        [0.5, 0.5], [si.GaussianPrior(torch.full(SHAPE, m), 0.1) for m in (-3.0, 3.0)]
    )
    likelihood = measured([[1.0, -1.0]], 0.5)
    y = torch.zeros(1, dtype=torch.float64)
    learner = engine(prior, likelihood, y, 15)
    one = si.GaussianPrior(torch.full(SHAPE, 3.0), 0.05).sample(500, seed=1)
    train_control(
        learner, nothing, Plan(iterations=300, paths=64), Recipe(ForwardKL(), [(1.0, Given(one))])
    )
    _, log_w = learner.paths(3000, None, stream(12))
    both = torch.cat([one, -one])
    _, target = learner.through(both, None, stream(13))
    found = evidence(log_w, target)
    assert found.ess > 0.1
    assert found.gap > 5
    assert "misses modes" in found.warnings[0]


def test_evidence_bounds_hold_and_bad_weights_are_named():
    log_w = torch.randn(1000, generator=stream(14), dtype=torch.float64) - 0.5
    found = evidence(log_w)
    # log-normal weights of unit variance and log Z = 0
    assert abs(found.log_z) < 0.15
    assert found.at_least < 0
    assert found.elbo == pytest.approx(-0.5, abs=0.1)
    assert not found.warnings
    wild = evidence(8 * log_w)
    assert "count as" in wild.warnings[0]
    heavy = -torch.rand(2000, generator=stream(15), dtype=torch.float64).log()
    assert k_hat(heavy) == pytest.approx(1.0, abs=0.3)
    with pytest.raises(ValueError, match="finite"):
        evidence(torch.full((20,), math.nan))


def test_joint_simulations_train_a_control_for_every_y():
    """A Gaussian prior: the control must learn how the data pull, without being told by guidance."""
    prior, likelihood = gaussian(), measured([[1.0, -0.5]], 0.2)
    chain = PriorChain(prior, 12)

    def simulate(n, seed):
        x = prior.sample(n, seed)
        return x, likelihood.simulate(x, seed)

    _, examples = simulate(500, 1)
    learner = Engine(chain, VectorControl(chain, examples), lambda x, y: likelihood.log_prob(y, x))
    x, y = simulate(200, 2)

    def elbo():
        posterior = [si.Posterior(prior, likelihood, v).gaussian_log_evidence for v in y]
        _, log_w = learner.paths(200, y, stream(16))
        return float((log_w - torch.tensor(posterior)).mean())

    before = elbo()
    recipe = Recipe(LogVariance(), [(0.5, OnPolicy()), (0.5, JointSimulations())])
    train_control(learner, simulate, Plan(iterations=300, groups=16, paths=8), recipe)
    after = elbo()
    print(before, after)
    assert before < -3
    assert after > -1.0


@pytest.mark.parametrize("chained", [PriorChain, TwistedChain])
def test_paths_of_the_chain_given_data_at_their_ends_are_imitated(chained, monkeypatch):
    """The gradient of -log p_u of whole paths, from all steps at once or from single ones on average."""
    prior, likelihood = gaussian(), measured([[1.0, -0.5]], 0.5)
    chain = PriorChain(prior, 6) if chained is PriorChain else TwistedChain(prior, 6, likelihood)
    guide = guidance(chain, likelihood) if chained is PriorChain else None
    learner = Engine(
        chain, VectorControl(chain, guide=guide), lambda x, y: likelihood.log_prob(y, x)
    )
    with torch.no_grad():
        learner.control.last.weight.normal_(0, 0.1, generator=stream(9))
    # of 80 paths 50 count, in an order of their own
    free, which = learner.unsteered(80, stream(20)), torch.randperm(80, generator=stream(22))[:50]
    y = likelihood.simulate(free.x[which], 23)

    def gathered():
        used = [p for p in learner.control.parameters() if p.grad is not None]
        return torch.cat([p.grad.flatten() for p in used])

    def gradient(steps=None):
        learner.control.zero_grad()
        gain = learner.imitate(free, which, y, stream(24), steps)
        return gain, gathered()

    gain, one = gradient()
    assert float(free.log_reward.abs().max()) == 0
    paths, _ = learner.onwards(free.states[:, which], y, stream(21))
    learner.control.zero_grad()
    learner.learn(paths, torch.full((50,), -1 / 50))
    whole = gathered()
    assert torch.allclose(one, whole, rtol=1e-3, atol=1e-4 * float(whole.abs().max()))
    if chained is PriorChain:
        assert gain == pytest.approx(float(paths.spent.sum(0).mean()), rel=1e-4)
    # a part of the steps is right on average: over all steps, one by one
    parts = []
    for i in range(6):
        order = lambda T, n, i=i, **_: ((torch.arange(T) - i) % T)[:, None].expand(T, n).double()
        monkeypatch.setattr(torch, "rand", order)
        parts.append(gradient(1)[1])
    mean = torch.stack(parts).mean(0)
    assert torch.allclose(mean, whole, rtol=1e-3, atol=1e-4 * float(whole.abs().max()))


def test_what_a_gradient_holds_does_not_grow_with_the_steps(monkeypatch):
    monkeypatch.setattr(engine_of_paths, "CHUNK", 1)
    likelihood, y = measured([[1.0, 1.0]], 1.0), torch.tensor([5.0], dtype=torch.float64)

    def held(steps):
        """Most bytes that wait for a backward pass."""
        learner, waiting, most = engine(grid(), likelihood, y, steps), [0], [0]
        paths, log_w = learner.paths(64, None, stream(10))

        def keep(t):
            waiting[0] += t.numel() * t.element_size()
            most[0] = max(most[0], waiting[0])
            return t

        def give(t):
            waiting[0] -= t.numel() * t.element_size()
            return t

        with torch.autograd.graph.saved_tensors_hooks(keep, give):
            learner.learn(paths, LogVariance().coefficients(log_w[None], None).flatten())
        return most[0]

    few, many = held(10), held(160)
    assert 0 < many < 1.1 * few
    monkeypatch.setattr(engine_of_paths, "CHUNK", 10**9)  # all steps at once
    assert held(160) > 10 * few


def test_a_control_that_imitates_closes_the_gap():
    prior, likelihood = problem(d=4, m=2, modes=3)
    gaps = []
    for plan in (
        Plan(iterations=1, rate=1e-9),
        Plan(iterations=0, simulated=200, groups=4, paths=32),
    ):
        learned = si.finetune(prior, likelihood, seed=0, steps=12, plan=plan, guided=False)
        gaps.append(sum(b.gap for b in learned.bounds(20, 50, seed=1)) / 20)
        assert len(learned.history) == plan.total
    assert gaps[1] < 0.3 * gaps[0]
    with pytest.raises(ValueError, match="expected `observe`"):
        train_control(learned.engine, lambda n, seed: (None, None), plan)
    with pytest.raises(ValueError, match="at least 1 of the first two together"):
        Plan(iterations=0)
    y = likelihood.simulate(prior.sample(1, seed=3), seed=4)[0]
    with pytest.raises(ValueError, match="serves one y"):
        si.finetune(prior, likelihood, seed=0, steps=6, y=y, plan=plan)


def walked(learned, y, n, islands, resample, **options):
    """Islands of n paths each, at their end."""
    posterior = learned.condition(y).posterior
    sampler = Steered(learned, resample, **options)
    found = [sampler.island(posterior, n, stream(30, i)) for i in range(islands)]
    for _ in descend_together(posterior.prior, found):
        pass
    return found


def test_resampling_on_the_way_leaves_the_evidence_what_it_is():
    """Means of Z over 300 islands of 16 paths with and without agree within 4 standard errors (false alarms: 6e-5)."""
    likelihood, y = measured([[1.0, 1.0]], 1.0), torch.tensor([5.0], dtype=torch.float64)
    plan = Plan(iterations=1, rate=1e-9)
    learned = si.finetune(grid(), likelihood, y=y, steps=8, plan=plan, seed=0)
    known = grid_evidence([[1.0, 1.0]], y, 1.0)
    base = learned.condition().posterior.gaussian_log_evidence
    means, errors = [], []
    for resample in (0.0, 0.9):
        islands = walked(learned, y, 16, 300, resample)
        z = torch.tensor([i.trace.log_evidence for i in islands]) + base - known
        means.append(float(z.exp().mean()))
        errors.append(float(z.exp().std()) / 300**0.5)
        # the effective size is recorded where particles may be resampled
        assert all(len(i.trace.ess) > 0 for i in islands) == (resample > 0)
    assert abs(means[0] - means[1]) < 4 * math.hypot(*errors)
    assert means[0] == pytest.approx(1.0, abs=0.3)  # the chain's own, at 8 steps


def test_paths_walked_anew_leave_the_draws_what_they_are():
    """Mean squared misfits of 20 islands of 256 paths, within 4 standard errors of weighted ones (false alarms: 6e-5)."""
    likelihood, y = measured([[1.0, 1.0]], 1.0), torch.tensor([5.0], dtype=torch.float64)
    plan = Plan(iterations=1, rate=1e-9)
    learned = si.finetune(grid(), likelihood, y=y, steps=8, plan=plan, seed=0)
    misfit = lambda x: likelihood.chi2(y, x)
    paths, log_w = learned.engine.paths(40_000, y.expand(40_000, 1), stream(31))
    known = float(torch.softmax(log_w, 0) @ misfit(paths.x))
    found, differ = {}, {}
    for moves in (0, 1, 4):
        islands = walked(learned, y, 256, 20, 0.0, moves=moves)
        w = [torch.softmax(torch.tensor(i.trace.log_weights).double(), 0) for i in islands]
        kept = [slice(None) if moves else systematic(v, 256, stream(32)) for v in w]
        draws = [i.x[rows] for i, rows in zip(islands, kept, strict=True)]
        each = torch.stack([misfit(x).mean() for x in draws])
        assert float(each.mean()) == pytest.approx(known, abs=4 * float(each.std()) / 20**0.5)
        found[moves] = float(each.mean())
        differ[moves] = sum(len(x.flatten(1).unique(dim=0)) for x in draws) / (20 * 256)
        assert islands[0].trace.evaluations == 8 + 4 * moves
        assert all(math.isnan(i.trace.acceptance[-1]) == (moves == 0) for i in islands)
    assert differ[0] < 0.75 < differ[1] < 0.95 < differ[4]
    # negative control: without weights
    assert abs(float(misfit(paths.x).mean()) - known) > 10 * abs(found[1] - known)


def test_what_a_chain_draws_without_data_is_the_prior_where_it_is_exact():
    """Of a Gaussian prior, whatever its control: covariance of 4,000 draws within 4 standard errors (false alarms: 2e-4)."""
    prior, likelihood = gaussian(), measured([[1.0, -0.5]], 0.5)
    learned = si.finetune(prior, likelihood, seed=0, steps=6, plan=Plan(iterations=1, rate=1e-12))
    x = learned.unsteered(4000, seed=1)
    torch.testing.assert_close(learned.unsteered(200, seed=1)[:128], x[:128])
    known = prior.moments.covariance.apply(torch.eye(2).double().reshape(2, 1, 1, 2)).reshape(2, 2)
    variances = known.diagonal()
    error = ((variances[:, None] * variances + known**2) / 4000).sqrt()
    assert bool(((torch.cov(x.flatten(1).T) - known).abs() < 4 * error).all())


def test_paths_of_an_exact_chain_are_not_walked_anew():
    prior, likelihood = gaussian(), measured([[1.0, -0.5]], 0.5)
    learned = si.finetune(prior, likelihood, seed=0, steps=6, plan=Plan(iterations=1, rate=1e-12))
    y = likelihood.simulate(prior.sample(1, seed=3), seed=4)[0]
    draws = learned.condition(y).sample(64, seed=5, island=64)
    assert draws.evaluations == 6 and bool(draws.acceptance.isnan().all())
    assert learned.condition(y).sample(32, seed=5, particles=3, island=16).evaluations == 18


def test_a_twist_is_learned_where_nothing_is_foreseen():
    """Noise with outliers, of which no Gaussian prior foresees anything: particles live on what was learned."""
    prior, gaussian_noise = problem(d=4, m=2, modes=3)
    noise = si.StudentNoise(scale=0.3, dof=3.0)
    likelihood = si.Likelihood(gaussian_noise.operator, noise)
    plan = Plan(iterations=60, simulated=200, groups=16, paths=8, twist=150)
    learned = si.finetune(prior, likelihood, seed=0, steps=12, plan=plan)
    left = [h["promise"] for h in learned.history if "promise" in h]
    assert len(left) == 150 and learned.twist.knows
    assert sum(left[-20:]) < 0.75 * 4 * sum(left[:5])
    y = likelihood.simulate(prior.sample(6, seed=3), seed=4)

    def alive(amortised):
        """Mean share of particles that a step leaves, if all are resampled after each."""
        found = [e for v in y for i in walked(amortised, v, 64, 4, 1.0) for e in i.trace.ess[:-1]]
        return sum(found) / len(found)

    with_twist = alive(learned)
    with torch.no_grad():
        learned.twist.network[-1].weight.zero_()
    assert 1 - with_twist < 0.7 * (1 - alive(learned))
    learned.twist.learned.fill_(False)
    assert not learned.twist.knows


def test_guidance_by_gradient_agrees_with_the_exact_one_where_errors_are_small():
    prior, likelihood = gaussian(), measured([[1.0, -0.5]], 3.0)
    y = torch.tensor([1.0], dtype=torch.float64)
    chain = PriorChain(prior, 10)
    x, k = prior.sample(5, seed=1), torch.full((5,), 9)
    step = chain.step(x, k, None)
    exact = guidance(chain, likelihood)(step, k, y.expand(5, 1))
    slope = guidance_by_gradient(chain, lambda x, _: likelihood.log_prob(y, x))(step, k, None)
    assert torch.allclose(exact, slope, rtol=0.02)


def test_guidance_by_gradient_is_all_of_a_linear_reward():
    """For a Gaussian prior log w is constant, but for the start, whose own share of the reward no step can mend."""
    prior = gaussian()
    b = torch.tensor([0.7, -1.2], dtype=torch.float64)
    reward = lambda x, _: x.flatten(1) @ b
    learned = si.finetune_by_reward(
        prior, reward, seed=0, steps=6, guided=True, plan=Plan(iterations=1, paths=2, rate=1e-12)
    )
    report = learned.evidence(500, 1)
    C, mean = prior.moments.covariance, prior.moments.mean.flatten()
    pull = C.apply(b.reshape(1, 1, 1, 2)).flatten()
    assert report.log_z == pytest.approx(float(mean @ b + 0.5 * b @ pull), abs=0.05)
    assert report.std < 0.15
    # without, the weights carry all of the reward
    plain = Engine(learned.engine.reference, VectorControl(learned.engine.reference), reward)
    assert float(plain.paths(500, None, stream(2))[1].std()) > 5 * report.std


def problem(d=8, m=3, modes=6, std=0.3, seed=1):
    """A mixture in d dimensions, of which m are measured."""
    g = stream(seed)
    draw = lambda *shape: torch.randn(shape, generator=g, dtype=torch.float64)
    components = []
    for _ in range(modes):
        root = 0.6 * draw(d, d) / math.sqrt(d)
        mean = 2 * draw(1, 1, d)
        components.append(si.GaussianPrior(mean, Dense(root @ root.T + 0.1 * torch.eye(d))))
    prior = si.MixturePrior(torch.rand(modes, generator=g) + 0.5, components)
    matrix = torch.linalg.qr(draw(d, d))[0][:m]
    return prior, si.Likelihood(si.DenseOperator(matrix, (1, 1, d)), si.GaussianNoise(std=std))


def test_an_amortised_control_samples_any_data_like_the_other_samplers():
    prior, likelihood = problem(d=4, m=2, modes=3)
    learned = si.finetune(
        prior, likelihood, seed=0, steps=20, plan=Plan(iterations=150, groups=16, paths=8)
    )
    y = likelihood.simulate(prior.sample(1, seed=3), seed=4)[0]
    found = learned.condition(y).sample(2000, seed=5, island=500)
    exact = si.sample(
        si.Posterior(prior, likelihood, y), 4000, si.SMC(levels=40), seed=6, island=1000
    )
    assert found.log_evidence == pytest.approx(exact.log_evidence, abs=0.3)
    spread = exact.x.std(0)
    assert ((found.x.mean(0) - exact.x.mean(0)).abs() / spread).max() < 0.25
    assert ((found.x.std(0) / spread) - 1).abs().max() < 0.25
    # the sampler's own islands and the engine's paths know the same evidence
    assert learned.condition(y).evidence(2000, seed=7).log_z == pytest.approx(
        found.log_evidence, abs=0.3
    )
    # without weights on the way what they are worth is known at the end
    assert float(found.ess[-1]) == pytest.approx(
        learned.condition(y).evidence(2000, 9).ess, rel=0.3
    )
    assert found.ess[:-1].isnan().all() and "worn" not in found.weights
    options = {"seed": 5, "island": 3, "moves": 0}
    few = learned.condition(y).sample(3, effective=0, **options)
    assert "worn out" in few.weights and few.evaluations == 20
    # as many more as it takes
    more = learned.condition(y).sample(3, effective=4.0, **options)
    assert float(more.ess[-1]) * more.evaluations / 20 * 3 > 12 and "worn" not in more.weights
    assert 60 < more.evaluations <= 16 * 20 and "worth" not in more.weights
    most = learned.condition(y).sample(3, effective=100.0, **options)
    assert most.evaluations == 16 * 20 and re.search(r"worth \d+ of 3 draws", most.weights)
    bounds = learned.bounds(sims=20, paths=100, seed=8)
    gaps = torch.tensor([b.gap for b in bounds])
    assert 0 < gaps.mean() < 8


def test_training_that_was_stopped_goes_on_bit_for_bit(tmp_path, monkeypatch):
    prior, likelihood = problem(d=4, m=2, modes=3)
    y = likelihood.simulate(prior.sample(1, seed=3), seed=4)[0]
    plan = Plan(iterations=12, paths=16)

    def run(folder):
        recipe = Recipe(
            TrajectoryBalance(),
            [
                (0.4, OnPolicy(1.2)),
                (0.3, Backtracking()),
                (0.3, LocalSearch(prior.log_prob, 3, 2)),
            ],
        )
        return si.finetune(
            prior, likelihood, seed=0, steps=6, y=y, plan=plan, recipe=recipe, folder=folder
        )

    monkeypatch.setattr(training, "SAVE_EVERY", 5)
    whole = run(tmp_path / "whole")
    propose, calls = OnPolicy.propose, []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 8:
            raise KeyboardInterrupt
        return propose(*arguments)

    monkeypatch.setattr(OnPolicy, "propose", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "parts")
    again = run(tmp_path / "parts")
    assert len(calls) == 8 + 7  # from iteration 5 on
    assert again.history == whole.history
    for k, v in again.control.state_dict().items():
        assert torch.equal(v, whole.control.state_dict()[k])
    with pytest.raises(ValueError, match="another training"):
        si.finetune(prior, likelihood, seed=0, steps=7, y=y, plan=plan, folder=tmp_path / "parts")
    # the same plan for other data is another training
    si.finetune(prior, likelihood, seed=0, steps=6, y=y, plan=plan, folder=tmp_path / "one")
    with pytest.raises(ValueError, match="another training"):
        si.finetune(
            prior, likelihood, seed=0, steps=6, y=2 * y, plan=plan, folder=tmp_path / "one"
        )
    with pytest.raises(ValueError, match="all of the reward"):
        Recipe(temper=1.0)


def test_weights_follow_their_seed_and_leave_the_global_generator_alone():
    prior, gaussian_noise = problem(d=4, m=2, modes=3)
    likelihood = si.Likelihood(gaussian_noise.operator, si.StudentNoise(scale=0.3, dof=3.0))
    examples = likelihood.simulate(prior.sample(50, seed=1), seed=2)
    images = PriorChain(si.GaussianPrior(torch.zeros(1, 16, 16), 1.0), 3)

    def made(seed):
        plan = Plan(iterations=2, simulated=2, groups=2, paths=4, twist=2)
        recipe = Recipe(TrajectoryBalance(examples, seed=seed))
        options = {"steps": 3, "plan": plan, "recipe": recipe, "images": prior.sample(50, 1)}
        learned = si.finetune(prior, likelihood, seed=seed, **options)
        modules = [learned.control, learned.twist, recipe.objective]
        modules += [ImageControl(images, seed=seed), Denoiser((3, 4), 8, seed=seed)]
        return [v.clone() for module in modules for v in module.state_dict().values()]

    found = []
    with torch.random.fork_rng(devices=[]):
        for state, seed in ((1, 0), (2, 0), (3, 1)):
            torch.manual_seed(state)
            before = torch.get_rng_state()
            found.append(made(seed))
            assert torch.equal(torch.get_rng_state(), before)
            si.load_prior("galaxy64")
            assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(*found[:2], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(*found[1:], strict=True))


def test_drawn_weights_have_no_biases_and_the_scales_of_normalisations_stay():
    module = torch.nn.Sequential(
        torch.nn.LayerNorm(1),
        torch.nn.Linear(1, 64),
        torch.nn.LayerNorm(64),
        torch.nn.Linear(64, 1),
    )
    initialise(module, stream(0))
    scales = [module[0].weight, module[2].weight]
    assert all(bool((v == 1).all()) for v in scales)
    assert not any(bool(layer.bias.any()) for layer in module)
    assert float(module[3].weight.detach().std()) == pytest.approx(
        1 / 8, rel=0.4
    )  # 4.5 standard errors


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"y": torch.zeros(4).double()}, r"data have shape \(4,\), the operator makes \(2,\)"),
        ({"y": torch.zeros(1, 2).double()}, r"pass y\[0\]"),
        ({"y": torch.tensor([math.nan, 0.0])}, "1 of 2 data are not finite"),
        ({"y": torch.zeros(2, dtype=torch.complex128)}, "the operator makes real data"),
        ({"images": torch.full((3, 1, 1, 4), math.nan)}, "3 of 3 images hold numbers"),
        ({"images": torch.ones(3, 1, 1, 4).long()}, "pass images.float()"),
        ({"images": torch.zeros(0, 1, 1, 4)}, "N at least 1"),
        ({"images": torch.zeros(3, 1, 4)}, r"expected \(N, 1, 1, 4\)"),
    ],
)
def test_data_and_images_that_do_not_fit_are_refused(wrong, message):
    prior, likelihood = problem(d=4, m=2, modes=3)
    plan = Plan(iterations=1, paths=2)
    with pytest.raises(ValueError, match=message):
        si.finetune(prior, likelihood, seed=0, steps=3, plan=plan, **wrong)
    options = {"images": torch.zeros(3, 1, 1, 4).double(), **wrong}
    with pytest.raises(ValueError, match=message):
        untrained(prior, likelihood, options.pop("images"), 0, steps=3, **options)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"steps": 0}, "steps is 0, expected at least 1"),
        ({"rate": 0.0}, "rate is 0"),
        ({"rate": math.nan}, "rate is nan"),
        ({"rate_log_z": -0.1}, "rate_log_z -0.1"),
        ({"clip": 0.0}, "clip 0"),
        ({"ema": 1.0}, "ema is 1, expected 0 <= ema < 1"),
        ({"ema": -0.5}, "ema is -0.5"),
    ],
)
def test_plans_that_teach_nothing_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        Plan(**wrong)
    Plan(steps=1, rate_log_z=0.0, clip=math.inf, ema=0.0)


def learners(device, side):
    """Control and twist of a trained prior on a device, and what they say of four images."""
    base = si.GaussianPrior(torch.zeros(1, side, side), 1.0)
    prior = si.ScorePrior(UNet(1, (8, 16), embedding=16), 1.0, base.moments, 0.01, 10.0)
    chain = PriorChain(prior.rescaled(3.0), 4)
    psf = si.PSFConvolution(torch.ones(3, 3) / 9, base.shape)
    likelihood = si.Likelihood(psf, si.StudentNoise(scale=0.3, dof=3.0))
    y = likelihood.simulate(base.sample(4, 0), 0)
    prior.to(device)
    control = control_of(chain, likelihood, y, guided=True)
    twist = new_twist(chain, likelihood, y)
    x, k = base.sample(4, 1).float(), torch.arange(4)
    return control, twist, lambda: (control(x, 0.5 * x, 0.1 * x, k, y), twist(x, 0.5 * x, k, y))


@pytest.mark.parametrize("side", [8, 16], ids=["perceptron", "U-Net"])
def test_controls_and_twists_run_where_the_prior_does(side):
    """On a device without numbers: weights are there and inputs arrive; for answers it has none, others are put."""
    control, twist, say = learners("meta", side)
    networks = [control.last if side == 8 else control.network, twist.network]
    arrived = []

    def answered(module, seen, said):
        arrived.extend(v.device.type for v in seen if v is not None)
        return torch.zeros(said.shape)

    for network in networks:
        assert {p.device.type for p in network.parameters()} == {"meta"}
        network.register_forward_hook(answered)
    u, h = say()
    assert set(arrived) == {"meta"}
    assert u.device.type == h.device.type == "cpu"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("side", [8, 16], ids=["perceptron", "U-Net"])
def test_a_gpu_says_what_the_cpu_does(side):
    found = []
    for device in ("cpu", "cuda"):
        control, twist, say = learners(device, side)
        for last in (control.last if side == 8 else control.network.last, twist.network):
            for p in last.parameters():
                torch.nn.init.constant_(p, 0.01)
        found.append([v.detach() for v in say()])
        assert all(v.device.type == "cpu" for v in found[-1])
    for here, there in zip(*found, strict=True):
        torch.testing.assert_close(here, there, rtol=1e-2, atol=1e-2)


def test_the_report_of_the_command_is_json(tmp_path):
    """No image is known to have made an observation, so that its bound from above is not known, either: null."""
    network = {"channels": 1, "widths": (8, 16), "blocks": 1, "embedding": 16}
    moments = si.GaussianPrior(torch.zeros(1, 16, 16), Fourier(torch.ones(1, 16, 16))).moments
    prior = si.ScorePrior(UNet(**network), 1.0, moments, 0.01, 20.0)
    card = {"name": "white", "network": network, "sigma_data": 1.0, "sigma_min": 0.01}
    card |= {"sigma_max": 20.0, "trained_images": 1, "training": {"data": {"size": 16}}}
    save_prior(tmp_path / "prior", prior, {**card, "held_out": {}})
    content = {
        "exposure": {"kind": "disc", "flux": 20.0, "fwhm": 2.5, "noise": 0.2},
        "prior": str(tmp_path / "prior"),
        "amplitude": 1.0,
        "steps": 4,
        "plan": {"iterations": 1, "groups": 1, "paths": 2},
        "images": 10,
        "sims": 1,
        "paths": 10,
        "n": 2,
        "output": str(tmp_path / "control"),
    }
    (tmp_path / "c.yaml").write_text(json.dumps(content))  # JSON is YAML
    assert main(["finetune", "--config", str(tmp_path / "c.yaml")]) == 0

    def refused(name):
        raise AssertionError(f"{name} is no JSON")

    said = (tmp_path / "control" / "report.json").read_text()
    report = json.loads(said, parse_constant=refused)
    assert report["observation"]["eubo"] is None
    assert math.isfinite(report["observation"]["elbo"] + report["after"][0]["eubo"])


def test_a_control_is_kept_and_found_again(tmp_path):
    prior, likelihood = problem(d=4, m=2, modes=3)
    plan = Plan(iterations=3, groups=2, paths=4)
    learned = si.finetune(prior, likelihood, seed=0, steps=6, plan=plan)
    learned.save(tmp_path)
    found = si.load_amortised(tmp_path, prior, likelihood)
    y = likelihood.simulate(prior.sample(1, seed=3), seed=4)[0]
    ours, theirs = (v.condition(y).evidence(50, seed=1) for v in (learned, found))
    assert ours == theirs
    draws = [v.condition(y).sample(4, seed=2, island=4) for v in (learned, found)]
    assert draws[0].meta["sampler"] == draws[1].meta["sampler"]
    assert re.fullmatch(
        r"Steered\(amortised=VectorControl [0-9a-f]{12}, resample=0.0, particles=1, effective=0.25, moves=1\)",
        draws[0].meta["sampler"],
    )
    other = si.Likelihood(likelihood.operator, si.GaussianNoise(std=0.1))
    with pytest.raises(ValueError, match="another problem: its likelihood"):
        si.load_amortised(tmp_path, prior, other)
    card = json.loads((tmp_path / "control.json").read_text())
    (tmp_path / "control.json").write_text(json.dumps(card | {"format": 2}))
    with pytest.raises(ValueError, match="control of format 2"):
        si.load_amortised(tmp_path, prior, likelihood)
    (tmp_path / "control.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="no control"):
        si.load_amortised(tmp_path, prior, likelihood)
    with pytest.raises(ValueError, match="which data"):
        learned.condition()


def test_images_have_a_control_of_convolutions():
    """A Gaussian field seen through a PSF, whose posterior guidance alone makes nearly exactly."""
    ky, kx = torch.fft.fftfreq(20)[:, None].double(), torch.fft.fftfreq(20).double()
    prior = si.GaussianPrior(
        torch.zeros(1, 20, 20), Fourier(1 / (0.05 + ky**2 + kx**2) ** 1.5 / 50)
    )
    psf = torch.ones(3, 3) / 9
    likelihood = si.Likelihood(
        si.PSFConvolution(psf, prior.shape, boundary="circular"), si.GaussianNoise(std=0.5)
    )
    plan = Plan(iterations=3, groups=2, paths=4, rate=1e-4)
    learned = si.finetune(prior, likelihood, seed=0, steps=12, plan=plan)
    assert type(learned.control).__name__ == "ImageControl"
    y = likelihood.simulate(prior.sample(1, seed=3), seed=4)[0]
    found = learned.condition(y).sample(200, seed=5, island=100)
    posterior = si.Posterior(prior, likelihood, y)
    exact = posterior.gaussian_draw(4000, stream(1))
    error = (found.x.mean(0) - exact.mean(0)) / exact.std(0)
    # 1 / 200 for exact draws, thrice as much for what weights cost
    assert float(error.square().mean()) < 0.015
    assert learned.condition(y).evidence(100, seed=1).std < 0.5
    free = si.finetune(prior, likelihood, seed=0, steps=12, plan=plan, guided=False)
    # negative control: three iterations teach nothing
    assert free.condition(y).evidence(100, seed=1).elbo < found.log_evidence - 50


def beyond_gaussian(kind, shape):
    """Images seen through noise with outliers, as counts, or by the amplitudes of their Fourier transform."""
    if kind == "amplitudes":
        n = math.prod(shape)
        rows = torch.fft.fft(torch.eye(n, dtype=torch.complex128))[1 : n // 4]
        operator = si.Amplitude(si.DenseOperator(rows, shape))
        return si.Likelihood(operator, si.RiceNoise(0.5))
    psf = si.PSFConvolution(torch.ones(3, 3) / 9, shape)
    noise = si.PoissonNoise(1.0) if kind == "counts" else si.StudentNoise(scale=0.3, dof=3.0)
    return si.Likelihood(psf, noise)


@pytest.mark.parametrize("background", [1.0, 1e4])
def test_counts_are_shown_in_units_of_their_noise(background):
    """Images of the same sky differ by about 1.4 from one exposure to the next, however bright the background is."""
    psf = si.PSFConvolution(torch.ones(3, 3) / 9, (1, 16, 16))
    likelihood = si.Likelihood(psf, si.PoissonNoise(background))
    sky = torch.full((1, 16, 16), 0.5 * background**0.5)
    seen = data_image(likelihood, sky)(likelihood.simulate(sky.expand(2, 1, 16, 16), 1))
    # the inverse hyperbolic sine takes a little off
    assert 0.8 < float((seen[0] - seen[1]).square().mean().sqrt()) < 1.6


@pytest.mark.parametrize("kind", ["outliers", "counts", "amplitudes"])
def test_guidance_knows_how_far_data_of_any_kind_can_pull(kind):
    """Its bounds are closer by far than those of the bare gradient, which pulls as if nothing gave way."""
    values = power_law(16, 16) / float(power_law(16, 16).mean())
    prior = si.GaussianPrior(torch.full((1, 16, 16), 9.0), Fourier(values))
    likelihood, images = beyond_gaussian(kind, prior.shape), prior.sample(16, 1)
    start = untrained(prior, likelihood, images, 0, steps=20)
    gap = lambda amortised: sum(r.gap for r in amortised.bounds(3, 32, 1)) / 3
    known = gap(start)
    reward = lambda x, y: likelihood.log_prob(y, x)
    start.control._guide = guidance_by_gradient(start.chain, reward)
    assert known < 0.5 * gap(start)


@pytest.mark.parametrize("kind", ["outliers", "counts", "amplitudes"])
def test_images_of_any_likelihood_have_a_control(kind, tmp_path):
    """It sees the data, and is kept and found again."""
    values = power_law(16, 16) / float(power_law(16, 16).mean())
    prior = si.GaussianPrior(torch.full((1, 16, 16), 9.0), Fourier(values))
    likelihood = beyond_gaussian(kind, prior.shape)
    plan = Plan(iterations=2, groups=2, paths=4, rate=1e-3)
    images = prior.sample(16, 1)
    learned = si.finetune(prior, likelihood, seed=0, steps=6, plan=plan, images=images)
    y = likelihood.simulate(images[:2], 2)
    seen = learned.control._image(y)
    assert seen.shape == images[:2].shape and float((seen[0] - seen[1]).abs().max()) > 0.1
    assert 0.1 < float(seen.square().mean().sqrt()) < 10
    draws = learned.condition(y[0]).sample(4, seed=3, island=4)
    assert bool(torch.isfinite(draws.x).all())
    learned.save(tmp_path)
    found = si.load_amortised(tmp_path, prior, likelihood)
    assert found.condition(y[0]).evidence(12, seed=4) == learned.condition(y[0]).evidence(
        12, seed=4
    )
    other = {"amplitudes": si.RiceNoise(0.6), "counts": si.PoissonNoise(1.1)}
    noise = other.get(kind, si.StudentNoise(scale=0.31, dof=3.0))
    with pytest.raises(ValueError, match="of another problem: its likelihood"):
        si.load_amortised(tmp_path, prior, si.Likelihood(likelihood.operator, noise))


@pytest.mark.parametrize("steps", [2, 9])
def test_the_twisted_chain_of_a_gaussian_prior_is_its_posterior(steps):
    """Every path weighs the evidence, at any number of steps; the plain chain's do not."""
    prior, likelihood = gaussian(3), measured([[1.0, -0.5, 0.3]], 0.1)
    y = torch.tensor([1.7], dtype=torch.float64)
    exact = si.Posterior(prior, likelihood, y).gaussian_log_evidence
    spread = {}
    for chain in (TwistedChain(prior, steps, likelihood), PriorChain(prior, steps)):
        guide = None if isinstance(chain, TwistedChain) else guidance(chain, likelihood)
        learner = Engine(
            chain, VectorControl(chain, guide=guide), lambda x, v: likelihood.log_prob(v, x)
        )
        _, log_w = learner.paths(100, y.expand(100, 1), stream(17))
        spread[type(chain).__name__] = float((log_w - exact).abs().max())
        noised = learner.through(prior.sample(100, seed=1), y.expand(100, 1), stream(18))[1]
        assert bool(torch.isfinite(noised).all())
    assert spread["TwistedChain"] < 1e-6
    assert spread["PriorChain"] > 0.5


def test_paths_begin_where_data_move_them():
    """At the level of the prior's own width they count for more, and their mean weight is the evidence, as without.

    A mean beyond four standard errors is a false alarm in one of 8,000 runs.
    """
    prior, likelihood = gaussian(3), measured([[1.0, -0.5, 0.3]], 0.1)
    y, n = torch.tensor([5.0], dtype=torch.float64), 20000
    exact = si.Posterior(prior, likelihood, y).gaussian_log_evidence
    effective = {}
    for told in (likelihood, None):
        chain = PriorChain(prior, 6, sigma_max=1.5, likelihood=told)
        control = VectorControl(chain, guide=guidance(chain, likelihood))
        learner = Engine(chain, control, lambda x, v: likelihood.log_prob(v, x))
        assert bool((chain.start(2, None).mean == prior.moments.mean).all())
        _, log_w = learner.paths(n, y.expand(n, 1), stream(17))
        w = (log_w - exact).exp()
        assert float(w.mean()) == pytest.approx(1, abs=4 * float(w.std()) / n**0.5)
        effective[told is None] = float(w.mean() ** 2 / w.square().mean())
    assert effective[False] > 2 * effective[True]


def test_levels_of_a_chain_end_where_the_prior_knows_the_rest():
    """Sooner than the network's own, unless data tell more of the image; others keep their levels."""
    prior = si.load_prior("galaxy32")
    widest = float(prior.moments.covariance.eigenvalues(prior.shape).max()) ** 0.5
    seen = lambda std: si.Likelihood(si.Identity(prior.shape), si.GaussianNoise(std=std))
    assert span(prior, seen(widest)) == pytest.approx((3.5 * widest, widest / 30))
    assert span(prior, seen(widest / 30)) == pytest.approx((3.5 * widest, widest / 60))
    assert span(prior, seen(1e-6))[1] == prior.sigma_min
    counts = si.Likelihood(si.Identity(prior.shape), si.PoissonNoise(1.0))
    for other in (None, counts):
        first, last = span(prior, other)
        assert first is None
        assert last == pytest.approx(widest / 30)
    assert span(gaussian(), measured([[1.0, 1.0]], 1.0)) == (None, None)


@pytest.mark.slow
def test_two_ways_to_the_evidence_of_images_agree():
    """log p(y) of galaxies behind a PSF, by the local steps of `Guided` and by weighted paths of the prior's chain.

    They share the network and nothing else. Six data: half of them within 3 nat, as log-weights of paths scatter by 2, and
    all within 10.
    """
    prior = si.load_prior("galaxy32")
    blur = si.PSFConvolution(gaussian_psf(3.8), prior.shape)
    likelihood = si.Likelihood(blur, si.GaussianNoise(std=0.1))
    chain = measured_chain(prior, 40, prior.sample(256, seed=3), seed=3)
    control = SamplerControl(chain, likelihood, si.Guided())
    engine = Engine(chain, control, lambda x, y: likelihood.log_prob(y, x))
    g, apart = stream(3), []
    for seed in range(6):
        with torch.no_grad():
            y = likelihood.simulate(engine.unsteered(1, g).x, seed)
            _, log_w = engine.paths(64, y.expand(64, *y.shape[1:]), g)
        by_paths = float(torch.logsumexp(log_w.double(), 0)) - math.log(64)
        draws = si.sample(si.Posterior(prior, likelihood, y[0]), 32, si.Guided(), seed=2)
        apart.append(draws.log_evidence - by_paths)
    print(apart)
    assert statistics.median(map(abs, apart)) < 3 and max(map(abs, apart)) < 10
