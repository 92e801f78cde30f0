"""Measurement operators, from the sky to noiseless data."""

from scoreinv.operators.amplitude import Amplitude
from scoreinv.operators.base import LinearOperator
from scoreinv.operators.convolution import PSFConvolution, gaussian_psf
from scoreinv.operators.fourier import NUFFT
from scoreinv.operators.generated import Generated
from scoreinv.operators.pixels import DenseOperator, Identity, Mask

__all__ = [
    "Amplitude",
    "DenseOperator",
    "Generated",
    "Identity",
    "LinearOperator",
    "Mask",
    "NUFFT",
    "PSFConvolution",
    "gaussian_psf",
]
