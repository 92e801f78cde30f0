"""What a control is trained to do: a weight for each path, by which the gradient of its log w counts.

With groups of G paths for each y, objectives are -sum_i c_i grad log w_i with coefficients c that do not depend on the
control's parameters but through the values of log w, all but the last:

- log-variance (VarGrad): 1/2 Var log w over each group. Richter et al. (2020, arXiv:2010.10436). On paths of the control
  itself its gradient is that of the reverse Kullback-Leibler divergence with a baseline.
- relative trajectory balance: 1/2 (log Z - log w)^2 with a learned log Z. Venkatraman et al. (2024, arXiv:2405.20971).
- forward Kullback-Leibler divergence: -log p_u of paths of the target, for noised joint simulations.

A learned log Z goes to the ELBO, not to the evidence, where a control is not perfect: never report it.
"""

from __future__ import annotations

import abc
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from scoreinv.finetune.control import numbers
from scoreinv.priors.unet import initialise
from scoreinv.streams import seeded, stream


class Objective(abc.ABC):
    """How much the gradient of each path's log w counts."""

    @abc.abstractmethod
    def coefficients(self, log_w: Tensor, y: Tensor | None) -> Tensor:
        """c with shape (groups, G), for log-weights with that shape and data of each group, with shape (groups, *data)."""

    def learned(self) -> list[nn.Parameter]:
        """Parameters of its own."""
        return []


@dataclass(frozen=True)
class LogVariance(Objective):
    """1/2 Var log w over the paths of one y.

    Args:
        huber: Deviations count by at most so much [nat].
    """

    huber: float = 20.0

    def coefficients(self, log_w: Tensor, y: Tensor | None) -> Tensor:
        if log_w.shape[1] < 2:
            raise ValueError("the log-variance needs at least 2 paths of each y")
        delta = (log_w - log_w.mean(1, keepdim=True)).clamp(-self.huber, self.huber)
        return -delta / (len(log_w) * (log_w.shape[1] - 1))


class TrajectoryBalance(nn.Module, Objective):
    """1/2 (log Z - log w)^2 with a learned log Z, which starts at the mean of the first log-weights.

    Args:
        examples: Data, with shape (n, *data), if log Z is a function of y.
        huber: See `LogVariance`.
        seed: Of the first weights.
    """

    @seeded(0)
    def __init__(self, examples: Tensor | None = None, huber: float = 20.0, seed: int = 0) -> None:
        super().__init__()
        self.huber, self.network = huber, None
        self.level = nn.Parameter(torch.tensor(float("nan"), dtype=torch.float64))
        if examples is not None:
            seen = numbers(examples)
            self.register_buffer("middle", seen.mean(0))
            self.register_buffer("unit", seen.std(0).clamp_min(1e-12))
            self.network = nn.Sequential(
                nn.Linear(seen.shape[1], 64),
                nn.SiLU(),
                nn.Linear(64, 64),
                nn.SiLU(),
                nn.Linear(64, 1),
            )
            initialise(self.network, stream(seed, 1))

    def log_z(self, y: Tensor | None) -> Tensor:
        """The learned log Z, with shape (groups,) or ()."""
        if self.network is None:
            return self.level
        return self.level + self.network((numbers(y) - self.middle) / self.unit)[:, 0].double()

    def coefficients(self, log_w: Tensor, y: Tensor | None) -> Tensor:
        with torch.no_grad():
            if bool(self.level.isnan()):
                self.level.copy_(log_w.mean())
        log_z = self.log_z(y)
        delta = (log_w - log_z.detach().reshape(-1, 1)).clamp(-self.huber, self.huber)
        (-delta.mean(1) * log_z).mean().backward()
        return -delta / log_w.numel()

    def learned(self) -> list[nn.Parameter]:
        return list(self.parameters())


@dataclass(frozen=True)
class ForwardKL:
    """-log p_u of paths of the target, which noise draws of it: see `Engine.imitate_noised`.

    No weights enter. Proposals that know such draws are `JointSimulations` and `Given`.
    """
