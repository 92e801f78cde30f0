"""Streams of random numbers, one for each purpose: whatever is asked for elsewhere, a stream stays the same."""

from __future__ import annotations

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
