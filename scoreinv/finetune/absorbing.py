"""Characters that appear one after the other: a reference chain whose steps are not Gaussian.

A state is L columns of A numbers, the character at each place, or zeros where it is masked. All of x_0 is masked. Step k
chooses n_k masked places blindly and reveals them, each drawn by itself from what the model expects there,

    x_{k+1}  =  x_k + z,      z_i ~ p(. | x_k) at revealed places i, and 0 elsewhere;      n_0 + ... + n_{T-1} = L.

As n_k is fixed, at the mean of independent coins, T = L steps reveal one place each, and nothing is lost by drawing places
by themselves. A control u tilts the characters, not the choice of places, which cancels from the ratio:

    p_u  =  p exp(u),      log p_u - log p_ref  =  u . z,      with sum_a p exp(u) = 1 at each place.

Austin et al., Structured Denoising Diffusion Models in Discrete State-Spaces (2021, arXiv:2107.03006); fixed n_k:
Hoogeboom et al., Autoregressive Diffusion Models (2022, arXiv:2110.02037).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from scoreinv.finetune.reference import Reference, Step

Model = Callable[
    [Tensor], Tensor
]  # states -> probabilities of characters at each place, both with shape (B, A, L)


@dataclass(frozen=True)
class CategoricalStep(Step):
    """n masked places of each sentence, chosen blindly, and their characters.

    Attributes:
        x: Sentences, with shape (B, A, L).
        denoised: E[x_T | x], with shape (B, A, L): x where it is known, probabilities where it is masked.
        n: How many places are revealed, with shape (B,).
    """

    x: Tensor
    denoised: Tensor
    n: Tensor

    def drawn(self, u: Tensor | float, generator: torch.Generator, spread: float = 1.0) -> Tensor:
        """z, for a normalised control; p_u^(1/spread) in the place of p_u."""
        p = (self.denoised * torch.as_tensor(u).exp()) ** (1 / spread)
        below = p.cumsum(1)  # in float64 no lot reaches the last of them, and none falls on p = 0
        lot = torch.rand(len(p), 1, p.shape[2], generator=generator, dtype=torch.float64)
        z = F.one_hot((below <= lot * below[:, -1:]).sum(1), p.shape[1]).mT.to(p.dtype)
        return z * (_ranked(masked(self.x), generator) < self.n[:, None])[:, None]

    def taken(self, z: Tensor) -> Tensor:
        return self.x + z

    def noise(self, x: Tensor) -> Tensor:
        return x - self.x

    @staticmethod
    def log_density(u: Tensor, z: Tensor) -> Tensor:
        """u . z, for a normalised control."""
        return (u.double() * z.double()).flatten(1).sum(1)

    def log_ratio(self, x: Tensor, z: Tensor) -> Tensor:
        """0: it stands for itself."""
        return torch.zeros(len(x), dtype=torch.float64)


class AbsorbingChain(Reference):
    """The reverse chain of an absorbing-state diffusion of L characters of an alphabet of A.

    Args:
        model: Probabilities of characters at all places, given those that are not masked.
        shape: (A, L).
        steps: T, at most L. With fewer than L, places that are revealed together know nothing of each other.

    Raises:
        ValueError: More steps than places, or none.
    """

    law = CategoricalStep
    dtype = torch.float32

    def __init__(self, model: Model, shape: tuple[int, int], steps: int) -> None:
        if not 1 <= steps <= shape[1]:
            raise ValueError(
                f"steps is {steps} for {shape[1]} places, expected 1 to {shape[1]}: a step reveals one place or more"
            )
        self.model, self.shape, self.steps = model, tuple(shape), steps
        self._known = torch.arange(steps + 1) * shape[1] // steps  # places of x_k

    def start(self, n: int, y: Tensor | None) -> CategoricalStep:
        x = torch.zeros(n, *self.shape, dtype=self.dtype)
        return CategoricalStep(x, x + 1 / self.shape[0], torch.zeros(n))

    def step(self, x: Tensor, k: Tensor, y: Tensor | None) -> CategoricalStep:
        with torch.no_grad():
            p = self.model(x).to(x.dtype)
        return self.around(x, torch.where(masked(x)[:, None], p, x), k, y)

    def around(self, x: Tensor, denoised: Tensor, k: Tensor, y: Tensor | None) -> CategoricalStep:
        """Step k of each state, for what the model has expected of it."""
        return CategoricalStep(x, denoised, self._known[k + 1] - self._known[k])

    def noised(self, x: Tensor, k: int, generator: torch.Generator) -> Tensor:
        rank = _ranked(~masked(x), generator)
        return torch.stack([x * (rank < n)[:, None] for n in self._known[: k + 1]])

    def clock(self, k: Tensor) -> Tensor:
        return 2 * k.double() / self.steps - 1

    def scale(self, k: Tensor) -> Tensor:
        return torch.ones(len(k))


def masked(x: Tensor) -> Tensor:
    """Which places hold no character, with shape (B, L)."""
    return x.sum(1) == 0


def _ranked(places: Tensor, generator: torch.Generator) -> Tensor:
    """0, 1, ... in a random order for the given places, and more for all others, with shape (B, L)."""
    lot = torch.rand(places.shape, generator=generator)
    return lot.masked_fill(~places, 2.0).argsort(1).argsort(1)
