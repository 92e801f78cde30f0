"""Few data, or a small image: a factorisation in data space."""

from __future__ import annotations

import torch
from torch import Tensor

from scoreinv.conditioning.base import Conditioned, Conditioner, Mobility, cholesky
from scoreinv.gaussian import Covariance, Dense, Gaussian
from scoreinv.operators.information import white

LARGEST = 512  # pixels up to which covariances are worth an eigenbasis


class DataSpaceConditioner(Conditioner):
    """The whitened operator B = S^-1/2 A as a matrix, compressed to at most d rows."""

    def __init__(
        self, B: Tensor, y: Tensor, shape: tuple[int, ...], constant: float, dtype: torch.dtype
    ) -> None:
        self.shape, self.dtype, self.constant = shape, dtype, constant
        rest = 0.0
        if B.shape[0] > B.shape[1]:
            Q, B = torch.linalg.qr(B)
            rest, y = float(y @ y), Q.T @ y
            rest -= float(y @ y)
        self.B, self.y, self.rest = B, y, rest

    def given(self, K: Covariance, slack: float = 1.0) -> Conditioned:
        return _InDataSpace(self, K)

    def noise(self, n: int, generator: torch.Generator) -> Tensor:
        return white((len(self.y),), n, generator, torch.float64)

    def predict(self, x: Tensor) -> Tensor:
        """B x, with shape (B, m)."""
        return x.flatten(1).double() @ self.B.T

    def inform(self, x: Tensor) -> Tensor:
        return (self.predict(x) @ self.B).reshape(x.shape).to(x.dtype)

    def misfit(self, m: Tensor, noise: Tensor | None = None) -> Tensor:
        return (self.left(m, noise) @ self.B).reshape(m.shape).to(m.dtype)

    def left(self, m: Tensor, noise: Tensor | None = None) -> Tensor:
        """y - B m, with shape (B, m), the data perturbed by noise if given."""
        r = self.y - self.predict(m)
        return r if noise is None else r + noise

    def propagate(self, K: Covariance) -> Tensor:
        """B K, with shape (m, d)."""
        return K.apply(self.B.reshape(-1, *self.shape)).flatten(1)

    def log_evidence(self, prior: Gaussian) -> float:
        r = self.y - self.predict(prior.mean[None])[0]
        L = cholesky(self.propagate(prior.covariance) @ self.B.T)
        white_r = torch.linalg.solve_triangular(L, r[:, None], upper=False)
        return (
            self.constant
            - 0.5 * (self.rest + float(white_r.square().sum()))
            - float(L.diagonal().log().sum())
        )


class _InDataSpace(Conditioned):
    def __init__(self, parent: DataSpaceConditioner, K: Covariance) -> None:
        self.parent, self.K = parent, K
        self.L = cholesky(parent.propagate(K) @ parent.B.T)

    def shift(self, m: Tensor, noise: Tensor | None = None) -> Tensor:
        r = self.parent.left(m, noise)
        pull = torch.cholesky_solve(r.T, self.L).T @ self.parent.B
        return self.K.apply(pull.reshape(m.shape)).to(m.dtype)

    def respond(self, e: Tensor) -> Tensor:
        Ke = self.K.apply(e.double())
        seen = torch.cholesky_solve(self.parent.predict(Ke).T, self.L).T @ self.parent.B
        return (Ke - self.K.apply(seen.reshape(e.shape))).to(e.dtype)

    def covariance(self) -> Covariance | None:
        d = self.parent.B.shape[1]
        if d > LARGEST:
            return None
        eye = torch.eye(d, dtype=torch.float64).reshape(d, *self.parent.shape)
        C = self.respond(eye).flatten(1)
        return Dense(0.5 * (C + C.T))

    def log_growth(self) -> float:
        return 2 * float(self.L.diagonal().log().sum())

    def mobility(self, prior_precision: Covariance, slope: Covariance) -> Mobility:
        return _DataSpaceMobility(self, prior_precision.map(torch.reciprocal), slope)


class _DataSpaceMobility(Mobility):
    """M = R - R W B^T (L L^T + B W R W B^T)^-1 B W R with R = Q^-1, where P = B^T (L L^T)^-1 B."""

    def __init__(self, level: _InDataSpace, R: Covariance, slope: Covariance) -> None:
        self.parent, self.R, self.L = level.parent, R, level.L
        self.BW = self.parent.propagate(slope)
        self.BWR = R.apply(self.BW.reshape(-1, *self.parent.shape)).flatten(1)
        self.root = torch.linalg.cholesky(self.L @ self.L.T + self.BWR @ self.BW.T)

    def _remove(self, v: Tensor, seen: Tensor) -> Tensor:
        return v - (torch.cholesky_solve(seen.T, self.root).T @ self.BWR).reshape(v.shape).to(
            v.dtype
        )

    def apply(self, v: Tensor) -> Tensor:
        flat = v.flatten(1).double()
        return self._remove(self.R.apply(v), flat @ self.BWR.T)

    def draw(self, n: int, generator: torch.Generator) -> Tensor:
        x = self.R.sqrt(white(self.parent.shape, n, generator, self.parent.dtype))
        z = white((len(self.L),), n, generator, torch.float64)
        return self._remove(x, x.flatten(1).double() @ self.BW.T + z @ self.L.T)
