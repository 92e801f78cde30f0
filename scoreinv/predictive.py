"""What one observation itself says of a posterior, without a truth: predicted data beside those that were measured.

Posterior predictive: y_rep ~ p(y | x), x ~ p(x | y), and how often y_rep is less likely under x than y is. Data that were
used to find x look likelier than new ones would: a small p is an alarm, a large one no proof.
Gelman, Meng & Stern, Posterior Predictive Assessment of Model Fitness (1996).

Held-out data are new: left out of the posterior, predicted by its draws, they have normal scores of variance 1 if the
posterior and the noise are right.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from scoreinv.likelihood import Likelihood
from scoreinv.noise import GaussianNoise
from scoreinv.posterior import Posterior
from scoreinv.streams import stream


def predictive_p(posterior: Posterior, x: Tensor, seed: int) -> float:
    """How often data that the draws predict fit them worse than the data do.

    Args:
        posterior: Of the observation.
        x: Draws, with shape (n, C, H, W).
        seed: Of the predicted data.
    """
    true = posterior.likelihood
    fit = [true.log_prob(y, x) for y in (true.simulate(x, seed), posterior.y)]
    return float((1 + (fit[0] <= fit[1]).double().sum()) / (len(x) + 1))


def held_out(likelihood: Likelihood, share: float, seed: int) -> tuple[Likelihood, Tensor]:
    """The likelihood without a random share of the data, and a mask of these, with shape (*data).

    Data of infinite variance are masked already, and never among them.

    Args:
        likelihood: With independent Gaussian noise.
        share: Of the data that are left out, between 0 and 1.
        seed: Decides which.

    Raises:
        ValueError: Noise that is not Gaussian, or shared by several data; a share not between 0 and 1, or of no data.
    """
    precision = likelihood.noise.pixel_precision if likelihood.gaussian else None
    if precision is None:
        raise ValueError(
            f"{type(likelihood.noise).__name__} of this likelihood is not independent and Gaussian; data that share noise "
            "cannot be left out one by one"
        )
    if not 0 < share < 1:
        raise ValueError(f"share is {share}, expected a number between 0 and 1")
    shape = likelihood.operator.data_shape
    known = (precision > 0).expand(shape)
    # a stream of its own: data simulated with the same seed would be chosen by their noise
    mask = known & (torch.rand(shape, generator=stream(seed, -4)) < share)
    if not bool(mask.any()):
        raise ValueError(
            f"a share of {share:g} of {int(known.sum())} data is none, expected a larger one"
        )
    kept = (1 / precision).expand(shape).masked_fill(mask, torch.inf)
    return Likelihood(likelihood.operator, GaussianNoise(variance=kept)), mask


@dataclass(frozen=True)
class Predicted:
    """Held-out data beside their prediction.

    Attributes:
        z: Errors in units of what noise and posterior let expect; real and imaginary parts of complex data in turn.
        scatter: rms of z, 1 if all is right.
        error: Of that, if the z were independent.
    """

    z: Tensor
    scatter: float
    error: float


def predicted(likelihood: Likelihood, y: Tensor, x: Tensor, mask: Tensor) -> Predicted:
    """How draws of a posterior without them predict held-out data.

    Args:
        likelihood: Of all data, with independent Gaussian noise.
        y: All data, with shape (*data).
        x: Draws, with shape (n, C, H, W).
        mask: Which were left out, with shape (*data).
    """
    clean = likelihood.operator(x.double())[:, mask]
    expected = clean.mean(0)
    noise = (1 / likelihood.noise.pixel_precision).expand(mask.shape)[mask]
    parts = (lambda v: torch.view_as_real(v).unbind(-1)) if y.is_complex() else (lambda v: (v,))
    # the mean of n draws is itself uncertain
    inflated = 1 + 1 / len(x)
    z = torch.cat(
        [
            (seen - mean) / (noise + inflated * draws.var(0)).sqrt()
            for seen, mean, draws in zip(
                parts(y[mask]), parts(expected), parts(clean), strict=True
            )
        ]
    )
    scatter = float(z.square().mean()) ** 0.5
    return Predicted(z, scatter, scatter / (2 * len(z)) ** 0.5)
