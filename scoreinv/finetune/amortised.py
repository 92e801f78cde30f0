"""The verb `finetune`: a control for all data of a measurement, or for one observation, and posteriors drawn with it.

    amortised = si.finetune(prior, likelihood, steps=50, seed=0)
    draws = amortised.condition(y).sample(64, seed=1)

Paths of the control carry weights, so draws are exact in the limit of many, and the evidence comes with them.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from scoreinv.digests import digest
from scoreinv.finetune.adapted import Adapted, AdaptedControl, check_control, new_control
from scoreinv.finetune.chain import NotKnownError, PriorChain, TwistedChain, measured
from scoreinv.finetune.control import (
    Control,
    convolves,
    guidance,
)
from scoreinv.finetune.evidence import Evidence, evidence, simulated_bounds
from scoreinv.finetune.paths import Engine
from scoreinv.finetune.proposals import JointSimulations, OnPolicy
from scoreinv.finetune.steered import Steered
from scoreinv.finetune.together import ALONE, Share
from scoreinv.finetune.training import Plan, Recipe, Simulate, train_control
from scoreinv.finetune.twist import Twist, learn_twist
from scoreinv.gaussian import Covariance
from scoreinv.likelihood import Likelihood
from scoreinv.noise import GaussianNoise, PoissonNoise, RiceNoise
from scoreinv.operators import LinearOperator
from scoreinv.posterior import Posterior
from scoreinv.priors.base import Prior
from scoreinv.samplers.run import sample
from scoreinv.samplers.samples import Samples
from scoreinv.streams import stream

PROBES = 256  # of them that measure how sure the prior is at each level
FORMAT = 9  # of the files of a control
FIRST = 3.5  # level of a chain that data steer, over the widest direction of the prior
LAST = 1 / 30  # and where a prior knows what is left
MEDIAN = 0.6745  # of the absolute value of a standard normal variable
IMAGES = 1024  # draws of the prior from which training data are simulated
TOGETHER = 128  # images of a chain whose paths are in memory at once


@dataclass(frozen=True)
class Amortised:
    """A control that serves any data of one measurement.

    Attributes:
        likelihood: Of the measurement.
        chain: The prior's reverse chain.
        control: Trained.
        y: The only data it serves; None if it serves all.
        twist: By which particles are resampled on the way.
        history: Of the training.
    """

    likelihood: Likelihood
    chain: PriorChain
    control: Control
    twist: Twist
    y: Tensor | None = None
    history: list[dict[str, float]] = field(default_factory=list)

    def __str__(self) -> str:
        """Its kind and a hash of its weights, for the provenance of draws and to find them again."""
        both = (self.control.state_dict(), self.twist.state_dict())
        found = digest(v for state in both for v in state.values())
        return f"{type(self.control).__name__} {found[:12]}"

    @property
    def engine(self) -> Engine:
        """Its paths and their weights."""
        reward = lambda x, y: self.likelihood.log_prob(y, x)
        return Engine(self.chain, self.control, reward)

    def condition(self, y: Tensor | None = None) -> Conditioned:
        """The posterior of one observation, with shape (*data).

        Raises:
            ValueError: Data that it was not trained for.
        """
        if self.y is not None and y is not None and not torch.equal(y, self.y):
            raise ValueError(
                "this control was trained for one observation, and these are other data; "
                "call finetune without y for a control that serves all"
            )
        y = self.y if y is None else y
        if y is None:
            raise ValueError("which data? This control serves all: pass y")
        return Conditioned(Posterior(self.chain.prior, self.likelihood, y), self)

    def unsteered(self, n: int, seed: int) -> Tensor:
        """n images that the chain draws without data, with shape (n, *shape): of the prior that weighted paths answer for.

        A chain of few steps does not draw quite what `Prior.sample` does.
        """
        counts = [min(TOGETHER, n - i) for i in range(0, n, TOGETHER)]
        parts = [self.engine.unsteered(m, stream(seed, 10, i)).x for i, m in enumerate(counts)]
        return torch.cat(parts)

    def bounds(self, sims: int, paths: int, seed: int) -> list[Evidence]:
        """Evidence reports for simulated data, each with an upper bound that is strict for the chain.

        An image of the chain and the path that made it are, given the data simulated from it, an exact draw of the target.

        Args:
            sims: Data sets.
            paths: Of the control for each.
            seed: Decides all.
        """
        return simulated_bounds(self.engine, self.likelihood.simulate, sims, paths, seed)

    def save(self, folder: str | Path) -> None:
        """Keep the control; `load_amortised` reads it."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {f"control.{k}": v for k, v in self.control.state_dict().items()}
        tensors |= {f"twist.{k}": v for k, v in self.twist.state_dict().items()}
        tensors = {k: v.contiguous() for k, v in tensors.items()}
        values = [C.eigenvalues(self.chain.shape) for C in self.chain.covariances]
        tensors["eigenvalues"] = torch.stack(values)
        if self.y is not None:
            tensors["y"] = torch.view_as_real(self.y) if self.y.is_complex() else self.y
        save_file(tensors, folder / "control.safetensors")
        (folder / "control.json").write_text(json.dumps(_card(self), indent=1) + "\n")


@dataclass(frozen=True)
class Conditioned:
    """The posterior of one observation, under a control.

    Attributes:
        posterior: The target.
        amortised: What draws from it.
    """

    posterior: Posterior
    amortised: Amortised

    def sample(
        self,
        n: int,
        seed: int,
        particles: int = 1,
        effective: float = 0.25,
        moves: int = 1,
        **options: Any,
    ) -> Samples:
        """n draws of weighted paths; see `Steered` for how many, and `scoreinv.sample` for the options."""
        sampler = Steered(self.amortised, particles=particles, effective=effective, moves=moves)
        return sample(self.posterior, n, sampler, seed=seed, **options)

    def evidence(self, n: int, seed: int) -> Evidence:
        """What n paths prove."""
        y = self.posterior.y
        _, log_w = self.amortised.engine.paths(n, y.expand(n, *y.shape), stream(seed, 6))
        return evidence(log_w)


def finetune(
    prior: Prior,
    likelihood: Likelihood,
    *,
    seed: int,
    steps: int = 50,
    y: Tensor | None = None,
    images: Tensor | None = None,
    guided: bool = True,
    control: Control | Adapted | None = None,
    plan: Plan | None = None,
    recipe: Recipe | None = None,
    folder: str | Path | None = None,
    progress: bool = False,
    share: Share = ALONE,
) -> Amortised:
    """Train a control of the prior's chain on simulated data, or on one observation.

    Args:
        prior: Its network stays as it is.
        likelihood: Simulates the data, and is the reward.
        seed: Decides everything random, in the place of the plan's.
        steps: T of the chain, 50 or more for results.
        y: The only data to serve, with shape (*data); any data of the likelihood if not given.
        images: Images to simulate data of, with shape (N, C, H, W); 1,024 draws of the prior if not given.
        guided: Start from the chain pulled by the data.
        control: What learns: the prior's network, adapted (`scoreinv.finetune.adapted`), or any control; if not given, a
            U-Net beside it, or a perceptron for few pixels (`scoreinv.finetune.control`).
        plan: How long and how fast.
        recipe: Objective and proposals; the log-variance if not given, on paths of the control, half of them joint
            simulations where it serves all data.
        folder: Where the training is kept, and goes on from after an interruption.
        progress: Show a progress bar.
        share: Number of this process, and of all that train this control together; the first ends with the twist, too.

    Raises:
        ValueError: Data, images or a control that do not fit, or are not finite.
    """
    check_control(control, prior)
    check_observation(prior, likelihood, y)  # before images are drawn, which takes long
    images = prior.sample(IMAGES, seed) if images is None else images
    amortised = untrained(
        prior, likelihood, images, seed, steps=steps, y=y, guided=guided, control=control
    )
    plan = replace(plan or Plan(), seed=seed)
    return train(amortised, images, plan, recipe, folder=folder, progress=progress, share=share)


def untrained(
    prior: Prior,
    likelihood: Likelihood,
    images: Tensor,
    seed: int,
    *,
    steps: int = 50,
    y: Tensor | None = None,
    guided: bool = True,
    control: Control | Adapted | None = None,
) -> Amortised:
    """The posteriors of a control that has learned nothing yet; see `finetune` for the arguments."""
    _check_images(images, prior)
    check_observation(prior, likelihood, y)
    told = likelihood if guided else None
    levels = PriorChain(prior, steps, None, *span(prior, told)).levels
    covariances = measured(prior, levels, images[:PROBES].to(prior.dtype), seed)
    chain = new_chain(prior, covariances, told)
    examples = None if y is not None else likelihood.simulate(images, seed)
    if not isinstance(control, Control):
        control = control_of(chain, likelihood, examples, guided, control, seed)
    return Amortised(likelihood, chain, control, new_twist(chain, likelihood, examples), y)


def check_observation(prior: Prior, likelihood: Likelihood, y: Tensor | None) -> None:
    """Raise, as `Posterior` does, if y is given and does not fit, or is not finite."""
    if y is not None:
        Posterior(prior, likelihood, y)


def train(
    amortised: Amortised,
    images: Tensor,
    plan: Plan,
    recipe: Recipe | None = None,
    *,
    folder: str | Path | None = None,
    progress: bool = False,
    share: Share = ALONE,
) -> Amortised:
    """Train its control in place; see `finetune` for the arguments. Returns the same object."""
    y = amortised.y
    if y is not None and plan.simulated:
        raise ValueError(
            f"simulated is {plan.simulated}, but this control serves one y: images of the prior did not make it; expected 0"
        )
    own = [(1.0, OnPolicy())]
    shared = own if y is not None else [*own, (1.0, JointSimulations())]
    engine, simulate = amortised.engine, _simulator(amortised.likelihood, images, y)
    recipe = recipe or Recipe(proposals=shared)
    observe = amortised.likelihood.simulate
    history = train_control(engine, simulate, plan, recipe, observe, folder, progress, share)
    if share[0] == 0:
        history += learn_twist(amortised.twist, engine, simulate, plan, progress)
    amortised.history.extend(history)
    return amortised


def new_chain(
    prior: Prior, covariances: Sequence[Covariance], likelihood: Likelihood | None
) -> PriorChain:
    """The twisted chain where covariances given data are known, unless the prior knows its error around each state."""
    if likelihood is not None and not prior.knows_error:
        try:
            return TwistedChain(prior, len(covariances), likelihood, covariances)
        except NotKnownError:
            pass  # a plain chain with guidance will do
    levels = span(prior, likelihood)
    return PriorChain(prior, len(covariances), covariances, *levels, likelihood)


def span(prior: Prior, likelihood: Likelihood | None) -> tuple[float | None, float | None]:
    """First and last noise level of a chain of few steps that data steer; None for those of `PriorChain`.

    Steps are where data decide. Above `FIRST` they move x_0 by little of its noise, and by how much is known; below `LAST`
    a prior that knows its error draws the rest at once, unless data tell more of the image.
    """
    if not prior.knows_error:
        return None, None
    widest = float(prior.moments.covariance.eigenvalues(prior.shape).max()) ** 0.5
    if likelihood is None or not likelihood.gaussian:
        return None, max(prior.sigma_min, LAST * widest)
    precision = likelihood.information(torch.float64).largest()
    last = LAST * widest
    if precision > 0:
        last = min(last, precision**-0.5 / 2)
    last = max(prior.sigma_min, last)
    return min(FIRST * widest, prior.sigma_max), last


def control_of(
    chain: PriorChain,
    likelihood: Likelihood,
    examples: Tensor | None,
    guided: bool,
    adapted: Adapted | None = None,
    seed: int = 0,
) -> Control:
    """The control of `new_control` that sees data of a likelihood, and is guided by it."""
    apart = guided and not isinstance(chain, TwistedChain)
    guide, image = guidance(chain, likelihood) if apart else None, None
    if examples is not None and convolves(chain.shape):
        image = data_image(likelihood, chain.prior.moments.mean)
    return new_control(chain, adapted, image=image, examples=examples, guide=guide, seed=seed)


def new_twist(chain: PriorChain, likelihood: Likelihood, examples: Tensor | None) -> Twist:
    """A twist that suits the images' size and the data."""
    mean = chain.prior.moments.mean
    image = data_image(likelihood, mean) if convolves(chain.shape) else None
    return Twist(chain, likelihood, image, examples)


def data_image(likelihood: Likelihood, around: Tensor) -> Callable[[Tensor], Tensor]:
    """Data as images of about unit scale, A^T S^-1 y over the noise of a pixel, with shape (B, C, H, W).

    Noise of other kinds has no S, but that of amplitudes, which get phases of zero: a network is shown the image, and makes
    of it what it can.

    Args:
        likelihood: Of the data.
        around: A typical image, whose noise sets the scale, with shape (C, H, W).
    """
    operator, noise = likelihood.operator, likelihood.noise
    linear = operator if isinstance(operator, LinearOperator) else operator.inner
    parts = noise.parts if isinstance(noise, RiceNoise) else noise
    dtype = torch.complex128 if linear.complex else torch.float64

    def back(y: Tensor) -> Tensor:
        y = parts.weigh(y) if isinstance(parts, GaussianNoise) else y
        return linear.transpose(y.to(dtype))

    # counts are not made of less than nothing
    clean = operator(around[None].double().clamp_min(0)).expand(64, *operator.data_shape)
    seen = noise.observe(clean, torch.Generator().manual_seed(0))
    # counts of a background are no noise; a few outliers are, and must not decide
    sky = noise.background if isinstance(noise, PoissonNoise) else 0.0
    size = back(seen - clean - sky).abs()
    scale = size[size > 0].median() / MEDIAN
    return lambda y: torch.asinh(back(y.to(operator_dtype(likelihood)) - sky) / scale)


def operator_dtype(likelihood: Likelihood) -> torch.dtype:
    """Of the data's algebra."""
    return torch.complex128 if likelihood.operator.complex else torch.float64


def load_amortised(folder: str | Path, prior: Prior, likelihood: Likelihood) -> Amortised:
    """A control that `Amortised.save` has kept.

    Raises:
        ValueError: Another prior or measurement than it was trained for, or a broken file.
    """
    folder = Path(folder)
    try:
        card = json.loads((folder / "control.json").read_text())
        tensors = load_file(folder / "control.safetensors")
    except (OSError, json.JSONDecodeError, SafetensorError) as error:
        raise ValueError(f"{folder} holds no control that can be read: {error}") from error
    if card.get("format") != FORMAT:
        raise ValueError(
            f"{folder} holds a control of format {card.get('format')}, this version reads {FORMAT}; train it again"
        )
    C, values = prior.moments.covariance, tensors.pop("eigenvalues")

    # a spectrum that channels share has one for each of them here
    def like(w: Tensor, v: Tensor) -> Tensor:
        if v.numel() == 1:
            return w.flatten()[0].to(v.dtype)
        return w.reshape(v.shape if w.numel() == v.numel() else prior.shape).to(v.dtype)

    covariances = [C.map(lambda v, w=w: like(w, v)) for w in values]
    chain = new_chain(prior, covariances, likelihood if card["guided"] else None)
    y = tensors.pop("y", None)
    if y is not None and likelihood.operator.complex:
        y = torch.view_as_complex(y)
    zero = None if y is not None else _nothing(2, likelihood)
    adapted = Adapted(card["rank"]) if card["control"] == AdaptedControl.__name__ else None
    control = control_of(chain, likelihood, zero, card["guided"], adapted)
    found = Amortised(likelihood, chain, control, new_twist(chain, likelihood, zero), y)
    if (seen := _card(found)) != card:
        other = [k for k in card if seen.get(k) != card[k]]
        raise ValueError(
            f"{folder} holds a control of another problem: its {', '.join(other)} differ; "
            "pass the prior and the likelihood that it was trained with"
        )
    for name, module in (("control.", control), ("twist.", found.twist)):
        part = {k.removeprefix(name): v for k, v in tensors.items() if k.startswith(name)}
        sizes = lambda state: {k: v.shape for k, v in state.items()}
        if sizes(part) != sizes(module.state_dict()):
            raise ValueError(
                f"{folder} holds a control of other sizes than finetune makes; expected one that it made: "
                "build a control of your own as it was, and load its weights into it"
            )
        module.load_state_dict(part)
    return found


def _card(amortised: Amortised) -> dict[str, Any]:
    control, chain = amortised.control, amortised.chain
    probe = torch.linspace(-1, 1, math.prod(chain.shape), dtype=torch.float64)
    probe = probe.reshape(1, *chain.shape)
    clean = amortised.likelihood.operator(probe)
    seen = amortised.likelihood.log_prob(torch.ones_like(clean[0]), probe)
    return {
        "format": FORMAT,
        "control": type(control).__name__,
        "rank": control.adapted.rank if isinstance(control, AdaptedControl) else None,
        "chain": type(chain).__name__,
        "guided": control.guided or isinstance(chain, TwistedChain),
        "steps": chain.steps,
        "prior": dict(chain.prior.identity),
        "likelihood": hashlib.sha256(f"{float(seen):.7g}".encode()).hexdigest()[:16],
    }


def _check_images(images: Tensor, prior: Prior) -> None:
    if tuple(images.shape[1:]) != tuple(prior.shape) or not len(images):
        raise ValueError(
            f"images have shape {tuple(images.shape)}, expected (N, {', '.join(map(str, prior.shape))}), N at least 1"
        )
    if not images.is_floating_point():
        raise ValueError(
            f"images are {images.dtype}, expected floating point; pass images.float()"
        )
    bad = ~torch.isfinite(images).flatten(1).all(1)
    if bool(bad.any()):
        raise ValueError(
            f"{int(bad.sum())} of {len(images)} images hold numbers that are not finite; drop those"
        )


def _simulator(likelihood: Likelihood, images: Tensor, y: Tensor | None) -> Simulate:
    def simulate(n: int, seed: int) -> tuple[Tensor, Tensor]:
        chosen = torch.randint(len(images), (n,), generator=stream(seed, 1))
        x = images[chosen]
        return x, likelihood.simulate(x, seed) if y is None else y.expand(n, *y.shape)

    return simulate


def _nothing(n: int, likelihood: Likelihood) -> Tensor:
    return torch.zeros(n, *likelihood.operator.data_shape, dtype=operator_dtype(likelihood))
