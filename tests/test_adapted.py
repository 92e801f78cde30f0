import math

import pytest
import torch

import scoreinv as si
from scoreinv.finetune.adapted import AdaptedControl
from scoreinv.finetune.amortised import data_image, untrained
from scoreinv.finetune.chain import PriorChain
from scoreinv.finetune.paths import Engine
from scoreinv.gaussian import Fourier, Gaussian
from scoreinv.priors.network import ScorePrior
from scoreinv.priors.unet import UNet
from scoreinv.streams import stream

SHAPE = (1, 16, 16)
RANKS = [None, 3]


def prior():
    """A small network with weights at random: any denoiser makes a chain."""
    network = UNet(widths=(8, 16), embedding=16)
    with torch.no_grad():
        for p in network.parameters():
            p.copy_(0.15 * torch.randn(p.shape, generator=stream(p.numel())))
    k2 = torch.fft.fftfreq(16)[:, None].double() ** 2 + torch.fft.fftfreq(16).double() ** 2
    moments = Gaussian(torch.zeros(SHAPE), Fourier(1 / (1 + 100 * k2) ** 1.5))
    return ScorePrior(network.to(memory_format=torch.channels_last), 0.6, moments, 0.01, 10.0)


def blurred(of):
    psf = torch.ones(3, 3) / 9
    return si.Likelihood(si.PSFConvolution(psf, of.shape), si.GaussianNoise(std=0.3))


@pytest.mark.parametrize("told", [False, True])
@pytest.mark.parametrize("rank", RANKS)
def test_an_adapted_control_starts_as_the_prior(rank, told):
    """Every path weighs the same to 1e-6, though data are seen; a step of training makes them differ, and only the copy."""
    known = prior()
    likelihood, chain = blurred(known), PriorChain(known, 5)
    image = None if told else data_image(likelihood, known.moments.mean)
    y = likelihood.simulate(known.sample(6, 1, steps=4), 2)
    y, other = (torch.eye(6), torch.eye(6).flip(0)) if told else (y, y + 1)
    control = AdaptedControl(chain, image, adapted=si.Adapted(rank), examples=y if told else None)
    weights = {k: v.clone() for k, v in known.network.state_dict().items()}
    engine = Engine(chain, control, lambda x, y: torch.zeros(len(x), dtype=torch.float64))
    paths, log_w = engine.paths(6, y, stream(3))
    assert float(log_w.abs().max()) < 1e-6
    engine.learn(paths, torch.linspace(-1, 1, 6, dtype=torch.float64))
    moved = {k for k, p in control.named_parameters() if p.grad is not None and bool(p.grad.any())}
    with torch.no_grad():
        for p in control.parameters():
            if p.grad is not None:
                p -= 0.1 * p.grad.sign()
    _, log_w = engine.paths(6, y, stream(3))
    assert float(log_w.abs().max()) > 1e-3
    for k, v in known.network.state_dict().items():
        assert torch.equal(v, weights[k])
    trained = [k for k, p in control.network.named_parameters() if p.requires_grad]
    if rank is None:
        assert any(k.startswith("network.first.weight") for k in moved)
        assert len(trained) == len(list(known.network.parameters())) + told
    else:
        assert all(".parametrizations.weight.0." in f".{k}" or k == "tell.weight" for k in trained)
        assert any(k.endswith("weight.0.B") for k in moved)
    # the data are seen now
    _, others = engine.paths(6, other, stream(3))
    assert float((others - log_w).abs().max()) > 1e-3


@pytest.mark.parametrize("rank", RANKS)
def test_an_adapted_control_is_the_same_at_any_amplitude(rank):
    known = prior()
    x, k = torch.randn(4, *SHAPE, generator=stream(1)), torch.arange(4)
    found = []
    for amplitude in (1.0, 7.0):
        chain = PriorChain(known.rescaled(amplitude), 5)
        control = AdaptedControl(chain, adapted=si.Adapted(rank))
        with torch.no_grad():
            for i, p in enumerate(control.network.parameters()):
                if p.requires_grad:
                    p += 0.1 * torch.randn(p.shape, generator=stream(2, i))
        states = amplitude * x
        step = chain.step(states, k, None)
        with torch.no_grad():
            found.append(control(states, step.denoised, None, k, None))
    assert float(found[0].square().mean().sqrt()) > 1e-2
    torch.testing.assert_close(found[1], found[0], rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("rank", [None, 8])
def test_an_adapted_control_learns_and_is_kept(rank, tmp_path):
    """The lower bound on the evidence of one observation rises by more than three standard errors in 100 iterations."""
    known = prior()
    likelihood = blurred(known)
    images = known.sample(32, 1, steps=4)
    y = likelihood.simulate(images[:1], 2)[0]
    same = {
        "seed": 0,
        "steps": 5,
        "y": y,
        "images": images,
        "guided": False,
        "control": si.Adapted(rank),
    }
    start = untrained(known, likelihood, **same)
    plan = si.Plan(iterations=100, groups=1, paths=16, rate=1e-3)
    learned = si.finetune(known, likelihood, plan=plan, **same)
    before, after = (v.condition().evidence(400, seed=1) for v in (start, learned))
    assert after.elbo > before.elbo + 3 * math.hypot(before.std, after.std) / 400**0.5
    learned.save(tmp_path)
    found = si.load_amortised(tmp_path, known, likelihood)
    assert found.control.adapted == si.Adapted(rank)
    assert found.condition().evidence(50, seed=2) == learned.condition().evidence(50, seed=2)


def test_weights_follow_their_seed_and_leave_the_global_generator_alone():
    chain = PriorChain(prior(), 3)
    likelihood, found = blurred(chain), []
    image = data_image(likelihood, chain.prior.moments.mean)
    with torch.random.fork_rng(devices=[]):
        for state, seed in ((1, 0), (2, 0), (3, 1)):
            torch.manual_seed(state)
            before = torch.get_rng_state()
            control = AdaptedControl(chain, image, adapted=si.Adapted(rank=3), seed=seed)
            assert torch.equal(torch.get_rng_state(), before)
            found.append(list(control.state_dict().values()))
    assert all(torch.equal(a, b) for a, b in zip(*found[:2], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(*found[1:], strict=True))


def test_what_cannot_be_adapted_is_refused():
    gaussian = si.GaussianPrior(torch.zeros(SHAPE), Fourier(torch.ones(16, 16)))
    with pytest.raises(ValueError, match="GaussianPrior has no network to adapt"):
        si.finetune(gaussian, blurred(gaussian), seed=0, steps=4, control=si.Adapted())
    with pytest.raises(ValueError, match="rank is 0, expected at least 1"):
        si.Adapted(rank=0)


def test_a_control_of_other_sizes_is_not_loaded(tmp_path):
    known = prior()
    likelihood, images = blurred(known), known.sample(4, 1, steps=4)
    own = AdaptedControl(
        PriorChain(known, 4), data_image(likelihood, images[0]), adapted=si.Adapted(2)
    )
    untrained(known, likelihood, images, 0, steps=4, guided=False, control=own).save(tmp_path)
    card = tmp_path / "control.json"
    card.write_text(card.read_text().replace('"rank": 2', '"rank": 3'))
    with pytest.raises(ValueError, match="a control of other sizes than finetune makes"):
        si.load_amortised(tmp_path, known, likelihood)
