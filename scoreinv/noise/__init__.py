"""Noise: what separates the data from A x."""

from scoreinv.noise.base import Noise
from scoreinv.noise.gaussian import GaussianNoise
from scoreinv.noise.poisson import PoissonNoise
from scoreinv.noise.rice import RiceNoise
from scoreinv.noise.student import StudentNoise

__all__ = ["GaussianNoise", "Noise", "PoissonNoise", "RiceNoise", "StudentNoise"]
