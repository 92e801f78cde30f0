"""What a state on the way promises: the potential by which paths of a control are resampled before they end.

With p_u the paths of a control, p those of the reference and r the reward, particles that count by psi_k at x_k change their
weight from one step to the next by

    Delta_k  =  log psi_{k+1}(x_{k+1})  -  log psi_k(x_k)  -  log p_u(x_{k+1} | x_k) / p(x_{k+1} | x_k),      psi_T = r.

All are constant where the control is right and psi_k = E[r | x_k], and so is log psi_0(x_0) less what the start spends. The
twist is learned on paths of the finished control, as what a Gaussian prior foresees plus a network,

    log psi_k(x, y)  =  log N(y; A D, S + A C_sigma A^T)  +  h(x, D, k, y),        loss  =  sum_k Var Delta_k

over the paths of one y: what all particles share does not matter. Any psi leaves the weights of whole paths what they are.

Optimal twists: Guarniero, Johansen & Lee, The Iterated Auxiliary Particle Filter (2017, arXiv:1511.06286); Naesseth et al.,
Elements of Sequential Monte Carlo (2019, arXiv:1903.04797), section 3.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from tqdm import tqdm

from scoreinv.finetune.chain import PriorChain, foreseen, foreseen_log_prob
from scoreinv.finetune.control import TIMES, answer, numbers
from scoreinv.finetune.paths import Engine, Paths, chunk
from scoreinv.finetune.training import Plan, Simulate, falling
from scoreinv.likelihood import Likelihood
from scoreinv.priors.unet import UNet, initialise, sinusoidal
from scoreinv.streams import seeded, stream


class Twist(nn.Module):
    """log psi_k up to a constant of k and y.

    Args:
        chain: Of the paths.
        likelihood: Of the data.
        image: The image of data y, with shape (B, C, H, W); for few pixels none, and they enter as numbers.
        examples: Data like those to come, with shape (n, *data), which set the scale of y; None if there is only one y, or
            an image of it.
        seed: Of the first weights.
    """

    @seeded(0)
    def __init__(
        self,
        chain: PriorChain,
        likelihood: Likelihood,
        image: Callable[[Tensor], Tensor] | None,
        examples: Tensor | None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.chain, self._likelihood, self._image = chain, likelihood, image
        self._given = foreseen(chain, likelihood)
        self._d = math.prod(chain.shape)
        self.register_buffer("learned", torch.tensor(False))
        if image is None:
            seen = torch.zeros(1, 0) if examples is None else numbers(examples)
            self.register_buffer("middle", seen.mean(0))
            unit = (seen - self.middle).square().mean(0).sqrt().clamp_min(1e-12)
            self.register_buffer("unit", unit)
            inputs = 2 * self._d + TIMES + seen.shape[1]
            self.network: nn.Module = nn.Sequential(
                nn.Linear(inputs, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 1)
            )
            initialise(self.network, stream(seed, 2))
            nn.init.zeros_(self.network[-1].weight)
        else:
            self.network = UNet(3 * chain.shape[0], (16, 32), embedding=64, outputs=1)
            initialise(self.network, stream(seed, 2))
        self.network.to(chain.device)

    @property
    def knows(self) -> bool:
        """Whether it says anything."""
        return self._given is not None or bool(self.learned)

    @torch.no_grad()
    def promise(self, x: Tensor, denoised: Tensor, k: int, y: Tensor) -> Tensor:
        """log psi_k up to a constant of k and y, with shape (B,), in float64."""
        foreseen = self.foreseen(denoised, k, y)
        if not bool(self.learned):
            return foreseen
        return foreseen + self(x, denoised, torch.full((len(x),), k), y)

    def foreseen(self, denoised: Tensor, k: int, y: Tensor) -> Tensor:
        """What a Gaussian prior foresees of images at step k, with shape (B,), in float64; 0 of data that are not Gaussian.

        Args:
            denoised: With shape (B, *shape).
            k: Step of all.
            y: Data of each, with shape (B, *data).
        """
        if self._given is None:
            return torch.zeros(len(denoised), dtype=torch.float64)
        return foreseen_log_prob(self._likelihood, self._given[k], denoised, y)

    def forward(self, x: Tensor, denoised: Tensor, k: Tensor, y: Tensor) -> Tensor:
        """h, with shape (B,), in float64, for states and denoised images (B, *shape), steps (B,) and data (B, *data)."""
        clock = self.chain.clock(k).float()
        over = lambda s: s.float().reshape(-1, *[1] * (x.ndim - 1))
        last = torch.full_like(k, self.chain.steps)
        inputs = [
            x.float() / over(self.chain.scale(k)),
            denoised.float() / over(self.chain.scale(last)),
        ]
        if self._image is not None:
            inputs.append(self._image(y).float())
            h = answer(self.network, torch.cat(inputs, 1), clock)
            return h.double().flatten(1).sum(1) / math.sqrt(self._d)
        flat = [*(v.flatten(1) for v in inputs), sinusoidal(clock, TIMES)]
        if len(self.middle):
            flat.append((numbers(y) - self.middle) / self.unit)
        return answer(self.network, torch.cat(flat, 1))[:, 0].double()


def learn_twist(
    twist: Twist, engine: Engine, simulate: Simulate, plan: Plan, progress: bool = False
) -> list[dict[str, float]]:
    """Train a twist on paths of a finished control, `plan.twist` batches of them.

    Returns:
        For each batch the standard deviation of Delta_k over the paths of one y, root mean square over the steps [nat].
    """
    optimiser = torch.optim.Adam(twist.parameters(), lr=plan.rate)
    history = []
    for i in tqdm(range(plan.twist), disable=not progress, unit="batch", desc="twist"):
        generator = stream(plan.seed, 8, i)
        _, y = simulate(plan.groups, int(torch.randint(2**62, (1,), generator=generator)))
        y = y.repeat_interleave(plan.paths, 0)
        paths, log_w = engine.paths(len(y), y, generator)
        optimiser.param_groups[0]["lr"] = plan.rate * falling(i / plan.twist)
        optimiser.zero_grad()
        variance = _learn(twist, paths, log_w, plan)
        nn.utils.clip_grad_norm_(twist.parameters(), plan.clip)
        optimiser.step()
        twist.learned.fill_(True)
        history.append({"promise": math.sqrt(variance)})
    return history


def _learn(twist: Twist, paths: Paths, log_w: Tensor, plan: Plan) -> float:
    """Add the gradient of the mean variance of Delta_k; returns the variance.

    What the network says goes first, a few steps at a time, then the gradient with respect to that, then the network's.
    """
    T, B = paths.spent.shape

    def said(part: Tensor) -> Tensor:
        flat = lambda v: v[part].flatten(0, 1)
        y = paths.y.repeat(len(part), *[1] * (paths.y.ndim - 1))
        h = twist(flat(paths.states), flat(paths.denoised), part.repeat_interleave(B), y)
        return h.reshape(len(part), B)

    parts = torch.arange(T).split(chunk(paths.x.shape[1:], B))
    with torch.no_grad():
        h = torch.cat([said(part) for part in parts])
        base = torch.stack([twist.foreseen(D, k, paths.y) for k, D in enumerate(paths.denoised)])
    h.requires_grad_(True)
    psi = torch.cat([base + h, paths.log_reward[None]])
    # the law of x_0 is not the reference's where the chain starts from the data
    first = paths.log_reward - paths.spent.sum(0) - log_w
    delta = torch.cat([psi[:1] - first, psi.diff(dim=0) - paths.spent])
    variance = delta.unflatten(1, (plan.groups, plan.paths)).var(2).mean()
    variance.backward()
    for part in parts:
        (said(part) * h.grad[part]).sum().backward()
    return float(variance.detach())
