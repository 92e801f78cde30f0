"""Fits members to pairs of parameters and data: early stopping, the best state kept, no global seed touched."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from scoreinv.digests import digest, digest_of_json, rounded
from scoreinv.npe.data import Inputs, mapped
from scoreinv.npe.members import Member
from scoreinv.npe.weights import Average, joined
from scoreinv.streams import integer, seeded, stream

Fresh = Callable[[Inputs, torch.Generator], Inputs]
FALLING = 0.2  # of the epochs, in which the rate falls
GAIN = 1e-4  # of the loss of the held-out pairs, below which an epoch is no better than those before it


@dataclass(frozen=True)
class Fitting:
    """How long and how fast.

    Args:
        epochs: Passes over the pairs, at most; in the last fifth of them the rate falls to nothing.
        batch: Pairs of a step.
        rate: First learning rate; halved when half of the patience is over.
        patience: Epochs without a better loss of the held-out pairs after which the fit ends.
        clip: Longest gradient.
        average: Share of itself that the average of the weights keeps at each step, less in the first ones. The average is
            what is judged and kept; 0 are the last weights.
        decay: Of the weights, in units of the rate, as `torch.optim.AdamW` takes it off.
    """

    epochs: int = 500
    batch: int = 256
    rate: float = 1e-3
    patience: int = 10
    clip: float = 5.0
    average: float = 0.99
    decay: float = 0.0

    def __post_init__(self) -> None:
        for name in ("epochs", "batch", "patience"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 1")
        if not self.rate > 0 or not self.clip > 0:
            raise ValueError(
                f"rate is {self.rate:g} and clip {self.clip:g}, expected both above 0"
            )
        if not 0 <= self.average < 1 or not self.decay >= 0:
            raise ValueError(
                f"average is {self.average:g} and decay {self.decay:g}, expected 0 to below 1, and 0 or more"
            )


@dataclass(frozen=True)
class Pairs:
    """What is fitted to.

    Attributes:
        u: Parameters, with shape (n, d).
        x: Stored data of each, by name, of which a batch at a time goes to the device.
        w: Weights, of mean 1, with shape (n,).
        held_out: Which pairs are not trained on, with shape (n,).
        fresh: Makes data of stored ones, for a batch and a generator, anew in every epoch; held-out ones are made once.
    """

    u: Tensor
    x: Inputs
    w: Tensor
    held_out: Tensor
    fresh: Fresh


def fit(
    member: Member,
    pairs: Pairs,
    plan: Fitting,
    seed: int,
    device: str = "cpu",
    progress: bool = False,
    checkpoint: Path | None = None,
    about: Mapping[str, Any] | None = None,
) -> list[dict[str, float]]:
    """Minimise the mean of `member.loss`; the member ends on the CPU, in its best state on held-out pairs.

    Args:
        member: A module.
        pairs: What it is fitted to.
        plan: How long and how fast.
        seed: Of the order of the pairs, and of what is fresh.
        device: Where it is fitted.
        progress: Show a progress bar.
        checkpoint: File in which the state is kept after each epoch, and from which the fit goes on.
        about: What tells the member from others, beside its network; values of JSON.

    Returns:
        For each epoch the losses of both sets and the learning rate.

    Raises:
        FloatingPointError: A loss that is not finite.
        ValueError: A checkpoint of another fit, or a broken one.
    """
    held_out = pairs.held_out
    trained = (~held_out).nonzero().flatten()
    there = lambda v: v.to(device)
    x_held = pairs.fresh(mapped(pairs.x, lambda v: v[held_out]), stream(seed, 2))
    u_held, w_held = pairs.u[held_out], pairs.w[held_out]
    member.to(device)
    card = {
        **(about or {}),
        "network": _drawn(member),
        "seed": seed,
        "pairs": len(pairs.u),
        # those of other simulations have others held out, so that all need not be read
        "data": digest([pairs.u, *x_held.values()])[:16],
        "pair weights": rounded(pairs.w),
        **asdict(plan),
    }
    keeper, progressed = Keeper(checkpoint, card), Progress(member.state_dict())
    with (
        joined(member) as weights,
        tqdm(total=plan.epochs, disable=not progress, unit="epoch") as bar,
    ):
        average = Average(member, weights, plan.average)
        optimiser = torch.optim.AdamW(weights, lr=plan.rate, weight_decay=plan.decay, fused=True)
        keeper.restore(member, average, optimiser, progressed)
        bar.update(len(progressed.history))
        for epoch in range(len(progressed.history), plan.epochs):
            if progressed.waited >= plan.patience:
                break
            rate = progressed.rate(plan)
            optimiser.param_groups[0]["lr"] = rate
            generator, total = stream(seed, 1, epoch), 0.0
            member.train()
            order = trained[torch.randperm(len(trained), generator=generator)]
            with seeded(integer(seed, 4, epoch)):  # for what draws in a network, such as dropout
                for rows in _batches(order, plan.batch):
                    some = mapped(pairs.x, lambda v, rows=rows: v[rows])
                    some = mapped(pairs.fresh(some, generator), there)
                    loss = member.loss(there(pairs.u[rows]), some, there(pairs.w[rows]))
                    optimiser.zero_grad(set_to_none=False)  # the gradients of the layers are views
                    loss.backward()
                    nn.utils.clip_grad_norm_(weights, plan.clip)
                    optimiser.step()
                    average.update()
                    total += float(loss.detach()) * len(rows)
            judged = average.network()
            now = _held_out_loss(judged, u_held, x_held, w_held, plan.batch, device, seed)
            if not math.isfinite(total + now):
                raise FloatingPointError(
                    f"the loss of epoch {epoch} is not finite: are the data? Standardised, they should be a few units wide"
                )
            found = {"loss": total / len(trained), "held out": now, "rate": rate}
            progressed.add(found, judged, plan)
            keeper.keep(member, average, optimiser, progressed)
            bar.set_postfix(held_out=f"{now:.3f}", best=f"{progressed.best:.3f}")
            bar.update()
    member.load_state_dict(progressed.kept)
    member.cpu().eval()
    return progressed.history


class Progress:
    """How far a fit has come, and the best state so far."""

    def __init__(self, state: dict[str, Tensor]) -> None:
        self.history: list[dict[str, float]] = []
        self.best, self.waited, self.kept = math.inf, 0, copy.deepcopy(state)
        self.least, self.stalled, self.halvings = math.inf, 0, 0

    def rate(self, plan: Fitting) -> float:
        """Of the next epoch."""
        left = (plan.epochs - len(self.history)) / (FALLING * plan.epochs)
        return plan.rate * 0.5**self.halvings * min(1.0, left)

    def add(self, epoch: dict[str, float], member: nn.Module, plan: Fitting) -> None:
        """One epoch more."""
        self.history.append(epoch)
        self.waited, self.stalled = self.waited + 1, self.stalled + 1
        if epoch["held out"] < self.best:
            self.best, self.waited = epoch["held out"], 0
            self.kept = copy.deepcopy(member.state_dict())
        if epoch["held out"] < self.least - GAIN:
            self.least, self.stalled = epoch["held out"], 0
        elif self.stalled > max(1, plan.patience // 2):
            self.stalled, self.halvings = 0, self.halvings + 1


class Keeper:
    """Keeps the state of a fit in a file.

    Args:
        file: Where; None to keep nothing.
        card: What tells this fit from others.
    """

    def __init__(self, file: Path | None, card: dict) -> None:
        self.file, self.card = file, card

    def keep(self, member: nn.Module, *others: Any) -> None:
        """After an epoch, so that what is there is always whole."""
        if self.file is None:
            return
        average, optimiser, progressed = others
        self.file.parent.mkdir(parents=True, exist_ok=True)
        state = {
            "card": self.card,
            "member": member.state_dict(),
            "average": average.state_dict(),
            "optimiser": optimiser.state_dict(),
            "progress": vars(progressed),
        }
        half = self.file.with_suffix(".part")
        torch.save(state, half)
        half.replace(self.file)

    def restore(self, member: nn.Module, *others: Any) -> None:
        """Take up the state where there is one."""
        if self.file is None or not self.file.exists():
            return
        average, optimiser, progressed = others
        try:
            state = torch.load(self.file, weights_only=True)
            card = state["card"]
        except Exception as error:
            raise ValueError(
                f"{self.file} cannot be read ({error}); remove it to begin anew"
            ) from error
        if card != self.card:
            other = [k for k in {**card, **self.card} if card.get(k) != self.card.get(k)]
            seen, expected = ({k: c.get(k) for k in other} for c in (card, self.card))
            raise ValueError(
                f"{self.file} is of the fit {seen}, expected {expected}; remove it to begin anew"
            )
        try:
            member.load_state_dict(state["member"])
            average.load_state_dict(state["average"])
            optimiser.load_state_dict(state["optimiser"])
        except (KeyError, RuntimeError, ValueError) as error:
            raise ValueError(
                f"{self.file} is of the fit of another network ({error}); remove it to begin anew"
            ) from None
        vars(progressed).update(state["progress"])


def _drawn(member: nn.Module) -> str:
    """How large a network is, and a hash of its layers and their options."""
    with seeded(0):  # zuko's layers draw numbers to say what they are
        layers = repr(member)
    layers = re.sub(r" at 0x[0-9a-fA-F]+", "", layers)  # an address in memory is another each time
    size = sum(v.numel() for v in member.parameters())
    return f"{size} weights, {digest_of_json(layers)[:16]}"


def _batches(rows: Tensor, size: int) -> tuple[Tensor, ...]:
    """Rows in parts of about this size, none much smaller than the others."""
    return rows.tensor_split(max(1, math.ceil(len(rows) / size)))


@torch.no_grad()
def _held_out_loss(
    member: Member, u: Tensor, x: Inputs, w: Tensor, batch: int, device: str, seed: int
) -> float:
    """Mean loss, of the same random numbers in every epoch."""
    member.eval()
    total = 0.0
    with seeded(integer(seed, 9)):
        for rows in _batches(torch.arange(len(u)), batch):
            some = mapped(x, lambda v, rows=rows: v[rows].to(device))
            loss = member.loss(u[rows].to(device), some, w[rows].to(device))
            total += float(loss) * len(rows)
    return total / len(u)


@torch.no_grad()
def scores(member: Member, u: Tensor, x: Inputs, seed: int, batch: int = 1000) -> Tensor:
    """`Member.scores` of many pairs, with shape (n, ...), in float64."""
    member.eval()
    with seeded(seed):
        parts = [
            member.scores(u[rows], mapped(x, lambda v, rows=rows: v[rows])).double()
            for rows in _batches(torch.arange(len(u)), batch)
        ]
    return torch.cat(parts)
