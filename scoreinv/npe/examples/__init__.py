"""Simulators of five kinds of astrophysical data, each on a page, with the likelihood that weighs what is learned."""

from collections.abc import Callable

from scoreinv.npe.examples.chirp import chirp
from scoreinv.npe.examples.cluster import cluster
from scoreinv.npe.examples.disc import disc
from scoreinv.npe.examples.dust import dust
from scoreinv.npe.examples.power import power
from scoreinv.npe.simulator import Simulator

EXAMPLES: dict[str, Callable[[], Simulator]] = {
    "cluster": cluster,
    "power": power,
    "chirp": chirp,
    "dust": dust,
    "disc": disc,
}

__all__ = ["EXAMPLES", "chirp", "cluster", "disc", "dust", "power"]
