"""Measurements as they come from a telescope, and where they lie on the sky.

The conventions of the whole package are stated here, once.

Fourier sign: V = sum_j x_j exp(-2 pi i (u l_j + v m_j)), with l towards East and m towards North
[rad], and u, v towards East and North [lambda]. Files that use the other sign are turned by their
reader, never later.

Axes: images have axes (C, H, W); rows increase to the North, columns increase to the West. Drawn
with `origin="lower"` north is up and east is left; this is the order of FITS. Pixel (i, j) of an
(H, W) image lies at m = (i - H // 2) * pixel_scale, l = -(j - W // 2) * pixel_scale. A cutout of
an optical image keeps the orientation of its file, and its WCS says where North is.

Weights: the inverse variance of EACH of the real and the imaginary part [Jy^-2]. Each visibility
is counted once: no Hermitian copies.

Units: the image is surface brightness per pixel, [Jy/pixel] for visibilities and the unit of the
data for a cutout. Baselines are in wavelengths [lambda], angles in [arcsec] unless stated.

Units and WCS stop in this package: operators see arrays, a pixel scale and nothing else.

astropy, h5py and scipy are imported by the functions that need them, so that `import scoreinv`
stays fast.
"""

from scoreinv.data.cutout import Cutout, noise_spectrum
from scoreinv.data.grid import Grid
from scoreinv.data.inspect import inspect
from scoreinv.data.readers import read_cutout, read_visibilities
from scoreinv.data.visibilities import Visibilities

__all__ = [
    "Cutout",
    "Grid",
    "Visibilities",
    "inspect",
    "noise_spectrum",
    "read_cutout",
    "read_visibilities",
]
