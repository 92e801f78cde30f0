"""Any function of an image in the place of a likelihood: p(x) r(x, y) / Z(y).

A classifier's log-probability turns a prior of all digits into one of the digit y; exp(Q(x, y) / alpha) turns a prior of
actions into the policy for the state y that is best without leaving it far behind. The reward is only evaluated, never
differentiated, unless guidance is asked for. Where a label can be drawn of each image, from p(y | x) = r(x, y), images of
the prior and their labels are joint draws of the target, and the training has exact paths for free.

Venkatraman et al., Amortizing Intractable Inference in Diffusion Models for Vision, Language and Control (2024,
arXiv:2405.20971).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from scoreinv.finetune.adapted import Adapted, check_control, new_control
from scoreinv.finetune.amortised import IMAGES, PROBES
from scoreinv.finetune.chain import measured_chain
from scoreinv.finetune.control import Control, guidance_by_gradient
from scoreinv.finetune.evidence import Evidence, evidence, simulated_bounds
from scoreinv.finetune.paths import Engine, Reward
from scoreinv.finetune.proposals import JointSimulations, OnPolicy
from scoreinv.finetune.together import ALONE, Share
from scoreinv.finetune.training import Observe, Plan, Recipe, train_control
from scoreinv.priors.base import Prior
from scoreinv.samplers.smc import systematic
from scoreinv.streams import stream


@dataclass(frozen=True)
class Rewarded:
    """A control whose draws are those of a prior as a reward reweighs them.

    Attributes:
        engine: Chain, control and reward.
        observe: Draws a label of each image; None if the reward is no probability of labels.
        history: Of the training.
    """

    engine: Engine
    observe: Observe | None = None
    history: list[dict[str, float]] = field(default_factory=list)

    def weighted(self, n: int, seed: int, y: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """n draws with shape (n, C, H, W), and their log-weights with shape (n,), for one y with shape (*data)."""
        many = None if y is None else y.expand(n, *y.shape)
        paths, log_w = self.engine.paths(n, many, stream(seed, 6))
        return paths.x, log_w

    def sample(self, n: int, seed: int, y: Tensor | None = None) -> Tensor:
        """n draws, resampled by their weights, with shape (n, C, H, W)."""
        x, log_w = self.weighted(n, seed, y)
        return x[systematic(torch.softmax(log_w, 0), n, stream(seed, 7))]

    def evidence(self, n: int, seed: int, y: Tensor | None = None) -> Evidence:
        """What n paths prove of log E_prior r(x, y)."""
        return evidence(self.weighted(n, seed, y)[1])

    def bounds(self, sims: int, paths: int, seed: int) -> list[Evidence]:
        """Evidence reports for labels drawn of images of the chain, with upper bounds that are strict for it.

        Raises:
            ValueError: A reward that labels cannot be drawn of.
        """
        if self.observe is None:
            raise ValueError("upper bounds need `observe`, which draws labels of images")
        return simulated_bounds(self.engine, self.observe, sims, paths, seed)


def finetune_by_reward(
    prior: Prior,
    reward: Reward,
    *,
    seed: int,
    steps: int = 50,
    y: Tensor | None = None,
    observe: Observe | None = None,
    images: Tensor | None = None,
    guided: bool = False,
    control: Control | Adapted | None = None,
    plan: Plan | None = None,
    recipe: Recipe | None = None,
    folder: str | Path | None = None,
    progress: bool = False,
    share: Share = ALONE,
) -> Rewarded:
    """Train a control of the prior's chain towards p(x) r(x, y).

    Args:
        prior: Its network stays as it is.
        reward: log r of images (B, C, H, W) and their y (B, *data), with shape (B,) [nat].
        seed: Decides everything random, in the place of the plan's.
        steps: T of the chain, 50 or more for results.
        y: What the reward may be told, with shape (N, *data), such as one-hot classes; None if it is told nothing.
        observe: Draws a y of each image with probability r(x, y), for images and a seed, if the reward is one.
        images: Of the prior, with shape (N, C, H, W); 1,024 draws if not given.
        guided: Start from the chain pulled by the reward's gradient.
        control: What learns: the prior's network, adapted (`scoreinv.finetune.adapted`), or any control; if not given, a
            U-Net beside it, or a perceptron for few pixels (`scoreinv.finetune.control`).
        plan: How long and how fast.
        recipe: Objective and proposals; the log-variance if not given, on paths of the control, half of them joint draws
            where `observe` makes them.
        folder: Where the training is kept, and goes on from after an interruption.
        progress: Show a progress bar.
        share: Number of this process, and of all that train this control together.

    Raises:
        ValueError: A reward that does not give one finite number for each image.
    """
    check_control(control, prior)
    images = prior.sample(IMAGES, seed) if images is None else images
    _check(reward, images[:2], y)
    chain = measured_chain(prior, steps, images[:PROBES], seed)
    if not isinstance(control, Control):
        guide = guidance_by_gradient(chain, reward) if guided else None
        control = new_control(chain, control, examples=y, guide=guide, seed=seed)
    engine = Engine(chain, control, reward)

    def simulate(n: int, seed: int) -> tuple[Tensor, Tensor | None]:
        x = images[torch.randint(len(images), (n,), generator=stream(seed, 1))]
        if observe is not None:
            return x, observe(x, seed)
        return x, None if y is None else y[torch.randint(len(y), (n,), generator=stream(seed, 2))]

    own = [(1.0, OnPolicy())]
    recipe = recipe or Recipe(
        proposals=own if observe is None else [*own, (1.0, JointSimulations())]
    )
    plan = replace(plan or Plan(), seed=seed)
    history = train_control(engine, simulate, plan, recipe, observe, folder, progress, share)
    return Rewarded(engine, observe, history)


def _check(reward: Reward, images: Tensor, y: Tensor | None) -> None:
    value = reward(images, None if y is None else y[:1].expand(len(images), *y.shape[1:]))
    if tuple(value.shape) != (len(images),) or not bool(torch.isfinite(value).all()):
        raise ValueError(
            f"the reward of {len(images)} images has shape {tuple(value.shape)} and the values {value.tolist()}; "
            "expected one finite number for each"
        )
