"""Paths of a control as a sampler: particles that are steered to the data, and weighted."""

from __future__ import annotations

import math
from collections.abc import Generator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from scoreinv.posterior import Posterior
from scoreinv.samplers.path import Descent, Island, Request
from scoreinv.samplers.smc import systematic

if TYPE_CHECKING:
    from scoreinv.finetune.amortised import Amortised


@dataclass(frozen=True)
class Steered:
    """Paths of a control, weighted: a sampler like the others.

    With `resample` particles count on the way down by what they promise (`scoreinv.finetune.twist`), and those that will not
    do are replaced by copies of others. Draws and evidence are exact in the limit of many whatever is promised; a promise
    that does not suit the data spoils them for any number in use: log Z of galaxies behind a PSF scatters by twice as much
    with it, and that of a galaxy unlike the prior's is 12 nat too low.

    Args:
        amortised: The control.
        resample: Effective sample size over n below which particles are resampled on the way; 0: never.
        particles: For each draw.
        effective: Share of the draws that particles must be worth; for data for which they are not, more are drawn, up to 16
            of a draw, and if that does not do the result says so.

    Raises:
        ValueError: Numbers out of range.
    """

    amortised: Amortised
    resample: float = 0.0
    particles: int = 1
    effective: float = 0.5

    label: ClassVar[str] = "paths of a learned control, weighted"

    def __post_init__(self) -> None:
        if not 0 <= self.resample <= 1 or self.particles < 1 or not self.effective >= 0:
            raise ValueError(
                f"resample is {self.resample}, particles {self.particles} and effective {self.effective}; "
                "expected a share between 0 and 1, at least one particle for each draw, and none below 0"
            )

    def refuses(self, posterior: Posterior) -> str:
        """Why this posterior is not for it; empty if it is."""
        prior = self.amortised.chain.prior
        if posterior.prior is not prior:
            return (
                f"the control was trained on {prior.identity}, not on {posterior.prior.identity}"
            )
        return ""

    def noise_levels(self, posterior: Posterior) -> list[float]:
        """Of the chain."""
        return self.amortised.chain.levels

    def island(self, posterior: Posterior, n: int, generator: torch.Generator) -> Island:
        """n particles at the start, with their stream."""
        return Walk(posterior, self, n, generator)


class Walk(Island):
    """Particles on paths of a control."""

    def __init__(
        self, posterior: Posterior, sampler: Steered, n: int, generator: torch.Generator
    ) -> None:
        super().__init__(posterior, sampler.amortised.chain.levels, n, generator)
        self.chain, self.control = sampler.amortised.chain, sampler.amortised.control
        self.y = posterior.y.expand(n, *posterior.y.shape)
        self.twist, self.least = sampler.amortised.twist, sampler.resample * n

    def _begin(self) -> Descent:
        start = self.chain.start(self.n, self.y)
        z = start.drawn(0.0, self.generator)
        self.x = start.taken(z)
        self.log_w = start.log_ratio(self.x, z)
        self.promise = torch.zeros(self.n, dtype=torch.float64)
        yield from ()

    def _step(self, i: int) -> Generator[Request, Any, int]:
        error = None
        if self.chain.prior.knows_error:
            denoised, error = yield from self._denoise_with_error(self.x, self.levels[i])
        else:
            denoised = yield from self._denoise(self.x, self.levels[i])
        k = torch.full((self.n,), i)
        if self.least > 0 and self.twist.knows:
            chosen = self._resampled(denoised, i)
            denoised = denoised[chosen]
            error = None if error is None else error[chosen]
        step = self.chain.around(self.x, denoised, k, self.y, error)
        g = self.control.guide(self.x, step, k, self.y)
        u = self.control(self.x, denoised, g, k, self.y)
        z = step.drawn(u, self.generator)
        self.x = step.taken(z)
        self.log_w += step.log_ratio(self.x, z) - step.log_density(u, z)
        return i + 1

    def _resampled(self, denoised: Tensor, i: int) -> Tensor:
        """Weigh the particles by what they promise, and resample them if few count; returns which go on."""
        promise = self.twist.promise(self.x, denoised, i, self.y)
        self.log_w += promise - self.promise
        self.promise = promise
        w = torch.softmax(self.log_w, 0)
        effective = float(1 / w.square().sum())
        self._lowest.append(effective / self.n)
        if effective >= self.least:
            return torch.arange(self.n)
        chosen = systematic(w, self.n, self.generator)
        self.x, self.promise = self.x[chosen], self.promise[chosen]
        self.log_w = torch.logsumexp(self.log_w, 0).sub(math.log(self.n)).expand(self.n).clone()
        return chosen

    def _end(self) -> Descent:
        yield from self._step(len(self.levels) - 1)
        reward = self.posterior.likelihood.log_prob(self.posterior.y, self.x)
        log_w = self.log_w + reward - self.promise - self.posterior.gaussian_log_evidence
        self.trace.log_weights = log_w.tolist()
        self.trace.log_evidence = float(torch.logsumexp(log_w, 0)) - math.log(self.n)
