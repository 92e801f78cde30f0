"""The one training loop: denoising score matching of a U-Net on images.

    loss = E | F(c_in x_sigma, c_noise) - (x_0 - c_skip x_sigma) / c_out |^2,    x_sigma = x_0 + sigma n,  ln sigma normal

(Karras et al., 2022, arXiv:2206.00364, eq. 8; Vincent, A Connection Between Score Matching and Denoising Autoencoders,
2011), Adam with a warm-up and a cosine decay, and an exponential moving average of the weights. All randomness of
step t depends on (seed, t) only, so a run that was stopped resumes exactly.
"""

from __future__ import annotations

import json
import math
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from scoreinv.averages import follow
from scoreinv.gaussian import Gaussian
from scoreinv.priors.network import ErrorModel, ScorePrior, preconditioning
from scoreinv.priors.unet import UNet, initialise
from scoreinv.priors.zoo import save_prior
from scoreinv.streams import stream
from scoreinv.training.error import learn_error
from scoreinv.training.images import image_moments, load_images, seen
from scoreinv.training.run import Optimisation, TrainingRun

CHECKPOINT = "checkpoint.safetensors"
LOG_EVERY = 50
ERROR_IMAGES = 1024  # held-out images on which errors are measured


def learning_rate(step: int, plan: Optimisation) -> float:
    """Linear warm-up, then a cosine to zero."""
    warm = min(1.0, (step + 1) / plan.warmup)
    return plan.rate * warm * 0.5 * (1 + math.cos(math.pi * step / plan.steps))


class _State:
    """Network, moving average and optimiser; reads and writes itself as safetensors."""

    def __init__(self, network: UNet, plan: Optimisation) -> None:
        self.step = 0
        self.network = network
        self.optimiser = torch.optim.AdamW(
            network.parameters(), lr=plan.rate, betas=(0.9, 0.99), weight_decay=0.0
        )
        self.average = {k: v.detach().clone() for k, v in network.named_parameters()}

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
        finished = state.step >= run.optimisation.steps
        if finished and run.error_steps > 0:
            # with a second look images are denoised otherwise, so it comes before the tables
            prior.error = _error(run, prior, images, held_out, accelerator, progress)
        card = _card(run, state.step, sigma_data)
        card["held_out"] = denoising_table(prior, run, held_out)
        if finished and run.draws > 0:
            card["power_spectrum"] = spectrum_table(prior, run, held_out, run.draws)
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
            weights = accelerator.unwrap_model(model).parameters()
            follow(state.average.values(), weights, plan.ema, 1 + state.step)
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
    known = seen(run.data, held_out[:ERROR_IMAGES], stream(run.seed, 5))
    # the finished prior is on the CPU, wherever it was trained
    batch = lambda t: tuple(
        v.cpu() for v in _batch(run, images, run.optimisation.steps + t, accelerator)
    )
    return learn_error(prior, batch, known, run.error_steps, run.seed, progress, run.look_steps)


def population_moments(run: TrainingRun, images: Tensor, most: int = 16384) -> Gaussian:
    """Mean and stationary covariance of the images as training sees them."""
    parts = [
        seen(run.data, part, stream(run.seed, 1, i))
        for i, part in enumerate(images[:most].split(1024))
    ]
    return image_moments(torch.cat(parts), run.data.symmetric)


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
        network,
        sigma_data,
        moments,
        run.sigma_min,
        run.sigma_max,
        {"prior": run.name},
        symmetric=run.data.symmetric,
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
        truth = seen(run.data, held_out, stream(run.seed, 2), amplitude)
        half = len(truth) // 2
        wiener, truth = image_moments(truth[:half], run.data.symmetric), truth[half:]
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
    truth = seen(run.data, held_out, stream(run.seed, 2))
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
    known = json.loads(path.read_text())
    for record in (wanted, known):  # these change no weights
        record.pop("draws", None)
        record.pop("error_steps", None)
        record.pop("look_steps", None)
        record["data"].pop("workers")
        record["optimisation"].pop("save_every")
    if known != wanted:
        raise ValueError(
            f"{folder} holds a training run with another configuration ({path}); "
            "choose another output folder, or delete this one to start again"
        )


def _batch(
    run: TrainingRun, images: Tensor, step: int, accelerator: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """This process' share of batch `step`: clean images, levels and noise."""
    plan = run.optimisation
    generator = stream(run.seed, 4, step)
    index = torch.randint(len(images), (plan.batch,), generator=generator)
    x0 = seen(run.data, images[index], generator)
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
