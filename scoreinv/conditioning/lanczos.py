"""Determinants of operators that are known by what they do to a vector.

Lanczos quadrature: Ubaru, Chen & Saad, Fast Estimation of tr(f(A)) via Stochastic Lanczos Quadrature (2017).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from scoreinv.gaussian import dot


def lanczos_logdet(
    operator: Callable[[Tensor], Tensor],
    shape: tuple[int, ...],
    error: float = 0.5,
    most: int = 64,
) -> tuple[float, float]:
    """log det of a symmetric positive definite operator by Lanczos quadrature, and its standard error [nat].

    Args:
        operator: Acts on (B, *shape).
        shape: Shape of one image.
        error: Standard error at which no more probes are drawn [nat].
        most: Batches of 16 probes at most.
    """
    generator, values = torch.Generator().manual_seed(0), torch.zeros(0, dtype=torch.float64)
    for _ in range(most):
        z = 2.0 * torch.randint(0, 2, (16, *shape), generator=generator).double() - 1
        values = torch.cat([values, lanczos(operator, z)])
        reached = float(values.std()) / len(values) ** 0.5
        if reached < error:
            break
    return float(values.mean()), reached


def lanczos(
    operator: Callable[[Tensor], Tensor], z: Tensor, steps: int = 40, tolerance: float = 1e-3
) -> Tensor:
    """z^T log(operator) z for each probe z, with shape (B,).

    Args:
        operator: Symmetric positive definite, acts on (B, *shape).
        z: Probes, with shape (B, *shape).
        steps: At most so many nodes of the quadrature.
        tolerance: Stops when another node changes the mean by less.
    """
    norm, column = dot(z, z), lambda c: c.reshape(-1, *[1] * (z.ndim - 1))
    q, previous, beta = z / column(norm.sqrt()), torch.zeros_like(z), torch.zeros_like(norm)
    alphas, betas, basis, result = [], [], [q], torch.full_like(norm, math.inf)
    for _ in range(steps):
        w = operator(q) - column(beta) * previous
        alpha = dot(w, q)
        w = w - column(alpha) * q
        for p in basis:  # full reorthogonalisation: rounding would repeat eigenvalues
            w = w - column(dot(w, p)) * p
        alphas.append(alpha)
        result, before = norm * _quadrature(alphas, betas), result
        beta = dot(w, w).sqrt()
        if float((result - before).mean().abs()) < tolerance or float(beta.max()) < 1e-12:
            break
        betas.append(beta)
        previous, q = q, w / column(beta.clamp_min(1e-30))
        basis.append(q)
    return result


@dataclass(frozen=True)
class Quadrature:
    """z^T f(operator) z = sum_j weights_j f(values_j) for any f, for each of some z.

    Attributes:
        values: Nodes, with shape (B, steps).
        weights: With shape (B, steps).
    """

    values: Tensor
    weights: Tensor

    def form(self, f: Callable[[Tensor], Tensor]) -> Tensor:
        """z^T f(operator) z, with shape (B,)."""
        return (self.weights * f(self.values)).sum(1)


def quadrature(
    operator: Callable[[Tensor], Tensor],
    z: Tensor,
    f: Callable[[Tensor], Tensor],
    tolerance: float,
    most: int = 800,
) -> Quadrature:
    """Nodes and weights by Lanczos iterations until z^T f(operator) z is known.

    Rounding repeats eigenvalues, which shares out their weights and does no harm. Golub & Meurant, Matrices, Moments and
    Quadrature (2010), chapters 4 and 6.

    Args:
        operator: Symmetric positive semi-definite, acts on (B, *shape).
        z: With shape (B, *shape).
        f: A function that is no easier than those to come.
        tolerance: Stops when a fifth more nodes change no form by more.
        most: Nodes.
    """
    norm, column = dot(z, z), lambda c: c.reshape(-1, *[1] * (z.ndim - 1))
    tiny = torch.finfo(torch.float64).tiny
    q, previous, beta = z / column(norm.sqrt().clamp_min(tiny)), torch.zeros_like(z), 0 * norm
    alphas, betas, found, check = [], [], torch.full_like(norm, math.inf), 25
    for done in range(1, most + 1):
        w = operator(q) - column(beta) * previous
        alpha = dot(w, q)
        w = w - column(alpha) * q
        alphas.append(alpha)
        beta = dot(w, w).sqrt()
        if done == check or done == most:
            check = math.ceil(1.2 * check)
            values, vectors = torch.linalg.eigh(_tridiagonal(alphas, betas))
            result = Quadrature(values.clamp_min(0), norm[:, None] * vectors[:, 0].square())
            now, before = result.form(f), found
            if bool(((now - before).abs() < tolerance).all()):
                return result
            found = now
        betas.append(beta)
        previous, q = q, w / column(beta.clamp_min(1e-30))
    return result


def _tridiagonal(alphas: list[Tensor], betas: list[Tensor]) -> Tensor:
    """The matrices of these diagonals, with shape (B, steps, steps)."""
    T = torch.diag_embed(torch.stack(alphas, 1))
    if betas:
        off = torch.stack(betas, 1)
        T = T + torch.diag_embed(off, 1) + torch.diag_embed(off, -1)
    return T


def _quadrature(alphas: list[Tensor], betas: list[Tensor]) -> Tensor:
    """e_1^T log(T) e_1 for tridiagonal matrices T, with shape (B,)."""
    values, vectors = torch.linalg.eigh(_tridiagonal(alphas, betas))
    return (vectors[:, 0].square() * values.clamp_min(1e-300).log()).sum(1)
