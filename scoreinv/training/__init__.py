"""How priors are trained: the one loop, and what a trained network learns of its error."""

from scoreinv.training.images import augment, image_moments, unseen_images
from scoreinv.training.loop import train
from scoreinv.training.run import Network, Optimisation, TrainingData, TrainingRun

__all__ = [
    "Network",
    "Optimisation",
    "TrainingData",
    "TrainingRun",
    "augment",
    "image_moments",
    "train",
    "unseen_images",
]
