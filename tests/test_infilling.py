"""Chains of characters on the engine of images: two places and an alphabet of three, so that all can be listed."""

import math

import pytest
import torch
from torch.nn import functional as F

from scoreinv.finetune import Rewarded
from scoreinv.finetune.absorbing import AbsorbingChain, masked
from scoreinv.finetune.control import Control
from scoreinv.finetune.evidence import evidence
from scoreinv.finetune.objectives import TrajectoryBalance
from scoreinv.finetune.paths import Engine
from scoreinv.finetune.proposals import Backtracking, OnPolicy, Replay
from scoreinv.finetune.text import TextControl, train_denoiser
from scoreinv.finetune.training import Plan, Recipe, train_control
from scoreinv.simulators.sentences import (
    LENGTH,
    decoded,
    encoded,
    every_sentence,
    grammatical,
    sentences,
)
from scoreinv.streams import stream

SHAPE = (3, 2)
TABLE = torch.tensor([[0.3, 0.05, 0.05], [0.02, 0.2, 0.08], [0.1, 0.05, 0.15]])
LOG_R = torch.tensor([[-2.0, 1.0, 0.0], [0.5, -1.0, 2.0], [0.0, 1.5, -3.0]])
LOG_Z = float((TABLE * LOG_R.exp()).sum().log())


def tabular(table):
    """The exact model of sentences drawn from a table of all."""

    def model(x):
        seen = torch.where(masked(x)[:, None], 1.0, x)
        p = torch.stack([seen[:, :, 1] @ table.T, seen[:, :, 0] @ table], 2)
        return p / p.sum(1, keepdim=True)

    return model


def of_table(values):
    return lambda x, y: (x[:, :, 0] @ values * x[:, :, 1]).sum(1).double()


class Oracle(Control):
    """From the model to that of the reweighed table."""

    def forward(self, x, denoised, g, k, y):
        return (tabular(TABLE * LOG_R.exp())(x) / self.reference.model(x)).log()


def engine(steps, log_r=LOG_R, random=0.0):
    chain = AbsorbingChain(tabular(TABLE), SHAPE, steps)
    control = TextControl(chain, width=32)
    with torch.no_grad():
        control.last.weight.normal_(0, random, generator=stream(1))
    return Engine(chain, control, of_table(log_r))


def agrees(log_w, log_z):
    """Whether the mean of w is Z within four standard errors (false alarms: 6e-5)."""
    w = (log_w - log_z).exp()
    return abs(float(w.mean()) - 1) < 4 * float(w.std()) / math.sqrt(len(w))


def test_the_chain_draws_what_its_model_knows():
    """One place at a time the table, both at once the product of its marginals, within five standard errors."""
    product = TABLE.sum(1, keepdim=True) * TABLE.sum(0)
    for steps, expected in ((2, TABLE), (1, product)):
        x = engine(steps).unsteered(20000, stream(2)).x
        found = torch.einsum("nal,nbm->ablm", x, x)[:, :, 0, 1] / len(x)
        assert float(((found - expected) / (expected / len(x)).sqrt()).abs().max()) < 5
    # negative control: the two differ by far more
    assert float(((product - TABLE) / (TABLE / len(x)).sqrt()).abs().max()) > 20


def test_steps_reveal_their_share_and_never_take_a_character_back():
    chain = AbsorbingChain(lambda x: torch.full_like(x, 0.25), (4, 10), 4)
    learner = Engine(chain, TextControl(chain), None)
    states = learner.unsteered(4000, stream(3)).states
    back = chain.noised(states[-1], 4, stream(4))
    for found in (states, back):
        known = found.sum((2, 3))
        assert bool((known == torch.tensor([0, 2, 5, 7, 10])[:, None]).all())
        assert bool((found.diff(dim=0) >= 0).all())
        # each place is as likely to be among the first five as any other, within five standard errors
        share = found[2].sum(1).mean(0)
        assert float((share - 0.5).abs().max()) < 5 * 0.5 / math.sqrt(4000)
    step = chain.step(states[2], torch.full((4000,), 2), None)
    z = step.drawn(0.0, stream(5))
    assert torch.equal(step.noise(step.taken(z)), z)
    assert float((z * ~masked(states[2])[:, None]).abs().max()) == 0
    with pytest.raises(ValueError, match="steps is 11 for 10 places, expected 1 to 10"):
        AbsorbingChain(chain.model, (4, 10), 11)


def test_without_a_reward_paths_weigh_the_same():
    learner = engine(2, 0 * LOG_R)
    assert float(learner.paths(100, None, stream(5))[1].abs().max()) < 1e-6
    # whatever the control does, the mean of w is 1
    _, log_w = engine(2, 0 * LOG_R, random=1.0).paths(4000, None, stream(6))
    assert float(log_w.std()) > 0.3
    assert agrees(log_w, 0.0)


@pytest.mark.parametrize("spread", [1.0, 2.0])
def test_paths_of_any_control_weigh_the_evidence(spread):
    """Not those that were made to stray: they are for training."""
    _, log_w = engine(2, random=1.0).paths(20000, None, stream(7), spread)
    assert float(log_w.std()) > 0.3
    assert agrees(log_w, LOG_Z) == (spread == 1)
    # the same paths, walked again, weigh the same
    learner = engine(2, random=1.0)
    paths, log_w = learner.paths(100, None, stream(7), spread)
    assert torch.allclose(learner.onwards(paths.states, None, stream(8))[1], log_w, atol=1e-5)
    # nor those of another chain: both places at once are another prior
    _, wrong = engine(1, random=1.0).paths(20000, None, stream(7))
    assert not agrees(wrong, LOG_Z)


def test_the_right_control_leaves_nothing_to_chance():
    """log w is log Z on every path where steps reveal one place; where they reveal two, none can be right."""
    spread = {}
    for steps in (2, 1):
        chain = AbsorbingChain(tabular(TABLE), SHAPE, steps)
        _, log_w = Engine(chain, Oracle(chain), of_table(LOG_R)).paths(1000, None, stream(8))
        spread[steps] = float((log_w - LOG_Z).abs().max())
    assert spread[2] < 1e-5
    assert spread[1] > 0.5


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe(),
        Recipe(
            TrajectoryBalance(), [(0.5, OnPolicy(1.5)), (0.25, Backtracking()), (0.25, Replay())]
        ),
    ],
    ids=["variance", "balance"],
)
def test_training_closes_the_gap(recipe):
    learner = engine(2)
    before = evidence(learner.paths(4000, None, stream(9))[1])
    nothing = lambda n, seed: (torch.zeros(n, *SHAPE), None)
    train_control(learner, nothing, Plan(200, paths=64), recipe)
    after = evidence(learner.paths(4000, None, stream(9))[1])
    assert LOG_Z - before.elbo > 0.5
    assert abs(LOG_Z - after.elbo) < 0.02
    assert after.log_z == pytest.approx(LOG_Z, abs=0.01)


def test_one_control_fills_in_around_any_character():
    """The first character is seen, a tenth of the time as another; with or without a hint of that, no gap is left."""
    chance = torch.full((3, 3), 0.05) + 0.85 * torch.eye(3)

    def observe(x, seed):
        p = torch.einsum("nac,ab->nb", x[:, :, :1], chance)
        chosen = torch.multinomial(p, 1, generator=stream(seed))[:, 0]
        return F.one_hot(chosen, 3).float()

    def joint(n, seed):
        x = one_hot_of_table(n, seed)
        return x, observe(x, seed)

    chain = AbsorbingChain(tabular(TABLE), SHAPE, 2)
    reward = lambda x, y: torch.einsum("na,ab,nb->n", x[:, :, 0], chance.log(), y).double()
    first = torch.tensor([1.0, 0.0])
    guide = lambda step, k, y: (y @ chance.log())[:, :, None] * first
    plan = Plan(iterations=0, simulated=150, groups=16, paths=4, rate=5e-3)
    for guided, before, after in ((None, 1.0, 0.05), (guide, 0.1, 0.05)):
        learned = Rewarded(Engine(chain, TextControl(chain, 3, guided, 32), reward), observe)
        assert gap(learned) > before
        train_control(learned.engine, joint, plan, observe=observe)
        assert -0.01 < gap(learned) < after
        for k, y in enumerate(torch.eye(3)):
            report = learned.evidence(2000, 2, y)
            log_z = float((TABLE.sum(1) @ chance)[k].log())
            assert report.log_z == pytest.approx(log_z, abs=0.02)
            assert log_z - report.elbo < 0.05


def gap(learned):
    """Mean EUBO - ELBO of twenty questions."""
    return sum(b.gap for b in learned.bounds(20, 50, 1)) / 20


def one_hot_of_table(n, seed):
    chosen = torch.multinomial(TABLE.flatten(), n, replacement=True, generator=stream(seed))
    return torch.stack([F.one_hot(chosen // 3, 3), F.one_hot(chosen % 3, 3)], 2).float()


def test_a_model_learns_the_law_of_its_sentences():
    """Its bound falls to their entropy, and its chain draws them as often, within six standard errors."""
    model, history = train_denoiser(one_hot_of_table(20000, 1), 400, 0, width=32)
    entropy = float(-(TABLE * TABLE.log()).sum())
    assert history[0] > entropy + 0.1
    assert sum(history[-100:]) / 100 == pytest.approx(entropy, abs=0.05)
    x = torch.zeros(1, *SHAPE)
    assert float((model(x)[0] - tabular(TABLE)(x)[0]).abs().max()) < 0.03
    x[0, 1, 0] = 1
    assert float((model(x)[0, :, 1] - tabular(TABLE)(x)[0, :, 1]).abs().max()) < 0.03


def test_sentences_are_of_the_grammar():
    x = sentences(200, 0)
    assert x.shape == (200, 27, LENGTH)
    assert bool(grammatical(x).all())
    assert torch.equal(encoded(decoded(x)), x)
    assert len(set(every_sentence())) == len(every_sentence())
    assert decoded(encoded(["the r__ dog"])) == ["the r__ dog"]
    right = ["two red rabbits see the dogs", "the quiet bears hear one dog"]
    wrong = [
        "two red rabbits sees the dog",
        "the quiet bear hear two dogs",
        "the quiet bears hear on edog",
    ]
    assert grammatical(encoded(right + wrong)).tolist() == [True] * 2 + [False] * 3
    with pytest.raises(ValueError, match=r"texts have \[3, 4\] characters; expected one length"):
        encoded(["the", "dogs"])
