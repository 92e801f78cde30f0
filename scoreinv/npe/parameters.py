"""Scalar parameters with a prior, and the space in which they are learned.

Each parameter theta of the distribution function F goes to

    u  =  Phi^-1(F(theta)),        p(theta)  =  N(u; 0, 1) |du / dtheta|,

and is N(0, 1) a priori there. No u leaves the support of the prior on its way back, and densities are exact:

    log q(theta)  =  log q(u) - log N(u; 0, 1) + log p(theta).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.distributions import Distribution

from scoreinv.streams import stream

FARTHEST = 8.0  # |u|: 1e-15 of the prior lies beyond


class ParameterPrior:
    """Independent parameters, each with a one-dimensional distribution of `torch.distributions`.

    Args:
        parameters: Distributions by the names of the parameters, which must know `cdf` and `icdf`, as Uniform, Normal,
            LogNormal, Laplace, Cauchy and HalfNormal do.

    Attributes:
        names: In the order of the columns of theta.

    Raises:
        ValueError: A distribution that is not of one number, or does not know `icdf`.
    """

    def __init__(self, **parameters: Distribution) -> None:
        if not parameters:
            raise ValueError("a prior without parameters; expected one distribution or more")
        half = torch.tensor(0.5, dtype=torch.float64)
        for name, p in parameters.items():
            if tuple(p.batch_shape) + tuple(p.event_shape) not in ((), (1,)):
                shape = tuple(p.batch_shape) + tuple(p.event_shape)
                raise ValueError(f"{name} has shape {shape}, expected one number")
            try:
                p.cdf(p.icdf(half))
            except NotImplementedError:
                raise ValueError(
                    f"{name} is a {type(p).__name__}, which has no inverse distribution function and so no way to an "
                    "unconstrained space; take Uniform, Normal, LogNormal, Laplace, Cauchy, HalfNormal, or one of these "
                    "under a TransformedDistribution"
                ) from None
        self.names = tuple(parameters)
        self._each = list(parameters.values())

    def __len__(self) -> int:
        return len(self.names)

    def sample(self, n: int, seed: int) -> Tensor:
        """n draws, with shape (n, d), in float64."""
        u = torch.randn(n, len(self), generator=stream(seed), dtype=torch.float64)
        return self.from_normal(u)

    def log_prob(self, theta: Tensor) -> Tensor:
        """log p, with shape (B,), in float64, for theta with shape (B, d); -inf outside of the support."""
        self._check_width(theta)
        theta = theta.double()
        inside = self.inside(theta)
        each = [
            p.log_prob(torch.where(ok, t, p.icdf(torch.tensor(0.5).double())))
            for p, t, ok in zip(self._each, theta.unbind(1), inside.unbind(1), strict=True)
        ]
        total = torch.stack([e.double().reshape(len(theta)) for e in each], 1).sum(1)
        return torch.where(inside.all(1), total, -math.inf)

    def inside(self, theta: Tensor) -> Tensor:
        """Whether each number is one that the prior allows, with shape (B, d)."""
        return torch.stack(
            [
                p.support.check(t.double())
                for p, t in zip(self._each, theta.unbind(1), strict=True)
            ],
            1,
        )

    def to_normal(self, theta: Tensor) -> Tensor:
        """u, with shape (B, d), in float64.

        Raises:
            ValueError: Parameters outside of the prior, or not finite.
        """
        self._check_width(theta)
        inside = self.inside(theta) & theta.isfinite()
        if not bool(inside.all()):
            column = int((~inside).any(0).nonzero()[0])
            wrong = theta[~inside[:, column], column]
            raise ValueError(
                f"{self.names[column]} has {len(wrong)} of {len(theta)} values that its prior does not allow (first: "
                f"{float(wrong[0]):g}); expected those of {self._each[column]}"
            )
        low = 0.5 * math.erfc(FARTHEST / math.sqrt(2))
        share = [
            p.cdf(t.double()).reshape(-1) for p, t in zip(self._each, theta.unbind(1), strict=True)
        ]
        return torch.special.ndtri(torch.stack(share, 1).double().clamp(low, 1 - low))

    def from_normal(self, u: Tensor) -> Tensor:
        """theta, with shape (B, d), in float64."""
        share = torch.special.ndtr(u.double().clamp(-FARTHEST, FARTHEST))
        each = [p.icdf(s).reshape(-1) for p, s in zip(self._each, share.unbind(1), strict=True)]
        return torch.stack(each, 1).double()

    def _check_width(self, theta: Tensor) -> None:
        if theta.ndim != 2 or theta.shape[1] != len(self):
            raise ValueError(
                f"theta has shape {tuple(theta.shape)}, expected (n, {len(self)}): {', '.join(self.names)}"
            )
