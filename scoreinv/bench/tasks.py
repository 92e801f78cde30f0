"""Simulators of a few parameters whose posteriors are known.

The problems are those of Lueckmann, Boelts, Greenberg, Goncalves & Macke, Benchmarking Simulation-Based Inference (2021,
arXiv:2101.04653), with the ten observations of each that they publish (github.com/sbi-benchmark/sbibm, commit 1a45fa7), and
references that are computed here: exact draws of the first three, and of slcp weighted ones. Of slcp they chose observations
whose posteriors are not extremely narrow. The sine in noise is the example of Zhang et al. (nbi, 2023, arXiv:2312.03824).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Uniform

from scoreinv.npe import ParameterPrior
from scoreinv.samplers.smc import systematic
from scoreinv.streams import stream

SHAPES = 2_000_000  # of the noise of slcp, which its reference weighs at a time
ROUNDS = 20  # of them, at most


@dataclass(frozen=True)
class Task:
    """A simulator whose posteriors are known.

    Attributes:
        prior: Of its parameters.
        simulate: x of theta, with shape (n, d), and a generator.
        reference: n draws of the posterior of one x, for a generator.
        log_likelihood: log p(x | theta) of one x for many theta; None where it has no closed form.
        flow: That suits it.
        sizes: Of the flow, where others than those of `NPE` suit it.
        decay: Of the weights of its fit.
    """

    prior: ParameterPrior
    simulate: Callable[[Tensor, torch.Generator], Tensor]
    reference: Callable[[Tensor, int, torch.Generator], Tensor]
    log_likelihood: Callable[[Tensor, Tensor], Tensor] | None = None
    flow: str = "nsf"
    sizes: Mapping[str, Any] = field(default_factory=dict)
    decay: float = 0.0


def box(d: int, half: float) -> ParameterPrior:
    """d parameters, uniform within half on both sides of zero."""
    ends = torch.tensor([-half, half], dtype=torch.float64)
    return ParameterPrior(**{f"theta{i + 1}": Uniform(*ends) for i in range(d)})


def normal(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def accepted(draw: Callable[[int], Tensor], inside: Callable[[Tensor], Tensor], n: int) -> Tensor:
    """n of the draws that are inside."""
    found: list[Tensor] = []
    while sum(map(len, found)) < n:
        some = draw(2 * n)
        found.append(some[inside(some)])
    return torch.cat(found)[:n]


def _two_moons() -> Task:
    prior, shift = box(2, 1.0), torch.tensor([0.25, 0.0], dtype=torch.float64)

    def crescent(n: int, generator: torch.Generator) -> Tensor:
        a = math.pi * (torch.rand(n, generator=generator, dtype=torch.float64) - 0.5)
        r = 0.1 + 0.01 * normal((n,), generator)
        return torch.stack([r * a.cos(), r * a.sin()], 1) + shift

    def shifted(theta: Tensor) -> Tensor:
        a, b = theta[:, 0] + theta[:, 1], theta[:, 1] - theta[:, 0]
        return torch.stack([-a.abs(), b], 1) / math.sqrt(2)

    def simulate(theta: Tensor, generator: torch.Generator) -> Tensor:
        return crescent(len(theta), generator) + shifted(theta)

    def reference(x: Tensor, n: int, generator: torch.Generator) -> Tensor:
        def draw(k: int) -> Tensor:
            q = math.sqrt(2) * (x - crescent(k, generator))
            sign = torch.randint(2, (k,), generator=generator).double() * 2 - 1
            a = torch.where(q[:, 0] <= 0, -sign * q[:, 0], math.nan)
            return torch.stack([0.5 * (a - q[:, 1]), 0.5 * (a + q[:, 1])], 1)

        return accepted(draw, lambda t: (t.abs() <= 1).all(1), n)

    def log_likelihood(x: Tensor, theta: Tensor) -> Tensor:
        at = x - shifted(theta) - shift
        r = at.norm(dim=1)
        log_p = -0.5 * ((r - 0.1) / 0.01).square() - math.log(0.01 * math.sqrt(math.tau))
        return torch.where(at[:, 0] > 0, log_p - (math.pi * r).log(), -math.inf)

    return Task(prior, simulate, reference, log_likelihood)


def _gaussian_linear_uniform() -> Task:
    prior, spread = box(10, 1.0), math.sqrt(0.1)

    def simulate(theta: Tensor, generator: torch.Generator) -> Tensor:
        return theta + spread * normal(theta.shape, generator)

    def reference(x: Tensor, n: int, generator: torch.Generator) -> Tensor:
        low, high = (torch.special.ndtr((end - x) / spread) for end in (-1.0, 1.0))
        share = low + (high - low) * torch.rand(n, 10, generator=generator, dtype=torch.float64)
        return (x + spread * torch.special.ndtri(share)).clamp(-1, 1)

    def log_likelihood(x: Tensor, theta: Tensor) -> Tensor:
        return -0.5 * ((x - theta) / spread).square().sum(1) - 5 * math.log(math.tau * 0.1)

    # ten parameters are learned by heart where a flow has the size that suits others
    small = {"hidden": (32, 32), "transforms": 2}
    return Task(prior, simulate, reference, log_likelihood, "coupling", small, decay=1.0)


def _gaussian_mixture() -> Task:
    prior, scales = box(2, 10.0), torch.tensor([1.0, 0.1], dtype=torch.float64)

    def scattered(middle: Tensor, n: int, generator: torch.Generator) -> Tensor:
        which = torch.randint(2, (n,), generator=generator)
        return middle + scales[which][:, None] * normal((n, 2), generator)

    def reference(x: Tensor, n: int, generator: torch.Generator) -> Tensor:
        return accepted(lambda k: scattered(x, k, generator), lambda t: (t.abs() <= 10).all(1), n)

    def log_likelihood(x: Tensor, theta: Tensor) -> Tensor:
        square = (x - theta).square().sum(1)
        each = [-0.5 * square / s**2 - 2 * math.log(s) for s in scales.tolist()]
        return torch.logsumexp(torch.stack(each), 0) - math.log(2 * math.tau)

    return Task(prior, lambda theta, g: scattered(theta, len(theta), g), reference, log_likelihood)


def _slcp() -> Task:
    prior = box(5, 3.0)

    def scales(theta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return theta[:, 2].square(), theta[:, 3].square(), theta[:, 4].tanh()

    def simulate(theta: Tensor, generator: torch.Generator) -> Tensor:
        s1, s2, rho = (v[:, None] for v in scales(theta))
        z = normal((len(theta), 4, 2), generator)
        first = theta[:, :1] + s1 * z[..., 0]
        second = theta[:, 1:2] + s2 * (rho * z[..., 0] + (1 - rho.square()).sqrt() * z[..., 1])
        return torch.stack([first, second], 2).flatten(1)

    def log_likelihood(x: Tensor, theta: Tensor) -> Tensor:
        s1, s2, rho = (v[:, None] for v in scales(theta))
        a = (x[0::2] - theta[:, :1]) / s1
        b = (x[1::2] - theta[:, 1:2]) / s2
        left = (1 - rho.square()).clamp_min(1e-12)
        square = (a.square() - 2 * rho * a * b + b.square()) / left
        return (-0.5 * square - (math.tau * s1 * s2 * left.sqrt()).log()).sum(1)

    def reference(x: Tensor, n: int, generator: torch.Generator) -> Tensor:
        # the noise has a covariance S of the inverse Wishart distribution with three degrees of freedom about the scatter of
        # the four points, and their centre is a Gaussian about their mean, but for the weights, and for the box
        points = x.reshape(4, 2)
        left = points - points.mean(0)
        root = torch.linalg.cholesky(torch.linalg.inv(left.T @ left))

        def weighted() -> tuple[Tensor, Tensor]:
            z = normal((SHAPES, 10), generator)
            T = torch.zeros(SHAPES, 2, 2, dtype=torch.float64)
            T[:, 0, 0], T[:, 1, 0], T[:, 1, 1] = (
                z[:, :3].norm(dim=1),
                z[:, 3],
                z[:, 4:6].norm(dim=1),
            )
            T = root @ T
            S = torch.linalg.inv(T @ T.mT)
            s1, s2 = S[:, 0, 0].sqrt(), S[:, 1, 1].sqrt()
            centre = points.mean(0) + 0.5 * (torch.linalg.cholesky(S) @ z[:, 6:8, None])[..., 0]
            signs = z[:, 8:].sign()
            rho = S[:, 0, 1] / s1 / s2
            shape = [signs[:, 0] * s1.sqrt(), signs[:, 1] * s2.sqrt(), rho.atanh()]
            theta = torch.cat([centre, torch.stack(shape, 1)], 1)
            inside = (theta.abs() <= 3).all(1)
            return theta[inside], (torch.det(S) / (s1 * s2)).sqrt()[inside]

        parts: list[tuple[Tensor, Tensor]] = []
        for _ in range(ROUNDS):  # where the box cuts off almost all, one will not do
            parts.append(weighted())
            theta, w = map(torch.cat, zip(*parts, strict=True))
            effective = float(w.sum().square() / w.square().sum()) if len(w) else 0.0
            if effective > n:
                return theta[systematic(w / w.sum(), n, generator)]
        raise FloatingPointError(
            f"the reference of slcp has {effective:.0f} effective draws, expected {n} or more"
        )

    return Task(prior, simulate, reference, log_likelihood)


TASKS: dict[str, Callable[[], Task]] = {
    "two_moons": _two_moons,
    "gaussian_linear_uniform": _gaussian_linear_uniform,
    "gaussian_mixture": _gaussian_mixture,
    "slcp": _slcp,
}


def published(name: str) -> Tensor:
    """The observations of one of `TASKS`, with shape (10, m)."""
    kept = json.loads(Path(__file__).with_name("observations.json").read_text())
    return torch.tensor(kept[name], dtype=torch.float64)


def curve(theta: Tensor) -> Tensor:
    """Sines without noise, with shape (n, 50)."""
    t = torch.linspace(0, 1, 50, dtype=torch.float64)
    return theta[:, :1].exp() * (theta[:, 2:] * t + theta[:, 1:2]).sin()


def sine(seed: int) -> tuple[ParameterPrior, Tensor]:
    """The prior of amplitude, phase and frequency, and a sine in noise of variance 1."""
    prior = ParameterPrior(
        log_amplitude=Uniform(0.0, math.log(10.0)),
        phase=Uniform(0.0, math.tau),
        frequency=Uniform(math.tau, 10 * math.tau),
    )
    return prior, (curve(prior.sample(1, seed)) + normal((1, 50), stream(seed, 1)))[0]
