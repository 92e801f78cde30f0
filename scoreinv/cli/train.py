"""`scoreinv train`: a new prior, from simulated images or a folder of them."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass

from scoreinv.training import TrainingRun
from scoreinv.training import train as train_prior


@dataclass(frozen=True)
class TrainConfig:
    """A training run and where it goes.

    Args:
        run: What to train.
        output: Folder of images, checkpoint, log and the finished prior.
        max_seconds: Stop after so long and keep the checkpoint [s]; the same command goes on.
    """

    run: TrainingRun
    output: str
    max_seconds: float = math.inf


def train(config: TrainConfig) -> None:
    """Train a prior on simulated images or a folder of images; a run that was stopped goes on from its checkpoint."""
    try:
        folder = train_prior(
            config.run, config.output, config.max_seconds, progress=sys.stderr.isatty()
        )
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"checkpoints stay in {config.output}; the same command goes on from the last one"
        ) from None
    print(f"prior         {folder}")
