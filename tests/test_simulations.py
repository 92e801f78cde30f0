"""Simulated observations from prior to verdict: samplers that are right pass, and each known mistake is found."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

import scoreinv as si
from scoreinv.cli import main
from scoreinv.gaussian import Fourier
from scoreinv.samplers.baselines import DPS, ConvolvedLikelihood
from scoreinv.training import TrainingData, unseen_images
from tests import analytic

SHAPE = (1, 8, 8)
POWER = Fourier(analytic.power_law(8, 8))
PRIOR = si.GaussianPrior(torch.zeros(SHAPE), POWER)
NOISE = float(POWER.marginal_variance(SHAPE)) ** 0.5  # as wide as the prior
IDENTITY = si.Identity(SHAPE)
VISIBILITIES = si.NUFFT(analytic.baselines(40), SHAPE, analytic.PIXEL)
# noise of a drizzled image: neighbouring pixels share it
SHARED = 0.1 + 0.9 * analytic.power_law(8, 8, slope=4.0)
DRIZZLED = si.GaussianNoise(spectrum=SHARED)


def verdict(likelihood, sampler=None, believed=None, sims=100, n=60, seed=0, **options):
    found = si.sample_simulations(
        PRIOR, likelihood, sims, n, sampler, seed=seed, believed=believed, **options
    )
    return found.coverage(seed)


def white(std):
    return si.Likelihood(IDENTITY, si.GaussianNoise(std=std))


def thermal(std):
    return si.Likelihood(VISIBILITIES, si.GaussianNoise(std=std))


@pytest.mark.parametrize(
    "likelihood",
    [white(NOISE), thermal(2.0), si.Likelihood(IDENTITY, DRIZZLED)],
    ids=["white", "visibilities", "drizzled"],
)
def test_exact_posteriors_are_calibrated(likelihood):
    """SMC of a Gaussian prior is exact: false alarms of 1 %, and a width known to a tenth."""
    report = verdict(likelihood, si.SMC(5))
    assert report.flagged(0.01) == [], str(report)
    assert report.dispersion.low < 1.03 and report.dispersion.high > 0.97
    assert 0.9 < report.detectable[0] and report.detectable[1] < 1.1


@pytest.mark.parametrize(
    ("likelihood", "sampler", "believed"),
    [
        (white(NOISE), ConvolvedLikelihood(40), None),
        (white(NOISE), DPS(40), None),
        (thermal(2.0), si.SMC(5), thermal(2.0 * 0.5**0.5)),
        (si.Likelihood(IDENTITY, DRIZZLED), si.SMC(5), white(float(SHARED.mean()) ** 0.5)),
    ],
    ids=["convolved likelihood", "DPS", "visibilities counted twice", "white noise assumed"],
)
def test_known_mistakes_are_found(likelihood, sampler, believed):
    """p < 10^-3 for each."""
    report = verdict(likelihood, sampler, believed)
    assert report.flagged(1e-3) != [], str(report)
    assert "calibrated within" not in report.verdict


def test_one_observation_is_tested_by_its_own_draws():
    """Draws of one posterior, observed again: SMC passes; noise that is taken for half as wide is found."""
    for believed, flagged in ((white(NOISE), False), (white(0.5 * NOISE), True)):
        y = white(NOISE).simulate(PRIOR.sample(1, 7), 8)[0]
        exact = si.sample(si.Posterior(PRIOR, white(NOISE), y), 80, si.SMC(5), seed=0).x
        found = si.sample_again(si.Posterior(PRIOR, believed, y), exact, 40, si.SMC(5), seed=0)
        assert bool(found.coverage(0).flagged(0.01)) == flagged
    counts = si.Likelihood(IDENTITY, si.StudentNoise(scale=1.0, dof=3.0))
    with pytest.raises(ValueError, match="only linear data with Gaussian noise"):
        si.sample_again(si.Posterior(PRIOR, counts, y), exact, 16, seed=0)


def test_predicted_data_fit_as_the_data_do():
    """p is spread around 1/2 where the noise is right; taken for half as wide, most of ten are near the least, 1 / 201."""
    for believed, low in ((white(NOISE), False), (white(0.5 * NOISE), True)):
        p = []
        for seed in range(10):
            y = white(NOISE).simulate(PRIOR.sample(1, seed), seed)[0]
            posterior = si.Posterior(PRIOR, believed, y)
            p.append(si.predictive_p(posterior, si.sample(posterior, 200, si.SMC(5), seed=0).x, 1))
        assert (sorted(p)[5] < 0.02) if low else (0.02 < min(p) and sum(p) / 10 > 0.2)


@pytest.mark.parametrize(
    "likelihood", [white(NOISE), thermal(2.0)], ids=["pixels", "visibilities"]
)
def test_held_out_data_are_predicted(likelihood):
    """rms of 1 within five standard errors over 12 observations; more than that if the noise is taken for half as wide."""
    for factor in (1.0, 2.0):
        z = []
        for seed in range(12):
            y = likelihood.simulate(PRIOR.sample(1, seed), seed)[0]
            said = si.GaussianNoise(variance=1 / likelihood.noise.pixel_precision / factor**2)
            believed = si.Likelihood(likelihood.operator, said)
            rest, mask = si.held_out(believed, 0.3, seed)
            x = si.sample(si.Posterior(PRIOR, rest, y), 100, si.SMC(5), seed=0).x
            z.append(si.predicted(believed, y, x, mask).z)
        z = torch.cat(z)
        rms = float(z.square().mean()) ** 0.5
        assert (abs(rms - 1) < 5 / (2 * len(z)) ** 0.5) == (factor == 1.0), rms
    with pytest.raises(ValueError, match="share is 1.5"):
        si.held_out(likelihood, 1.5, 0)
    with pytest.raises(ValueError, match="a share of 1e-09 of .* data is none, expected a larger"):
        si.held_out(likelihood, 1e-9, 0)
    with pytest.raises(ValueError, match="cannot be left out one by one"):
        si.held_out(si.Likelihood(IDENTITY, DRIZZLED), 0.5, 0)


def test_held_out_data_are_not_chosen_by_their_noise():
    """A tenth of 20 x 1,024 data, simulated with the same seeds in float32, has noise of rms 1 within five errors."""
    flat, noise = si.Likelihood(si.Identity((1, 32, 32)), si.GaussianNoise(std=1.0)), []
    for seed in range(20):
        y = flat.simulate(torch.zeros(1, 1, 32, 32), seed)[0]
        noise.append(y[si.held_out(flat, 0.1, seed)[1]])
    noise = torch.cat(noise)
    assert float(noise.square().mean().sqrt()) == pytest.approx(1, abs=5 / (2 * len(noise)) ** 0.5)


def test_masked_data_are_not_held_out():
    variance = torch.ones(1, 16, 16)
    variance[:, :8] = torch.inf
    masked = si.Likelihood(si.Identity((1, 16, 16)), si.GaussianNoise(variance=variance))
    rest, mask = si.held_out(masked, 0.5, 0)
    assert not bool(mask[:, :8].any()) and 30 < int(mask.sum()) < 98
    assert torch.equal(rest.noise.pixel_precision == 0, mask | variance.isinf())


def watched():
    """A sampler, and of every island that it made the posterior, the stream and the first numbers of that."""
    seen = []

    class Watched(si.Anneal):
        def island(self, posterior, n, generator):
            again = torch.Generator()
            again.set_state(generator.get_state())
            first = torch.randn(20, generator=again, dtype=torch.float64)
            seen.append((posterior, generator.initial_seed(), first))
            return super().island(posterior, n, generator)

    return Watched(2), seen


def test_truths_are_independent_of_the_noise_of_their_draws():
    """No correlation, within 5 / sqrt(n), of a truth's component with the size of the first numbers of its particles."""
    (shape, sims), (sampler, seen) = ((1, 1, 2), 300), watched()
    mixture = si.MixturePrior(
        [0.5, 0.5], [si.GaussianPrior(m * torch.ones(shape), 0.1) for m in (-1, 1)]
    )
    flat = si.Likelihood(si.Identity(shape), si.GaussianNoise(std=1.0))
    truths = si.sample_simulations(mixture, flat, sims, 2, sampler, seed=0).truths
    component = truths.mean((1, 2, 3)).sign().double()
    first = torch.stack([first for _, _, first in seen])
    assert len(first) == sims
    rows = torch.cat([component[None], first.T, first.abs().T])
    assert float(torch.corrcoef(rows)[0, 1:].abs().max()) < 5 / sims**0.5


def test_seeds_of_an_observation_are_not_those_of_its_simulations():
    """Neither the noise of data simulated with seed 3 nor the streams of draws with seed 0 come again."""
    x, (sampler, seen) = PRIOR.sample(1, 7), watched()
    y = white(1.0).simulate(x, 3)[0]
    posterior = si.Posterior(PRIOR, white(1.0), y)
    truths = si.sample(posterior, 80, sampler, seed=0).x[:5]
    own = {seed for _, seed, _ in seen}
    seen.clear()
    si.sample_again(posterior, truths, 80, sampler, seed=0)
    assert len(own) == 5 and len(seen) == 25
    assert own.isdisjoint(seed for _, seed, _ in seen)
    joined = torch.stack([p.y for p, _, _ in seen[::5]])
    noise = (2 * joined - y - truths).flatten(1)
    rows = torch.cat([(y - x).flatten(1), noise]).double()
    assert float(torch.corrcoef(rows)[0, 1:].abs().max()) < 5 / 8  # of 64 numbers


def test_a_simulation_depends_on_its_number_only(tmp_path):
    options = {"sampler": si.SMC(4), "seed": 3}
    one = si.sample_simulations(PRIOR, white(0.5), 12, 16, folder=tmp_path / "a", **options)
    for process in (0, 1):
        shared = si.sample_simulations(
            PRIOR, white(0.5), 12, 16, folder=tmp_path / "b", share=(process, 2), **options
        )
        assert shared is None
    two = si.read_simulations(tmp_path / "b", 12)
    fewer = si.sample_simulations(PRIOR, white(0.5), 10, 16, **options)
    for name in ("draws", "truths", "wiener", "dirty", "log_likelihood"):
        assert torch.equal(getattr(one, name), getattr(two, name))
        assert torch.equal(getattr(one, name)[:10], getattr(fewer, name))
    with pytest.raises(ValueError, match="2 of 14 simulations are not in .*simulation-00012"):
        si.read_simulations(tmp_path / "b", 14)


def test_finished_simulations_are_found_again(tmp_path):
    run = lambda seed=0: si.sample_simulations(
        PRIOR, white(0.5), 10, 16, si.SMC(4), seed=seed, folder=tmp_path
    )
    first = run()
    (tmp_path / "simulation-00004.safetensors").unlink()
    before = {p.name: p.stat().st_mtime_ns for p in tmp_path.iterdir()}
    again = run()
    assert torch.equal(first.draws, again.draws)
    assert {p.name: p.stat().st_mtime_ns for p in tmp_path.iterdir() if p.name in before} == before
    with pytest.raises(ValueError, match="another problem, sampler or seed"):
        run(seed=1)
    # truths that are given are not those that were drawn
    given = lambda truths: si.sample_simulations(
        PRIOR, white(0.5), 10, 16, si.SMC(4), seed=0, folder=tmp_path, truths=truths
    )
    with pytest.raises(ValueError, match="another problem, sampler or seed"):
        given(PRIOR.sample(10, seed=9))
    # but for what other threads make of their last bits
    assert torch.equal(given(first.truths * (1 + 1e-7)).draws, first.draws)
    (tmp_path / "simulation-00002.safetensors").write_bytes(b"cut off")
    with pytest.raises(ValueError, match="00002.* is not a finished simulation"):
        run()


def test_bad_requests_are_explained(tmp_path):
    for options, message in (
        ({"sims": 0, "n": 9}, "sims is 0"),
        ({"sims": 9, "n": 9, "truths": torch.zeros(9, 3)}, r"truths have shape \(9, 3\)"),
        ({"sims": 9, "n": 9, "share": (0, 2)}, "need a folder"),
    ):
        with pytest.raises(ValueError, match=message):
            si.sample_simulations(PRIOR, white(0.5), seed=0, **options)


CONFIG = """
exposure: {kind: galaxy, flux: 40, fwhm: 2.0, noise: 0.05}
prior: galaxy32
gaussian: true
amplitude: 1.0
smc: {levels: 4}
sims: 12
n: 16
swaps: 99
"""


def test_the_command_writes_a_report(tmp_path, capsys):
    config, output = tmp_path / "c.yaml", tmp_path / "out" / "report.json"
    config.write_text(CONFIG)
    words = ["coverage", "--config", str(config), "--output", str(output)]
    assert main(words) == 0
    said = capsys.readouterr().out
    for name in ("verdict", "width", "detectable", "sharpness", "report", "figure"):
        assert name in said
    record = json.loads(output.read_text())
    assert record["sims"] == 12 and record["draws"] == 16
    assert output.with_suffix(".png").stat().st_size > 20_000
    assert main(words) == 2 and "exists" in capsys.readouterr().err
    output.unlink()
    assert main(words) == 0
    assert json.loads(output.read_text()) == record
    notes = output.with_suffix("") / "notes.txt"
    notes.write_text("mine")
    assert main([*words, "--overwrite", "--sims", "10", "--seed", "1"]) == 0
    assert notes.read_text() == "mine" and len(list(notes.parent.iterdir())) == 11
    assert main([*words, "--overwrite", "true", "--sims", "5"]) == 2
    assert "at least 10 of each" in capsys.readouterr().err


def test_truths_may_be_other_images_than_draws_of_the_prior(tmp_path, capsys):
    """Images like those of the training but others, over the whole range of its amplitudes, or those of a folder."""
    config, mine = tmp_path / "c.yaml", tmp_path / "mine"
    config.write_text(CONFIG)
    mine.mkdir()
    np.save(mine / "a.npy", np.random.default_rng(0).random((14, 40, 40)))
    found = {}
    for name in ("prior", "held out", str(mine)):
        output = tmp_path / f"{len(found)}.json"
        words = ["coverage", "--config", str(config), "--output", str(output), "--truths", name]
        assert main(words) == 0
        assert f"truths        {'draws of the prior' if name == 'prior' else name}" in (
            capsys.readouterr().out
        )
        found[name] = si.read_simulations(output.with_suffix(""), 12).truths
    data = TrainingData(**si.shipped_priors()["galaxy32"]["training"]["data"])
    torch.testing.assert_close(found["held out"].float(), unseen_images(data, 12, seed=0))
    peaks = found["held out"].flatten(1).amax(1)
    assert 0.5 <= float(peaks.min()) < 0.9 and 1.1 < float(peaks.max()) <= 2
    assert not torch.isclose(found["prior"], found["held out"]).all()
    words[-1] = "held-out"
    kept = len(list(output.with_suffix("").iterdir()))
    assert main([*words, "--overwrite"]) == 2
    # a slip costs no finished simulation
    assert len(list(output.with_suffix("").iterdir())) == kept == 12
    assert (
        "truths are from 'held-out', expected 'prior', 'held out', 'chain'"
        in capsys.readouterr().err
    )


def test_processes_share_the_simulations(tmp_path):
    """Two processes write the report that one writes."""
    config = tmp_path / "c.yaml"
    config.write_text(CONFIG)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    reports = []
    for launch in (
        ["-m"],
        ["-m", "torch.distributed.run", "--nproc_per_node", "2", "-m"],
    ):
        output = tmp_path / f"{len(reports)}.json"
        words = ["scoreinv", "coverage", "--config", str(config), "--output", str(output)]
        done = subprocess.run(
            [sys.executable, *launch, *words],
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr[-2000:]
        said = dict(line.split(maxsplit=1) for line in done.stdout.splitlines() if " " in line)
        assert said["processes"].strip() == str(1 + len(reports))
        reports.append(json.loads(output.read_text()))
        assert reports[-1].pop("meta")["config"]["sims"] == 12
    assert reports[0] == reports[1]
