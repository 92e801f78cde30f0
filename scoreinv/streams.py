"""Streams of random numbers, one for each purpose: whatever is asked for elsewhere, a stream stays the same."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


def stream(*seed: int) -> torch.Generator:
    """A generator for each tuple of integers; different tuples give unrelated streams."""
    state = 0
    for value in seed:
        # splitmix64 (Steele, Lea & Flood 2014): nearby integers land far apart
        state = (state + 0x9E3779B97F4A7C15 + int(value)) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
        state ^= state >> 31
    return torch.Generator().manual_seed(state >> 1)


def integer(*seed: int) -> int:
    """A seed for code that takes one, for each tuple of integers; different tuples give unrelated ones."""
    return int(torch.randint(2**62, (1,), generator=stream(*seed)))


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Code that takes no generator, such as that of new layers, under this seed; the global states are left as they were."""
    # CUDA is not woken up for this
    cuda = torch.cuda.is_initialized()
    with torch.random.fork_rng(range(torch.cuda.device_count()) if cuda else ()):
        (torch.manual_seed if cuda else torch.default_generator.manual_seed)(seed)
        yield
