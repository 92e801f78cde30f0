"""Simulators, kept simulations, rounds for one observation, and the stages that lead to its posterior."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.distributions import Normal, Uniform

from scoreinv.cli import main
from scoreinv.likelihood import Likelihood
from scoreinv.noise import GaussianNoise
from scoreinv.npe import NPE, NRE, Clipped, Fitting, ParameterPrior, Truncated, sequential
from scoreinv.npe.examples import EXAMPLES, chirp, disc, power
from scoreinv.npe.examples.cluster import KEV, counted, energy_flux, expected, photons
from scoreinv.npe.examples.dust import black_body
from scoreinv.npe.figure import corner, predictive
from scoreinv.npe.images import ISOPHOTE, geometry, geometry_prior, image_pairs
from scoreinv.npe.mixture import Population
from scoreinv.npe.rounds import LEAST, Region, _thinned
from scoreinv.npe.store import Store, load_simulator, simulated
from scoreinv.operators import Identity

MINE = """
import torch
from torch.distributions import Normal, Uniform
from scoreinv.npe import ParameterPrior
from scoreinv.npe.simulator import Simulator

A = torch.tensor([[1.0, 0.5], [0.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
prior = ParameterPrior(a=Normal(0.0, 1.0), b=Uniform(-2.0, 2.0))

def simulate(theta, generator):
    return theta @ A.T

def noise(x, generator):
    return x + 0.3 * torch.randn(x.shape, generator=generator, dtype=x.dtype)

def log_likelihood(x, theta):
    return -0.5 * ((x - theta @ A.T) / 0.3).square().sum(1)

simulator = Simulator(prior, simulate, noise, log_likelihood)
nothing = 3
"""


@pytest.fixture
def mine(tmp_path):
    (tmp_path / "mine.py").write_text(MINE)
    return f"{tmp_path}/mine.py:simulator"


# --- the examples --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_has_the_likelihood_of_its_data(name):
    """The expectation of p(x | theta') / p(x | theta) over data of theta is 1 for any theta': 2,000 data, 5 of its errors.

    Data twice as noisy, as the negative control, do not have that mean.
    """
    simulator, n = EXAMPLES[name](), 2000
    at = torch.full((1, len(simulator.prior)), 0.1)
    away = lambda step: simulator.prior.from_normal(at + step)
    # so far that log ratios scatter by a half
    step = (
        1e-4
        * 0.5
        / float(
            _ratios(simulator, simulator.data(away(0).expand(n, -1), 3), away(1e-4), away(0)).std()
        )
    )
    clean = simulator.simulate(away(0).expand(n, -1), torch.Generator().manual_seed(0))
    x = simulator.noise(clean, torch.Generator().manual_seed(1))
    middle = x.double().mean(0)
    for data, right in ((x, True), (middle + 2 * (x - middle), False)):
        ratio = _ratios(simulator, data, away(step), away(0)).exp()
        error = float(ratio.std()) / n**0.5
        assert (abs(float(ratio.mean()) - 1) < 5 * error) == right


def _ratios(simulator, x, near, middle):
    both = torch.cat([near, middle])
    each = [simulator.log_likelihood(v, both) for v in x]
    return torch.stack([a[0] - a[1] for a in each])


def test_examples_have_the_units_that_they_say():
    """A black body's flux is 1; a cluster twice as massive at the same redshift is brighter by 2^(4/3); sigma_8 is met."""
    wavelength = torch.logspace(-2, 3, 4000).double()
    for temperature in (4500.0, 15_000.0):
        total = torch.trapezoid(black_body(wavelength, temperature), wavelength)
        assert float(total) == pytest.approx(1, abs=1e-3)
    theta = torch.tensor([[14.5, 0.2, -2.0, 0.0], [14.5, 0.2, -2.0, 2.0]]).double()
    rate = expected(theta) - 20
    # the scatter of the luminosity alone
    assert float((rate[1] / rate[0]).log().mean()) == pytest.approx(0.8, abs=1e-6)
    assert torch.equal(
        counted(torch.zeros(3).double(), torch.Generator()), torch.zeros(3).double()
    )
    # all photons times their energies are the flux, L / 4 pi D_L^2
    near, far = (torch.tensor([[14.7, z, 0.0, 0.0]]).double() for z in (0.1, 0.5))
    for theta in (near, far):
        E = torch.linspace(1e-3, 200.0, 200_001).double()
        found = float(torch.trapezoid(E * photons(theta, E), E)) * KEV
        assert found == pytest.approx(float(energy_flux(theta)), rel=1e-2)
    simulator = power()
    high, low = (torch.tensor([[0.3, s, 1.0]]).double() for s in (0.9, 0.6))
    shot = 1 / 3e-4
    both = [simulator.simulate(t, None) - shot for t in (high, low)]
    torch.testing.assert_close(both[0] / both[1], torch.full_like(both[0], 2.25))
    simulator = disc()
    face_on = torch.tensor([[0.2, 0.3, 1.0, 0.4, 0.0, 0.0], [0.2, 0.3, 1.0, 2.0, 0.0, 0.0]])
    V = simulator.simulate(face_on, None)
    torch.testing.assert_close(V[0], V[1])  # the position angle of a face-on disc says nothing
    assert float(V.max()) < 0.2
    simulator, at = chirp(), int(0.3 * 1024)
    theta = torch.tensor([[28.0, 0.45, 1.0, 0.0], [28.0, 0.45, 0.0, 1.0]]).double()
    h = simulator.simulate(theta, None)[:, 0, at]
    # the first is at its crest in the middle of the data, the second at a node, but for a fifth of a sample
    torch.testing.assert_close(h, torch.tensor([0.15**-0.25, 0.0]).double(), atol=0.1, rtol=0.01)


# --- rounds --------------------------------------------------------------------------------------

NARROW = ParameterPrior(a=Normal(0.0, 1.0), b=Uniform(-2.0, 2.0))
SPREAD = 0.01
QUICK = Fitting(epochs=40, batch=100, rate=2e-3, patience=10)


def bent(theta):
    a, b = theta.unbind(1)
    return torch.stack([a + 0.5 * b**2, b + 0.3 * a**3], 1)


def shown(theta, generator):
    return bent(theta) + SPREAD * torch.randn(theta.shape, generator=generator, dtype=theta.dtype)


def on_a_grid(known):
    """Mean and standard deviations of the posterior."""
    side = [torch.linspace(0, 0.8, 1500).double(), torch.linspace(-1.4, -0.8, 1500).double()]
    theta = torch.cartesian_prod(*side)
    w = torch.softmax(known(theta) + NARROW.log_prob(theta), 0)[:, None]
    mean = (w * theta).sum(0)
    return mean, (w * (theta - mean).square()).sum(0).sqrt()


@pytest.mark.parametrize("proposal", [Truncated(), Clipped()])
def test_rounds_find_a_narrow_posterior(proposal):
    """A posterior a hundred times narrower than the prior, from rounds of 500: more draws count than at first.

    More than 200 of 500, whose weighted means and variances are those on a grid, within four of their errors, which the
    weights decide: draws of the tails, where weights are large, are most of what a variance has.
    """
    x = bent(torch.tensor([[0.4, -1.1]]).double())[0]
    known = lambda theta: -0.5 * ((x - bent(theta)) / SPREAD).square().sum(1)
    mean, spread = on_a_grid(known)
    result = sequential(
        lambda: NPE(NARROW, "maf"),
        shown,
        x,
        rounds=3,
        n=500,
        seed=0,
        proposal=proposal,
        log_likelihood=known,
        plan=QUICK,
    )
    sizes = [w.n_eff for w in result.weighted]
    assert result.best > 0 and sizes[result.best] == max(sizes)
    assert sizes[result.best] > 2 * sizes[0] and sizes[result.best] > 200
    weighted = result.given.reweighted(known, 4000, seed=1)
    w = torch.softmax(weighted.log_w, 0)[:, None]
    found = (w * weighted.theta).sum(0)
    square = (weighted.theta - found).square()
    variance = (w * square).sum(0)
    errors = [(w.square() * v).sum(0).sqrt() for v in (square, (square - variance).square())]
    assert bool(((found - mean).abs() < 4 * errors[0]).all())
    assert bool(((variance - spread.square()).abs() < 4 * errors[1]).all())


@pytest.mark.parametrize("beside", [False, True])
def test_a_region_holds_the_posterior_and_its_draws_are_of_the_prior(beside):
    """Of 10,000 draws of an estimate one in a hundred lies outside; inside, both ways of drawing agree with the prior.

    Also where a mixture is fitted to weighted draws, which are of a posterior not quite that of the estimate.
    """
    theta = NARROW.sample(2000, seed=0)
    x = theta + 0.5 * torch.randn(2000, 2, generator=torch.Generator().manual_seed(1)).double()
    given = NPE(NARROW, "maf").fit(theta, x, 0, QUICK).condition(torch.zeros(2).double())
    region = Region(given)
    if beside:
        population = Population()
        u = torch.randn(4000, 2, generator=torch.Generator().manual_seed(8)).double()
        population.add(u, -0.5 * (u / 0.3).square().sum(1))
        region = Region(given, population.fitted(torch.Generator().manual_seed(9)))
    region = region.holding(0.01, 2)
    u, log_r = region.draw(10_000, 3)
    # one in a hundred, and three of its errors, of both samples
    assert float((region.log_r(u) < 0).double().mean()) == pytest.approx(0.01, abs=0.005)
    torch.testing.assert_close(region.log_ratio(u), log_r, atol=1e-4, rtol=0)
    kept = Truncated().draw([region], 4000, 4)
    assert bool((region.log_r(kept) > 0).all())
    prior = torch.randn(200_000, 2, generator=torch.Generator().manual_seed(5)).double()
    inside = prior[region.log_r(prior) > 0]
    assert len(inside) > 3000
    for moment in (1, 2):
        a, b = kept**moment, inside**moment
        error = (a.var(0) / len(a) + b.var(0) / len(b)).sqrt()
        assert bool(((a.mean(0) - b.mean(0)).abs() < 4.5 * error).all())
    # where the level is high, draws come of the estimate, and are the same
    higher = replace(region, log_t=max(region.log_t, 0.2))
    kept = Truncated().draw([higher], 4000, 6)
    inside = prior[higher.log_r(prior) > 0]
    error = (kept.var(0) / len(kept) + inside.var(0) / len(inside)).sqrt()
    assert bool(((kept.mean(0) - inside.mean(0)).abs() < 4.5 * error).all())
    # weights of draws of a mixture give back the clipped prior
    both = torch.cat([prior[:20_000], Clipped().draw([region], 20_000, 7)])
    w = Clipped().weights(both, [region], [20_000, 20_000])
    w = _thinned(w, torch.Generator().manual_seed(10))
    clipped = region.log_r(prior).clamp_max(0).exp()[:, None]
    expected_mean = (clipped * prior).sum(0) / clipped.sum()
    found = (w[:, None] * both).sum(0) / w.sum()
    torch.testing.assert_close(found, expected_mean, atol=0.03, rtol=0)


def test_a_level_counts_draws_by_their_weights():
    """Draws that weigh nothing are left out first, whatever their number."""
    log_r = torch.tensor([3.0, 1.0, 2.0, 4.0]).double()
    w = torch.tensor([0.4, 0.0, 0.1, 0.5]).double()
    for share, log_t in ((0.05, 2.0), (0.2, 3.0), (0.6, 4.0)):
        assert Region(None).above(log_r, w, share).log_t == log_t


def test_hard_bounds_do_not_trust_weighted_draws():
    """A truncated round keeps all but a hundredth of the estimate's draws, whichever of them the likelihood prefers."""
    theta = NARROW.sample(500, seed=0)
    given = NPE(NARROW, "mixture").fit(theta, bent(theta), 0, Fitting(epochs=2))
    region = Region(given.condition(torch.zeros(2).double()))
    u, log_r = region.draw(5000, 1)
    w = torch.zeros_like(log_r)
    w[log_r.argsort()[-5:]] = 1.0  # those that are surest
    hard, soft = (p.bounded(region, (log_r, w), 0.01, 2) for p in (Truncated(), Clipped()))
    kept = [float((r.log_r(u) > 0).double().mean()) for r in (hard, soft)]
    assert kept[0] == pytest.approx(0.99, abs=0.006) and kept[1] < 0.01


def test_small_weights_are_left_out_by_chance_alone():
    """Their sum is as it was, within 4 of its errors; no small one is left, and no large one is changed."""
    w = torch.rand(50_000, generator=torch.Generator().manual_seed(0)).double() ** 8
    thin = _thinned(w, torch.Generator().manual_seed(1))
    least = LEAST * w.mean()
    small = w < least
    assert small.sum() > 10_000 and torch.equal(thin[~small], w[~small])
    assert set(thin[small].tolist()) == {0.0, float(least)}
    error = (w[small] * (least - w[small])).sum().sqrt()
    assert float((thin - w).sum().abs()) < 4 * float(error)


def test_mistakes_in_rounds():
    go = lambda **options: sequential(
        lambda: NPE(NARROW, "maf"), shown, torch.zeros(2), n=100, seed=0, **options
    )
    with pytest.raises(ValueError, match="rounds is 0"):
        go(rounds=0)
    with pytest.raises(ValueError, match="share 1, expected .* between 0 and 1"):
        go(rounds=2, share=1.0)
    with pytest.raises(ValueError, match="rounds are for NPE, and NRE learns no posterior"):
        sequential(lambda: NRE(NARROW), shown, torch.zeros(2), rounds=2, n=100, seed=0)


def test_kept_rounds_are_taken_up_by_the_same_call_alone(tmp_path):
    """Or by one for more rounds; another is told what differs."""
    made = 0

    def simulate(theta, generator):
        nonlocal made
        made += 1
        return shown(theta, generator)

    def go(x=(0.5, 0.75), prior=NARROW, **options):
        given = {"rounds": 1, "n": 100, "seed": 0, "plan": Fitting(epochs=1), **options}
        x = torch.tensor(x).double()
        return sequential(lambda: NPE(prior, "maf"), simulate, x, folder=tmp_path, **given)

    first = go().given.sample(10, 0)
    assert torch.equal(go().given.sample(10, 0), first) and made == 1
    go(rounds=2)
    assert made == 2
    other = ParameterPrior(a=Normal(0.0, 1.0), b=Uniform(-3.0, 3.0))
    for options, said in (
        (
            {"x": (0.5, -0.75)},
            r"rounds with observation {'x': '\(2,\) \w+'}, expected observation",
        ),
        ({"prior": other}, "rounds with parameters"),
        ({"n": 120}, "rounds with n 100, expected n 120; choose another folder"),
        ({"seed": 1}, "rounds with seed 0, expected seed 1"),
        ({"share": 0.01}, "rounds with share 0.001, expected share 0.01"),
        ({"proposal": Clipped()}, "with proposal 'Truncated', expected proposal 'Clipped'"),
        ({"plan": Fitting(epochs=2)}, "rounds with plan"),
    ):
        with pytest.raises(ValueError, match=said):
            go(**options)
    assert made == 2
    (tmp_path / "round-0/pairs.safetensors").write_bytes(b"broken")
    with pytest.raises(ValueError, match="cannot be read"):
        go()


# --- what is kept --------------------------------------------------------------------------------


def test_simulations_are_the_same_for_any_number_of_processes(mine, tmp_path):
    """And after an interruption; other simulations are refused."""
    one = simulated(mine, 250, tmp_path / "one", seed=3, batch=100)
    two = simulated(mine, 250, tmp_path / "two", seed=3, batch=100, workers=2)
    assert torch.equal(one.theta, two.theta) and torch.equal(one.x, two.x)
    assert one.hash == two.hash and one.missing() == []
    theta, first = one.theta.clone(), one.x.clone()
    # a batch that was not finished
    array = np.load(one.folder / "x-x.npy", mmap_mode="r+")
    array[100:200] = math.nan
    np.save(one.folder / "done.npy", np.array([1, 0, 1], dtype="uint8"))
    assert one.missing() == [1]
    again = simulated(mine, 250, tmp_path / "one", seed=3, batch=100)
    assert torch.equal(again.theta, theta) and torch.equal(again.x, first)
    with pytest.raises(ValueError, match=r"holds simulations of n 250, expected n 300"):
        simulated(mine, 300, tmp_path / "one", seed=3, batch=100)
    with pytest.raises(ValueError, match="holds no simulations that can be read"):
        Store(tmp_path).card  # noqa: B018
    # what is changed in memory stays there
    again.x[:] = 0
    assert not bool((Store(one.folder).x == 0).all())


def test_a_simulator_is_found_by_name_or_in_a_file(mine, tmp_path):
    assert load_simulator("dust").prior.names[0] == "attenuation"
    assert load_simulator(mine).prior.names == ("a", "b")
    with pytest.raises(ValueError, match="expected one of cluster, .*, or FILE.py:NAME"):
        load_simulator("clusters")
    with pytest.raises(ValueError, match="no Simulator called 'nothing', but int"):
        load_simulator(mine.replace(":simulator", ":nothing"))
    (tmp_path / "broken.py").write_text("import nothing_of_this_name")
    with pytest.raises(ValueError, match="cannot be run: ModuleNotFoundError"):
        load_simulator(f"{tmp_path}/broken.py:simulator")


# --- stages --------------------------------------------------------------------------------------


def npe(*words):
    return main(["npe", *words])


def test_stages_lead_from_a_simulator_to_a_posterior(mine, tmp_path, capsys, monkeypatch):
    """Alone or all in one; a stage that is done is found, one of other simulations is refused."""
    monkeypatch.setattr("scoreinv.npe.stages.JUDGED", 10)
    config = tmp_path / "npe.yaml"
    out = tmp_path / "out"
    config.write_text(
        f"simulator: {mine}\noutput: {out}\nn: 1000\nsims: 30\ndraws: 40\nsamples: 1000\nswaps: 199\n"
        "training:\n  methods: [maf, nre]\n  plan:\n    epochs: 8\n    batch: 100\n    rate: 2.0e-3\n"
    )
    given = ("--config", str(config))
    assert npe("train", *given) == 2
    assert "holds no simulations" in capsys.readouterr().err
    assert npe("data", *given) == 0
    assert npe("validate", *given) == 2
    assert "run the train stage" in capsys.readouterr().err
    assert npe("train", *given) == 0
    first = capsys.readouterr().out
    assert "maf-0" in first and "nre-0" in first
    kept = {f: f.stat().st_mtime_ns for f in out.rglob("*.safetensors")}
    assert npe("run", *given) == 0
    text = capsys.readouterr().out
    assert {f: f.stat().st_mtime_ns for f in out.rglob("*.safetensors")} == kept
    for line in (
        "verdict",
        "bias          b: truths",
        "of the draws are effective",
        "like those simulated",
        "median",
    ):
        assert line in text
    table = json.loads((out / "train/train.json").read_text())
    assert [row["method"] for row in table["rows"]].count("nre") == 1
    assert table["rows"][0]["log q [nat]"] >= table["rows"][1]["log q [nat]"]
    for name in ("corner.png", "predictive.png"):
        assert (out / "posterior" / name).stat().st_size > 10_000
    saved = np.load(out / "posterior/posterior.npz")
    assert saved["theta"].shape == (1000, 2) and list(saved["names"]) == ["a", "b"]
    w = np.exp(saved["log_w"] - saved["log_w"].max())
    mean = (w[:, None] * saved["weighted"]).sum(0) / w.sum()
    assert np.abs(mean - saved["theta"].mean(0)).max() < 0.3
    # an observation of one's own
    np.save(tmp_path / "seen.npy", np.array([50.0, 50.0, 50.0]))
    seen = ("--observation", str(tmp_path / "seen.npy"))
    assert npe("observe", *given, *seen) == 2
    assert "is of another observation" in capsys.readouterr().err
    assert npe("observe", *given, *seen, "--overwrite") in (0, 2)
    said = capsys.readouterr()
    assert "STRANGER" in said.out or "-inf" in said.err
    # the only input may be named
    np.save(tmp_path / "one.npy", np.array([0.1, 0.0, 0.2]))
    np.savez(tmp_path / "one.npz", x=np.array([0.1, 0.0, 0.2]))
    for name in ("one.npy", "one.npz"):
        words = ("--observation", str(tmp_path / name), "--overwrite")
        assert npe("observe", *given, *words) == 0
        assert "of the draws are effective" in capsys.readouterr().out
        assert npe("observe", *given, *words[:2]) == 0
    (tmp_path / "broken.npz").write_bytes(b"PK broken")
    assert npe("observe", *given, "--observation", str(tmp_path / "broken.npz")) == 2
    assert "cannot be read" in capsys.readouterr().err
    # other sizes, or another plan, are not what was kept
    assert npe("data", *given, "--n", "2000") == 2
    assert npe("train", *given, "--training.plan.epochs", "20") == 2
    assert "pass --overwrite" in capsys.readouterr().err
    assert npe("validate", *given, "--sims", "40") == 2
    assert npe("validate", *given, "--sims", "30") == 0
    assert "found" in capsys.readouterr().out
    # what was cut off is named, and made again once it is removed
    for name in ("data/done.npy", "train/maf-0/row.json", "validation.json"):
        whole = (out / name).read_bytes()
        for size in (0, len(whole) // 2):
            (out / name).write_bytes(whole[:size])
            assert npe("run", *given) == 2
            assert f"{out / name} cannot be read" in capsys.readouterr().err
        (out / name).write_bytes(whole)
    kept = out / "posterior/posterior.npz"
    for size in (0, 100):
        kept.write_bytes(kept.read_bytes()[:size])
        assert npe("observe", *given) == 2
        assert f"{kept} cannot be read" in capsys.readouterr().err
    kept.unlink()
    assert npe("observe", *given) == 0
    # nor is a simulator that was changed since
    path = tmp_path / "mine.py"
    path.write_text(path.read_text().replace("0.3 * torch", "0.6 * torch"))
    assert npe("train", *given) == 2
    assert "the simulator or the configuration has changed" in capsys.readouterr().err
    assert npe("data", *given, "--overwrite") == 0
    assert npe("train", *given) == 2
    assert "was fitted to other simulations" in capsys.readouterr().err
    # what is not of these stages stays
    (out / "train/notes-of-mine").mkdir()
    assert npe("train", *given, "--overwrite") == 0
    assert (out / "train/notes-of-mine").exists()


def test_a_learned_likelihood_tells_the_evidence_of_the_data(mine, tmp_path, capsys):
    """Within 0.4 nat of what the known one tells, for data of two observations; a learned posterior tells none."""
    constant = -3 * math.log(0.3 * math.sqrt(math.tau))  # which MINE leaves out
    out = tmp_path / "out"
    words = ("--simulator", mine, "--output", str(out), "--n", "1500", "--samples", "1000")
    words += ("--training.plan.epochs", "16", "--training.plan.batch", "100")
    words += ("--training.hidden", "[32, 32]", "--training.transforms", "2")
    assert npe("data", *words) == 0
    for method, x in (
        ("nle", (0.1, 0.0, 0.2)),
        ("nle", (0.8, -0.6, 0.3)),
        ("maf", (0.1, 0.0, 0.2)),
    ):
        np.save(tmp_path / "seen.npy", np.array(x))
        given = (*words, "--training.methods", f"[{method}]")
        assert npe("train", *given) == 0
        seen = ("--observation", str(tmp_path / "seen.npy"), "--overwrite")
        assert npe("observe", *given, *seen) == 0
        said = "log Z" in capsys.readouterr().out.split("of the likelihood as it was learned")[0]
        meta = json.loads(str(np.load(out / "posterior/posterior.npz")["meta"]))
        assert (meta["log_evidence"] is not None) == (method == "nle") and said
        if method == "nle":
            assert abs(meta["log_evidence"] - meta["log_z"] - constant) < 0.4


def test_rounds_lead_to_one_posterior_and_go_on_after_a_stop(mine, tmp_path, capsys):
    """What is finished is found, what is not is made the same again; another plan, or a learned likelihood, is refused."""
    out = tmp_path / "out"
    given = ["--simulator", mine, "--output", str(out), "--n", "600", "--rounds", "2"]
    given += ["--samples", "1000", "--training.methods", "maf", "--training.plan.epochs", "8"]
    assert npe("rounds", *given) == 0
    text = capsys.readouterr().out
    assert "n_eff / n" in text and "truth" in text and "log Z" in text
    folder = out / "rounds"
    first = dict(np.load(folder / "posterior/posterior.npz"))
    mean, sd = first["theta"].mean(0), first["theta"].std(0)
    # the exact one, but for the ends of the prior: the noise is 0.3, the truth that of the seed
    simulator = load_simulator(mine)
    truth = simulator.prior.sample(1, 0)[0]
    assert np.abs((mean - truth.numpy()) / sd).max() < 4 and sd.max() < 0.4
    kept = {f: f.stat().st_mtime_ns for f in folder.glob("round-*/*.safetensors")}
    assert len(kept) == 4
    # stopped in the middle of the second fit
    for name in ("fitted", "estimator.safetensors", "estimator.json"):
        (folder / "round-1" / name).unlink()
    assert npe("rounds", *given) == 0
    again = dict(np.load(folder / "posterior/posterior.npz"))
    np.testing.assert_array_equal(again["theta"], first["theta"])
    same = [f for f, t in kept.items() if f.stat().st_mtime_ns == t]
    assert {f"{f.parent.name}/{f.name}" for f in same} == {
        "round-0/pairs.safetensors",
        "round-0/estimator.safetensors",
        "round-1/pairs.safetensors",
    }
    capsys.readouterr()
    for other in (["--n", "700"], ["--proposal", "clipped"]):
        assert npe("rounds", *given, *other) == 2
        assert "rounds for another observation or of another plan" in capsys.readouterr().err
    assert npe("rounds", *given, "--training.methods", "nle", "--overwrite") == 2
    assert "methods has nle, which learns no posterior" in capsys.readouterr().err
    # nothing of which was lost; a third round goes on from these two, unless they were the last worth taking
    assert all(f.exists() for f in kept)
    before = {f: f.stat().st_mtime_ns for f in kept}
    assert npe("rounds", *given, "--rounds", "3") == 0
    assert {f: f.stat().st_mtime_ns for f in kept} == before


def test_mistakes_in_stages(mine, tmp_path, capsys):
    given = ("--simulator", mine, "--output", str(tmp_path / "out"))
    for words, said in (
        (("dates", *given), "what is 'dates', expected one of data"),
        (("data", *given, "--n", "3"), "n is 3, expected at least 100"),
        (("rounds", *given, "--rounds", "0"), "rounds is 0, expected at least 1"),
        (
            ("rounds", *given, "--proposal", "clip"),
            "proposal is 'clip', expected one of truncated",
        ),
        (("data", *given, "--training.methods", "mof"), "expected some of maf"),
        (("data", "--simulator", "x.py:y", "--output", str(tmp_path)), "or FILE.py:NAME"),
    ):
        assert npe(*words) == 2
        assert said in capsys.readouterr().err


# --- numbers of images ---------------------------------------------------------------------------


def test_geometry_is_that_of_an_inclined_disc():
    """A Gaussian disc of scale 5 pixels at 60 degrees, its major axis at 30 degrees from the x axis; and pairs fit."""
    y, x = torch.meshgrid(*[torch.arange(64).double() - 31.5] * 2, indexing="ij")
    p, cos_i = math.radians(30), 0.5
    along, across = x * math.cos(p) + y * math.sin(p), -x * math.sin(p) + y * math.cos(p)
    disc = (-0.5 * (along**2 + (across / cos_i) ** 2) / 25).exp()[None, None]
    flux, radius, e1, e2 = geometry(3 * disc)[0].tolist()
    assert flux == pytest.approx(3 * math.tau * 25 * cos_i, rel=1e-3)
    # a Gaussian of which a share q of the light lies beyond the isophote, at r^2 > 2 ln(1 / q) of its own scale
    q = ISOPHOTE
    within = 1 - q * math.log(1 / q) / (1 - q)
    assert radius == pytest.approx(5 * (within * (1 + cos_i**2) / 2) ** 0.5, rel=2e-3)
    length = (1 - cos_i**2) / (1 + cos_i**2)
    assert math.hypot(e1, e2) == pytest.approx(length, rel=2e-3)
    assert 0.5 * math.atan2(e2, e1) == pytest.approx(p, abs=2e-3)
    # grain on the sky, as trained priors leave it, has as much of the second moments as the disc
    grain = 0.002 * torch.rand(disc.shape, generator=torch.Generator().manual_seed(1)).double()
    assert float((grain * (x**2 + y**2)).sum()) > 0.4 * float((disc * (x**2 + y**2)).sum())
    grained = geometry(disc + grain)[0].tolist()
    assert grained[1:] == pytest.approx([radius, e1, e2], rel=0.02)
    sky = torch.rand(200, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    likelihood = Likelihood(Identity((1, 8, 8)), GaussianNoise(std=0.1))
    theta, data = image_pairs(sky, likelihood, 1)
    prior = geometry_prior(sky)
    assert data.shape == sky.shape and bool(prior.inside(theta).all())
    # A^T S^-1 y of the identity is y / variance
    assert float((0.01 * data - sky).std()) == pytest.approx(0.1, rel=0.05)


# --- pictures ------------------------------------------------------------------------------------


def test_pictures_show_what_they_are_given(tmp_path):
    """Contours at 68 and 95 %, of which every label has its own; numbers, series and images have their pictures."""
    draws = {k: torch.randn(2000, 3) + i for i, k in enumerate(("one", "two"))}
    figure = corner(draws, ["a", "b_c", "d"], torch.zeros(3))
    labels = [ax.get_xlabel() for ax in figure.axes]
    assert {"a", "b c", "d"} <= set(labels)
    assert len(figure.axes[3].collections) == 2
    with pytest.raises(ValueError, match=r"one has shape \(2000, 3\), expected \(n, 2\)"):
        corner(draws, ["a", "b"])
    for shape in ((7,), (1, 30), (1, 8, 8)):
        predictive(torch.zeros(shape), torch.randn(50, *shape)).savefig(tmp_path / "p.png")
        assert (tmp_path / "p.png").stat().st_size > 5000
    with pytest.raises(
        ValueError, match=r"predicted data have shape \(50, 6\), expected \(n, 7\)"
    ):
        predictive(torch.zeros(7), torch.randn(50, 6))
