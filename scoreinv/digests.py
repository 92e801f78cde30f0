"""Whether two arrays, or two settings, are the same, without keeping both."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


def digest(values: Iterable[Tensor]) -> str:
    """SHA-256 of the bytes of arrays, one after another, as 64 hexadecimal digits."""
    found = hashlib.sha256()
    for v in values:
        found.update(v.detach().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()


def digest_of_json(*parts: Any) -> str:
    """SHA-256 of what JSON can say, as 64 hexadecimal digits."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def rounded(values: Tensor) -> str:
    """A number that tells arrays apart, to seven digits: the last bits of what was computed depend on the threads."""
    values = torch.view_as_real(values) if values.is_complex() else values
    values = values.flatten().double()
    ramp = torch.linspace(1, 2, len(values), dtype=torch.float64)
    # what is positive has a sum whose digits do not cancel
    shifted = values + values.square().mean().sqrt()
    return f"{float((ramp * shifted.square()).sum()):.7g}"
