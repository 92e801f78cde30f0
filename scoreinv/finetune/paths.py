"""Paths of a controlled chain, and their weights relative to the reference: the one quantity of this package.

With z_k = V_k^-1/2 (x_{k+1} - mean_k(x_k)), a control that moves the mean by V_k^1/2 u_k has the path density

    log p_u - log p_ref  =  sum_k  u_k . z_k - |u_k|^2 / 2

and a path of the target p_ref(path) r(x_T) / Z has the weight

    log w  =  log r(x_T) - log p_T(x_T) - sum_k (u_k . z_k - |u_k|^2 / 2),

with p_T the terminal density that the reward is freed of (`Reference.log_terminal`). No normalisation of a Gaussian enters,
so nothing large cancels; sums are in float64. The mean of w over paths of the control is Z; log w is constant, log Z, where
the control is right. No density of how paths were proposed enters either: any paths will do to train on. Steps that are not
Gaussian have another z, and their own ratio in the place of u . z - |u|^2 / 2 (`Step.log_density`).

Relative trajectory balance: Venkatraman et al., Amortizing Intractable Inference in Diffusion Models for Vision, Language
and Control (2024, arXiv:2405.20971); diffusion samplers: Sendera et al., Improved Off-Policy Training of Diffusion Samplers
(2024, arXiv:2402.05098).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from scoreinv.finetune.control import Control
from scoreinv.finetune.reference import Reference, Step

CHUNK = 4096  # pixels times images times steps, over 64: what one call of the control with a gradient holds

Reward = Callable[[Tensor, Tensor | None], Tensor]


@dataclass(frozen=True)
class Paths:
    """Paths, with what the reference says of every step.

    Attributes:
        states: x_0, ..., x_T, with shape (T + 1, B, *shape).
        z: What their steps drew, with shape (T, B, *shape).
        denoised: Of all states but the last, with shape (T, B, *shape).
        errors: Of those, with shape (T, B, parts, *shape), for paths without a control, of a reference that knows them.
        guidance: What data say of each step, in units of V^1/2, with shape (T, B, *shape); None for controls without.
        y: Data of each path, with shape (B, *data); None if there are none.
        spent: By how much the control makes each step likelier than the reference does, with shape (T, B) [nat].
        log_reward: log r(x_T) - log p_T(x_T), with shape (B,) [nat].
    """

    states: Tensor
    z: Tensor
    denoised: Tensor
    errors: Tensor | None
    guidance: Tensor | None
    y: Tensor | None
    spent: Tensor
    log_reward: Tensor

    @property
    def x(self) -> Tensor:
        """The images that paths lead to, with shape (B, *shape)."""
        return self.states[-1]

    def __len__(self) -> int:
        return self.states.shape[1]


@dataclass(frozen=True)
class Engine:
    """A reference, a control and a reward.

    Args:
        reference: The chain.
        control: What tilts its steps.
        reward: log r(x, y) of images with shape (B, *shape) and data (B, *data) or None, with shape (B,).
    """

    reference: Reference
    control: Control
    reward: Reward

    @torch.no_grad()
    def paths(
        self,
        n: int,
        y: Tensor | None,
        generator: torch.Generator,
        spread: float = 1.0,
        controlled: bool = True,
    ) -> tuple[Paths, Tensor]:
        """Paths of the control, and their log-weights.

        Args:
            n: Paths.
            y: Data of each, with shape (n, *data).
            generator: Of the noise.
            spread: Of what each step draws, > 1 to explore.
            controlled: Without, paths of the reference.

        Returns:
            The paths, and log w with shape (n,) in float64 [nat].
        """
        start = self.reference.start(n, y)
        x = start.taken(start.drawn(0.0, generator))
        return self.onwards(x[None], y, generator, spread, controlled)

    @torch.no_grad()
    def onwards(
        self,
        states: Tensor,
        y: Tensor | None,
        generator: torch.Generator,
        spread: float = 1.0,
        controlled: bool = True,
    ) -> tuple[Paths, Tensor]:
        """Paths that begin with given states, with shape (k + 1, n, *shape), and are completed by the control."""
        ref, xs = self.reference, list(states)
        zs, denoised, errors, guides, spent = [], [], [], [], []
        start = ref.start(len(xs[0]), y)
        first = -start.log_ratio(xs[0], start.noise(xs[0]))
        for i in range(ref.steps):
            k = torch.full((len(xs[i]),), i)
            step = ref.step(xs[i], k, y)
            g = self.control.guide(xs[i], step, k, y) if controlled else None
            u = self.control(xs[i], step.denoised, g, k, y) if controlled else 0 * xs[i]
            if i + 1 == len(xs):
                z = step.drawn(u, generator, spread)
                xs.append(step.taken(z))
            else:
                z = step.noise(xs[i + 1])
            spent.append(step.log_density(u, z) - step.log_ratio(xs[i + 1], z))
            zs.append(z)
            denoised.append(step.denoised)
            errors.append(None if controlled else step.error)
            guides.append(g)
        found = Paths(
            torch.stack(xs),
            torch.stack(zs),
            torch.stack(denoised),
            None if errors[0] is None else torch.stack(errors),
            None if guides[0] is None else torch.stack(guides),
            y,
            torch.stack(spent),
            self.reward(xs[-1], y) - ref.log_terminal(xs[-1]),
        )
        return found, found.log_reward - found.spent.sum(0) - first

    def through(
        self, x: Tensor, y: Tensor | None, generator: torch.Generator
    ) -> tuple[Paths, Tensor]:
        """Paths of the reference's noising that lead to images x, with shape (B, *shape), and their log-weights.

        Where x are draws of the posterior, these are paths of the target.
        """
        noised = self.reference.noised(x, self.reference.steps, generator)
        return self.onwards(noised, y, generator)

    def unsteered(self, n: int, generator: torch.Generator) -> Paths:
        """n paths of the chain itself, of which no reward is asked."""
        free = replace(self, reward=lambda x, _: x.new_zeros(len(x), dtype=torch.float64))
        return free.paths(n, None, generator, controlled=False)[0]

    def imitate(
        self,
        paths: Paths,
        which: Tensor,
        y: Tensor,
        generator: torch.Generator,
        steps: int | None = None,
    ) -> float:
        """Add the gradient of -log p_u of paths of the target: those of the chain, given data observed at their ends.

        The forward Kullback-Leibler divergence. For data of any image; images noised would not do as well in their place: a
        chain of few steps is not the reverse of noising, and a control would learn the difference.

        Args:
            paths: Of the chain, see `unsteered`.
            which: Numbers of those that count, with shape (n,).
            y: Data observed at their ends, with shape (n, *data).
            generator: Chooses the steps.
            steps: Of each path whose gradient counts, scaled up to all of them; all if not given.

        Returns:
            By how much the control makes such paths likelier than the reference does [nat].
        """

        def taken(part: Tensor, k: Tensor, data: Tensor) -> tuple[Tensor, Step, Tensor]:
            of = lambda v, at=part: v[at, which].flatten(0, 1)
            here, known = of(paths.states), () if paths.errors is None else (of(paths.errors),)
            step = self.reference.around(here, of(paths.denoised), k, data, *known)
            return here, step, of(paths.states, part + 1)

        return self._imitate(len(which), taken, y, generator, steps)

    def imitate_noised(
        self, x: Tensor, y: Tensor | None, generator: torch.Generator, steps: int | None = None
    ) -> float:
        """Add the gradient of -log p_u of paths that noise draws of the target.

        Where some of the steps count, each leads to the mean over all ways to noise the image that pass its state, which
        varies by the share that the step has of the noise that is left, where a single way does by all of it. The means of
        neighbours are nearly the same, so all steps together would tell no more than the way itself.

        Args:
            x: Draws, with shape (n, *shape).
            y: Data of each, with shape (n, *data), or None.
            generator: Of the noise.
            steps: Of each path whose gradient counts, scaled up to all of them; all if not given.

        Returns:
            By how much the control makes such paths likelier than the reference does [nat].
        """
        ref = self.reference
        states, rows = ref.noised(x, ref.steps, generator), torch.arange(len(x))

        def taken(part: Tensor, k: Tensor, data: Tensor | None) -> tuple[Tensor, Step, Tensor]:
            here, there = (states[at, rows].flatten(0, 1) for at in (part, part + 1))
            if steps is not None:
                mean = ref.towards(here, x.repeat(len(part), *[1] * (x.ndim - 1)), k)
                there = there if mean is None else mean
            return here, ref.step(here, k, data), there

        return self._imitate(len(x), taken, y, generator, steps)

    def _imitate(
        self,
        n: int,
        taken: Callable[[Tensor, Tensor, Tensor | None], tuple[Tensor, Step, Tensor]],
        y: Tensor | None,
        generator: torch.Generator,
        steps: int | None,
    ) -> float:
        """The gradient of -log p_u of n paths, of which `taken` knows some: states, their steps, where these led to."""
        T, gain = self.reference.steps, 0.0
        # of each path other steps: neighbours that share a step would say nearly the same
        chosen = torch.rand(T, n, generator=generator).argsort(0)[: steps or T]
        for part in chosen.split(chunk(self.reference.shape, n)):
            k = part.flatten()
            data = None if y is None else y.repeat(len(part), *[1] * (y.ndim - 1))
            with torch.no_grad():
                here, step, there = taken(part, k, data)
                g, z = self.control.guide(here, step, k, data), step.noise(there)
            u = self.control(here, step.denoised, g, k, data)
            likelier = step.log_density(u, z).sum() / n
            (-T / len(chosen) * likelier).backward()
            gain += T / len(chosen) * float(likelier.detach())
        return gain

    def learn(self, paths: Paths, weights: Tensor, steps: Tensor | None = None) -> None:
        """Add the gradient of -sum_i weights_i log w_i to that of the control's parameters.

        A few steps at a time, so that memory does not grow with T.

        Args:
            paths: Any.
            weights: With shape (B,).
            steps: Which steps of the chain count, scaled up to all of them; all if not given.
        """
        T, B = self.reference.steps, len(paths)
        chosen = torch.arange(T) if steps is None else steps
        for part in chosen.split(chunk(self.reference.shape, B)):
            k = part.repeat_interleave(B)
            flat = lambda v, part=part: v[part].flatten(0, 1)
            y = None if paths.y is None else paths.y.repeat(len(part), *[1] * (paths.y.ndim - 1))
            g = None if paths.guidance is None else flat(paths.guidance)
            u = self.control(flat(paths.states), flat(paths.denoised), g, k, y)
            log_ratio = self.reference.law.log_density(u, flat(paths.z)).reshape(len(part), B)
            (T / len(chosen) * (weights * log_ratio.sum(0)).sum()).backward()


def chunk(shape: Sequence[int], n: int) -> int:
    """Steps of n paths that go through a network with a gradient at once, for images of this shape."""
    return max(1, 64 * CHUNK // (math.prod(shape) * n))
