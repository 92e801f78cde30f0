"""The one training loop: denoising score matching of a U-Net on simulated images.

    loss = E | F(c_in x_sigma, c_noise) - (x_0 - c_skip x_sigma) / c_out |^2,    x_sigma = x_0 + sigma n,  ln sigma normal

(Karras et al., 2022, arXiv:2206.00364, eq. 8; Vincent, A Connection Between Score Matching and Denoising Autoencoders,
2011), Adam with a warm-up and a cosine decay, and an exponential moving average of the weights. All randomness of
step t depends on (seed, t) only, so a run that was stopped resumes exactly.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from scoreinv.gaussian import Fourier, Gaussian
from scoreinv.priors.base import stream
from scoreinv.priors.network import ErrorModel, ScorePrior, preconditioning
from scoreinv.priors.unet import UNet, initialise
from scoreinv.priors.zoo import save_prior
from scoreinv.simulators import simulate_images
from scoreinv.training.error import learn_error

CHECKPOINT = "checkpoint.safetensors"
LOG_EVERY = 50
ERROR_IMAGES = 1024  # held-out images on which the correlation of errors is measured


@dataclass(frozen=True)
class TrainingData:
    """Simulated images, augmented by the eight flips and rotations, a shift and an amplitude.

    Args:
        kind: "galaxy" or "disc".
        size: Pixels on a side.
        images: How many to simulate for training.
        held_out: How many more to simulate for the held-out figures.
        amplitude: Peak of an image, log-uniform between these two [model unit].
        shift: Whole-pixel shift, uniform in [-shift, shift] on each axis.
        workers: Processes that simulate.
    """

    kind: str
    size: int
    images: int
    held_out: int = 4096
    amplitude: tuple[float, float] = (0.5, 2.0)
    shift: int = 2
    workers: int = 2


@dataclass(frozen=True)
class Optimisation:
    """How the network is fitted.

    Args:
        steps: Optimiser steps of the whole schedule.
        batch: Images in a step, over all processes.
        rate: Peak learning rate, reached after `warmup` steps and decayed to zero by a cosine.
        warmup: Steps of linear warm-up.
        ema: Decay of the moving average of the weights.
        log_sigma: Mean and standard deviation of ln sigma in training.
        save_every: Steps between checkpoints.
    """

    steps: int
    batch: int = 64
    rate: float = 2e-3
    warmup: int = 200
    ema: float = 0.9985
    log_sigma: tuple[float, float] = (-2.3, 1.7)
    save_every: int = 500


@dataclass(frozen=True)
class Network:
    """Architecture of the U-Net, see `scoreinv.priors.unet.UNet`.

    Args:
        widths: Channels at each resolution, the first at half that of the image.
        blocks: Residual blocks at each resolution, on the way down and on the way up.
        embedding: Features of the noise level.
    """

    widths: tuple[int, ...] = (48, 96, 192)
    blocks: int = 1
    embedding: int = 128


@dataclass(frozen=True)
class TrainingRun:
    """A prior to train: what it learns, how, and what its card says in the end.

    Args:
        name: Name of the prior, for its card.
        data: What it learns.
        optimisation: How it is fitted.
        network: Its architecture.
        sigma_min: Lowest noise level it is trained at [model unit].
        sigma_max: Highest noise level it is trained at [model unit].
        draws: Draws of the finished prior whose power spectra its card compares with held-out images; 0 for none.
        error_steps: Optimiser steps in which the finished network learns its error, which `Guided` follows; 0 for none.
        seed: Decides images, initial weights and batches.
    """

    name: str
    data: TrainingData
    optimisation: Optimisation
    network: Network = field(default_factory=Network)
    sigma_min: float = 0.002
    sigma_max: float = 20.0
    draws: int = 1000
    error_steps: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        data, network, (low, high) = self.data, self.network, self.data.amplitude
        smallest = 2 ** len(network.widths)
        for wrong, message in (
            (data.size % smallest, f"size is {data.size}, expected a multiple of {smallest}: {len(network.widths)} "
             "levels of the network each halve the image"),
            (any(w % 8 for w in network.widths), f"widths are {network.widths}, expected multiples of 8"),
            (data.images < 1 or data.held_out < 2, f"images is {data.images} and held_out {data.held_out}, "
             "expected at least 1 and 2"),
            (not 0 < low <= high, f"amplitude is {data.amplitude}, expected 0 < lowest <= highest"),
            (self.optimisation.warmup < 1, f"warmup is {self.optimisation.warmup}, expected at least 1 step"),
            (not 0 < self.sigma_min < self.sigma_max, f"sigma goes from {self.sigma_min:g} to {self.sigma_max:g}, "
             "expected 0 < sigma_min < sigma_max"),
        ):  # fmt: skip
            if wrong:
                raise ValueError(message)


def augment(
    images: Tensor, generator: torch.Generator, shift: int, amplitude: tuple[float, float]
) -> Tensor:
    """Random flips, rotation, shift and amplitude of each image, with shape (B, C, H, W)."""
    draw = lambda *shape: torch.rand(shape, generator=generator)
    out = torch.empty(images.shape)
    turns, flips = (4 * draw(len(images))).int(), draw(len(images)) < 0.5
    moves = torch.floor((2 * shift + 1) * draw(len(images), 2)).int() - shift
    low, high = math.log(amplitude[0]), math.log(amplitude[1])
    peak = (low + (high - low) * draw(len(images))).exp()
    for i, x in enumerate(images):
        x = x.float().rot90(int(turns[i]), (-2, -1))
        x = x.flip(-1) if flips[i] else x
        out[i] = peak[i] * x.roll((int(moves[i, 0]), int(moves[i, 1])), (-2, -1))
    return out


def image_moments(images: Tensor) -> Gaussian:
    """Mean image and stationary covariance of images with shape (n, C, H, W)."""
    mean = images.mean(0)
    power = torch.zeros(images.shape[1:], dtype=torch.float64)
    for part in images.split(1024):
        power += torch.fft.fft2(part - mean, norm="ortho").abs().double().square().sum(0)
    power = power / len(images)
    # every orientation is equally likely under the augmentation: impose it, and P(k) = P(-k) with it
    power = sum(p.rot90(k, (-2, -1)) for p in _unshifted(power) for k in range(4)) / 8
    return Gaussian(mean, Fourier(torch.fft.ifftshift(power[..., :-1, :-1], (-2, -1))))


def _unshifted(power: Tensor) -> tuple[Tensor, Tensor]:
    """The spectrum on a grid of odd size centred on k = 0 (Nyquist row repeated), and its mirror image."""
    centred = torch.fft.fftshift(power, (-2, -1))
    centred = torch.cat([centred, centred[..., :1, :]], -2)
    centred = torch.cat([centred, centred[..., :, :1]], -1)
    return centred, centred.flip(-1)


def learning_rate(step: int, plan: Optimisation) -> float:
    """Linear warm-up, then a cosine to zero."""
    warm = min(1.0, (step + 1) / plan.warmup)
    return plan.rate * warm * 0.5 * (1 + math.cos(math.pi * step / plan.steps))


def load_images(run: TrainingRun, folder: Path, progress: bool) -> tuple[Tensor, Tensor]:
    """Training and held-out images, simulated once and kept beside the checkpoints; both (n, 1, H, W), float16."""
    data = run.data
    n = data.images + data.held_out
    key = hashlib.sha256(f"{data.kind} {data.size} {n} {run.seed}".encode()).hexdigest()[:12]
    path = folder / f"images-{key}.npy"
    if not path.exists():
        images = simulate_images(data.kind, n, data.size, run.seed, data.workers, progress)
        partial = path.with_suffix(".part.npy")
        np.save(partial, images)
        partial.rename(path)
    images = torch.from_numpy(np.load(path))
    return images[: data.images], images[data.images :]


class _State:
    """Network, moving average and optimiser; reads and writes itself as safetensors."""

    def __init__(self, network: UNet, plan: Optimisation) -> None:
        self.step = 0
        self.network = network
        self.optimiser = torch.optim.AdamW(
            network.parameters(), lr=plan.rate, betas=(0.9, 0.99), weight_decay=0.0
        )
        self.average = {k: v.detach().clone() for k, v in network.named_parameters()}

    def follow(self, network: torch.nn.Module, decay: float) -> None:
        """Move the average towards the weights; early on faster, so that the start is forgotten."""
        decay = min(decay, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            for k, v in network.named_parameters():
                self.average[k].lerp_(v.detach().to(self.average[k].device), 1 - decay)

    def save(self, path: Path, network: torch.nn.Module, optimiser: torch.optim.Optimizer) -> None:
        tensors = {f"average.{k}": v for k, v in self.average.items()}
        names = [k for k, _ in network.named_parameters()]
        for k, v in network.named_parameters():
            tensors[f"weight.{k}"] = v.detach()
        for i, moments in optimiser.state_dict()["state"].items():
            tensors[f"first.{names[i]}"] = moments["exp_avg"]
            tensors[f"second.{names[i]}"] = moments["exp_avg_sq"]
        partial = path.with_suffix(".part")
        save_file(
            {k: v.cpu().contiguous() for k, v in tensors.items()},
            partial,
            metadata={"step": str(self.step)},
        )
        partial.replace(path)

    def load(self, path: Path) -> None:
        tensors = load_file(path)
        with safe_open(path, "pt") as f:
            self.step = int(f.metadata()["step"])
        names = [k for k, _ in self.network.named_parameters()]
        self.network.load_state_dict({k: tensors[f"weight.{k}"] for k in names})
        self.average = {k: tensors[f"average.{k}"] for k in names}
        if self.step == 0:
            return  # stopped before its first step: the optimiser has no moments yet
        state = self.optimiser.state_dict()
        state["state"] = {
            i: {
                "step": torch.tensor(float(self.step)),
                "exp_avg": tensors[f"first.{k}"],
                "exp_avg_sq": tensors[f"second.{k}"],
            }
            for i, k in enumerate(names)
        }
        self.optimiser.load_state_dict(state)


def train(
    run: TrainingRun, folder: str | Path, max_seconds: float = math.inf, progress: bool = True
) -> Path:
    """Train a prior and write it; a run that exists in the folder is continued.

    Args:
        run: What to train.
        folder: Where images, checkpoint, log and the finished prior go.
        max_seconds: Stop (and keep the checkpoint) after so many seconds; a later call goes on exactly from there.
        progress: Show progress bars.

    Returns:
        The folder, which `load_prior` reads.

    Raises:
        ValueError: The folder holds a run with another configuration.
        FloatingPointError: The loss is not finite.
    """
    from accelerate import Accelerator

    deadline, folder = time.monotonic() + max_seconds, Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    accelerator = Accelerator(mixed_precision="bf16")
    main = accelerator.is_main_process
    if main:
        _claim(run, folder)
        load_images(run, folder, progress)
    accelerator.wait_for_everyone()
    images, held_out = load_images(run, folder, progress)
    moments = population_moments(run, images)
    sigma_data = moments.covariance.marginal_variance(tuple(moments.mean.shape)) ** 0.5
    state = _State(_new_network(run, images.shape[1]), run.optimisation)
    if (folder / CHECKPOINT).exists():
        state.load(folder / CHECKPOINT)
    _fit(run, state, images, sigma_data, accelerator, folder, deadline, progress)
    if main:
        prior = as_prior(run, state.average, moments, sigma_data)
        card = _card(run, state.step, sigma_data)
        card["held_out"] = denoising_table(prior, run, held_out)
        if state.step >= run.optimisation.steps:
            if run.draws > 0:
                card["power_spectrum"] = spectrum_table(prior, run, held_out, run.draws)
            if run.error_steps > 0:
                prior.error = _error(run, prior, images, held_out, accelerator, progress)
        save_prior(folder, prior, card)
    return folder


def _fit(
    run: TrainingRun,
    state: _State,
    images: Tensor,
    sigma_data: float,
    accelerator: Any,
    folder: Path,
    deadline: float,
    progress: bool,
) -> None:
    """Optimise from the state's step until the schedule or the time is over; the state is kept on disk."""
    plan, main, losses = run.optimisation, accelerator.is_main_process, []
    model, optimiser = accelerator.prepare(state.network, state.optimiser)
    keep = lambda: state.save(folder / CHECKPOINT, accelerator.unwrap_model(model), optimiser)
    with tqdm(total=plan.steps, initial=state.step, disable=not progress, unit="step") as bar:
        while state.step < plan.steps and time.monotonic() < deadline:
            batch = _batch(run, images, state.step, accelerator)
            optimiser.param_groups[0]["lr"] = learning_rate(state.step, plan)
            loss = _loss(model, *batch, sigma_data)
            optimiser.zero_grad()
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            state.step += 1
            state.follow(accelerator.unwrap_model(model), plan.ema)
            losses.append(float(loss.detach()))
            bar.update()
            if state.step % LOG_EVERY == 0 and main:
                _report(folder, state.step, losses, bar)
                losses.clear()
            if state.step % plan.save_every == 0 and main:
                keep()
    if main:
        keep()


def _error(
    run: TrainingRun,
    prior: ScorePrior,
    images: Tensor,
    held_out: Tensor,
    accelerator: Any,
    progress: bool,
) -> ErrorModel:
    """What the finished network learns of its error."""
    seen = augment(
        held_out[:ERROR_IMAGES], stream(run.seed, 5), run.data.shift, run.data.amplitude
    )
    batch = lambda t: _batch(run, images, run.optimisation.steps + t, accelerator)
    return learn_error(prior, batch, seen, run.error_steps, run.seed, progress)


def population_moments(run: TrainingRun, images: Tensor, most: int = 16384) -> Gaussian:
    """Mean and stationary covariance of the images as training sees them."""
    data = run.data
    parts = [
        augment(part, stream(run.seed, 1, i), data.shift, data.amplitude)
        for i, part in enumerate(images[:most].split(1024))
    ]
    return image_moments(torch.cat(parts))


def _new_network(run: TrainingRun, channels: int) -> UNet:
    """The network with initial weights from the run's own stream."""
    network = UNet(channels=channels, **asdict(run.network))
    initialise(network, stream(run.seed, 0))
    return network.to(memory_format=torch.channels_last)


def as_prior(
    run: TrainingRun, weights: dict[str, Tensor], moments: Gaussian, sigma_data: float
) -> ScorePrior:
    """The prior with these weights."""
    network = UNet(channels=moments.mean.shape[0], **asdict(run.network))
    network.load_state_dict(weights)
    network.to(memory_format=torch.channels_last)
    return ScorePrior(
        network, sigma_data, moments, run.sigma_min, run.sigma_max, {"prior": run.name}
    )


@torch.no_grad()
def denoising_table(
    prior: ScorePrior,
    run: TrainingRun,
    held_out: Tensor,
    levels: tuple[float, ...] = (0.03, 0.1, 0.3, 1.0),
) -> dict[str, dict[str, float]]:
    """Held-out denoising error over that of the population's Wiener filter, at each level.

    "prior" uses the training population; "peak = 1" the same images at unit peak, with the Wiener filter of that
    population.
    """
    table = {}
    for label, amplitude in (("prior", run.data.amplitude), ("peak = 1", (1.0, 1.0))):
        truth = augment(held_out, stream(run.seed, 2), run.data.shift, amplitude)
        half = len(truth) // 2
        wiener, truth = image_moments(truth[:half]), truth[half:]
        table[label] = {}
        for i, sigma in enumerate(levels):
            x = truth + sigma * torch.randn(truth.shape, generator=stream(run.seed, 3, i))
            W = wiener.covariance.map(lambda v, s=sigma: v / (v + s**2))
            linear = wiener.mean + W.apply(x - wiener.mean)
            ours = torch.cat([prior.denoise(p, p.new_full((len(p),), sigma)) for p in x.split(64)])
            ratio = (ours - truth).square().mean() / (linear - truth).square().mean()
            table[label][f"sigma = {sigma:g}"] = round(float(ratio), 4)
    return table


def spectrum_table(
    prior: ScorePrior, run: TrainingRun, held_out: Tensor, n: int
) -> dict[str, int | list[float]]:
    """Median power of n draws of the prior over that of held-out images, at k = 1, 2, ... to 0.9 of Nyquist."""
    data = run.data
    truth = augment(held_out, stream(run.seed, 2), data.shift, data.amplitude)
    ratio = _median_power(prior.sample(n, seed=run.seed)) / _median_power(truth)
    return {"draws": n, "ratio": [round(float(r), 3) for r in ratio]}


def _median_power(images: Tensor) -> Tensor:
    """Median over images of the mean power in rings of spatial frequency, with shape (k,)."""
    n = images.shape[-1]
    k = torch.fft.fftfreq(n) * n
    ring = (k[:, None] ** 2 + k**2).sqrt().round()
    power = torch.fft.fft2(images.double()).abs().square().mean(1)
    rings = [power[:, ring == i].mean(1) for i in range(1, int(0.45 * n) + 1)]
    return torch.stack(rings, 1).median(0).values


def _claim(run: TrainingRun, folder: Path) -> None:
    """Keep the configuration in the folder, and refuse to continue another one."""
    path, wanted = folder / "run.json", json.loads(json.dumps(asdict(run)))
    if not path.exists():
        path.write_text(json.dumps(wanted, indent=2))
        return
    seen = json.loads(path.read_text())
    for record in (wanted, seen):  # these change no weights
        record.pop("draws", None)
        record.pop("error_steps", None)
        record["data"].pop("workers")
        record["optimisation"].pop("save_every")
    if seen != wanted:
        raise ValueError(
            f"{folder} holds a training run with another configuration ({path}); "
            "choose another output folder, or delete this one to start again"
        )


def _batch(
    run: TrainingRun, images: Tensor, step: int, accelerator: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """This process' share of batch `step`: clean images, levels and noise."""
    plan, data = run.optimisation, run.data
    generator = stream(run.seed, 4, step)
    index = torch.randint(len(images), (plan.batch,), generator=generator)
    x0 = augment(images[index], generator, data.shift, data.amplitude)
    # stratified quantiles: every batch covers all levels
    u = (
        torch.randperm(plan.batch, generator=generator)
        + torch.rand(plan.batch, generator=generator)
    ) / plan.batch
    log_sigma = plan.log_sigma[0] + plan.log_sigma[1] * torch.special.ndtri(
        u.clamp(1e-6, 1 - 1e-6)
    )
    sigma = log_sigma.exp().clamp(run.sigma_min, run.sigma_max)
    noise = torch.randn(x0.shape, generator=generator)
    share = slice(accelerator.process_index, None, accelerator.num_processes)
    return tuple(v[share].to(accelerator.device) for v in (x0, sigma, noise))


def _loss(
    model: torch.nn.Module, x0: Tensor, sigma: Tensor, noise: Tensor, sigma_data: float
) -> Tensor:
    skip, out, scale, c = preconditioning(sigma, sigma_data)
    x = x0 + sigma.reshape(-1, 1, 1, 1) * noise
    target = (x0 - skip * x) / out
    loss = (
        (model((scale * x).contiguous(memory_format=torch.channels_last), c).float() - target)
        .square()
        .mean()
    )
    if not bool(torch.isfinite(loss)):
        raise FloatingPointError(
            "the training loss is not finite; the last checkpoint is kept. Lower the learning rate?"
        )
    return loss


def _report(folder: Path, step: int, losses: list[float], bar: tqdm) -> None:
    mean = sum(losses) / len(losses)
    bar.set_postfix(loss=f"{mean:.4f}")
    with (folder / "log.jsonl").open("a") as f:
        f.write(json.dumps({"step": step, "loss": mean, "time": time.time()}) + "\n")


def _card(run: TrainingRun, step: int, sigma_data: float) -> dict:
    return {
        "name": run.name,
        "network": {"channels": 1, **asdict(run.network)},
        "sigma_data": sigma_data,
        "sigma_min": run.sigma_min,
        "sigma_max": run.sigma_max,
        "unit": "peak of a typical image = 1",
        "trained_steps": step,
        "trained_images": step * run.optimisation.batch,
        "training": asdict(run),
    }
