"""Samplers of other packages, by their own code on the same problems."""

from scoreinv.bench.peers.azula import Azula
from scoreinv.bench.peers.base import Peer
from scoreinv.bench.peers.deepinv import DeepInv

__all__ = ["Azula", "DeepInv", "Peer"]
