"""Rewards in the place of likelihoods, on mixtures whose reweighed form is known."""

import math

import pytest
import torch
from torch.nn import functional as F

import scoreinv as si
from scoreinv.gaussian import Fourier
from scoreinv.streams import stream

SIDE = 5.0  # between neighbouring modes
CELLS = torch.cartesian_prod(torch.arange(-1.0, 2.0), torch.arange(-1.0, 2.0)).double()
WEIGHTS = torch.arange(1.0, 10.0)


@pytest.fixture(scope="module")
def nine():
    """Nine modes on a grid of three columns and three rows, the last the most likely."""
    parts = [si.GaussianPrior(SIDE * c.reshape(1, 1, 2), 0.3) for c in CELLS]
    return si.MixturePrior(WEIGHTS, parts)


def columns(x):
    """Log-probabilities of the three columns, a classifier's."""
    at = x[:, 0, 0, :1].double()
    return torch.log_softmax(-((at - SIDE * torch.arange(-1.0, 2.0).double()) ** 2), 1)


def drawn(x, seed):
    chosen = torch.multinomial(columns(x).exp(), 1, generator=stream(seed))[:, 0]
    return F.one_hot(chosen, 3).double()


def of_class(x, y):
    return (columns(x) * y).sum(1)


@pytest.mark.parametrize("observe", [None, drawn])
def test_a_classifier_turns_a_prior_into_one_of_a_class(nine, observe):
    """Shares of the modes within four standard errors of what reweighing gives, the evidence within a fifth of a nat."""
    learned = si.finetune_by_reward(
        nine, of_class, seed=0, steps=20, y=torch.eye(3).double(), observe=observe,
        plan=si.Plan(iterations=150, groups=8, paths=16),
    )  # fmt: skip
    for k in (0, 2):
        y = torch.eye(3)[k].double()
        x = learned.sample(1000, 1, y)[:, 0, 0]
        assert float(((x[:, 0] / SIDE).round() == k - 1).double().mean()) > 0.99
        exact = WEIGHTS.reshape(3, 3)[k] / WEIGHTS.reshape(3, 3)[k].sum()
        found = ((x[:, 1] / SIDE).round() + 1).long().bincount(minlength=3) / len(x)
        effective = 1000 * learned.evidence(1000, 1, y).ess
        assert effective > 100
        assert float((found - exact).abs().max()) < 4 * 0.5 / math.sqrt(effective)
        report = learned.evidence(2000, 2, y)
        share = float(WEIGHTS.reshape(3, 3)[k].sum() / WEIGHTS.sum())
        assert report.log_z == pytest.approx(math.log(share), abs=0.2)
        assert report.elbo > math.log(share) - 1.5
    if observe is None:
        with pytest.raises(ValueError, match="upper bounds need `observe`"):
            learned.bounds(1, 10, 0)
    else:
        gaps = [b.gap for b in learned.bounds(20, 100, 3)]
        assert -0.5 < sum(gaps) / len(gaps) < 3


def test_an_untrained_control_is_the_prior(nine):
    """Negative control: without learning, paths carry the weights, and few of them count."""
    plan = si.Plan(iterations=1, groups=1, paths=2, rate=1e-12)
    options = {"seed": 0, "steps": 20, "plan": plan}
    first = si.finetune_by_reward(nine, of_class, y=torch.eye(3).double(), **options)
    x, log_w = first.weighted(2000, 1, torch.eye(3)[0].double())
    inside = ((x[:, 0, 0, 0] / SIDE).round() == -1).double()
    assert float(inside.mean()) == pytest.approx(6 / 45, abs=0.04)
    assert float(torch.softmax(log_w, 0) @ inside) > 0.99
    nothing = si.finetune_by_reward(nine, lambda x, y: 0 * x[:, 0, 0, 0], **options)
    assert nothing.evidence(100, 1).elbo == pytest.approx(0, abs=1e-6)


def test_offline_control_finds_the_best_policy_near_the_behaviour(nine):
    """Actions of nine habits, valued by their distance from the state: p(a) exp(Q(a, s) / alpha) is a mixture again."""
    alpha = 4.0
    value = lambda a, s: -((a[:, 0, 0].double() - s) ** 2).sum(1) / (2 * alpha)
    states = 4 * torch.randn(512, 2, generator=stream(1)).double()
    policy = si.finetune_by_reward(
        nine, value, seed=0, steps=20, y=states, plan=si.Plan(iterations=200, groups=16, paths=8)
    )
    narrow = 1 / (1 / 0.3 + 1 / alpha)
    for s in torch.tensor([[0.0, 0.0], [4.0, -3.0]], dtype=torch.float64):
        log_w = WEIGHTS.log() - ((SIDE * CELLS - s) ** 2).sum(1) / (2 * (alpha + 0.3))
        best = torch.softmax(log_w, 0) @ (narrow * (SIDE * CELLS / 0.3 + s / alpha))
        actions, log_w = policy.weighted(2000, 2, s)
        w = torch.softmax(log_w, 0)
        a = actions[:, 0, 0]
        spread = ((w @ a.square() - (w @ a).square()) * w.square().sum()).sqrt()
        assert bool(((w @ a - best).abs() < 4 * spread + 0.1).all())
        # the behaviour itself is worth far less
        gained = w @ value(actions, s) - value(nine.sample(2000, 3), s).mean()
        assert float(gained) > 1.0


def test_images_are_of_the_class_that_is_asked_for():
    """Three patterns of 12 x 12 pixels: the control tells them apart from labels alone, the untrained one does not."""
    row = torch.arange(12.0)
    waves = [torch.cos(2 * torch.pi * (k * row[:, None] + row) / 12) for k in range(3)]
    rough = Fourier(torch.full((1, 12, 12), 0.05))
    parts = [si.GaussianPrior(w[None].double(), rough) for w in waves]
    prior = si.MixturePrior([1.0, 1.0, 1.0], parts)
    seen = torch.stack(waves).flatten(1).double()
    log_p = lambda x: torch.log_softmax(x.flatten(1).double() @ seen.T / 12, 1)
    of_class = lambda x, y: (log_p(x) * y).sum(1)

    def label(x, seed):
        chosen = torch.multinomial(log_p(x).exp(), 1, generator=stream(seed))[:, 0]
        return F.one_hot(chosen, 3).double()

    shares = []
    for simulated in (1, 60):
        plan = si.Plan(0, simulated, groups=8, paths=4, steps=4, rate=2e-3)
        learned = si.finetune_by_reward(
            prior, of_class, seed=0, steps=8, y=torch.eye(3).double(), observe=label,
            images=prior.sample(64, 0), plan=plan,
        )  # fmt: skip
        assert type(learned.engine.control).__name__ == "ImageControl"
        found = [log_p(learned.weighted(64, 1, y)[0]).argmax(1) for y in torch.eye(3).double()]
        shares.append(sum(float((c == k).double().mean()) for k, c in enumerate(found)) / 3)
    assert shares[0] < 0.5 and shares[1] > 0.65


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (lambda x, y: x, "expected one finite number for each"),
        (lambda x, y: x[:, 0, 0, 0].log() - math.inf, "expected one finite number for each"),
    ],
)
def test_a_reward_must_be_a_number(nine, reward, message):
    with pytest.raises(ValueError, match=message):
        si.finetune_by_reward(nine, reward, seed=0, steps=5)
