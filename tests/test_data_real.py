"""Facts about real measurements, and published numbers that the readers must give back.

Sky orientations are the published ones: SPT0346-52 (Spilker et al. 2016, arXiv:1604.05723: the
lens lies 0.5 arcsec East of the phase centre, the brightest image to its North-West), M87 (EHT
Collaboration 2019, arXiv:1906.11241: the ring is bright in the South) and 3C 273 (the jet points
South-West).
"""

import numpy as np
import pytest

from scoreinv.data import inspect, noise_spectrum, read_cutout, read_visibilities
from scoreinv.data.cutout import autocovariance, blank_sky
from scoreinv.data.formats.images import image_hdus, read_image

ARCSEC = np.pi / 180 / 3600
COSMOS = "hst/cosmos_ext"
FIELD = "hst/cosmos_23.5/147246.0_150.416558_1.998697_masknoise.fits"
SPT = "interferometry/alma/SPT0346-52_cont.bin"
M87 = "interferometry/eht_m87"

SGRA = "interferometry/eht_sgra/ER6_SGRA_2017_097_lo_hops_netcal-LMTcal"

# Rows times IFs of every UVFITS file.
UVFITS = {
    f"{M87}/SR1_M87_2017_095_hi_hops_netcal_StokesI.uvfits": 6458,
    f"{M87}/SR1_M87_2017_095_lo_hops_netcal_StokesI.uvfits": 6453,
    f"{M87}/SR1_M87_2017_096_hi_hops_netcal_StokesI.uvfits": 9081,
    f"{M87}/SR1_M87_2017_096_lo_hops_netcal_StokesI.uvfits": 8645,
    f"{M87}/SR1_M87_2017_100_hi_hops_netcal_StokesI.uvfits": 2610,
    f"{M87}/SR1_M87_2017_100_lo_hops_netcal_StokesI.uvfits": 2367,
    f"{M87}/SR1_M87_2017_101_hi_hops_netcal_StokesI.uvfits": 8058,
    f"{M87}/SR1_M87_2017_101_lo_hops_netcal_StokesI.uvfits": 7447,
    f"{M87}/hops_lo_3601_M87+zbl-dtcal_selfcal.uvfits": 5877,
    f"{SGRA}_StokesI.uvfits": 17529,
    f"{SGRA}-besttime_StokesI.uvfits": 6181,
    "interferometry/vlba/3C273DEC16.UVP": 4 * 1913,
    "interferometry/vlba/3C345MAR18.UVP": 4 * 3014,
    "interferometry/vlba/3C279APR13.UVP": 2081,
    "interferometry/vlba/3C279MAY13.UVP": 2204,
    "interferometry/vlba/BLLACMAY13.UVP": 2462,
    "interferometry/vlba/sample.uvfits": 714,
}


def needed(data_root, name):
    path = data_root / name
    if not path.exists():
        pytest.skip(f"{name} is not in the data folder")
    return path


def dirty_map(vis, east, north):
    """Naturally weighted map [Jy/beam] at offsets [arcsec], with shape (len(north), len(east))."""
    u, v = 2 * np.pi * ARCSEC * vis.uv.numpy().T
    columns = np.exp(1j * np.outer(u, east)) * (vis.weight * vis.data).numpy()[:, None]
    return (np.exp(1j * np.outer(v, north)).T @ columns).real / float(vis.weight.sum())


# --- visibilities --------------------------------------------------------------------------------


def test_spt0346(data_root):
    vis = read_visibilities(needed(data_root, SPT))
    assert (len(vis), vis.flagged, len(vis.antennas.unique())) == (21669, 0, 41)
    assert vis.max_baseline == pytest.approx(750e3, rel=1e-3)
    assert vis.primary_beam == pytest.approx(42.58, abs=0.01)
    assert vis.natural_rms == pytest.approx(28.3e-6, rel=2e-3)
    check = vis.weight_check()
    assert check.pairs == 20849
    assert (check.mean, check.robust) == pytest.approx((0.952, 0.938), abs=1e-3)
    vis.check_scale(0.1, (64, 64))


def test_spt0346_lies_where_it_was_published(data_root):
    vis = read_visibilities(needed(data_root, SPT))
    offsets = np.arange(-20, 21) * 0.1
    sky = dirty_map(vis, offsets, offsets)
    bright = np.where(sky > 1e-3, sky, 0)
    assert (bright.sum(0) * offsets).sum() / bright.sum() == pytest.approx(0.4, abs=0.15)
    row, column = np.unravel_index(sky.argmax(), sky.shape)
    assert (offsets[column], offsets[row]) == pytest.approx((0.2, 1.0), abs=0.11)
    assert sky.max() == pytest.approx(3.62e-3, rel=0.02)


def test_wrong_units_are_seen(data_root):
    """u, v of SPT0346-52 in kilolambda and in metres, read as wavelengths."""
    vis = read_visibilities(needed(data_root, SPT))
    for factor in (1e-3, 2.14e-3):
        wrong = type(vis)(factor * vis.uv, vis.data, vis.weight)
        with pytest.raises(ValueError, match="field of 6.4 arcsec: u, v in kilolambda"):
            wrong.check_scale(0.1, (64, 64))


@pytest.mark.parametrize("name", UVFITS)
def test_uvfits(data_root, name):
    vis = read_visibilities(needed(data_root, name))
    assert len(vis) + vis.flagged == UVFITS[name]
    assert vis.flagged < 0.01 * UVFITS[name]
    assert 1e9 < vis.max_baseline < 1e10
    assert 4.3e10 < vis.frequency < 2.31e11
    assert vis.ra is not None and vis.time.min() > 2.45e6
    assert (vis.antennas[:, 0] != vis.antennas[:, 1]).all() and vis.hermitian_copies() == 0
    assert "UVFITS" in str(inspect(needed(data_root, name)))


@pytest.mark.parametrize(
    ("name", "mean", "robust"),
    [
        ("SR1_M87_2017_095_lo_hops_netcal_StokesI.uvfits", 1.05, 0.72),
        ("SR1_M87_2017_101_hi_hops_netcal_StokesI.uvfits", 1.61, 0.84),
        ("hops_lo_3601_M87+zbl-dtcal_selfcal.uvfits", 11.3, 1.05),
    ],
)
def test_weights_of_m87(data_root, name, mean, robust):
    check = read_visibilities(needed(data_root, f"{M87}/{name}")).weight_check()
    assert (check.mean, check.robust) == pytest.approx((mean, robust), rel=0.01)


@pytest.mark.parametrize(("sign", "bright"), [(None, 180), (-1, 0)])
def test_ring_of_m87_is_bright_in_the_south(data_root, sign, bright):
    """A ring of 40 uas, 60 % brighter on one side, matched in the uv plane over shifts.

    Negative control: with the other sign it is found in the North.
    """
    path = needed(data_root, f"{M87}/hops_lo_3601_M87+zbl-dtcal_selfcal.uvfits")
    vis = read_visibilities(path, sign=sign)
    far = vis.baselines.numpy() > 1e8
    phase = 2e-6 * np.pi * ARCSEC * vis.uv.numpy()[far]
    data = vis.data.numpy()[far]
    angle = np.radians(np.arange(0, 360, 10))
    east, north = 20 * np.sin(angle), 20 * np.cos(angle)
    blur = np.exp(-((phase**2).sum(1)) * 6**2 / 2)
    waves = np.exp(-1j * (np.outer(phase[:, 0], east) + np.outer(phase[:, 1], north)))
    shifts = np.arange(-10, 11, 4)
    weight = 1 / np.hypot(*phase.T)

    def match(position):
        model = blur * (waves @ (1 + 0.6 * np.cos(angle - np.radians(position))))
        size = np.sqrt((weight * np.abs(model) ** 2).sum() * (weight * np.abs(data) ** 2).sum())
        turned = [np.exp(1j * (phase @ np.array([x, y]))) for x in shifts for y in shifts]
        return max((weight * data * (model.conj() * t)).sum().real for t in turned) / size

    scores = {position: match(position) for position in (0, 90, 180, 270)}
    assert max(scores, key=scores.get) == bright
    assert scores[bright] > scores[180 - bright] + 0.05


def test_jet_of_3c273_points_south_west(data_root):
    """Flux beyond the beam of the core, in the map of long and short baselines together."""
    vis = read_visibilities(needed(data_root, "interferometry/vlba/3C273DEC16.UVP"))
    offsets = np.arange(-6, 7) * 3e-4
    sky = dirty_map(vis, offsets, offsets)
    south_west = sky[:6, offsets < 0].sum()
    assert south_west > 2 * abs(sky[7:, offsets > 0].sum())


def test_tables(data_root):
    alma = "interferometry/alma/AS209_DSHARP_subsample_frank.txt"
    vis = read_visibilities(needed(data_root, alma))
    assert len(vis) == 196 and vis.max_baseline == pytest.approx(6.06e6, rel=1e-3)
    assert float(vis.weight.sum()) == pytest.approx(3.25e6, rel=2e-3)
    ring = read_visibilities(
        needed(data_root, "interferometry/sim_alma/multi_ring_C43_6.txt.bz2"), unit="lambda"
    )
    assert len(ring) == 54180 and ring.weight.unique() == 1
    metres = needed(data_root, "interferometry/sim_alma/galario_quickstart_uvtable.txt")
    disk = read_visibilities(metres, unit="m", frequency=299792458e3)
    assert len(disk) == 13923
    np.testing.assert_allclose(disk.uv, 1000 * read_visibilities(metres).uv)


# --- images --------------------------------------------------------------------------------------


def rho(patches):
    covariance = autocovariance(patches, 8)
    return covariance[8:, 8:] / covariance[8, 8]


def test_blank_sky_of_cosmos(data_root):
    """Correlation of drizzled ACS noise, within the range over all fields that were measured."""
    stamps = image_hdus(needed(data_root, f"{COSMOS}/real_galaxy_images_extension.fits"))
    skies = [blank_sky(stamp) for stamp in stamps.values()]
    patches = [sky / np.nanstd(sky) for sky in skies if np.isfinite(sky).sum() > 100]
    field = blank_sky(read_image(needed(data_root, FIELD)).pixels)
    for correlation in (rho(patches), rho([field])):
        assert 0.43 < correlation[0, 1] < 0.50 and 0.43 < correlation[1, 0] < 0.50
        assert 0.19 < correlation[1, 1] < 0.23
        assert 0.02 < (correlation[0, 2] + correlation[2, 0]) / 2 < 0.05


def test_measured_spectrum_beats_white_noise(data_root):
    """Trained on half of the blank patches of a field, scored on the other: nats per pixel."""
    sky = blank_sky(read_image(needed(data_root, FIELD)).pixels)
    corners = [(i, j) for i in range(0, 520, 24) for j in range(0, 520, 24)]
    patches = [sky[i : i + 24, j : j + 24] - np.nanmean(sky) for i, j in corners]
    patches = [patch for patch in patches if np.isfinite(patch).all()]
    train, test = patches[::2], np.stack(patches[1::2])
    variance = np.mean(np.square(train))
    spectrum = noise_spectrum(train, (24, 24), variance).numpy()[0]
    power = np.abs(np.fft.fft2(test)) ** 2 / 24**2
    coloured = -0.5 * np.mean(power / spectrum + np.log(spectrum))
    white = -0.5 * np.mean(test**2 / variance + np.log(variance))
    assert len(test) > 100
    assert 0.2 < coloured - white < 0.35


def test_cosmos_cutout(data_root):
    cutout = read_cutout(
        needed(data_root, f"{COSMOS}/real_galaxy_images_extension.fits"),
        hdu=4,
        psf=needed(data_root, f"{COSMOS}/real_galaxy_PSF_images_extension.fits"),
        catalogue=needed(data_root, f"{COSMOS}/real_galaxy_catalog_26_extension_example.fits"),
        noise="measured",
        size=64,
    )
    assert cutout.data.shape == cutout.noise_spectrum.shape == (1, 64, 64)
    assert cutout.grid.pixel_scale == pytest.approx(0.03) and cutout.psf.shape == (1, 65, 51)
    assert cutout.std == pytest.approx(2.58e-3, rel=1e-3)
    assert float(cutout.noise_spectrum.mean()) == pytest.approx(cutout.std**2)
    ratio = cutout.noise_spectrum / cutout.std**2
    assert 3 < float(ratio.max()) < 5.5 and 0.01 <= float(ratio.min()) < 0.2


def test_hubble_and_ground_see_the_same_sky(data_root):
    """The brightest pixels of HSC i and of HST F814W, smoothed alike, agree to a HSC pixel."""
    from scipy.ndimage import gaussian_filter

    hst = read_cutout(needed(data_root, "hst/hsc_hst/scarlet_Cut_HST1.fits"), size=200)
    hsc = read_cutout(needed(data_root, "hst/hsc_hst/scarlet_Cut_HSC1.fits"), plane=2, size=40)
    places = []
    for cutout, width in ((hst, 0.35 / 0.03), (hsc, 1.0)):
        smooth = gaussian_filter(cutout.data[0].numpy(), width)
        row, column = np.unravel_index(smooth.argmax(), smooth.shape)
        places.append(cutout.grid.wcs().pixel_to_world(column, row))
    assert places[0].separation(places[1]).arcsec < 0.2


@pytest.mark.parametrize(
    ("folder", "image", "psf"),
    [
        ("hst/lensed_quasars", "he0435_814w.npz", "he0435_814w.npz"),
        ("hst/lenses", "image_lens_system1_F390W.h5", "psf_lens_system1_F390W.h5"),
    ],
)
def test_other_formats(data_root, folder, image, psf):
    cutout = read_cutout(
        needed(data_root, f"{folder}/{image}"), psf=needed(data_root, f"{folder}/{psf}")
    )
    assert cutout.grid.pixel_scale in (pytest.approx(0.05), pytest.approx(0.04, rel=1e-4))
    assert float(cutout.psf.sum()) == pytest.approx(1, abs=0.02)
