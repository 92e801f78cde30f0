"""Numbers of an image, by two ways that must agree.

Draws of the posterior of an image (`scoreinv.sample`) give draws of any number of it. An estimator gives them at once, from
pairs of such numbers and data that the same likelihood made of images like those of the prior. Data enter as
A^T S^-1 y, which is all that they say of an image, as an image.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributions import LogNormal, Uniform

from scoreinv.likelihood import Likelihood
from scoreinv.npe.parameters import ParameterPrior

SPREAD = 2.0  # of ln flux
ISOPHOTE = 0.01  # of the peak


def geometry(images: Tensor) -> Tensor:
    """Total flux, radius and two ellipticities, with shape (B, 4), in float64, of images with shape (B, C, H, W).

    With Q the second moments about its centroid of what is brighter than `ISOPHOTE`, the radius [pixel] is
    ((Q_xx + Q_yy) / 2)^1/2, and the ellipticities are (Q_xx - Q_yy) / (Q_xx + Q_yy) and 2 Q_xy / (Q_xx + Q_yy), of which an
    inclined disc of small thickness has the length (1 - cos^2 i) / (1 + cos^2 i) at twice the angle of its major axis.
    Without it the grain that draws have on blank sky, far from the centroid, would make all galaxies large and round.
    """
    light = images.double().sum(1)
    bright = light > ISOPHOTE * light.amax((1, 2), keepdim=True)
    positive = torch.where(bright, light, 0.0).clamp_min(0)
    H, W = light.shape[1:]
    y, x = torch.arange(H).double()[:, None], torch.arange(W).double()
    total = positive.sum((1, 2)).clamp_min(torch.finfo(torch.float64).tiny)
    mean = lambda v: (positive * v).sum((1, 2)) / total
    dx, dy = x - mean(x)[:, None, None], y - mean(y)[:, None, None]
    xx, yy, xy = mean(dx**2), mean(dy**2), mean(dx * dy)
    both = (xx + yy).clamp_min(torch.finfo(torch.float64).tiny)
    return torch.stack([light.sum((1, 2)), (both / 2).sqrt(), (xx - yy) / both, 2 * xy / both], 1)


def geometry_prior(images: Tensor) -> ParameterPrior:
    """A space for the geometry of such images: wide, for what is learned is their own distribution in it."""
    H, W = images.shape[-2:]
    flux = float(geometry(images)[:, 0].clamp_min(1e-300).log().mean())
    return ParameterPrior(
        flux=LogNormal(flux, SPREAD),
        radius=Uniform(0.0, float(max(H, W))),
        ellipticity_1=Uniform(-1.0, 1.0),
        ellipticity_2=Uniform(-1.0, 1.0),
    )


def image_pairs(images: Tensor, likelihood: Likelihood, seed: int) -> tuple[Tensor, Tensor]:
    """Geometry of images, with shape (n, 4), and their data as images, with shape (n, C, H, W); linear and Gaussian only."""
    y = likelihood.simulate(images, seed)
    return geometry(images), torch.stack([likelihood.projection(v) for v in y])
