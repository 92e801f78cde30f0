"""What a prior is trained on, and how: the configuration of a run."""

from __future__ import annotations

import math
from dataclasses import dataclass, field


@dataclass(frozen=True)
class TrainingData:
    """Images, augmented by the eight flips and rotations, a shift and an amplitude.

    Args:
        kind: "galaxy" or "disc", which are simulated, or "folder".
        size: Pixels on a side.
        images: How many to train on.
        held_out: How many more for the held-out figures.
        amplitude: Peak of an image, log-uniform between these two [model unit].
        shift: Whole-pixel shift, uniform in [-shift, shift] on each axis.
        workers: Processes that simulate.
        folder: Of images of one's own, for the kind "folder": FITS, .npy, .npz, HDF5 or pictures, of any size.
        symmetric: Whether a flipped or rotated image is as likely as the image; digits are not like that.
    """

    kind: str
    size: int
    images: int
    held_out: int = 4096
    amplitude: tuple[float, float] = (0.5, 2.0)
    shift: int = 2
    workers: int = 2
    folder: str | None = None
    symmetric: bool = True


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
        look_steps: Steps in which it then learns to look at denoised images once more, which leaves less noise on blank sky;
            0 for none, as the shipped priors have it.
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
    look_steps: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        data, network, plan = self.data, self.network, self.optimisation
        low, high = data.amplitude
        smallest = 2 ** len(network.widths)
        for wrong, message in (
            (data.size < 1 or data.size % smallest, f"size is {data.size}, expected a multiple of {smallest}: "
             f"{len(network.widths)} levels of the network each halve the image"),
            (not network.widths or any(w < 1 or w % 8 for w in network.widths), f"widths are {network.widths}, expected "
             "multiples of 8, one or more"),
            (network.blocks < 1 or network.embedding < 2 or network.embedding % 2, f"blocks is {network.blocks} and "
             f"embedding {network.embedding}, expected at least 1 and an even number above 0"),
            (data.images < 1 or data.held_out < 2, f"images is {data.images} and held_out {data.held_out}, "
             "expected at least 1 and 2"),
            (not 0 < low <= high < math.inf, f"amplitude is {data.amplitude}, expected 0 < lowest <= highest < inf"),
            (data.shift < 0, f"shift is {data.shift}, expected 0 or more pixels"),
            ((data.kind == "folder") != (data.folder is not None), f"kind is {data.kind!r} and folder {data.folder}, "
             "expected a folder for the kind 'folder', and for no other"),
            (min(plan.steps, plan.batch, plan.warmup, plan.save_every) < 1, f"steps is {plan.steps}, batch {plan.batch}, "
             f"warmup {plan.warmup} and save_every {plan.save_every}, expected at least 1 of each"),
            (not plan.rate > 0 or not 0 <= plan.ema < 1, f"rate is {plan.rate:g} and ema {plan.ema:g}, "
             "expected a rate above 0 and 0 <= ema < 1"),
            (not plan.log_sigma[1] > 0, f"log_sigma is {plan.log_sigma}, expected a mean and a deviation above 0"),
            (min(self.draws, self.error_steps, self.look_steps) < 0, f"draws is {self.draws}, error_steps "
             f"{self.error_steps} and look_steps {self.look_steps}, expected 0 or more"),
            (self.look_steps > 0 and self.error_steps == 0, f"look_steps is {self.look_steps} and error_steps 0, expected "
             "more: a second look goes by the error that the network knows"),
            (not 0 < self.sigma_min < self.sigma_max < math.inf, f"sigma goes from {self.sigma_min:g} to "
             f"{self.sigma_max:g}, expected 0 < sigma_min < sigma_max"),
        ):  # fmt: skip
            if wrong:
                raise ValueError(message)
