"""Scalar parameters with a prior, and the space in which they are learned.

Each parameter theta of the distribution function F goes to

    u  =  Phi^-1(F(theta)),        p(theta)  =  N(u; 0, 1) |du / dtheta|,

and is N(0, 1) a priori there. No u leaves the support of the prior on its way back, and densities are exact:

    log q(theta)  =  log q(u) - log N(u; 0, 1) + log p(theta).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.distributions import Distribution, TransformedDistribution

from scoreinv.streams import stream
from scoreinv.tensors import as_tensor

FARTHEST = 8.0  # |u|: 1e-15 of the prior lies beyond
KNOWN_BY = (0.01, 0.25, 0.5, 0.75, 0.99)  # quantiles that tell one prior from another


class ParameterPrior:
    """Independent parameters, each with a one-dimensional distribution of `torch.distributions`.

    Args:
        parameters: Distributions by the names of the parameters, which must know `cdf` and `icdf`, as Uniform, Normal,
            LogNormal, Laplace, Cauchy and HalfNormal do, and Uniform under an ExpTransform (log-uniform). Their numbers are
            taken in float64, as they were written.

    Attributes:
        names: In the order of the columns of theta.

    Raises:
        ValueError: A distribution that is not of one number, or does not know `icdf`.
    """

    def __init__(self, **parameters: Distribution) -> None:
        if not parameters:
            raise ValueError("a prior without parameters; expected one distribution or more")
        for name, p in parameters.items():
            shape = tuple(p.batch_shape) + tuple(p.event_shape)
            if shape not in ((), (1,)):
                raise ValueError(f"{name} has shape {shape}, expected one number")
        self.names = tuple(parameters)
        self._each = [_double(p) for p in parameters.values()]
        ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
        for name, p in zip(self.names, self._each, strict=True):
            try:
                p.cdf(p.icdf(0.5 * ends[1:]))
            except NotImplementedError:
                raise ValueError(
                    f"{name} is a {type(p).__name__}, which has no inverse distribution function and so no way to an "
                    "unconstrained space; take Uniform, Normal, LogNormal, Laplace, Cauchy, HalfNormal, or one of these "
                    "under a TransformedDistribution"
                ) from None
        low, high = torch.stack([p.icdf(ends).reshape(2) for p in self._each], 1).sort(0).values
        self.low, self.high = low, high
        middle = [p.icdf(0.5 * ends[1:]).reshape(()) for p in self._each]
        self._first, self._last = (
            torch.stack([_inwards(*v) for v in zip(self._each, end, middle, strict=True)])
            for end in (low, high)
        )

    def __len__(self) -> int:
        return len(self.names)

    @property
    def card(self) -> dict[str, list]:
        """What tells one prior from another: names in their order, and quantiles."""
        at = torch.tensor(KNOWN_BY, dtype=torch.float64)
        quantiles = [[float(f"{v:.6g}") for v in p.icdf(at).flatten()] for p in self._each]
        return {"names": list(self.names), "quantiles": quantiles}

    def only(self, names: Sequence[str]) -> ParameterPrior:
        """The prior of some of the parameters, in this order."""
        return ParameterPrior(**{name: self._each[self.names.index(name)] for name in names})

    def sample(self, n: int, seed: int) -> Tensor:
        """n draws, with shape (n, d), in float64."""
        u = torch.randn(n, len(self), generator=stream(seed), dtype=torch.float64)
        return self.from_normal(u)

    def log_prob(self, theta: Tensor) -> Tensor:
        """log p, with shape (B,), in float64, for theta with shape (B, d); -inf outside of the support.

        Raises:
            ValueError: Another shape, or nan.
        """
        self._check_width(theta)
        if wrong := int(theta.isnan().any(1).sum()):
            raise ValueError(
                f"{wrong} of {len(theta)} parameters are nan, which no density is of; find out why first"
            )
        columns = self._within(theta.double()).unbind(1)
        each = [
            p.log_prob(t).reshape(len(theta)) for p, t in zip(self._each, columns, strict=True)
        ]
        inside = self.inside(theta) & theta.isfinite()
        return torch.where(inside.all(1), torch.stack(each, 1).sum(1), -math.inf)

    def inside(self, theta: Tensor) -> Tensor:
        """Whether each number is one that the prior allows, up to its rounding, with shape (B, d)."""
        finest = 4 * torch.finfo(theta.dtype).eps if theta.dtype.is_floating_point else 0.0
        slack = lambda end: (finest * end.abs()).nan_to_num(0.0, 0.0)
        low, high = self.low - slack(self.low), self.high + slack(self.high)
        return (theta.double() >= low) & (theta.double() <= high)

    def to_normal(self, theta: Tensor) -> Tensor:
        """u, with shape (B, d), in float64.

        Raises:
            ValueError: Parameters outside of the prior, or not finite.
        """
        self._check_width(theta)
        allowed = self.inside(theta) & theta.isfinite()
        if not bool(allowed.all()):
            i = int((~allowed).any(0).nonzero()[0])
            wrong = theta[~allowed[:, i], i]
            raise ValueError(
                f"{self.names[i]} has {len(wrong)} of {len(theta)} values that its prior does not allow (first: "
                f"{float(wrong[0]):g}); expected {float(self.low[i]):g} to {float(self.high[i]):g}"
            )
        low = 0.5 * math.erfc(FARTHEST / math.sqrt(2))
        columns = self._within(theta.double()).unbind(1)
        share = [p.cdf(t).reshape(-1) for p, t in zip(self._each, columns, strict=True)]
        return torch.special.ndtri(torch.stack(share, 1).clamp(low, 1 - low))

    def from_normal(self, u: Tensor) -> Tensor:
        """theta, with shape (B, d), in float64."""
        share = torch.special.ndtr(u.double().clamp(-FARTHEST, FARTHEST))
        each = [p.icdf(s).reshape(-1) for p, s in zip(self._each, share.unbind(1), strict=True)]
        return self._within(torch.stack(each, 1))

    def _within(self, theta: Tensor) -> Tensor:
        """Just inside of the ends, where densities are not zero, whatever rounding does to the ends."""
        return torch.maximum(torch.minimum(theta, self._last), self._first)

    def _check_width(self, theta: Tensor) -> None:
        if theta.ndim != 2 or theta.shape[1] != len(self):
            raise ValueError(
                f"theta has shape {tuple(theta.shape)}, expected (n, {len(self)}): {', '.join(self.names)}"
            )


def _inwards(p: Distribution, end: Tensor, middle: Tensor) -> Tensor:
    """The number next to an end, or further in, by steps that double, whose density is neither zero nor infinite."""
    near = at = torch.nextafter(end, middle)
    step = near - end
    while step.abs() < (at - middle).abs() and not p.log_prob(at).isfinite().all():
        at, step = near + step, 2 * step
    return at


def _double(p: Distribution) -> Distribution:
    """The same distribution in float64; numbers of single precision as their shortest decimal, 0.7 and not 0.699999988."""
    if isinstance(p, TransformedDistribution) and not p.arg_constraints:
        return TransformedDistribution(_double(p.base_dist), p.transforms, validate_args=False)
    numbers = {name: _decimal(getattr(p, name)) for name in p.arg_constraints}
    return type(p)(**numbers, validate_args=False)


def _decimal(v: Tensor) -> Tensor:
    v = as_tensor(v).detach()
    if v.dtype != torch.float32:
        return v.double()
    shortest = [float(str(np.float32(x))) for x in v.flatten().tolist()]
    return torch.tensor(shortest, dtype=torch.float64).reshape(v.shape)
