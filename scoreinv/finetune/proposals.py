"""Where training paths come from. Any paths will do; the best are those that the posterior would take.

- `OnPolicy`: paths of the control, with more noise than its own at first.
- `JointSimulations`: x of the prior, y of x, and x noised: exact paths of the posterior for every y, for free.
- `Backtracking`: noise a good image part of the way, and let the control complete it.
- `Replay`: images that did well before, noised all the way.
- `LocalSearch`: images of a buffer moved along the target's gradient by MALA, then noised (Sendera et al., 2024,
  arXiv:2402.05098, section 4).

The last three keep images in a buffer and serve one y; amortised training has the joint simulations instead.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from scoreinv.finetune.paths import Engine, Paths
from scoreinv.operators.information import white

Proposed = tuple[Paths, Tensor]
ACCEPTANCE = 0.574  # of MALA at its best step (Roberts & Rosenthal 1998)


class Proposal(abc.ABC):
    """Makes training paths."""

    @abc.abstractmethod
    def propose(
        self, engine: Engine, x: Tensor, y: Tensor | None, done: float, generator: torch.Generator
    ) -> Proposed:
        """One path for each simulated image.

        Args:
            engine: Of the control as it is.
            x: Images of the prior that made y, with shape (B, *shape).
            y: Data of each path, with shape (B, *data), or None.
            done: Share of the training that is over.
            generator: Of everything random.
        """

    def saw(self, paths: Paths) -> None:
        """Take note of paths, whoever proposed them."""
        return

    def state(self) -> dict[str, Tensor]:
        """What a training that goes on must find again."""
        return {}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Take a state up again."""
        return


@dataclass
class OnPolicy(Proposal):
    """Paths of the control.

    Args:
        spread: Factor on the noise at first; it falls to 1 by the middle of the training. In many dimensions it makes paths
            that no control takes: leave it at 1 beyond 100.
    """

    spread: float = 1.0

    def propose(
        self, engine: Engine, x: Tensor, y: Tensor | None, done: float, generator: torch.Generator
    ) -> Proposed:
        spread = 1 + (self.spread - 1) * max(0.0, 1 - 2 * done)
        return engine.paths(len(x), y, generator, spread)


class Noised(Proposal):
    """Paths that noise draws of the target."""

    @abc.abstractmethod
    def images(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Draws, with shape (B, *shape), for images of the prior that made the data, with that shape."""

    def propose(
        self, engine: Engine, x: Tensor, y: Tensor | None, done: float, generator: torch.Generator
    ) -> Proposed:
        return engine.through(self.images(x, generator), y, generator)


@dataclass
class JointSimulations(Noised):
    """Paths that lead to the images that made the data."""

    def images(self, x: Tensor, generator: torch.Generator) -> Tensor:
        return x


@dataclass
class Given(Noised):
    """Paths that lead to given images, such as posterior draws of a slower sampler.

    Args:
        draws: With shape (N, *shape).
    """

    draws: Tensor

    def images(self, x: Tensor, generator: torch.Generator) -> Tensor:
        return self.draws[torch.randint(len(self.draws), (len(x),), generator=generator)]


@dataclass
class Buffer:
    """Images with the log-reward that they have earned, the latest `capacity` of them."""

    capacity: int = 20000
    x: Tensor | None = None
    log_reward: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))

    def add(self, x: Tensor, log_reward: Tensor) -> None:
        known = x if self.x is None else torch.cat([self.x, x])
        self.x = known[-self.capacity :]
        self.log_reward = torch.cat([self.log_reward, log_reward.double()])[-self.capacity :]

    def state(self) -> dict[str, Tensor]:
        return {} if self.x is None else {"x": self.x, "log_reward": self.log_reward}

    def restore(self, state: dict[str, Tensor]) -> None:
        if state:
            self.x, self.log_reward = state["x"], state["log_reward"]

    def draw(self, n: int, generator: torch.Generator) -> Tensor:
        """n images, better ones more often: the probability falls with the rank (Tripp et al. 2020)."""
        rank = torch.argsort(torch.argsort(self.log_reward, descending=True)).double()
        p = 1 / (0.01 * len(rank) + rank)
        return self.x[torch.multinomial(p, n, replacement=True, generator=generator)]


@dataclass
class Backtracking(Proposal):
    """Good images, noised to a step of the chain and completed by the control."""

    buffer: Buffer = field(default_factory=Buffer)

    def propose(
        self, engine: Engine, x: Tensor, y: Tensor | None, done: float, generator: torch.Generator
    ) -> Proposed:
        if self.buffer.x is None:
            return engine.paths(len(x), y, generator)
        T = engine.reference.steps
        good = self.buffer.draw(len(x), generator)
        states = engine.reference.noised(good, T, generator)
        k = int(torch.randint(1, T, (1,), generator=generator))
        return engine.onwards(states[: k + 1], y, generator)

    def saw(self, paths: Paths) -> None:
        self.buffer.add(paths.x, paths.log_reward)

    def state(self) -> dict[str, Tensor]:
        return self.buffer.state()

    def restore(self, state: dict[str, Tensor]) -> None:
        self.buffer.restore(state)


@dataclass
class Replay(Backtracking):
    """Good images, noised all the way."""

    def propose(
        self, engine: Engine, x: Tensor, y: Tensor | None, done: float, generator: torch.Generator
    ) -> Proposed:
        if self.buffer.x is None:
            return engine.paths(len(x), y, generator)
        return engine.through(self.buffer.draw(len(x), generator), y, generator)


@dataclass
class LocalSearch(Proposal):
    """Images that MALA has moved along the target, noised all the way.

    Args:
        log_target: log-density of the images, up to a constant, with shape (B,).
        moves: Of MALA, each time.
        every: Calls from one search to the next.
        buffer: Of images that chains start from.
    """

    log_target: Callable[[Tensor], Tensor]
    moves: int = 40
    every: int = 25
    buffer: Buffer = field(default_factory=Buffer)
    found: Buffer = field(default_factory=Buffer)
    step: float = 0.05
    calls: int = 0

    def propose(
        self, engine: Engine, x: Tensor, y: Tensor | None, done: float, generator: torch.Generator
    ) -> Proposed:
        if self.buffer.x is None:
            return engine.paths(len(x), y, generator)
        if self.calls % self.every == 0:
            start = self.buffer.draw(2 * len(x), generator)
            moved, log_p, self.step = mala(
                start, self.log_target, self.moves, self.step, generator
            )
            self.found.add(moved, log_p)
        self.calls += 1
        return engine.through(self.found.draw(len(x), generator), y, generator)

    def saw(self, paths: Paths) -> None:
        self.buffer.add(paths.x, paths.log_reward)

    def state(self) -> dict[str, Tensor]:
        both = {"seen": self.buffer.state(), "found": self.found.state()}
        tensors = {f"{name}.{k}": v for name, part in both.items() for k, v in part.items()}
        return {**tensors, "step": torch.tensor([self.step, self.calls], dtype=torch.float64)}

    def restore(self, state: dict[str, Tensor]) -> None:
        for name, buffer in (("seen", self.buffer), ("found", self.found)):
            part = {
                k.removeprefix(f"{name}."): v for k, v in state.items() if k.startswith(f"{name}.")
            }
            buffer.restore(part)
        self.step, self.calls = float(state["step"][0]), int(state["step"][1])


def mala(
    x: Tensor,
    log_p: Callable[[Tensor], Tensor],
    moves: int,
    step: float,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor, float]:
    """Metropolis-adjusted Langevin moves; the step is adapted to the acceptance that suits it best.

    Returns:
        Images with shape (B, *shape), log p of them with shape (B,), and the step.
    """

    def known(x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            x = x.detach().requires_grad_(True)
            value = log_p(x)
            return value.detach(), torch.autograd.grad(value.sum(), x)[0]

    def towards(a: Tensor, b: Tensor, slope: Tensor) -> Tensor:
        return -(b - a - step * slope).flatten(1).square().sum(1) / (4 * step)

    value, slope = known(x)
    for _ in range(moves):
        z = white(tuple(x.shape[1:]), len(x), generator, x.dtype)
        new = x + step * slope + math.sqrt(2 * step) * z
        new_value, new_slope = known(new)
        ratio = new_value - value + towards(new, x, new_slope) - towards(x, new, slope)
        accept = torch.rand(len(x), generator=generator).log() < ratio
        rows = accept.reshape(-1, *[1] * (x.ndim - 1))
        x, slope = torch.where(rows, new, x), torch.where(rows, new_slope, slope)
        value = torch.where(accept, new_value, value)
        step *= 1.05 if float(accept.double().mean()) > ACCEPTANCE else 0.95
    return x, value, step
