"""The one training loop of controls, whatever the reference, the objective and the proposals."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from scoreinv.averages import follow
from scoreinv.digests import digest
from scoreinv.finetune.objectives import ForwardKL, LogVariance, Objective
from scoreinv.finetune.paths import Engine, Paths
from scoreinv.finetune.proposals import Noised, OnPolicy, Proposal
from scoreinv.finetune.together import (
    ALONE,
    Share,
    average,
    average_numbers,
    check_same,
    check_share,
)
from scoreinv.streams import stream

CHECKPOINT = "checkpoint.safetensors"
SAVE_EVERY = 200  # iterations
POOL = 4  # batches of paths of the chain that are drawn at once, where iterations take some of their steps
Simulate = Callable[[int, int], tuple[Tensor, Tensor | None]]  # (n, seed) -> images and their data
Observe = Callable[[Tensor, int], Tensor]  # images and a seed -> data


@dataclass(frozen=True)
class Plan:
    """How long and how fast.

    Args:
        iterations: Of the optimiser, on whole paths.
        simulated: Iterations before them, on `groups * paths` paths of the chain, each with data observed at its end
            (`Engine.imitate`). For a control that serves all data. Where `steps` are some of the chain's, the
            paths serve until each step has counted once or so; more often, and images are learned by heart.
        twist: Batches of paths after all iterations, on which a `Twist` is learned.
        groups: Different y in a batch of paths, shared out if there are several processes; 1 where there is only one y.
        paths: Paths of each, G.
        rate: First learning rate; constant for 60 % of all iterations, then falling to a fiftieth.
        rate_log_z: Of the objective's own parameters.
        clip: Longest gradient.
        steps: Steps of the chain whose gradient counts in an iteration, K of T; all if not given.
        ema: Of the weights that are kept.
        seed: Decides everything random.
    """

    iterations: int = 1000
    simulated: int = 0
    twist: int = 0
    groups: int = 1
    paths: int = 128
    rate: float = 2e-3
    rate_log_z: float = 0.1
    clip: float = 1.0
    steps: int | None = None
    ema: float = 0.99
    seed: int = 0

    def __post_init__(self) -> None:
        if self.total < 1 or min(self.iterations, self.simulated, self.twist) < 0:
            raise ValueError(
                f"iterations is {self.iterations}, simulated {self.simulated} and twist {self.twist}; "
                "expected at least 1 of the first two together, and none below 0"
            )
        if self.groups < 1 or self.paths < 2:
            raise ValueError(
                f"groups is {self.groups} and paths {self.paths}, expected at least 1 and 2"
            )
        if self.steps is not None and self.steps < 1:
            raise ValueError(
                f"steps is {self.steps}, expected at least 1; leave it out for all steps of the chain"
            )
        # so asked that nan does not pass
        if not (self.rate > 0 and self.rate_log_z >= 0 and self.clip > 0):
            raise ValueError(
                f"rate is {self.rate:g}, rate_log_z {self.rate_log_z:g} and clip {self.clip:g}; expected rate and clip "
                "above 0, and rate_log_z not below; try the defaults"
            )
        if not 0 <= self.ema < 1:
            raise ValueError(
                f"ema is {self.ema:g}, expected 0 <= ema < 1; 0 keeps the last weights"
            )

    @property
    def total(self) -> int:
        """Iterations of both kinds."""
        return self.simulated + self.iterations


@dataclass(frozen=True)
class Recipe:
    """What is learned from what.

    Args:
        objective: See `scoreinv.finetune.objectives`.
        proposals: Each with its share of the paths of every y.
        temper: Share of the iterations in which the reward rises from a twentieth of itself to all of it; 0 for none.
    """

    objective: Objective | ForwardKL = field(default_factory=LogVariance)
    proposals: Sequence[tuple[float, Proposal]] = field(
        default_factory=lambda: [(1.0, OnPolicy())]
    )
    temper: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.temper < 1:
            raise ValueError(
                f"temper is {self.temper:g}, expected 0 <= temper < 1: the training must end with all of the reward"
            )
        others = [type(p).__name__ for _, p in self.proposals if not isinstance(p, Noised)]
        if isinstance(self.objective, ForwardKL) and others:
            raise ValueError(
                f"{', '.join(others)} know no draws of the target, which the forward divergence needs; "
                "expected JointSimulations or Given"
            )


def train_control(
    engine: Engine,
    simulate: Simulate,
    plan: Plan,
    recipe: Recipe | None = None,
    observe: Observe | None = None,
    folder: str | Path | None = None,
    progress: bool = False,
    share: Share = ALONE,
) -> list[dict[str, float]]:
    """Train a control; its parameters are changed, and end as their running mean.

    Args:
        engine: Reference, control and reward.
        simulate: Images of the prior and their data, for a number and a seed; data may be None, or the same for all.
        plan: How long and how fast.
        recipe: Objective and proposals; the log-variance on paths of the control if not given.
        observe: Data of images, for those and a seed; needed where `plan.simulated` asks for them.
        folder: Where the training is kept every so often; one that is there is continued, bit for bit. (Of proposals that
            remember images, several processes keep what the first remembers.)
        progress: Show a progress bar.
        share: Number of this process, and of all that train this control together.

    Returns:
        For each iteration the mean of log w of the paths and its standard deviation over those of one y, or how much
        likelier than under the reference simulated paths are [nat].

    Raises:
        ValueError: The folder holds another training; a plan that needs `observe`, and none is given; groups that so many
            processes cannot share.
        FloatingPointError: Log-weights that are not finite.
    """
    if plan.simulated and observe is None:
        raise ValueError(
            f"simulated is {plan.simulated}: expected `observe`, which makes data of the chain's images"
        )
    check_share(share, plan.groups)
    recipe = recipe or Recipe()
    state = _State(engine, plan, recipe, *simulate(2, plan.seed), share[1])
    here = replace(plan, groups=plan.groups // share[1])
    place = () if share == ALONE else (share[0],)  # in the streams of random numbers
    path = None if folder is None else Path(folder) / CHECKPOINT
    if path is not None and path.exists():
        state.load(path)
    check_same(state.signature, share)
    pool, T = None, engine.reference.steps
    served = POOL * max(1, T // (plan.steps or T))
    with tqdm(
        total=plan.total,
        initial=state.step,
        disable=not progress,
        unit="batch",
        desc="control",
    ) as bar:
        while state.step < plan.total:
            i = state.step
            state.optimiser.param_groups[0]["lr"] = plan.rate * falling(i / plan.total)
            state.optimiser.zero_grad()
            if i < plan.simulated:
                if pool is None or i % served == 0:
                    generator = stream(plan.seed, 9, i // served, *place)
                    pool = engine.unsteered(POOL * here.groups * here.paths, generator)
                found = _imitation(engine, pool, observe, here, stream(plan.seed, 3, i, *place))
            else:
                done = (i - plan.simulated) / plan.iterations
                found = _batch(
                    engine, simulate, here, recipe, done, stream(plan.seed, 2, i, *place)
                )
            average(state.gradients, share)
            found = average_numbers(found, share)
            nn.utils.clip_grad_norm_(engine.control.parameters(), plan.clip)
            state.optimiser.step()
            # where they began is each process' own
            average(state.own, share)
            state.follow(found)
            bar.set_postfix({k: f"{v:.2f}" for k, v in state.history[-1].items()})
            bar.update()
            due = state.step % SAVE_EVERY == 0 or state.step == plan.total
            if path is not None and due and share[0] == 0:
                state.save(path)
    engine.control.load_state_dict(state.average)
    return state.history


class _State:
    """Everything that a training goes on from: weights, their running mean, moments, buffers, what happened so far."""

    def __init__(
        self,
        engine: Engine,
        plan: Plan,
        recipe: Recipe,
        x: Tensor,
        y: Tensor | None,
        processes: int,
    ) -> None:
        self.control, self.plan, self.recipe = engine.control, plan, recipe
        self.step = 0
        self.history: list[dict[str, float]] = []
        objective = recipe.objective
        self.own = objective.learned() if isinstance(objective, Objective) else []
        self.optimiser = torch.optim.Adam(
            [
                {"params": list(self.control.parameters()), "lr": plan.rate},
                *([{"params": self.own, "lr": plan.rate_log_z}] if self.own else []),
            ]
        )
        self.average = {k: v.clone() for k, v in self.control.state_dict().items()}
        proposals = [(share, type(p).__name__) for share, p in recipe.proposals]
        weights = sum(p.numel() for p in self.control.parameters())
        self.key = f"{plan} {recipe.temper} {type(recipe.objective).__name__} {proposals} {weights} weights"
        self.key += f" {processes} processes" if processes > 1 else ""
        # prior, chain, control, measurement and data all show in the weights of a few paths
        _, log_w = engine.paths(len(x), y, stream(plan.seed, 4))
        self.probe = float(log_w.sum())

    @property
    def gradients(self) -> list[Tensor]:
        """Of all that is learned."""
        learned = [p for group in self.optimiser.param_groups for p in group["params"]]
        return [p.grad for p in learned if p.grad is not None]

    @property
    def signature(self) -> dict[str, float]:
        """What processes that train together must have in common."""
        weights = int(digest(self.control.parameters())[:8], 16)
        return {"step": self.step, "first paths": self.probe, "weights' hash": weights}

    def follow(self, found: dict[str, float]) -> None:
        """After a step: the running mean, and what is remembered."""
        self.step += 1
        follow(self.average.values(), self.control.state_dict().values(), self.plan.ema, self.step)
        self.history.append(found)

    def _tensors(self) -> dict[str, Tensor]:
        found = {f"average.{k}": v for k, v in self.average.items()}
        found |= {f"weight.{k}": v for k, v in self.control.state_dict().items()}
        found |= {f"own.{i}": p.detach() for i, p in enumerate(self.own)}
        for i, moments in self.optimiser.state_dict()["state"].items():
            found |= {f"moment.{i}.{k}": v for k, v in moments.items()}
        for i, (_, proposal) in enumerate(self.recipe.proposals):
            found |= {f"proposal.{i}.{k}": v for k, v in proposal.state().items()}
        return found

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".part")
        record = {"step": str(self.step), "key": self.key, "probe": repr(self.probe)}
        record["history"] = json.dumps(self.history)
        tensors = {k: v.detach().clone().contiguous() for k, v in self._tensors().items()}
        save_file(tensors, partial, metadata=record)
        partial.replace(path)

    def load(self, path: Path) -> None:
        with safe_open(path, "pt") as f:
            record, tensors = f.metadata(), {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118
        # the last bits depend on the threads
        same = math.isclose(float(record["probe"]), self.probe, rel_tol=1e-3, abs_tol=1e-3)
        if record["key"] != self.key or not same:
            other = "prior, chain or data" if record["key"] == self.key else record["key"]
            raise ValueError(
                f"{path} is of another training ({other}, not {self.key}); choose another folder, or delete it"
            )
        part = lambda name: {
            k.removeprefix(f"{name}."): v for k, v in tensors.items() if k.startswith(f"{name}.")
        }
        self.step, self.history = int(record["step"]), json.loads(record["history"])
        self.control.load_state_dict(part("weight"))
        kept = part("average")
        self.average = {k: kept[k].to(v.device) for k, v in self.average.items()}
        for i, p in enumerate(self.own):
            p.data.copy_(tensors[f"own.{i}"])
        state = self.optimiser.state_dict()
        for name, v in part("moment").items():
            i, _, kind = name.partition(".")
            state["state"].setdefault(int(i), {})[kind] = v
        self.optimiser.load_state_dict(state)
        for i, (_, proposal) in enumerate(self.recipe.proposals):
            proposal.restore(part(f"proposal.{i}"))


def _imitation(
    engine: Engine, pool: Paths, observe: Observe, plan: Plan, generator: torch.Generator
) -> dict[str, float]:
    """The gradient of an iteration on paths of the chain."""
    which = torch.randperm(len(pool), generator=generator)[: plan.groups * plan.paths]
    y = observe(pool.x[which], int(torch.randint(2**62, (1,), generator=generator)))
    return {"gain": engine.imitate(pool, which, y, generator, plan.steps)}


def _batch(
    engine: Engine,
    simulate: Simulate,
    plan: Plan,
    recipe: Recipe,
    done: float,
    generator: torch.Generator,
) -> dict[str, float]:
    """The gradient of an iteration on whole paths, with this share of them done."""
    x, y = simulate(plan.groups, int(torch.randint(2**62, (1,), generator=generator)))
    shares = torch.tensor([share for share, _ in recipe.proposals], dtype=torch.float64)
    counts = _split(shares / shares.sum(), plan.paths, generator)
    repeat = lambda v, n: None if v is None else v.repeat_interleave(n, 0)
    asked = [(n, p) for n, (_, p) in zip(counts, recipe.proposals, strict=True) if n]
    if isinstance(recipe.objective, ForwardKL):
        images = torch.cat([p.images(repeat(x, n), generator) for n, p in asked])
        data = None if y is None else torch.cat([repeat(y, n) for n, _ in asked])
        return {"gain": engine.imitate_noised(images, data, generator, plan.steps)}
    found = [
        (n, *p.propose(engine, repeat(x, n), repeat(y, n), done, generator)) for n, p in asked
    ]
    for _, paths, _ in found:
        for _, proposal in recipe.proposals:
            proposal.saw(paths)
    log_w = torch.cat([lw.reshape(plan.groups, count) for count, _, lw in found], 1)
    if recipe.temper and done < recipe.temper:
        reward = torch.cat([p.log_reward.reshape(plan.groups, n) for n, p, _ in found], 1)
        log_w = log_w - 0.95 * (1 - done / recipe.temper) * reward
    if not bool(torch.isfinite(log_w).all()):
        raise FloatingPointError("log-weights of paths are not finite: is the reward?")
    c = recipe.objective.coefficients(log_w, y)
    steps = None
    if plan.steps is not None:
        steps = torch.randperm(engine.reference.steps, generator=generator)[: plan.steps]
    for (_, paths, _), part in zip(found, c.split([n for n, _, _ in found], 1), strict=True):
        engine.learn(paths, part.flatten(), steps)
    return {"log_w": float(log_w.mean()), "spread": float(log_w.std(1).mean())}


def _split(shares: Tensor, n: int, generator: torch.Generator) -> list[int]:
    """n paths over proposals: the whole parts of their shares, and the rest at random."""
    counts = (shares * n).floor().long()
    rest = n - int(counts.sum())
    if rest:
        more = torch.multinomial(shares, rest, replacement=True, generator=generator)
        counts = counts + more.bincount(minlength=len(shares))
    return counts.tolist()


def falling(done: float) -> float:
    """The learning rate over its first value."""
    return 1.0 if done < 0.6 else max(0.02, (1 - done) / 0.4)
