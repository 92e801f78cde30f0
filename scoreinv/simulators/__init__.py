"""Simulated skies: what priors are trained and tested on."""

from .discs import protoplanetary_disc
from .galaxies import galaxy
from .images import simulate_images

__all__ = ["galaxy", "protoplanetary_disc", "simulate_images"]
