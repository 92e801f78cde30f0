"""Which of the ways to condition suits a measurement."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from scoreinv.conditioning.base import Conditioner
from scoreinv.conditioning.commuting import CommutingConditioner
from scoreinv.conditioning.data_space import DataSpaceConditioner
from scoreinv.conditioning.iterative import IterativeConditioner
from scoreinv.gaussian import Covariance, Dense, joint
from scoreinv.likelihood import Likelihood

FEW_DATA = 512  # data-space factorisations up to this size; beyond, conjugate gradients are faster


def conditioner(
    likelihood: Likelihood,
    y: Tensor,
    C: Covariance,
    dtype: torch.dtype,
    tolerance: float = 0.05,
) -> Conditioner:
    """The cheapest exact conditioner for Gaussians whose covariance shares a basis with C.

    Args:
        likelihood: Linear and Gaussian.
        y: Data, with shape (*data).
        C: Covariance of the prior.
        dtype: Precision of the particles.
        tolerance: Error of the iterative solves, where those are needed, in standard deviations of the posterior.
    """
    operator, noise = likelihood.operator, likelihood.noise
    constant = float(noise.log_prob(torch.zeros_like(y)[None]))
    whitened = noise.whiten(y[None].to(torch.complex128 if operator.complex else torch.float64))
    misfit = -0.5 * float(whitened.abs().square().sum())
    information = likelihood.information(dtype)
    D = likelihood.projection(y)
    if (
        information.exact is not None
        and joint(lambda h, c: h + c, information.exact, C) is not None
    ):
        return CommutingConditioner(information.exact, information, D, constant + misfit, dtype)
    rows = math.prod(operator.data_shape) * (2 if operator.complex else 1)
    d = math.prod(operator.shape)
    if min(rows, d) <= FEW_DATA or information.nearby is None or isinstance(C, Dense):
        B = whitened_matrix(likelihood)
        flat = (torch.view_as_real(whitened) if operator.complex else whitened).reshape(-1)
        return DataSpaceConditioner(B, flat.double(), operator.shape, constant, dtype)
    return IterativeConditioner(information, D, C, constant + misfit, dtype, tolerance)


def whitened_matrix(likelihood: Likelihood) -> Tensor:
    """S^-1/2 A, with shape (m, d); real and imaginary parts are rows of their own."""
    operator, whiten = likelihood.operator, likelihood.noise.whiten
    d, parts = math.prod(operator.shape), (2,) if operator.complex else ()
    m = math.prod((*operator.data_shape, *parts))
    if m < d:
        unit = torch.eye(m, dtype=torch.float64).reshape(m, *operator.data_shape, *parts)
        unit = torch.view_as_complex(unit) if operator.complex else unit
        return operator.transpose(whiten(unit)).reshape(m, d)
    columns = whiten(
        operator.forward(torch.eye(d, dtype=torch.float64).reshape(d, *operator.shape))
    )
    columns = torch.view_as_real(columns) if operator.complex else columns
    return columns.reshape(d, m).T.contiguous()
