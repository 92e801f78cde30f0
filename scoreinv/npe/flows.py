"""Densities of u given features: normalising flows and mixtures of zuko, and flows of a differential equation.

Papamakarios, Pavlakou & Murray, Masked Autoregressive Flow (2017, arXiv:1705.07057); Durkan et al., Neural Spline Flows
(2019, arXiv:1906.04032); Dinh, Krueger & Bengio, NICE (2014, arXiv:1410.8516), for couplings; Bishop, Mixture Density
Networks (1994).

A `Transport` carries noise z to u along a differential equation, and densities come from its divergence on the way. Either
from t = 0 to 1 (Lipman et al., Flow Matching for Generative Modeling, 2022, arXiv:2210.02747; of posteriors: Wildberger et
al., 2023, arXiv:2305.17161),

    du_t / dt = v(u_t, t),    u_t = t u + (1 - t) z,    v = E[u - z | u_t],

or down the noise levels of a denoiser D, scaled and trained as our priors of images are (Karras et al., 2022,
arXiv:2206.00364; of posteriors: Sharrock et al., Sequential Neural Score Estimation, 2022, arXiv:2210.04872),

    du_s / d ln s = u_s - D(u_s, s),    u_s = u + s z,

where sigma_data = 1, for a priori u is N(0, 1).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from scoreinv.npe.featurizers import MLP
from scoreinv.priors.network import preconditioning

EXPLICIT = ("maf", "nsf", "coupling", "mixture")
HIDDEN, TRANSFORMS = (64, 64), 5
KINDS = (*EXPLICIT, "matching", "score")
WAVES = 6  # of time that a velocity sees, and of ln sigma that a denoiser does
FINEST, COARSEST = 0.002, 80.0  # noise levels of a denoiser
PRECISE = 1e-5  # of the steps along the way, absolute and relative


def new_flow(
    kind: str,
    parameters: int,
    features: int,
    hidden: Sequence[int] = HIDDEN,
    transforms: int = TRANSFORMS,
) -> nn.Module:
    """q(u | features), a module whose call gives a distribution.

    Args:
        kind: maf, nsf, coupling, or mixture (of Gaussians); matching or score.
        parameters: Numbers u.
        features: Numbers that it is conditioned on.
        hidden: Widths of the networks; those of a velocity or denoiser are twice as wide, and one more.
        transforms: Layers of a flow; half the components of a mixture.

    Raises:
        ValueError: Another kind, sizes below 1, or a coupling of one parameter.
    """
    check_flow(kind, hidden, transforms)
    if kind == "coupling" and parameters < 2:
        raise ValueError("a coupling needs two parameters or more; take maf, nsf or mixture")
    from zuko import flows
    from zuko.nn import MaskedLinear

    hidden = tuple(hidden)
    if kind not in EXPLICIT:
        widths = tuple(2 * width for width in (*hidden, hidden[-1]))
        return (Matching if kind == "matching" else Score)(parameters, features, widths)
    sizes = {"features": parameters, "context": features, "hidden_features": hidden}
    if kind == "mixture":
        return flows.GMM(components=2 * transforms, **sizes)
    if kind == "maf":
        flow = flows.MAF(transforms=transforms, **sizes)
    else:
        passes = 2 if kind == "coupling" else None
        flow = flows.NSF(transforms=transforms, passes=passes, **sizes)
    for layer in flow.modules():
        if isinstance(layer, MaskedLinear):
            # multiplies weights at each step, and would be made of their type each time
            layer.mask = layer.mask.to(layer.weight.dtype)
    return flow


def check_flow(
    kind: str,
    hidden: Sequence[int] = HIDDEN,
    transforms: int = TRANSFORMS,
    kinds: Sequence[str] = KINDS,
) -> None:
    """Of what `new_flow` takes.

    Raises:
        ValueError: A kind that is none of `kinds`, or sizes below 1.
    """
    if kind not in kinds:
        raise ValueError(f"flow is {kind!r}, expected one of {', '.join(kinds)}")
    if not hidden or min(hidden) < 1 or transforms < 1:
        raise ValueError(
            f"hidden is {list(hidden)} and transforms {transforms}, expected one width or more, and all at least 1"
        )


class Transport(nn.Module, ABC):
    """A flow of a differential equation; its call on features gives a distribution of u.

    Args:
        parameters: Numbers u.
        features: Numbers that it is conditioned on.
        hidden: Widths of the network.
    """

    ends: tuple[float, float]  # of time, that of noise first
    spread: float  # standard deviation of the noise

    def __init__(self, parameters: int, features: int, hidden: tuple[int, ...]) -> None:
        super().__init__()
        self.network = MLP(parameters + features + 2 * WAVES, parameters, hidden)
        self.register_buffer("origin", torch.zeros(parameters))
        self.register_buffer("wave", math.pi * 2.0 ** (torch.arange(WAVES) - 1))

    @abstractmethod
    def loss(self, u: Tensor, features: Tensor) -> Tensor:
        """Of pairs, with shape (B,), at times and noise drawn of the global stream."""

    @abstractmethod
    def velocity(self, t: Tensor, u: Tensor, features: Tensor) -> Tensor:
        """Of u, with its shape, at time t, a number."""

    def forward(self, features: Tensor) -> torch.distributions.Distribution:
        from zuko.distributions import DiagNormal, NormalizingFlow
        from zuko.transforms import FreeFormJacobianTransform

        start, end = (self.origin.new_tensor(t) for t in self.ends)
        way = FreeFormJacobianTransform(
            lambda t, u: self.velocity(t, u, features.expand(*u.shape[:-1], -1)),
            t0=end,
            t1=start,
            phi=(features, *self.parameters()),
            atol=PRECISE,
            rtol=PRECISE,
        )
        noise = DiagNormal(self.origin, self.spread + self.origin)
        return NormalizingFlow(way, noise.expand(features.shape[:-1]))

    def _look(self, u: Tensor, at: Tensor, features: Tensor) -> Tensor:
        angles = at[..., None] * self.wave
        return self.network(
            torch.cat([u, angles.sin(), angles.cos(), features], -1).flatten(0, -2)
        ).reshape(u.shape)


class Matching(Transport):
    """Learns the velocity."""

    ends, spread = (0.0, 1.0), 1.0

    def loss(self, u: Tensor, features: Tensor) -> Tensor:
        t, z = torch.rand(len(u), 1, device=u.device), torch.randn_like(u)
        v = self._look(t * u + (1 - t) * z, t[:, 0], features)
        return (v - (u - z)).square().sum(1)

    def velocity(self, t: Tensor, u: Tensor, features: Tensor) -> Tensor:
        return self._look(u, t.expand(u.shape[:-1]), features)


class Score(Transport):
    """Learns a denoiser."""

    ends = (math.log(COARSEST), math.log(FINEST))
    spread = math.hypot(1.0, COARSEST)

    def loss(self, u: Tensor, features: Tensor) -> Tensor:
        high, low = self.ends
        # as many at each level in every batch
        share = (torch.randperm(len(u), device=u.device) + torch.rand(1, device=u.device)) / len(u)
        s = (low + (high - low) * share).exp()
        x = u + s[:, None] * torch.randn_like(u)
        out = self._scales(s)[1]
        return ((u - self._denoised(x, s, features)) / out).square().sum(1)

    def velocity(self, t: Tensor, u: Tensor, features: Tensor) -> Tensor:
        return u - self._denoised(u, t.exp().expand(u.shape[:-1]), features)

    def _denoised(self, x: Tensor, s: Tensor, features: Tensor) -> Tensor:
        skip, out, scale, noise = self._scales(s)
        return skip * x + out * self._look(scale * x, noise[..., 0], features)

    @staticmethod
    def _scales(s: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """c_skip, c_out and c_in, and ln sigma / 4, which the network sees, with shape (..., 1)."""
        return tuple(v.reshape(*s.shape, 1) for v in preconditioning(s.flatten(), 1.0))
