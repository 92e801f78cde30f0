"""Simulated skies: what priors are trained and tested on."""

from .discs import protoplanetary_disc
from .galaxies import galaxy
from .images import simulate_images
from .sersic import SersicGalaxy

__all__ = ["SersicGalaxy", "galaxy", "protoplanetary_disc", "simulate_images"]
