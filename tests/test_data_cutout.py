"""Facts about cutouts and the noise of their pixels, on files written here.

Statistical tests have a fixed seed and a tolerance of five standard errors: a correct program
would fail one of them with another seed less than once in a million times.
"""

import h5py
import numpy as np
import pytest
import torch
from astropy.io import fits
from astropy.wcs import WCS

from scoreinv.data import Cutout, Grid, inspect, noise_spectrum, read_cutout
from scoreinv.data.cutout import autocovariance, blank_sky
from scoreinv.data.inspect import fwhm


@pytest.fixture
def rng():
    return np.random.default_rng(3)


def gaussian(shape, width, centre=None):
    y, x = np.indices(shape)
    row, column = (n // 2 for n in shape) if centre is None else centre
    return np.exp(-((y - row) ** 2 + (x - column) ** 2) / (2 * width**2))


KERNEL = gaussian((5, 5), 0.8) / np.linalg.norm(gaussian((5, 5), 0.8))


def correlated(rng, shape):
    """White noise convolved with KERNEL: variance 1, spectrum |FFT(KERNEL)|^2."""
    white = rng.normal(size=shape)
    return np.fft.irfft2(np.fft.rfft2(white) * np.fft.rfft2(KERNEL, shape), shape)


@pytest.fixture
def image(tmp_path, rng):
    """A FITS image of noise with a source at a known sky position, and its PSF."""
    grid = Grid((80, 90), 0.05, ra=150.0, dec=2.0)
    pixels = 0.1 * correlated(rng, (80, 90)) + 20 * gaussian((80, 90), 2.0, (30, 50)) + 3.0
    header = grid.header("optical")
    header["BUNIT"] = "electron/s"
    fits.PrimaryHDU(pixels, header).writeto(tmp_path / "a.fits")
    fits.PrimaryHDU(gaussian((11, 11), 1.5)).writeto(tmp_path / "psf.fits")
    return tmp_path / "a.fits"


def test_cropped_cutout_keeps_its_place_on_the_sky(image, tmp_path):
    cutout = read_cutout(
        image, psf=tmp_path / "psf.fits", size=32, centre=(30, 50), noise=0.1, background=3
    )
    peak = np.unravel_index(int(cutout.data.argmax()), cutout.data.shape)
    assert peak == (0, 16, 16) and cutout.data.dtype == torch.float64
    source = WCS(fits.getheader(image)).all_pix2world(50, 30, 0)
    np.testing.assert_allclose(cutout.grid.wcs().all_pix2world(16, 16, 0), source, rtol=1e-12)
    np.testing.assert_allclose((cutout.grid.ra, cutout.grid.dec), source, rtol=1e-12)
    assert cutout.grid.pixel_scale == pytest.approx(0.05)
    assert cutout.grid.unit == "electron/s" and cutout.grid.header()["BUNIT"] == "electron/s"
    assert (cutout.std, cutout.noise_spectrum, cutout.background) == (0.1, None, 3.0)
    assert cutout.psf.shape == (1, 11, 11) and len(cutout.sha256) == 64


def test_background_is_left_unless_asked_for(image):
    level = read_cutout(image).data.median()
    assert float(level) == pytest.approx(3, abs=0.05)
    cutout = read_cutout(image, background="median-of-border")
    assert float(cutout.data.median()) == pytest.approx(0, abs=0.05)
    assert cutout.background == pytest.approx(3, abs=0.05)


def test_nan_pixels(image):
    with fits.open(image, mode="update") as hdus:
        hdus[0].data[2, :3] = np.nan
    with pytest.raises(
        ValueError, match="3 of 7200 pixels are NaN or infinite; pass mask_nan=True"
    ):
        read_cutout(image)
    cutout = read_cutout(image, mask_nan=True, noise="measured")
    assert int((~cutout.mask).sum()) == 3 and not cutout.data[~cutout.mask].any()
    assert "3 pixels are NaN" in str(inspect(image))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(size=100), r"a part of shape \(100, 100\) around pixel \(40, 45\) leaves the image"),
        (dict(size=32, centre=(3, 3)), "take a smaller size or another centre"),
        (dict(centre=(3, 3)), "centre was passed without size"),
        (dict(size=0), r"a part of shape \(0, 0\) has no pixels"),
        (dict(size=(16, -3)), r"a part of shape \(16, -3\) has no pixels"),
        (dict(psf=np.ones((5, 5)), psf_size=-1), r"a part of shape \(-1, -1\) has no pixels"),
        (dict(pixel_scale=0.1), "pixel_scale is 0.1 arcsec, and .* states 0.05; leave it out"),
        (dict(background="median"), "expected a number or 'median-of-border'"),
        (dict(noise="white"), "noise is 'white', expected a standard deviation or 'measured'"),
        (dict(noise=-1), "std is -1.0, expected a positive number"),
        (dict(hdu=3), r"has no HDU 3; it has 1 HDUs: 0 PRIMARY \(80, 90\)"),
        (dict(psf=np.zeros((5, 5))), "psf sums to 0, expected a positive sum: is this the PSF"),
        (dict(psf=np.full((5, 5), np.nan)), "psf has 25 NaN or infinite pixels; mend them"),
        (dict(psf=np.ones(5)), r"psf has shape \(5,\), expected \(h, w\)"),
        (dict(psf=np.ones((41, 9)), size=16), r"psf has shape \(41, 9\), .* with psf_size=31"),
    ],
)
def test_cutout_errors(image, arguments, message):
    with pytest.raises(ValueError, match=message):
        read_cutout(image, **arguments)


def test_a_border_that_is_not_measured_has_no_level(tmp_path):
    pixels = np.pad(np.ones((20, 20)), 2, constant_values=np.nan)
    np.save(tmp_path / "a.npy", pixels)
    given = dict(pixel_scale=1.0, mask_nan=True)
    with pytest.raises(ValueError, match="no pixel of the border is finite"):
        read_cutout(tmp_path / "a.npy", background="median-of-border", **given)
    assert read_cutout(tmp_path / "a.npy", background=1.0, **given).data.abs().max() == 0


@pytest.mark.parametrize("pixels", [np.ones((9, 9)) * 1j, np.full((9, 9), "a")])
def test_pixels_are_real_numbers(tmp_path, pixels):
    """Of complex ones half would be lost."""
    np.save(tmp_path / "a.npy", pixels)
    np.save(tmp_path / "b.npy", np.ones((9, 9)))
    a, b = tmp_path / "a.npy", tmp_path / "b.npy"
    for image, psf in ((a, b), (b, a)):
        with pytest.raises(ValueError, match="a.npy is of type .* expected real numbers"):
            read_cutout(image, psf=psf, pixel_scale=1.0)


def test_psf_can_be_cut(image):
    psf = gaussian((41, 9), 1.0)
    cutout = read_cutout(image, size=16, psf=psf, psf_size=31)
    np.testing.assert_array_equal(cutout.psf[0], psf[5:36])


def test_cutout_checks_what_it_is_given():
    grid, data = Grid((8, 8), 1.0), np.zeros((1, 8, 8))
    for arguments, message in (
        (dict(data=data[0]), r"data has shape \(8, 8\), expected \(1, 8, 8\)"),
        (dict(psf=np.ones((3, 3))), r"psf has shape \(3, 3\), expected \(1, h, w\)"),
        (dict(noise_spectrum=data), "minimum 0, expected .* and positive"),
        (dict(mask=data[0]), r"mask has shape \(8, 8\), expected \(1, 8, 8\)"),
    ):
        with pytest.raises(ValueError, match=message):
            Cutout(**(dict(data=data, grid=grid) | arguments))


def test_arrays_of_other_formats(tmp_path, rng):
    pixels, psf = rng.normal(size=(3, 20, 24)), gaussian((9, 9), 1.2)
    np.savez(tmp_path / "a.npz", image_data=pixels, psf_model=psf, pixel_scale_arcsec=0.04)
    cutout = read_cutout(tmp_path / "a.npz", plane=1, psf=tmp_path / "a.npz")
    np.testing.assert_array_equal(cutout.data[0], pixels[1])
    np.testing.assert_array_equal(cutout.psf[0], psf)
    assert cutout.grid.pixel_scale == 0.04
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["image_data"] = pixels[0]
        file["transform_pix2angle"] = np.diag([-0.08, 0.08])
        file["kernel_point_source"] = psf
    assert read_cutout(tmp_path / "a.h5").grid.pixel_scale == pytest.approx(0.08)
    np.save(tmp_path / "a.npy", pixels[2])
    cutout = read_cutout(tmp_path / "a.npy", pixel_scale=0.1, psf=tmp_path / "a.h5")
    assert cutout.psf.shape == (1, 9, 9) and cutout.grid.shape == (20, 24)
    assert "FWHM" in str(inspect(tmp_path / "a.h5"))
    for arguments, message in (
        (dict(path="a.npy"), "does not state its pixel scale; pass pixel_scale"),
        (dict(path="a.npz"), r"has shape \(3, 20, 24\), expected one image \(H, W\); pass plane"),
        (dict(path="a.npz", plane=3), "has 3 planes, not 3"),
        (dict(path="a.npz", hdu="sky"), "holds image_data, psf_model, .* pass the name"),
    ):
        with pytest.raises(ValueError, match=message):
            read_cutout(**(arguments | dict(path=tmp_path / arguments["path"])))
    for name in ("a.h5", "a.npy"):
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:200])
        with pytest.raises(ValueError, match="damaged"):
            read_cutout(tmp_path / name, pixel_scale=1)


def write_catalogue(tmp_path, rng, count=12):
    """A file of galaxies in the layout of GalSim, with PSFs and a catalogue."""
    galaxies, psfs, std = [], [], 0.1 * (1 + np.arange(count))
    for k in range(count):
        source = 50 * gaussian((50, 60), 2.0)
        galaxies.append(std[k] * (source + correlated(rng, (50, 60))))
        psfs.append(gaussian((11, 11), 1 + 0.1 * k))
    for name, arrays in (("galaxies.fits", galaxies), ("psfs.fits", psfs)):
        hdus = [fits.PrimaryHDU(arrays[0]), *(fits.ImageHDU(x) for x in arrays[1:])]
        fits.HDUList(hdus).writeto(tmp_path / name)
    numbers = np.arange(count)
    columns = [
        fits.Column("GAL_HDU", "J", array=numbers),
        fits.Column("PSF_HDU", "J", array=numbers[::-1]),
        fits.Column("GAL_FILENAME", "20A", array=["galaxies.fits"] * count),
        fits.Column("PIXEL_SCALE", "D", array=np.full(count, 0.03)),
        fits.Column("NOISE_VARIANCE", "D", array=std**2),
    ]
    fits.BinTableHDU.from_columns(columns).writeto(tmp_path / "catalogue.fits")
    return psfs


def test_catalogue_gives_psf_scale_and_noise(tmp_path, rng):
    psfs = write_catalogue(tmp_path, rng)
    cutout = read_cutout(
        tmp_path / "galaxies.fits",
        hdu=4,
        psf=tmp_path / "psfs.fits",
        catalogue=tmp_path / "catalogue.fits",
        noise="measured",
        size=40,
    )
    np.testing.assert_array_equal(cutout.psf[0], psfs[7])
    assert cutout.grid.pixel_scale == 0.03 and cutout.std == pytest.approx(0.5)
    assert float(cutout.noise_spectrum.mean()) == pytest.approx(0.25)
    covariance = torch.fft.ifft2(cutout.noise_spectrum[0]).real
    truth = np.fft.ifft2(np.abs(np.fft.fft2(KERNEL, (40, 40))) ** 2).real
    np.testing.assert_allclose(covariance[0, :4] / covariance[0, 0], truth[0, :4], atol=0.06)


def test_catalogue_errors(tmp_path, rng):
    write_catalogue(tmp_path, rng)
    galaxies, catalogue = tmp_path / "galaxies.fits", tmp_path / "catalogue.fits"
    for arguments, message in (
        (dict(hdu=4), "does not state its pixel scale"),
        (dict(pixel_scale=0.03, psf=tmp_path / "psfs.fits"), "holds 12 images; pass psf_hdu"),
        (
            dict(catalogue=galaxies),
            "is no GalSim catalogue: it has no table with a column GAL_HDU",
        ),
        (dict(catalogue=catalogue, hdu=40), "has no HDU 40; it has 12 HDUs"),
    ):
        with pytest.raises(ValueError, match=message):
            read_cutout(galaxies, **arguments)
    fits.PrimaryHDU(np.ones((50, 60))).writeto(tmp_path / "other.fits")
    with fits.open(catalogue, mode="update") as hdus:
        hdus[1].data["GAL_HDU"][1] = 0
    with pytest.raises(ValueError, match="has 2 rows for HDU 0 of galaxies.fits, expected one"):
        read_cutout(galaxies, catalogue=catalogue)


def test_white_noise_has_a_flat_spectrum(rng):
    """400^2 pixels: a lag is known to 1 / 400 and comes twice, P to sqrt(2 sum w^2) / 400."""
    spectrum = noise_spectrum([rng.normal(0, 2, (400, 400))], (40, 40))
    taper = np.cos(np.pi * np.arange(-8, 9) / 18) ** 2
    error = np.sqrt((np.outer(taper, taper) ** 2).sum() * 2 / 400**2)
    assert float((spectrum / 4 - 1).abs().max()) < 5 * error
    assert float(spectrum.mean()) == pytest.approx(4, rel=5 * 0.0035)


def test_correlated_noise_is_recovered(rng):
    """The spectrum fits new noise of the same kind better than white noise does."""
    patches = [correlated(rng, (60, 60)) for _ in range(20)]
    spectrum = noise_spectrum(patches, (32, 32), variance=9.0).numpy()[0]
    assert spectrum.mean() == pytest.approx(9) and spectrum.min() > 0
    truth = 9 * np.abs(np.fft.fft2(KERNEL, (32, 32))) ** 2
    assert np.abs(spectrum - truth).mean() < 0.05 * truth.max()
    power = np.abs(np.fft.fft2(3 * correlated(rng, (32, 32)))) ** 2 / 32**2
    gain = -0.5 * np.mean(power / spectrum + np.log(spectrum) - power / 9 - np.log(9))
    assert gain > 0.2


def test_spectrum_errors(rng):
    with pytest.raises(ValueError, match=r"lags up to 8 need at least 17 pixels; pass a smaller"):
        noise_spectrum([rng.normal(size=(40, 40))], (16, 16))
    with pytest.raises(
        ValueError, match="too little blank sky .* no patch has 100 measured pixels"
    ):
        noise_spectrum([rng.normal(size=(9, 9))], (40, 40))


def test_masked_pixels_do_not_count(rng):
    noise = correlated(rng, (200, 200))
    holes = np.where(rng.random(noise.shape) < 0.3, np.nan, noise)
    np.testing.assert_allclose(autocovariance([holes], 2), autocovariance([noise], 2), atol=0.05)


def test_blank_sky_leaves_the_noise(rng):
    """Twenty galaxies on correlated noise: what is left has the variance of the noise."""
    noise = correlated(rng, (300, 300))
    sky = noise + sum(
        amplitude * gaussian(noise.shape, 3.0, centre)
        for amplitude, centre in zip(
            rng.uniform(5, 50, 20), rng.uniform(0, 300, (20, 2)), strict=True
        )
    )
    sky[:20, :20] = 0
    left = blank_sky(sky)
    assert np.isnan(left[:20, :20]).all()
    assert 0.5 < np.isfinite(left).mean() < 0.95
    assert np.nanvar(left) == pytest.approx(1, abs=0.05)
    assert np.var(sky) > 1.5
    rho = autocovariance([left], 1)[1, 1:]
    truth = np.fft.ifft2(np.abs(np.fft.fft2(KERNEL, (32, 32))) ** 2).real
    assert rho[1] / rho[0] == pytest.approx(truth[0, 1], abs=0.03)


@pytest.mark.parametrize("width", [1.0, 1.6, 3.0])
def test_fwhm_of_a_gaussian(width):
    assert fwhm(gaussian((41, 40), width)) == pytest.approx(2.3548 * width, rel=0.03)
    assert fwhm(gaussian((41, 40), width, (5, 5))) is None


def test_images_among_what_is_none(tmp_path):
    """Names, spectra and empty arrays beside an image are passed over; a scale that is no number is refused."""
    path, image = tmp_path / "a.h5", gaussian((20, 30), 2.0)
    with h5py.File(path, "w") as file:
        file["image"], file["name"], file["pixel_scale_arcsec"] = image, "a star", 0.05
        file["nothing"] = h5py.Empty("f4")
    assert inspect(path).shape == image.shape
    np.testing.assert_allclose(read_cutout(path, noise=1.0, background=0.0).data[0], image)
    with h5py.File(path, "a") as file:
        del file["pixel_scale_arcsec"]
        file["pixel_scale_arcsec"] = [0.05, 0.06]
    with pytest.raises(ValueError, match="pixel_scale_arcsec has shape .2,., expected one number"):
        inspect(path)
    spectrum = fits.PrimaryHDU(np.ones(40))
    spectrum.header.update(CTYPE1="FREQ", CRVAL1=1e9, CDELT1=1e6, CRPIX1=1)
    spectrum.writeto(tmp_path / "a.fits")
    with pytest.raises(ValueError, match="has neither an image nor a table"):
        inspect(tmp_path / "a.fits")


def test_inspection_of_images(tmp_path, rng, image):
    text = str(inspect(image))
    assert "80 x 90" in text and "electron/s" in text and "0.05 arcsec" in text
    assert inspect(tmp_path / "psf.fits").kind == "image (FITS)"
    assert "FWHM 3.5" in str(inspect(tmp_path / "psf.fits"))
    write_catalogue(tmp_path, rng)
    assert inspect(tmp_path / "galaxies.fits").kind == "12 images (FITS)"
    catalogue = inspect(tmp_path / "catalogue.fits")
    assert catalogue.kind == "catalogue (FITS)" and catalogue.shape == (12,)
    assert "NOISE_VARIANCE" in str(catalogue)
    image.write_bytes(image.read_bytes()[:5000])
    with pytest.raises(ValueError, match="damaged or truncated FITS"):
        inspect(image)
    np.savez(tmp_path / "b.npz", words=np.array(["a"]))
    with pytest.raises(ValueError, match="holds words, and none of them is an image"):
        inspect(tmp_path / "b.npz")
