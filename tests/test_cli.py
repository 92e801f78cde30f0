"""The command line: what a user types, what comes back, and what a mistake ends in."""

import io
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

import scoreinv as si
from scoreinv.cli import COMMANDS, main
from scoreinv.cli.data import (
    SimulatedCutout,
    Speckle,
    VisibilityData,
    candidates,
    observe,
)
from scoreinv.cli.finetune import FinetuneConfig
from scoreinv.cli.keys import check_known, explained, keys
from scoreinv.cli.parse import help_text, parse
from scoreinv.cli.sample import SampleConfig
from scoreinv.finetune import training
from scoreinv.gaussian import Fourier, Gaussian
from scoreinv.priors.unet import UNet
from scoreinv.priors.zoo import save_prior
from scoreinv.simulators import SersicGalaxy

ROOT = Path(__file__).parents[1]
SIZE, SIGMA = 16, 0.3
NETWORK = {"channels": 1, "widths": (8, 16), "blocks": 1, "embedding": 16}
SIMULATION = {
    "kind": "disc",
    "flux": 0.02,
    "pixel_scale": 0.1,
    "declination": -30.0,
    "hour_angles": [-1.0, 1.0],
    "integrations": 3,
    "frequency": 230e9,
    "scale": 0.3,
    "noise": {"tsys": 100.0, "bandwidth": 1e9, "integration": 10.0},
}


@pytest.fixture(scope="module")
def prior(tmp_path_factory):
    """A prior folder whose network answers zero: exactly N(0, SIGMA^2) in every pixel."""
    folder = tmp_path_factory.mktemp("prior")
    spectrum = torch.full((1, SIZE, SIZE), SIGMA**2, dtype=torch.float64)
    card = {
        "name": "white16",
        "network": NETWORK,
        "sigma_data": SIGMA,
        "sigma_min": 0.002,
        "sigma_max": 20.0,
        "trained_images": 1_000_000,
        "training": {"data": {"size": SIZE}},
        "held_out": {"peak = 1": {"sigma = 0.1": 0.5}},
    }
    moments = Gaussian(torch.zeros(1, SIZE, SIZE), Fourier(spectrum))
    save_prior(folder, si.ScorePrior(UNet(**NETWORK), SIGMA, moments, 0.002, 20.0), card)
    return folder


@pytest.fixture
def config(prior, tmp_path):
    """A configuration file and where its result goes."""
    content = {
        "simulation": SIMULATION,
        "prior": str(prior),
        "guided": {"levels": 24},
        "n": 64,
        "output": str(tmp_path / "out" / "a.fits"),
        "figure": False,
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(content))
    return path, Path(content["output"])


def failure(capsys, *arguments):
    """What a command that ends with status 2 says, in one line."""
    assert main([str(a) for a in arguments]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and "Traceback" not in lines[0]
    return lines[0]


# --- keys and errors -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["--see", "1"], "unknown key 'see'; did you mean 'seed'?"),
        (["--smc.levls", "3"], "smc: unknown key 'levls'; did you mean 'levels'?"),
        (["--levels", "3"], "unknown key 'levels'; did you mean 'smc.levels'?"),
        (
            ["--visibilities.pixel-scael=3"],
            "visibilities: unknown key 'pixel_scael'; did you mean 'pixel_scale'?",
        ),
        (["--n", "many"], "n is many, expected int"),
        (["--smc.levels", "1.5"], "smc.levels is 1.5, expected int"),
        (
            ["--cutout.size", "[1, 2, 3]"],
            "cutout.size is [1, 2, 3], expected int | tuple[int, int]",
        ),
        (["--n"], "argument --n: expected one argument"),
        ([], "missing: prior, output"),
        (["--visibilities.path", "a"], "visibilities: missing: pixel_scale"),
        (["--guided.levels", "0"], "error: levels is 0 and moves 0, expected at least 2 levels"),
        (["--smc", "7"], "smc is 7, expected the keys levels, particles"),
    ],
)
def test_mistakes_in_keys(capsys, given, expected):
    needed = ["--prior", "a", "--output", "a.fits"] if given else []
    assert expected in failure(capsys, "sample", *needed, *given)


def test_mistakes_in_files(capsys, tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("visibilities:\n  pixel_scael: 0.1\n")
    expected = f"{path}: visibilities: unknown key 'pixel_scael'; did you mean 'pixel_scale'?"
    assert expected in failure(capsys, "sample", "--config", path)
    path.write_text("a: [b")
    assert f"{path} is not YAML" in failure(capsys, "sample", "--config", path)
    path.write_text("n: 3\nvisibilities: {path: a, path: b}\nseed: 1\n")
    assert f"{path} is not YAML: path is given twice" in failure(
        capsys, "sample", "--config", path
    )
    path.write_text("- 1")
    assert f"{path} holds no keys" in failure(capsys, "sample", "--config", path)
    assert f"{tmp_path} is a folder" in failure(capsys, "sample", "--config", tmp_path)
    path.unlink()
    assert f"{path} does not exist" in failure(capsys, "sample", "--config", path)


def test_mistakes_in_values(capsys, config, tmp_path, monkeypatch):
    path, output = config
    vis = ["--visibilities.path", "a.npz", "--visibilities.pixel_scale", "1"]
    both = failure(capsys, "sample", "--config", path, *vis)
    assert "exactly one of the sections" in both and "got visibilities and simulation" in both
    assert "got none" in failure(capsys, "sample", "--config", path, "--simulation", "null")
    assert "got smc and guided" in failure(capsys, "sample", "--config", path, "--smc.levels", 3)
    assert "a.png" in failure(capsys, "sample", "--config", path, "--output", "a.png")
    assert "did you mean" in failure(capsys, "smaple")
    for amplitude in ("1e300", "-1"):
        wrong = failure(capsys, "sample", "--config", path, "--amplitude", amplitude)
        assert f"amplitude is {float(amplitude):g}, expected between 1e-20 and 1e+20" in wrong
    unknown = failure(capsys, "sample", "--config", path, "--prior", "galaxy63")
    assert "no prior 'galaxy63'" in unknown

    monkeypatch.setenv("SCOREINV_DATA", str(tmp_path))
    missing = failure(capsys, "sample", "--config", path, "--simulation", "null", *vis)
    for part in (tmp_path / "a.npz", Path.cwd() / "a.npz", "fetch.py", "export SCOREINV_DATA="):
        assert str(part) in missing
    assert not output.exists()


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (SIMULATION | {"flux": -1.0}, "error: simulation.flux is -1, expected 0"),
        (SIMULATION | {"integrations": -2}, "error: simulation.integrations is -2, expected"),
        ({"kind": "disc", "flux": 1.0, "fwhm": 0.0, "noise": 1.0}, "error: exposure.fwhm is 0"),
        ({"kind": "disc", "flux": 1.0, "fwhm": -1.0, "noise": 1.0}, "error: exposure.fwhm is -1"),
    ],
)
def test_mistakes_in_simulations(capsys, tmp_path, section, message):
    path = tmp_path / "a.yaml"
    name = "simulation" if "frequency" in section else "exposure"
    path.write_text(yaml.safe_dump({name: section, "prior": "galaxy32", "output": "a.fits"}))
    assert message in failure(capsys, "sample", "--config", path)


def test_a_folder_is_no_output(capsys, config, tmp_path, monkeypatch):
    """Seen before anything is computed, as is a test of coverage without enough swaps."""
    path, output = config
    output.with_suffix(".png").mkdir(parents=True)
    monkeypatch.setattr(si, "load_prior", None)
    given = ["--config", path, "--overwrite"]
    assert "is a folder" in failure(capsys, "sample", *given, "--figure", "true")
    assert "is a folder" in failure(
        capsys, "sample", *given, "--figure", output.with_suffix(".png")
    )
    path.write_text(
        yaml.safe_dump(
            yaml.safe_load(path.read_text()) | {"output": str(output.with_suffix(".json"))}
        )
    )
    path.write_text(
        "".join(line for line in path.read_text().splitlines(True) if "figure" not in line)
    )
    assert "is a folder" in failure(capsys, "coverage", *given)
    assert "swaps is 98, expected" in failure(capsys, "coverage", *given, "--swaps", 98)


def test_debug_shows_where(config):
    path, _ = config
    with pytest.raises(ValueError, match="no prior"):
        main(["sample", "--config", str(path), "--prior", "nothing", "--debug"])


def test_existing_output_is_kept(capsys, config):
    path, output = config
    output.parent.mkdir()
    output.write_text("precious")
    assert "pass --overwrite" in failure(capsys, "sample", "--config", path)
    assert output.read_text() == "precious"
    assert main(["sample", "--config", str(path), "--n", "1", "--overwrite"]) == 0
    assert len(si.read_samples(output).x) == 1
    assert "Jy, of one draw" in capsys.readouterr().out


@pytest.mark.parametrize("name", COMMANDS)
def test_help_explains_every_key(name):
    out = io.StringIO()
    with redirect_stdout(out):
        assert main([name, "--help"]) == 0
    config = COMMANDS[name].__annotations__["config"]
    config = getattr(sys.modules[COMMANDS[name].__module__], config)
    for key in keys(config):
        assert key.name in out.getvalue()
        if key.section is None:
            assert len(key.text) > 10, f"{key.name} is not explained"


def test_explanations_may_span_lines_and_share_names():
    @dataclass(frozen=True)
    class Options:
        """A test.

        Args:
            a, b: First line
                and second.
            c: Another one: with a colon.

        Raises:
            ValueError: Never.
        """

        a: int
        b: int = 1
        c: tuple[int, int] = (1, 2)

    assert explained(Options) == {
        "a": "First line and second.",
        "b": "First line and second.",
        "c": "Another one: with a colon.",
    }
    text = " ".join(help_text(Options, "x", "y").split())
    assert "(int, required)" in text and "(tuple[int, int], default [1, 2])" in text
    assert parse(Options, ["--a", "3", "--c", "[4, 5]"], "x") == Options(3, 1, (4, 5))
    with pytest.raises(ValueError, match="unknown key 'd'; did you mean"):
        check_known(["d"], Options)


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda p: p.stem)
def test_configs_are_complete(path):
    """Every configuration parses as it is, apart from where the result goes."""
    command = path.stem.partition("_")[0]
    command = command if command in COMMANDS else "sample"
    module = sys.modules[COMMANDS[command].__module__]
    config = getattr(module, f"{command.capitalize()}Config")
    output = {"coverage": "a.json"}.get(command, "a.fits")
    parse(config, ["--config", str(path), "--output", output], command)


def test_print_config(capsys, config):
    path, _ = config
    with pytest.raises(SystemExit) as stop:
        main(["sample", "--config", str(path), "--seed", "7", "--print_config"])
    assert stop.value.code in (0, None)
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["seed"] == 7 and printed["simulation"]["noise"]["tsys"] == 100
    assert printed["guided"] == {"levels": 24, "local": True} and printed["smc"] is None


# --- sample --------------------------------------------------------------------------------------


def excess(draws, seen, amplitude):
    """How far the mean of the draws is from the exact posterior mean, in standard deviations.

    For a white Gaussian prior the posterior is N(m, P^-1) with P = H + 1 / variance and
    P m = A^T S^-1 y, so that n (mean - m)^T P (mean - m) is chi^2 with one degree per pixel.
    """
    A = seen.likelihood.operator
    columns = A.adjoint(
        seen.likelihood.noise.weigh(A(torch.eye(SIZE**2).double().reshape(-1, 1, SIZE, SIZE)))
    )
    P = columns.reshape(SIZE**2, SIZE**2) + torch.eye(SIZE**2) / (amplitude * SIGMA) ** 2
    error = draws.mean.flatten() - torch.linalg.solve(
        P, seen.likelihood.projection(seen.y).flatten()
    )
    chi2 = len(draws.x) * float(error @ P @ error)
    return (chi2 - SIZE**2) / (2 * SIZE**2) ** 0.5


def test_sample_from_end_to_end(capsys, config):
    """The exact posterior, within 5 standard deviations (false alarms: 1 in 10^6).

    Negative control: the same draws against the posterior of twice the amplitude.
    """
    path, output = config
    assert main(["sample", "--config", str(path), "--figure", "true"]) == 0
    said = capsys.readouterr().out
    for name in ("evidence", "chi^2", "residual", "total flux", "coverage", "result", "figure"):
        assert name in said
    draws = si.read_samples(output)
    amplitude, recorded = draws.meta["amplitude"], draws.meta["config"]
    assert f"amplitude {amplitude:.4g} Jy/pixel" in said
    assert recorded["simulation"]["flux"] == 0.02 and recorded["n"] == 64
    seen = observe(SampleConfig(**from_record(recorded)).data, (1, SIZE, SIZE))
    assert float(draws.truth.sum()) == pytest.approx(0.02)
    assert abs(excess(draws, seen, amplitude)) < 5
    assert abs(excess(draws, seen, 2 * amplitude)) > 5
    chi2 = float(re.search(r"chi\^2 +([\d.]+)", said)[1])
    assert chi2 == pytest.approx(1, abs=5 * (2 / seen.likelihood.data_size) ** 0.5 + 0.1)
    assert output.with_suffix(".png").exists() and not output.with_suffix(".islands").exists()


def from_record(recorded):
    """The part of a recorded configuration that says what was observed."""
    from scoreinv.cli.data import Simulation, ThermalNoise

    simulation = recorded["simulation"]
    noise = ThermalNoise(**simulation["noise"])
    simulation = Simulation(**{**simulation, "noise": noise})
    return {"prior": "", "output": "a.fits", "simulation": simulation}


def test_visibilities_from_a_file(config, tmp_path, monkeypatch):
    """A point source written as a table comes out where it was, moved by the shift."""
    path, output = config
    rng = np.random.default_rng(0)
    uv = rng.uniform(-1e6, 1e6, (400, 2))
    east, north = np.deg2rad(np.array([0.3, -0.2]) / 3600)
    data = np.exp(-2j * np.pi * (uv @ [east, north]))
    noise = 0.01 * (rng.standard_normal(400) + 1j * rng.standard_normal(400))
    columns = [*uv.T, (data + noise).real, (data + noise).imag, np.full(400, 1e4)]
    np.savetxt(tmp_path / "vis.txt", np.stack(columns, 1))
    monkeypatch.setenv("SCOREINV_DATA", str(tmp_path))
    section = ["--visibilities.path", "vis.txt", "--visibilities.pixel_scale", "0.1"]
    shift = ["--visibilities.shift", "[0.2, 0.0]", "--amplitude", "1"]
    command = ["sample", "--config", str(path), "--simulation", "null", *section, *shift]
    assert main(command) == 0
    mean = si.read_samples(output).mean[0]
    row, column = divmod(int(mean.argmax()), SIZE)
    assert (row - SIZE // 2, SIZE // 2 - column) == (-2, 1)
    assert float(mean.max()) == pytest.approx(1, abs=0.1)


def test_amplitudes_of_visibilities_from_a_file(tmp_path, monkeypatch):
    """A double source has beats, wherever it is; |V| keeps them, with Rice's noise, and knows nothing of the place."""
    rng = np.random.default_rng(0)
    uv = rng.uniform(-1e6, 1e6, (400, 2))
    monkeypatch.setenv("SCOREINV_DATA", str(tmp_path))
    shape, sky = (1, SIZE, SIZE), torch.zeros(1, SIZE, SIZE, dtype=torch.float64)
    sky[0, 5, 4], sky[0, 9, 6] = 1.0, 0.5
    clean = si.NUFFT(torch.from_numpy(uv), shape, 0.1)(sky[None])[0].numpy()
    noise = 0.1 * (rng.standard_normal(400) + 1j * rng.standard_normal(400))
    columns = [*uv.T, (clean + noise).real, (clean + noise).imag, np.full(400, 1e2)]
    np.savetxt(tmp_path / "vis.txt", np.stack(columns, 1))
    seen = observe(VisibilityData("vis.txt", 0.1, amplitudes=True), shape)
    assert isinstance(seen.likelihood.noise, si.RiceNoise) and seen.image(seen.y).shape == shape
    # 5 standard deviations
    spread = 5 * (2 / 400) ** 0.5
    misfit = lambda x: float(seen.likelihood.chi2(seen.y, x[None])) / 400
    assert misfit(sky) == pytest.approx(1, abs=spread)
    moved, turned = sky.roll((2, 3), (1, 2)), sky.flip(1, 2)
    assert misfit(moved) == pytest.approx(misfit(sky)) == pytest.approx(misfit(turned))
    assert misfit(sky.flip(2)) > 1 + spread
    with pytest.raises(ValueError, match="give one pixel_scale with amplitudes"):
        candidates(VisibilityData("vis.txt", (0.1, 0.2), amplitudes=True))
    # as the command line gives one
    alone = candidates(VisibilityData("vis.txt", (0.1,), amplitudes=True))
    assert alone == [VisibilityData("vis.txt", 0.1, amplitudes=True)]


def test_speckle_interferometry_sees_half_of_a_disc():
    """Twice as many components across as the canvas has cycles, up to the diffraction limit, each once."""
    section = Speckle("disc", 50.0, 0.02, diameter=8.0, wavelength=2e-6, noise=1e-3)
    seen = observe(section, (1, SIZE, SIZE))
    uv, limit = seen.likelihood.operator.inner.uv, 8.0 / 2e-6
    length = uv.norm(dim=1)
    cell = 1 / (2 * SIZE * math.radians(0.02 / 3600))
    assert float(length.max()) <= limit and float(length.min()) == 0
    assert len(uv) == pytest.approx(0.5 * math.pi * (limit / cell) ** 2, rel=0.1)
    both = torch.cat([uv, -uv[length > 0]])
    assert len((both / cell).round().unique(dim=0)) == 2 * len(uv) - 1
    # the one at no frequency is the total flux
    assert float(seen.y[length == 0]) == pytest.approx(50.0, abs=0.01)
    with pytest.raises(ValueError, match="pixel"):
        observe(replace(section, pixel_scale=0.2), (1, SIZE, SIZE))
    for key, wrong in (("diameter", -8.0), ("wavelength", 0.0), ("oversampling", 0)):
        with pytest.raises(ValueError, match=f"speckle.{key} is {wrong:g}, expected"):
            replace(section, **{key: wrong})


def test_residuals_of_amplitudes_have_the_noise_that_is_stated():
    """At the truth the map of what is left of 1,000 amplitudes near their noise is white, in its middle, too."""
    section = Speckle("disc", 20.0, 0.02, diameter=8.0, wavelength=2e-6, noise=3.0)
    maps = []
    for seed in range(100):
        seen = observe(replace(section, seed=seed), (1, SIZE, SIZE))
        left = seen.likelihood.residual(seen.y, seen.truth[None])[0]
        maps.append(seen.image(left) / seen.rms)
    maps = torch.cat(maps)
    # 100 skies: the mean of a pixel is known to 0.1 (0.14 in the middle), 4 errors
    assert float(maps.mean(0).abs().max()) < 0.6
    assert float(maps.square().mean().sqrt()) == pytest.approx(0.9, abs=0.15)


def test_the_likeliest_pixel_scale_is_chosen(config, capsys, tmp_path, monkeypatch):
    """A white sky that fills the canvas: with smaller pixels its field would be too small."""
    path, output = config
    rng = np.random.default_rng(3)
    uv = rng.uniform(-1, 1, (300, 2)) * 0.5 / np.deg2rad(0.1 / 3600)
    A = si.NUFFT(torch.from_numpy(uv), (1, SIZE, SIZE), 0.1)
    sky = SIGMA * torch.from_numpy(rng.standard_normal((1, 1, SIZE, SIZE)))
    y = si.Likelihood(A, si.GaussianNoise(std=0.1)).simulate(sky, 4)[0].numpy()
    np.savetxt(tmp_path / "vis.txt", np.stack([*uv.T, y.real, y.imag, np.full(300, 100.0)], 1))
    monkeypatch.setenv("SCOREINV_DATA", str(tmp_path))
    section = ["--visibilities.path", "vis.txt", "--visibilities.pixel_scale", "0.05,0.07,0.1"]
    command = ["sample", "--config", str(path), "--simulation", "null", *section, "--n", "4"]
    assert main(command) == 0
    said = capsys.readouterr().out
    assert "0.1 arcsec: log Z +0.0" in said and said.count("log Z -") == 2
    draws = si.read_samples(output)
    assert draws.grid.pixel_scale == pytest.approx(0.1)
    assert draws.meta["amplitude"] == pytest.approx(1.0, abs=0.2)
    both = [*command, "--amplitude", "1", "--overwrite"]
    assert "compared at the likeliest amplitude" in failure(capsys, *both)


def test_cutout_from_a_file(config, tmp_path):
    """A point source seen through a known PSF, on a canvas larger than the data."""
    path, output = config
    offsets = np.arange(5) - 2
    psf = np.exp(-(offsets[:, None] ** 2 + offsets**2) / 2)
    psf /= psf.sum()
    data = 0.01 * np.random.default_rng(1).standard_normal((12, 12))
    data[5:10, 3:8] += psf
    data[0, 0] = np.nan
    np.save(tmp_path / "image.npy", data)
    np.save(tmp_path / "psf.npy", psf)
    section = {
        "path": tmp_path / "image.npy",
        "psf": tmp_path / "psf.npy",
        "noise": 0.01,
        "pixel_scale": 0.05,
        "mask_nan": "true",
    }
    words = [w for k, v in section.items() for w in (f"--cutout.{k}", str(v))]
    command = ["sample", "--config", str(path), "--simulation", "null", *words, "--amplitude", "1"]
    assert main(command) == 0
    draws = si.read_samples(output)
    row, column = divmod(int(draws.mean[0].argmax()), SIZE)
    assert (row, column) == (7 + 2, 5 + 2)
    seen = torch.isfinite(draws.data_image[0])
    assert int(seen.sum()) == 143 and not bool(seen[2, 2])
    assert draws.grid.pixel_scale == 0.05 and draws.grid.shape == (SIZE, SIZE)


def test_a_peer_that_is_missing_is_an_error(capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    said = failure(capsys, "bench", "exact", "--methods", "azula-DPS", "--quick", "true")
    assert "azula-DPS" in said and "azula is not installed; pip install" in said


def test_cutout_of_counts(capsys, config, tmp_path):
    """A point source of 4,000 counts on a background of 20; chi^2 a pixel is at most 1.35, 1 and three standard errors.

    Counts without their background, and rates, are refused.
    """
    path, output = config
    offsets = np.arange(5) - 2
    psf = np.exp(-(offsets[:, None] ** 2 + offsets**2) / 2)
    psf /= psf.sum()
    sky = np.full((12, 12), 20.0)
    sky[5:10, 3:8] += 4000 * psf
    counts = np.random.default_rng(1).poisson(sky).astype(float)
    np.save(tmp_path / "image.npy", counts)
    np.save(tmp_path / "psf.npy", psf)
    section = {
        "path": tmp_path / "image.npy",
        "psf": tmp_path / "psf.npy",
        "noise": "counts",
        "pixel_scale": 0.05,
    }
    words = [w for k, v in section.items() for w in (f"--cutout.{k}", str(v))]
    command = ["sample", "--config", str(path), "--simulation", "null", *words, "--n", "4"]
    assert main([*command, "--cutout.background", "20"]) == 0
    said = capsys.readouterr().out
    assert "in the place of the PoissonNoise the Gaussian near the data" in said
    chi2 = float(next(line for line in said.splitlines() if line.startswith("chi^2")).split()[1])
    assert chi2 < 1.35
    draws = si.read_samples(output)
    assert divmod(int(draws.mean[0].argmax()), SIZE) == (7 + 2, 5 + 2)
    predicted = float((draws.data_image - draws.residual_image).nansum())
    assert abs(predicted - (counts - 20).sum()) < 3 * counts.sum() ** 0.5
    assert abs(float(np.nanmedian(draws.data_image.numpy()))) < 5
    assert "background is 0 counts" in failure(capsys, *command, "--overwrite")
    np.save(tmp_path / "image.npy", counts / 7)
    rates = [*command, "--cutout.background", "20", "--overwrite"]
    assert "Give the counts themselves" in failure(capsys, *rates)


def test_cutout_larger_than_the_canvas(capsys, config, tmp_path):
    path, _ = config
    np.save(tmp_path / "image.npy", np.zeros((20, 20)))
    np.save(tmp_path / "psf.npy", np.eye(3))
    words = ["--cutout.path", tmp_path / "image.npy", "--cutout.psf", tmp_path / "psf.npy"]
    words += ["--cutout.noise", "1", "--cutout.pixel_scale", "1", "--simulation", "null"]
    assert "cutout.size=16" in failure(capsys, "sample", "--config", path, *words)


def test_wrong_unit_is_caught(capsys, config, tmp_path):
    path, _ = config
    np.savetxt(tmp_path / "vis.txt", np.random.default_rng(0).uniform(-200, 200, (50, 5)) ** 2)
    words = ["--visibilities.path", tmp_path / "vis.txt", "--visibilities.pixel_scale", "0.1"]
    message = failure(capsys, "sample", "--config", path, "--simulation", "null", *words)
    assert "unit='klambda'" in message


# --- interruption --------------------------------------------------------------------------------


def test_interrupted_run_goes_on(config, tmp_path):
    """Ctrl-C after the first island; the same command ends with the draws of a whole run."""
    path, output = config
    slow = ["--guided", "null", "--smc.levels", "20", "--n", "12", "--island", "2"]
    command = ["sample", "--config", str(path), *slow]
    threads = str(torch.get_num_threads())
    environment = {**os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
    # a shell that runs the tests in the background has them, and their children, ignore Ctrl-C
    signal.signal(signal.SIGINT, signal.default_int_handler)
    run = subprocess.Popen(
        [sys.executable, "-m", "scoreinv", *command],
        cwd=ROOT,
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
    )
    first = output.with_suffix(".islands") / "island-00000.safetensors"
    deadline = time.monotonic() + 120
    while not first.exists() and run.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    run.send_signal(signal.SIGINT)
    _, said = run.communicate(timeout=60)
    assert run.returncode == 130
    finished = int(re.search(r"(\d+) islands are finished", said)[1])
    assert 1 <= finished < 12 and "the same command goes on" in said and "Traceback" not in said
    assert first.exists() and not output.exists()

    times = {f: f.stat().st_mtime_ns for f in first.parent.iterdir()}
    assert len(times) == finished
    assert main(command) == 0
    whole = tmp_path / "whole.fits"
    assert main([*command, "--output", str(whole)]) == 0
    assert torch.equal(si.read_samples(output).x, si.read_samples(whole).x)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--n", "0"), "n is 0"),
        (("--island", "1"), "island is 1"),
        (("--figure", "a.xyz"), "figure is a.xyz, expected a name in .png"),
        (("--batch", "0"), "batch is 0"),
        (("--amplitude", "-1"), "amplitude is -1"),
        (("--prior", "nowhere"), "nowhere"),
    ],
)
def test_a_command_that_cannot_run_leaves_the_old_result(capsys, config, words, message):
    path, output = config
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_bytes(b"a result")
    assert message in failure(capsys, "sample", "--config", path, "--overwrite", *words)
    assert output.read_bytes() == b"a result"


def test_overwrite_forgets_the_islands_of_another_problem(capsys, config):
    path, output = config
    command = ["sample", "--config", str(path), "--n", "4"]
    islands = output.with_suffix(".islands")
    assert main([*command, "--output", str(output.with_name("b.fits"))]) == 0
    islands.mkdir(parents=True)
    (islands / "island-00000.safetensors").write_bytes(b"")
    assert "not a finished island" in failure(capsys, *command)
    assert main([*command, "--overwrite"]) == 0
    assert output.exists() and not islands.exists()


# --- the other commands --------------------------------------------------------------------------


def test_inspect(capsys, tmp_path):
    np.savetxt(tmp_path / "vis.txt", np.ones((3, 5)))
    assert main(["inspect", str(tmp_path / "vis.txt"), "--unit", "klambda"]) == 0
    assert "visibilities (text)" in capsys.readouterr().out
    (tmp_path / "empty").write_bytes(b"")
    assert "is empty" in failure(capsys, "inspect", tmp_path / "empty")


# --- finetune ------------------------------------------------------------------------------------


@pytest.fixture
def finetuning(prior, tmp_path):
    """Arguments of a short training for data behind a PSF, and its folder."""
    content = {
        "exposure": {"kind": "disc", "flux": 20.0, "fwhm": 2.5, "noise": 0.2},
        "prior": str(prior),
        "amplitude": 1.0,
        "steps": 6,
        "plan": {"iterations": 4, "groups": 2, "paths": 4, "rate": 1e-4},
        "images": 40,
        "sims": 2,
        "paths": 16,
        "n": 4,
        "output": str(tmp_path / "control"),
    }
    path = tmp_path / "finetune.yaml"
    path.write_text(yaml.safe_dump(content))
    return ["finetune", "--config", str(path)], Path(content["output"])


def test_finetune_from_end_to_end(capsys, finetuning, prior):
    """A prior that is Gaussian: the twisted chain needs no control, and no path weighs more than another."""
    command, folder = finetuning
    assert main(command) == 0
    said = capsys.readouterr().out
    for name in ("before", "after", "draws", "report", "figure", "chi^2"):
        assert name in said
    report = json.loads((folder / "report.json").read_text())
    assert len(report["history"]) == 4 and report["config"]["plan"]["groups"] == 2
    for record in report["before"]:
        assert record["std"] < 1e-3 and abs(record["eubo"] - record["elbo"]) < 1e-3
    draws = si.read_samples(folder / "draws.fits")
    assert len(draws.x) == 4 and draws.truth is not None
    assert (folder / "report.png").stat().st_size > 10_000
    seen = observe(FinetuneConfig(**observed(report["config"])).data, (1, SIZE, SIZE))
    loaded = si.load_amortised(folder, si.load_prior(prior).rescaled(1.0), seen.likelihood)
    assert loaded.condition(seen.y).evidence(16, 0).ess > 0.5
    assert "report.json exists" in failure(capsys, *command)
    assert "expected 0" in failure(capsys, *command, "--only", "--plan.simulated", "5")
    (folder / "mine.txt").write_text("precious")
    assert main([*command, "--overwrite", "--only", "--plan.iterations", "2"]) == 0
    assert (folder / "mine.txt").read_text() == "precious"
    assert len(json.loads((folder / "report.json").read_text())["history"]) == 2


def test_what_finetune_has_learned_samples_and_is_tested_for_coverage(
    capsys, finetuning, prior, tmp_path
):
    """For a Gaussian prior the twisted chain is exact; another measurement than it was trained for is refused."""
    command, folder = finetuning
    assert main(command) == 0
    content = {
        "exposure": {"kind": "disc", "flux": 20.0, "fwhm": 2.5, "noise": 0.2, "seed": 5},
        "prior": str(prior),
        "amplitude": 1.0,
        "control": {"folder": str(folder), "particles": 2},
    }
    path = tmp_path / "other.yaml"
    path.write_text(yaml.safe_dump(content))
    output = tmp_path / "draws.fits"
    known = ["--config", str(path), "--output"]
    assert main(["sample", *known, str(output), "--n", "16"]) == 0
    assert "learned control" in capsys.readouterr().out
    assert "particles=2" in si.read_samples(output).meta["sampler"]
    report = tmp_path / "report.json"
    assert main(["coverage", *known, str(report), "--sims", "20", "--n", "16"]) == 0
    assert "12 evaluations a draw" in capsys.readouterr().out  # six steps of two particles
    assert json.loads(report.read_text())["p"] > 1e-3  # false alarms: one in a thousand
    report = tmp_path / "chain.json"
    coverage = ["coverage", *known, str(report), "--sims", "20", "--n", "16", "--truths", "chain"]
    assert "expected the section control" in failure(capsys, *coverage, "--control", "null")
    assert main(coverage) == 0
    assert re.search(r"truths +chain", capsys.readouterr().out)
    assert json.loads(report.read_text())["p"] > 1e-3
    command = ["sample", *known, str(tmp_path / "none.fits")]
    assert "its prior differ" in failure(capsys, *command, "--amplitude", "2")
    assert "its likelihood differ" in failure(capsys, *command, "--exposure.noise", "0.3")
    assert "no control" in failure(capsys, *command, "--control.folder", str(tmp_path))
    assert "leave one out" in failure(capsys, *command, "--smc.levels", "5")
    assert "particles 0" in failure(capsys, *command, "--control.particles", "0")


def test_finetune_of_latent_numbers(capsys, finetuning):
    """Seven numbers in the place of an image: named in the report, drawn as images, and loaded by what the report holds."""
    command, folder = finetuning
    assert main([*command, "--latent", "--n", "8"]) == 0
    said = capsys.readouterr().out
    report = json.loads((folder / "report.json").read_text())
    assert set(report["parameters"]) == set(SersicGalaxy.names) and "radius" in said
    draws, galaxy = si.read_samples(folder / "draws.fits"), SersicGalaxy(**report["galaxy"])
    assert draws.x.shape == (8, 1, SIZE, SIZE) and draws.truth is not None
    flux = torch.tensor(report["parameters"]["flux"])
    assert float((draws.x.flatten(1).sum(1) / flux - 1).abs().max()) < 0.3
    seen = observe(FinetuneConfig(**observed(report["config"])).data, (1, SIZE, SIZE))
    prior = si.GaussianPrior(torch.zeros(galaxy.shape, dtype=torch.float64), 1.0)
    operator = si.Generated(seen.likelihood.operator, galaxy, galaxy.shape)
    likelihood = si.Likelihood(operator, seen.likelihood.noise)
    loaded = si.load_amortised(folder, prior, likelihood)
    assert math.isfinite(loaded.condition(seen.y).evidence(16, 0).log_z)
    assert "leave adapted out" in failure(capsys, *command, "--latent", "--adapted.rank", "2")


def test_finetune_without_phases(capsys, finetuning):
    command, folder = finetuning
    speckle = {
        "kind": "disc",
        "flux": 20.0,
        "pixel_scale": 0.02,
        "diameter": 8.0,
        "wavelength": 2e-6,
        "noise": 1.0,
    }
    words = [w for k, v in speckle.items() for w in (f"--speckle.{k}", str(v))]
    command = [*command, "--exposure", "null", *words]
    assert main(command) == 0
    assert "EUBO - ELBO" in capsys.readouterr().out
    draws = si.read_samples(folder / "draws.fits")
    assert draws.truth is not None and bool(torch.isfinite(draws.x).all())
    assert "give a number" in failure(capsys, *command, "--amplitude", "null", "--overwrite")


def observed(recorded):
    """The part of a recorded configuration that says what was observed."""
    exposure = SimulatedCutout(**recorded["exposure"])
    return {"prior": "", "output": "a", "plan": si.Plan(), "exposure": exposure}


def test_a_training_that_was_interrupted_goes_on(capsys, finetuning, monkeypatch):
    command, folder = finetuning
    monkeypatch.setattr(training, "SAVE_EVERY", 2)
    save = training._State.save

    def stop(state, path):
        save(state, path)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(training._State, "save", stop)
        assert main(command) == 130
    assert "the same command goes on from there" in capsys.readouterr().err
    assert not (folder / "report.json").exists()
    assert main(command) == 0
    history = json.loads((folder / "report.json").read_text())["history"]
    assert main([*command, "--output", str(folder.with_name("whole"))]) == 0
    whole = json.loads((folder.with_name("whole") / "report.json").read_text())["history"]
    assert history == whole
    (folder / "report.json").unlink()
    assert "another training" in failure(capsys, *command, "--plan.rate", "0.1")


@pytest.mark.parametrize("methods", [["--methods", "Guided,TDS"], ["--methods=[Guided, TDS]"]])
def test_bench(capsys, tmp_path, methods):
    output = tmp_path / "exact.json"
    words = ["--quick", "--n", "20", "--seeds", "1", "--smc.levels", "4", "--output", str(output)]
    assert main(["bench", "exact", *methods, *words]) == 0
    rows = json.loads(output.read_text())
    assert [row["method"] for row in rows] == ["Guided", "TDS"] * 3
    assert capsys.readouterr().out.count("SW / floor") == 3
    assert output.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    page = output.with_suffix(".md").read_text()
    assert "--methods Guided,TDS --n 20 --seeds 1 --quick true --smc.levels 4" in page
    assert page.count("| Guided |") == page.count("| TDS |") == 3
    assert "Of the suite's 31 problems, 3 were run." in page
    assert "methods is empty" in failure(capsys, "bench", "exact", "--methods", "[]")
    assert "at least 20 draws" in failure(capsys, "bench", "exact", "--n", "4")
    words = ["--methods", "PiGDM", "--problems", "amplitudes 2", "--workers", "1", "--seeds", "1"]
    assert "none of PiGDM takes the data of amplitudes 2" in failure(
        capsys, "bench", "exact", *words
    )
    assert "methods are DPSS" in failure(capsys, "bench", "exact", "--methods", "DPSS")
    assert "problems are grid 9 1" in failure(capsys, "bench", "exact", "--problems", "grid 9 1")
    assert "a name in .json" in failure(capsys, "bench", "exact", "--output", "runs/table")


def test_priors(capsys, prior, monkeypatch):
    card = yaml.safe_load((prior / "card.json").read_text())
    monkeypatch.setattr(si, "shipped_priors", lambda: {"white16": card})
    assert main(["priors"]) == 0
    said = capsys.readouterr().out
    for part in (
        "white16",
        "16 x 16",
        "0.002 to 20",
        "1,000,000",
        "0.50 at 0.1",
        card["sha256"][:12],
    ):
        assert part in said


def test_a_card_in_words_of_its_own_is_named(capsys, config, prior, tmp_path):
    """Where truths are asked for like those that the prior learned."""
    path, output = config
    words = yaml.safe_load(path.read_text())
    del words["figure"]
    path.write_text(yaml.safe_dump(words))
    mine = tmp_path / "mine"
    shutil.copytree(prior, mine)
    card = json.loads((mine / "card.json").read_text())
    card["training"]["data"] |= {"kind": "galaxies", "telescope": "HST"}
    (mine / "card.json").write_text(json.dumps(card))
    words = ["--config", path, "--prior", mine, "--output", output.with_suffix(".json")]
    said = failure(capsys, "coverage", *words, "--truths", "held out")
    assert f"the card of {mine} has telescope in training.data, expected some of amplitude" in said


@pytest.mark.parametrize("buffered", ["", "1"])
def test_a_reader_that_leaves_early_causes_no_error(buffered):
    """`scoreinv priors | true`, with output flushed at the end or line by line."""
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "scoreinv", "priors"]
    environment = {**os.environ, "PYTHONUNBUFFERED": buffered}
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, env=environment)
    os.close(write)
    assert done.returncode == 0 and done.stderr == b""


def test_train(capsys, tmp_path):
    """A finished run is found again; another one is refused."""
    run = {
        "name": "tiny",
        "data": {"kind": "disc", "size": 16, "images": 64, "held_out": 16, "workers": 1},
        "optimisation": {"steps": 2, "batch": 4},
        "network": {"widths": [8, 16], "embedding": 16},
    }
    path, folder = tmp_path / "train.yaml", tmp_path / "out"
    path.write_text(yaml.safe_dump({"run": run}))
    command = ["train", "--config", str(path), "--output", str(folder), "--max-seconds", "600"]
    assert main(command) == 0
    weights = (folder / "weights.safetensors").read_bytes()
    assert main(command) == 0
    assert (folder / "weights.safetensors").read_bytes() == weights
    assert si.load_prior(folder).shape == (1, 16, 16)
    assert "another configuration" in failure(capsys, *command, "--run.seed", "1")


def test_vis_section_is_checked_against_the_canvas(tmp_path):
    np.savetxt(tmp_path / "vis.txt", np.ones((3, 5)) * [1e6, 1e6, 1, 0, 1])
    with pytest.raises(ValueError, match="too coarse"):
        observe(VisibilityData(str(tmp_path / "vis.txt"), 1.0), (1, SIZE, SIZE))


def test_a_target_that_is_missed_ends_in_status_one(monkeypatch, capsys, tmp_path):
    """And what was finished is found again, with a page and a figure of all."""
    from scoreinv.bench import rtb

    ran = []

    def near(seed):
        ran.append(seed)
        return {"ELBO": -0.1, "log Z": 0.0, "EUBO": 0.2}

    cases = {
        "near": rtb.Case(near, {"ELBO": (-0.5, 0.0)}),
        "off": rtb.Case(lambda seed: {"ELBO": -2.0}, {"ELBO": (-0.5, 0.0)}),
    }
    monkeypatch.setattr(rtb, "CASES", cases)
    kept = ["--seed", "4", "--output", str(tmp_path / "table.json")]
    assert main(["bench", "rtb", "--problems", "[near]", *kept]) == 0
    assert main(["bench", "rtb", *kept]) == 1
    assert ran == [4]
    assert "ELBO -0.5..0" in capsys.readouterr().out
    page = (tmp_path / "table.md").read_text()
    assert "`scoreinv bench rtb --seed 4`" in page and "| off | 4 |" in page
    assert (tmp_path / "table.png").stat().st_size > 5000
    assert "expected some of near, off" in failure(capsys, "bench", "rtb", "--problems", "[far]")
