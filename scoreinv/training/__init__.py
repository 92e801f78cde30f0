"""How priors are trained: the one loop, and what a trained network learns of its error."""

from scoreinv.training.loop import (
    Network,
    Optimisation,
    TrainingData,
    TrainingRun,
    augment,
    image_moments,
    train,
)

__all__ = [
    "Network",
    "Optimisation",
    "TrainingData",
    "TrainingRun",
    "augment",
    "image_moments",
    "train",
]
