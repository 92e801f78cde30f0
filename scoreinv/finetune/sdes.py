"""Samplers as controls of a prior's chain, so that all are compared in nats.

A sampler whose steps are those of the chain with another estimate m of x_0, in the place of the denoised image D, moves
their mean by (1 - a) (m - D), a = (s / sigma)^2. With the step's covariance V that is the control

    u  =  V^-1/2 (1 - a) (m - D),

so its paths have weights, and its ELBO and its upper bound say how far it is from the posterior, whatever its draws look
like. All walk the same chain, with its levels and its noise; the estimates are those of

    Guided    m = D + (K^-1 + H)^-1 A^T S^-1 (y - A D),  K the error that the prior knows around x, or C_sigma
    PiGDM     m = D + sigma^2 J^T A^T (S + r^2 A A^T)^-1 (y - A D),  r^2 = sigma^2 v / (sigma^2 + v)
    DPS       a step of zeta J^T A^T e / |e|,  e = y - A D,

J the Jacobian of D; sources in `scoreinv.samplers.guided` and `scoreinv.samplers.baselines`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from scoreinv.finetune.chain import PriorChain, measured_chain, solver
from scoreinv.finetune.control import Control, Guide, guidance
from scoreinv.finetune.evidence import Evidence, simulated_bounds
from scoreinv.finetune.paths import Engine
from scoreinv.finetune.reference import Step
from scoreinv.gaussian import Scalar
from scoreinv.likelihood import Likelihood
from scoreinv.priors.base import Prior
from scoreinv.samplers.baselines import DPS, PiGDM
from scoreinv.samplers.guided import Guided

PROBES = 256  # draws of the prior that measure how sure it is at each level
Shift = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


class SamplerControl(Control):
    """A control that learns nothing: it moves the means of the chain's steps as a sampler would.

    What else the sampler does, such as the noise that local steps add anew, their wider draws and skewed errors, is not part
    of it: they are compared by their estimate m alone.

    Args:
        chain: That is moved.
        likelihood: Linear, with Gaussian noise.
        sampler: `Guided`, `PiGDM` or `DPS`; how many levels it has is the chain's business.

    Raises:
        ValueError: Another sampler, whose steps are not Gaussian ones of this kind, or another likelihood.
    """

    def __init__(
        self, chain: PriorChain, likelihood: Likelihood, sampler: Guided | PiGDM | DPS
    ) -> None:
        super().__init__(chain)
        if not isinstance(sampler, Guided) and type(sampler) not in SHIFTS:
            known = ", ".join(kind.__name__ for kind in (Guided, *SHIFTS))
            raise ValueError(
                f"the steps of {type(sampler).__name__} have no density relative to the chain's; expected one of {known}"
            )
        if not likelihood.gaussian:
            raise ValueError(
                f"{type(likelihood.operator).__name__} with {type(likelihood.noise).__name__}: "
                "samplers are compared on linear data with Gaussian noise"
            )
        self._guide: Guide | None = None
        self._shift: Shift | None = None
        if isinstance(sampler, Guided):
            self._guide = guidance(chain, likelihood, sampler.local)
        else:
            self._shift = SHIFTS[type(sampler)](chain, likelihood, sampler)

    def guide(self, x: Tensor, step: Step, k: Tensor, y: Tensor | None) -> Tensor:
        if self._guide is not None:
            return self._guide(step, k, y)
        return step.leant(self._shift(x, step.denoised, k, y))

    def forward(
        self, x: Tensor, denoised: Tensor, g: Tensor | None, k: Tensor, y: Tensor | None
    ) -> Tensor:
        return g


def sampler_bounds(
    sampler: Guided | PiGDM | DPS,
    prior: Prior,
    likelihood: Likelihood,
    *,
    seed: int,
    steps: int = 50,
    sims: int = 8,
    paths: int = 64,
) -> list[Evidence]:
    """Evidence reports of a sampler for simulated data, as `Amortised.bounds` has them for a trained control.

    Args:
        sampler: `Guided`, `PiGDM` or `DPS`; its levels are the chain's.
        prior: Whose chain is walked.
        likelihood: Linear, with Gaussian noise.
        seed: Decides all; the same data for every sampler.
        steps: Of the chain.
        sims: Data sets.
        paths: For each.
    """
    chain = measured_chain(prior, steps, prior.sample(PROBES, seed), seed)
    reward = lambda x, y: likelihood.log_prob(y, x)
    engine = Engine(chain, SamplerControl(chain, likelihood, sampler), reward)
    return simulated_bounds(engine, likelihood.simulate, sims, paths, seed)


def _pigdm(chain: PriorChain, likelihood: Likelihood, sampler: PiGDM) -> Shift:
    C = chain.prior.moments.covariance
    v = float(C.eigenvalues(chain.shape).mean())
    variances = [s**2 * v / (s**2 + v) for s in chain.levels]
    conditioner = solver(likelihood, C, chain.dtype)
    given = [conditioner.given(Scalar(r2)) for r2 in variances]

    def shift(x: Tensor, denoised: Tensor, k: Tensor, y: Tensor) -> Tensor:
        e, pull = likelihood.log_slope(y, denoised), torch.empty_like(denoised)
        for i in k.unique().tolist():
            pull[k == i] = given[i].respond(e[k == i]) / variances[i]
        sigma, s = chain.sigma(k), chain.sigma(k + 1)
        return _scaled(sigma**2 - s**2, _transposed(chain, x, k, pull))

    return shift


def _dps(chain: PriorChain, likelihood: Likelihood, sampler: DPS) -> Shift:
    A = likelihood.operator

    def shift(x: Tensor, denoised: Tensor, k: Tensor, y: Tensor) -> Tensor:
        e = y - A(denoised.double())
        length = e.abs().square().flatten(1).sum(1).sqrt().clamp_min(1e-300)
        pull = A.transpose(e / length.reshape(-1, *[1] * (e.ndim - 1))).to(x.dtype)
        return sampler.zeta * _transposed(chain, x, k, pull)

    return shift


SHIFTS: dict[type, Callable[..., Shift]] = {PiGDM: _pigdm, DPS: _dps}


def _transposed(chain: PriorChain, x: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """J^T v, with shape (B, *shape), for the Jacobian J of the denoiser at x."""
    with torch.enable_grad():
        x = x.detach().requires_grad_(True)
        denoised = chain.prior.denoise(x, chain.sigma(k).to(x.dtype))
        return torch.autograd.grad(denoised, x, v.to(denoised.dtype))[0]


def _scaled(c: Tensor, x: Tensor) -> Tensor:
    return c.to(x.dtype).reshape(-1, *[1] * (x.ndim - 1)) * x
