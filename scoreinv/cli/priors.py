"""`scoreinv priors`: the priors that come with the package."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import scoreinv as si

COLUMNS = ("name", "size", "sigma", "trained images", "held-out error", "power of draws", "sha256")
NOTE = """\
sigma [model unit; the peak of a typical image is 1]
held-out error: mean squared denoising error over that of the Wiener filter, for images of peak 1, at each noise level
power of draws: median power spectrum over that of held-out images, lowest and highest ratio from k = 1 to 0.9 of Nyquist"""


@dataclass(frozen=True)
class PriorsConfig:
    """No keys."""


def priors(config: PriorsConfig) -> None:
    """List the priors that come with the package."""
    cards = si.shipped_priors()
    if not cards:
        print("no priors come with this installation; train one with `scoreinv train`")
        return
    table = [COLUMNS, *(tuple(_row(name, card)) for name, card in cards.items())]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for row in table:
        print("  ".join(f"{cell:<{w}}" for cell, w in zip(row, widths, strict=True)).rstrip())
    print(f"\n{NOTE}")


def _row(name: str, card: dict[str, Any]) -> Iterator[str]:
    size = card["training"]["data"]["size"]
    errors = card.get("held_out", {}).get("peak = 1", {})
    yield name
    yield f"{size} x {size}"
    yield f"{card['sigma_min']:g} to {card['sigma_max']:g}"
    yield f"{card['trained_images']:,}"
    yield ", ".join(f"{v:.2f} at {k.removeprefix('sigma = ')}" for k, v in errors.items())
    ratio = card.get("power_spectrum", {}).get("ratio")
    yield f"{min(ratio):.2f} to {max(ratio):.2f}" if ratio else "not measured"
    yield card["sha256"][:12]
