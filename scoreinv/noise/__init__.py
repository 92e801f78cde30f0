"""Noise: what separates the data from A x."""

from scoreinv.noise.gaussian import GaussianNoise

__all__ = ["GaussianNoise"]
