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
from scoreinv.samplers.smc import in_order, systematic

if TYPE_CHECKING:
    from scoreinv.finetune.amortised import Amortised

AGAIN = 0.5  # of the steps, those that a move walks anew


@dataclass(frozen=True)
class Steered:
    """Paths of a control, weighted: a sampler like the others.

    Few of them carry most of the weight, and would be drawn more than once. So where any is, the later part of all draws'
    paths is walked once more, and taken or left by the rule of Metropolis and Hastings: the target stays what it is.

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
        moves: How often the later part of a draw's path is walked anew.

    Raises:
        ValueError: Numbers out of range.
    """

    amortised: Amortised
    resample: float = 0.0
    particles: int = 1
    effective: float = 0.25
    moves: int = 1

    label: ClassVar[str] = "paths of a learned control, weighted"

    def __post_init__(self) -> None:
        if (
            not 0 <= self.resample <= 1
            or self.particles < 1
            or min(self.effective, self.moves) < 0
        ):
            raise ValueError(
                f"resample is {self.resample}, particles {self.particles}, effective {self.effective} and moves "
                f"{self.moves}; expected a share between 0 and 1, at least one particle for each draw, and none below 0"
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
        self.moves, self.draws = sampler.moves, math.ceil(n / sampler.particles)
        self.again = self.chain.steps - round(AGAIN * self.chain.steps)

    def _begin(self) -> Descent:
        start = self.chain.start(self.n, self.y)
        z = start.drawn(0.0, self.generator)
        self.x = start.taken(z)
        self.log_w = start.log_ratio(self.x, z)
        self.promise = torch.zeros(self.n, dtype=torch.float64)
        # of the part of the paths that is walked anew: where it begins, and what it adds to their log-weights
        self.begun, self.later = self.x, torch.zeros(self.n, dtype=torch.float64)
        yield from ()

    def _step(self, i: int) -> Generator[Request, Any, int]:
        if i == self.again:
            self.begun, self.later = self.x, torch.zeros(self.n, dtype=torch.float64)
        denoised, error = yield from self._denoised(self.x, i)
        if self.least > 0 and self.twist.knows:
            chosen = self._resampled(denoised, i)
            denoised = denoised[chosen]
            error = None if error is None else error[chosen]
        self.x, gain = self._stepped(self.x, denoised, error, i)
        self.log_w, self.later = self.log_w + gain, self.later + gain
        return i + 1

    def _denoised(
        self, x: Tensor, i: int
    ) -> Generator[Request, Any, tuple[Tensor, Tensor | None]]:
        """The denoised images, and their errors if the prior knows them."""
        if self.chain.prior.knows_error:
            return (yield from self._denoise_with_error(x, self.levels[i]))
        return (yield from self._denoise(x, self.levels[i])), None

    def _stepped(
        self, x: Tensor, denoised: Tensor, error: Tensor | None, i: int
    ) -> tuple[Tensor, Tensor]:
        """Where step i of the control leads, and what it adds to log-weights."""
        k, y = torch.full((len(x),), i), self.y[: len(x)]
        step = self.chain.around(x, denoised, k, y, error)
        g = self.control.guide(x, step, k, y)
        u = self.control(x, denoised, g, k, y)
        z = step.drawn(u, self.generator)
        x = step.taken(z)
        return x, step.log_ratio(x, z) - step.log_density(u, z)

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
        self.begun, self.later = self.begun[chosen], self.later[chosen]
        self.log_w = torch.logsumexp(self.log_w, 0).sub(math.log(self.n)).expand(self.n).clone()
        return chosen

    def _end(self) -> Descent:
        yield from self._step(len(self.levels) - 1)
        reward = self._reward(self.x)
        log_w = self.log_w + reward - self.promise - self.posterior.gaussian_log_evidence
        self.trace.log_weights = log_w.tolist()
        self.trace.log_evidence = float(torch.logsumexp(log_w, 0)) - math.log(self.n)
        if self.moves > 0:
            yield from self._moved(log_w, self.later + reward)

    def _moved(self, log_w: Tensor, later: Tensor) -> Descent:
        """The draws, chosen by their weights, and the later part of their paths walked anew if any is chosen twice."""
        order = in_order(self.x, self.posterior.moments.covariance)
        share = torch.softmax(log_w[order], 0)
        chosen = order[systematic(share, self.draws, self.generator)].sort().values
        self.x, begun, later = self.x[chosen], self.begun[chosen], later[chosen]
        self.trace.even = True
        self.trace.evaluations *= self.n / self.draws
        if len(chosen.unique()) == self.draws:
            return
        for _ in range(self.moves):
            x, gain = begun, torch.zeros_like(later)
            for i in range(self.again, self.chain.steps):
                denoised, error = yield from self._denoised(x, i)
                x, more = self._stepped(x, denoised, error, i)
                gain += more
            gain += self._reward(x)
            chance = torch.rand(self.draws, generator=self.generator, dtype=torch.float64)
            accepted = chance.log() < gain - later
            self.x[accepted], later[accepted] = x[accepted], gain[accepted]
            self._accepted.append(float(accepted.double().mean()))

    def _reward(self, x: Tensor) -> Tensor:
        return self.posterior.likelihood.log_prob(self.posterior.y, x)
