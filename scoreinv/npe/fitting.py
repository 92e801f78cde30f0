"""Fits densities to pairs of parameters and data: early stopping, the best state kept, no global seed touched."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm import tqdm

from scoreinv.npe.data import Inputs, mapped
from scoreinv.streams import stream

Noise = Callable[[Inputs, torch.Generator], Inputs]


@dataclass(frozen=True)
class Fitting:
    """How long and how fast.

    Args:
        epochs: At most.
        batch: Pairs of a step.
        rate: First learning rate; halved when half of the patience is over.
        patience: Epochs without a better loss of the held-out pairs after which the fit ends.
        clip: Longest gradient.
    """

    epochs: int = 500
    batch: int = 256
    rate: float = 1e-3
    patience: int = 20
    clip: float = 5.0

    def __post_init__(self) -> None:
        for name in ("epochs", "batch", "patience"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 1")
        if not self.rate > 0 or not self.clip > 0:
            raise ValueError(
                f"rate is {self.rate:g} and clip {self.clip:g}, expected both above 0"
            )


def fit(
    density: nn.Module,
    u: Tensor,
    x: Inputs,
    held_out: Tensor,
    plan: Fitting,
    seed: int,
    noise: Noise | None = None,
    progress: bool = False,
) -> list[dict[str, float]]:
    """Maximise the mean of `density.log_prob(u, x)`; the density ends in its best state on held-out pairs.

    Args:
        density: A module.
        u: Parameters, with shape (n, d).
        x: Data of each, by name.
        held_out: Which pairs are not trained on, with shape (n,).
        plan: How long and how fast.
        seed: Of the order of the pairs, and of the noise.
        noise: Makes data of stored ones, anew in every epoch, for a batch and a generator; held-out data get theirs once.
        progress: Show a progress bar.

    Returns:
        For each epoch the losses of both sets and the learning rate.

    Raises:
        FloatingPointError: A loss that is not finite.
    """
    trained = (~held_out).nonzero().flatten()
    u_held, x_held = u[held_out], mapped(x, lambda v: v[held_out])
    if noise is not None:
        x_held = noise(x_held, stream(seed, 2))
    optimiser = torch.optim.Adam(density.parameters(), lr=plan.rate)
    falling = torch.optim.lr_scheduler.ReduceLROnPlateau(
        optimiser, factor=0.5, patience=max(1, plan.patience // 2)
    )
    history, best, kept, waited = [], math.inf, copy.deepcopy(density.state_dict()), 0
    with tqdm(total=plan.epochs, disable=not progress, unit="epoch") as bar:
        for epoch in range(plan.epochs):
            generator = stream(seed, 1, epoch)
            total = 0.0
            density.train()
            for rows in trained[torch.randperm(len(trained), generator=generator)].split(
                plan.batch
            ):
                some = mapped(x, lambda v, rows=rows: v[rows])
                some = some if noise is None else noise(some, generator)
                loss = -density.log_prob(u[rows], some).mean()
                optimiser.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(density.parameters(), plan.clip)
                optimiser.step()
                total += float(loss.detach()) * len(rows)
            now = _loss(density, u_held, x_held, plan.batch)
            if not math.isfinite(total + now):
                raise FloatingPointError(
                    f"the loss of epoch {epoch} is not finite: are the data? Standardised, they should be a few units wide"
                )
            history.append(
                {
                    "loss": total / len(trained),
                    "held out": now,
                    "rate": optimiser.param_groups[0]["lr"],
                }
            )
            falling.step(now)
            waited += 1
            if now < best:
                best, kept, waited = now, copy.deepcopy(density.state_dict()), 0
            bar.set_postfix(held_out=f"{now:.3f}", best=f"{best:.3f}")
            bar.update()
            if waited >= plan.patience:
                break
    density.load_state_dict(kept)
    density.eval()
    return history


@torch.no_grad()
def _loss(density: nn.Module, u: Tensor, x: Inputs, batch: int) -> float:
    density.eval()
    parts = torch.arange(len(u)).split(4 * batch)
    total = [
        float(density.log_prob(u[rows], mapped(x, lambda v, rows=rows: v[rows])).sum())
        for rows in parts
    ]
    return -sum(total) / len(u)
