"""Results on disk, interrupted runs, and the page that shows a result."""

import errno
import json
import math
import os

import pytest
import torch
from astropy.io import fits
from astropy.wcs import WCS
from matplotlib.text import Text

import scoreinv as si
from scoreinv.data.grid import Grid
from scoreinv.gaussian import Fourier, Gaussian
from scoreinv.priors import GaussianPrior
from scoreinv.samplers.run import fingerprint

SHAPE = (1, 8, 10)
GRID = Grid(SHAPE[1:], 0.1, ra=54.0, dec=-52.1, frequency=1.4e11, unit="Jy/pixel")
SETTINGS = {"sampler": si.Anneal(levels=4, moves=1), "seed": 3, "island": 4}
META = {"config": {"n": 8}, "data": {"source": "a test", "unit": "Jy/beam", "rms": 0.5}}


def posterior(data=1.0, prior=None):
    """A pixelwise problem: N(0, 1) prior, data of noise 0.5."""
    prior = prior or GaussianPrior(torch.zeros(SHAPE, dtype=torch.float64), 1.0)
    likelihood = si.Likelihood(si.Identity(SHAPE), si.GaussianNoise(std=0.5))
    return si.Posterior(prior, likelihood, torch.full(SHAPE, data, dtype=torch.float64))


@pytest.fixture(scope="module")
def samples():
    draws = si.sample(posterior(), 8, **SETTINGS, grid=GRID, meta=META)
    return draws.with_(truth=draws.mean.clone())


# --- files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "exact"), [("a.fits", False), ("a.h5", True), ("a.hdf5", True)])
def test_round_trip(samples, tmp_path, name, exact):
    """Everything comes back: images in float32 from FITS, bit by bit from HDF5."""
    back = si.read_samples(samples.write(tmp_path / name))
    tolerance = {"rtol": 0, "atol": 0} if exact else {"rtol": 1e-6, "atol": 1e-6}
    for field in ("x", "data_image", "residual_image", "truth"):
        old, new = getattr(samples, field), getattr(back, field)
        torch.testing.assert_close(new.double(), old.double(), **tolerance)
    for field in ("levels", "acceptance", "ess", "island_log_evidence"):
        torch.testing.assert_close(
            getattr(back, field), getattr(samples, field), rtol=0, atol=0, equal_nan=True
        )
    for field in ("log_evidence", "log_evidence_std", "evaluations", "weights", "seconds"):
        assert getattr(back, field) == getattr(samples, field)
    assert back.grid == samples.grid
    assert back.meta == json.loads(json.dumps(samples.meta))


def test_fits_is_what_a_viewer_expects(samples, tmp_path):
    with fits.open(samples.write(tmp_path / "a.fits")) as hdus:
        hdus.verify("exception")
        primary = hdus[0]
        assert primary.data.shape == SHAPE[1:] and primary.header["BUNIT"] == "Jy/pixel"
        assert hdus["DRAWS"].data.shape == (8, *SHAPE[1:])
        for name in ("STD", "DRAWS", "TRUTH"):
            assert hdus[name].header["BUNIT"] == "Jy/pixel"
        for name in ("DATA_IMAGE", "RESIDUAL_IMAGE"):
            assert hdus[name].header["BUNIT"] == "Jy/beam"
        header = primary.header
        assert (header["NDRAWS"], header["SEED"], header["PRIOR"]) == (8, 3, "GaussianPrior")
        assert header["LOGEVID"] == pytest.approx(samples.log_evidence)
        assert header["CREATOR"].startswith("scoreinv")
        sky = WCS(header).celestial.pixel_to_world(SHAPE[2] // 2, SHAPE[1] // 2)
        east = WCS(header).celestial.pixel_to_world(SHAPE[2] // 2 - 1, SHAPE[1] // 2)
    assert (sky.ra.deg, sky.dec.deg) == pytest.approx((54.0, -52.1))
    assert sky.position_angle(east).deg == pytest.approx(90, abs=0.1)


def test_names_in_any_alphabet(tmp_path):
    """FITS headers hold ASCII; the provenance keeps the name."""
    prior = GaussianPrior(torch.zeros(SHAPE, dtype=torch.float64), 1.0)
    prior.identity = {"prior": "modèle"}
    grid = Grid(SHAPE[1:], 0.1, unit="\u00b5Jy/pixel")
    draws = si.sample(posterior(prior=prior), 4, **SETTINGS, grid=grid)
    path = draws.write(tmp_path / "a.fits")
    header = fits.getheader(path)
    assert (header["PRIOR"], header["BUNIT"]) == ("mod?le", "uJy/pixel")
    assert si.read_samples(path).meta["prior"]["prior"] == "modèle"


def test_one_draw_has_no_spread(tmp_path):
    """It is written and drawn all the same; warnings are errors here."""
    draws = si.sample(posterior(), 1, **SETTINGS, grid=GRID)
    assert bool(draws.std.isnan().all())
    draws.write(tmp_path / "a.fits")
    draws.plot().savefig(tmp_path / "a.png")


def test_nothing_is_overwritten_unasked(samples, tmp_path):
    path = samples.write(tmp_path / "a.fits")
    before = path.read_bytes()
    with pytest.raises(FileExistsError, match="overwrite=True"):
        samples.write(path)
    assert path.read_bytes() == before
    samples.with_(x=samples.x[:2]).write(path, overwrite=True)
    assert len(si.read_samples(path).x) == 2


def test_wrong_files(samples, tmp_path):
    with pytest.raises(ValueError, match=r"'.npy', expected one of .fits, .h5, .hdf5"):
        samples.write(tmp_path / "a.npy")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        si.read_samples(tmp_path / "nothing.fits")
    fits.PrimaryHDU().writeto(tmp_path / "other.fits")
    with pytest.raises(ValueError, match="holds no posterior draws"):
        si.read_samples(tmp_path / "other.fits")
    (tmp_path / "text.h5").write_text("not HDF5")
    with pytest.raises(ValueError, match="holds no posterior draws"):
        si.read_samples(tmp_path / "text.h5")


# --- interrupted runs ----------------------------------------------------------------------------


def full_after(calls):
    """An `os.replace` whose disk is full after so many calls."""
    replace, left = os.replace, iter(range(calls))

    def fails(source, target):
        if next(left, None) is None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        replace(source, target)

    return fails


def test_full_disk_keeps_what_is_finished(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full_after(1))
        with pytest.raises(OSError, match="island 1 .* No space left on device"):
            si.sample(posterior(), 12, **SETTINGS, folder=tmp_path)
    assert [f.name for f in tmp_path.iterdir()] == ["island-00000.safetensors"]
    resumed = si.sample(posterior(), 12, **SETTINGS, folder=tmp_path)
    assert torch.equal(resumed.x, si.sample(posterior(), 12, **SETTINGS).x)


def test_full_disk_leaves_no_half_result(samples, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "replace", full_after(0))
    with pytest.raises(OSError, match="No space left on device; no file was left half written"):
        samples.write(tmp_path / "a.fits")
    assert not list(tmp_path.iterdir())


def test_finished_islands_are_not_run_again(tmp_path):
    si.sample(posterior(), 8, **SETTINGS, folder=tmp_path)
    times = {f: f.stat().st_mtime_ns for f in tmp_path.iterdir()}
    more = si.sample(posterior(), 12, **SETTINGS, folder=tmp_path)
    assert len(times) == 2 and all(f.stat().st_mtime_ns == t for f, t in times.items())
    assert torch.equal(more.x, si.sample(posterior(), 12, **SETTINGS).x)


@pytest.mark.parametrize(
    "change",
    [
        {"posterior": posterior(data=1.1)},
        {"posterior": posterior(prior=GaussianPrior(torch.zeros(SHAPE), 1.2))},
        {"posterior": posterior(prior=GaussianPrior(torch.full(SHAPE, 0.1), 1.0))},
        {"seed": 4},
        {"island": 2},
        {"sampler": si.Anneal(levels=5, moves=1)},
    ],
)
def test_islands_of_another_problem(tmp_path, change):
    problem = {"posterior": posterior(), **SETTINGS}
    si.sample(n=4, folder=tmp_path, **problem)
    with pytest.raises(ValueError, match="islands of another problem"):
        si.sample(n=4, folder=tmp_path, **{**problem, **change})


class Shrunk(torch.nn.Module):
    """A network of one weight."""

    def __init__(self, weight):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(weight))

    def forward(self, x, _):
        return self.weight * x


def equal_moments(w):
    """Two Gaussians of weights w and 1 - w; the mean of both is 0 and the variance along ones 2, whatever w is."""
    means = [math.sqrt((1 - w) / w), -math.sqrt(w / (1 - w))]
    ones = torch.ones(SHAPE, dtype=torch.float64)
    return si.MixturePrior([w, 1 - w], [GaussianPrior(m * ones, 1.0) for m in means])


def trained(weight):
    moments = posterior().prior.moments
    spectrum = Fourier(torch.ones(SHAPE[1:], dtype=torch.float64))
    return si.ScorePrior(Shrunk(weight), 1.0, Gaussian(moments.mean, spectrum), 0.01, 50.0)


def turned(sign):
    uv = sign * torch.tensor([[3e4, 1e4], [-1e4, 2e4], [2e4, 3e4]], dtype=torch.float64)
    likelihood = si.Likelihood(si.NUFFT(uv, SHAPE, 0.5), si.GaussianNoise(std=0.5))
    y = torch.tensor([1 + 1j, 0.5 - 1j, 0.3j], dtype=torch.complex128)
    return si.Posterior(posterior().prior, likelihood, y)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (turned(1), turned(-1)),
        (posterior(prior=equal_moments(0.2)), posterior(prior=equal_moments(0.5))),
        (posterior(prior=trained(0.0)), posterior(prior=trained(0.5))),
    ],
    ids=["Fourier sign", "modes", "weights"],
)
def test_what_moments_and_amplitudes_do_not_show_is_another_problem(first, second):
    keys = [fingerprint(p, **SETTINGS) for p in (first, second, first)]
    assert keys[0] == keys[2] != keys[1]


def test_truncated_island(tmp_path):
    si.sample(posterior(), 4, **SETTINGS, folder=tmp_path)
    (island,) = tmp_path.iterdir()
    island.write_bytes(island.read_bytes()[:100])
    with pytest.raises(ValueError, match=f"{island.name} is not a finished island .* delete it"):
        si.sample(posterior(), 4, **SETTINGS, folder=tmp_path)


class Failing(GaussianPrior):
    """A prior that breaks after so many evaluations."""

    def __init__(self, evaluations):
        super().__init__(torch.zeros(SHAPE, dtype=torch.float64), 1.0)
        self.left = evaluations

    def denoise(self, x, sigma):
        self.left -= 1
        return super().denoise(x, sigma) * (1.0 if self.left >= 0 else math.nan)


def test_broken_island_is_named(tmp_path):
    whole = si.sample(posterior(), 4, **SETTINGS).evaluations
    with pytest.raises(FloatingPointError, match="island 1 failed"):
        si.sample(posterior(prior=Failing(whole + 1)), 8, **SETTINGS, folder=tmp_path)
    assert [f.name for f in tmp_path.iterdir()] == ["island-00000.safetensors"]


def test_the_rest_of_a_batch_is_kept(tmp_path):
    """Two islands side by side, the second of which turns up a broken draw."""

    class Second(si.GaussianPrior):
        def denoise(self, x, sigma):
            spoiled = torch.ones(len(x), 1, 1, 1, dtype=x.dtype)
            spoiled[4:8] = math.nan
            return super().denoise(x, sigma) * spoiled

    prior = Second(torch.zeros(SHAPE, dtype=torch.float64), 1.0)
    with pytest.raises(FloatingPointError, match="island 1 failed"):
        si.sample(posterior(prior=prior), 12, **SETTINGS, batch=3, folder=tmp_path)
    kept = sorted(f.name for f in tmp_path.iterdir())
    assert kept == ["island-00000.safetensors", "island-00002.safetensors"]


def test_one_broken_particle_does_not_become_all_of_them(tmp_path):
    """With weights a particle that is not finite stops its island: it must not be resampled around, by a scout neither."""

    class Broken(si.GaussianPrior):
        def denoise(self, x, sigma):
            spoiled = torch.ones(len(x), 1, 1, 1, dtype=x.dtype)
            spoiled[2] = math.nan
            return super().denoise(x, sigma) * spoiled

    prior = Broken(torch.zeros(SHAPE, dtype=torch.float64), 1.0)
    with pytest.raises(
        FloatingPointError, match="the scout failed: the importance weights are not finite"
    ):
        si.sample(posterior(prior=prior), 4, si.SMC(4), seed=3, island=4)


# --- figure --------------------------------------------------------------------------------------


def titles(figure):
    return [axes.get_title(loc="left") for axes in figure.axes if axes.get_title(loc="left")]


def test_figure_without_truth(samples, tmp_path):
    figure = samples.with_(truth=None, meta={}).plot()
    overview = ["Data", "Posterior mean", "Standard deviation", "Residual"]
    assert titles(figure) == overview + [f"Draw {i}" for i in (1, 2, 3, 4)]
    figure.savefig(tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 10_000


def test_figure_with_truth(samples):
    figure = samples.plot()
    assert titles(figure) == [
        *("Truth", "Dirty image", "Posterior mean", "Standard deviation"),
        *(f"Draw {i}" for i in (1, 2, 3, 4)),
        *("Residual / noise", "(Mean − truth) / std"),
        *("Coverage of the true pixels", "Total flux [Jy]"),
    ]
    footer = " ".join(text.get_text() for text in figure.texts)
    assert "8 draws" in footer and "log evidence" in footer and "Weights not used" in footer


def test_figure_shows_the_sky_the_right_way_round(samples):
    """East is left: offsets to the East fall along the columns, those to the North rise."""
    mean = next(a for a in samples.plot().axes if a.get_title(loc="left") == "Posterior mean")
    left, right, bottom, top = mean.images[0].get_extent()
    assert (left, right, bottom, top) == pytest.approx((0.55, -0.45, -0.45, 0.35))
    assert mean.images[0].origin == "lower"


def shown(axis):
    """Tick labels of an axis within its limits."""
    low, high = sorted(axis.get_view_interval())
    ticks = [t for t in axis.get_major_ticks() if low <= t.get_loc() <= high]
    return [t.label1 for t in ticks] + [t.label2 for t in ticks] + [axis.label]


def test_text_of_the_figure_does_not_overlap(samples):
    figure = samples.plot()
    figure.canvas.draw()
    texts = list(figure.texts)
    for axes in figure.axes:
        inside = [child for child in axes.get_children() if isinstance(child, Text)]
        texts += [*shown(axes.xaxis), *shown(axes.yaxis), *inside]
    boxes = [t.get_window_extent() for t in texts if t.get_visible() and t.get_text()]
    assert len(boxes) > 60
    for i, a in enumerate(boxes):
        assert not any(a.overlaps(b) for b in boxes[:i])


def test_figure_leaves_pyplot_alone(samples):
    import matplotlib.pyplot as plt

    before = plt.get_fignums()
    samples.plot()
    assert plt.get_fignums() == before


def test_figure_refuses(samples):
    with pytest.raises(ValueError, match=r"truth has shape \(1, 3, 3\), the draws \(1, 8, 10\)"):
        samples.plot(truth=torch.zeros(1, 3, 3))
    with pytest.raises(ValueError, match="stretch is 0"):
        samples.plot(stretch=0)
