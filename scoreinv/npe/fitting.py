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
from scoreinv.npe.flows import seeded
from scoreinv.streams import integer, stream

Fresh = Callable[[Inputs, torch.Generator], Inputs]


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
    fresh: Fresh,
    device: str = "cpu",
    progress: bool = False,
) -> list[dict[str, float]]:
    """Maximise the mean of `density.log_prob(u, x)`; the density ends on the CPU, in its best state on held-out pairs.

    Args:
        density: A module.
        u: Parameters, with shape (n, d).
        x: Stored data of each, by name, of which a batch at a time goes to the device.
        held_out: Which pairs are not trained on, with shape (n,).
        plan: How long and how fast.
        seed: Of the order of the pairs, and of what is fresh.
        fresh: Makes data of stored ones, for a batch and a generator, anew in every epoch; held-out ones are made once.
        device: Where the density is fitted.
        progress: Show a progress bar.

    Returns:
        For each epoch the losses of both sets and the learning rate.

    Raises:
        FloatingPointError: A loss that is not finite.
    """
    trained = (~held_out).nonzero().flatten()
    there = lambda v: v.to(device)
    u_held = u[held_out]
    x_held = fresh(mapped(x, lambda v: v[held_out]), stream(seed, 2))
    density.to(device)
    optimiser = torch.optim.Adam(density.parameters(), lr=plan.rate)
    falling = torch.optim.lr_scheduler.ReduceLROnPlateau(
        optimiser, factor=0.5, patience=max(1, plan.patience // 2), threshold_mode="abs"
    )
    history, best, kept, waited = [], math.inf, copy.deepcopy(density.state_dict()), 0
    with (
        seeded(integer(seed, 4)),  # for what draws in a network, such as dropout
        tqdm(total=plan.epochs, disable=not progress, unit="epoch") as bar,
    ):
        for epoch in range(plan.epochs):
            generator, total = stream(seed, 1, epoch), 0.0
            density.train()
            order = trained[torch.randperm(len(trained), generator=generator)]
            for rows in order.split(plan.batch):
                some = fresh(mapped(x, lambda v, rows=rows: v[rows]), generator)
                loss = -density.log_prob(there(u[rows]), mapped(some, there)).mean()
                optimiser.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(density.parameters(), plan.clip)
                optimiser.step()
                total += float(loss.detach()) * len(rows)
            now = -float(log_prob(density, u_held, x_held, plan.batch, device).mean())
            if not math.isfinite(total + now):
                raise FloatingPointError(
                    f"the loss of epoch {epoch} is not finite: are the data? Standardised, they should be a few units wide"
                )
            rate = optimiser.param_groups[0]["lr"]
            history.append({"loss": total / len(trained), "held out": now, "rate": rate})
            falling.step(now)
            waited += 1
            if now < best:
                best, kept, waited = now, copy.deepcopy(density.state_dict()), 0
            bar.set_postfix(held_out=f"{now:.3f}", best=f"{best:.3f}")
            bar.update()
            if waited >= plan.patience:
                break
    density.load_state_dict(kept)
    density.cpu().eval()
    return history


@torch.no_grad()
def log_prob(
    density: nn.Module, u: Tensor, x: Inputs, batch: int = 1000, device: str = "cpu"
) -> Tensor:
    """log q of many pairs, a batch at a time, with shape (n,), in float64 on the CPU."""
    density.eval()
    found = []
    for rows in torch.arange(len(u)).split(batch):
        some = mapped(x, lambda v, rows=rows: v[rows].to(device))
        found.append(density.log_prob(u[rows].to(device), some).double().cpu())
    return torch.cat(found)
