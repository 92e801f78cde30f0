"""What commands that sample have in common: one data section, one sampler, an amplitude."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import scoreinv as si
from scoreinv.cli.data import Observation, candidates, observe

DATA = ("visibilities", "cutout", "simulation", "exposure")
SAMPLERS = ("smc", "anneal", "guided")


def check_sections(config: Any) -> None:
    """Raise unless a configuration has one data section, and one sampler at most."""
    given = [name for name in DATA if getattr(config, name) is not None]
    if len(given) != 1:
        seen = " and ".join(given) or "none"
        raise ValueError(f"expected exactly one of the sections {', '.join(DATA)}; got {seen}")
    samplers = [name for name in SAMPLERS if getattr(config, name) is not None]
    if len(samplers) > 1:
        raise ValueError(
            f"expected one sampler at most, got {' and '.join(samplers)}; "
            f"leave one out, on the command line with --{samplers[0]} null"
        )


def data_section(config: Any) -> Any:
    """The data section that is given."""
    return next(x for name in DATA if (x := getattr(config, name)) is not None)


def sampler(config: Any) -> si.SMC | si.Anneal | si.Guided:
    """The sampler that is given, or the default."""
    return next((x for name in SAMPLERS if (x := getattr(config, name)) is not None), si.SMC())


def chosen(
    section: Any, amplitude: float | None, prior: si.Prior
) -> tuple[Observation, float, Sequence[str]]:
    """The observation and the amplitude of the prior: of several pixel scales the one under which the data are likeliest.

    Returns:
        Both, and a line for each of several pixel scales.
    """
    choices = [observe(part, prior.shape) for part in candidates(section)]
    if len(choices) == 1 and amplitude is not None:
        return choices[0], amplitude, []
    if len(choices) > 1 and amplitude is not None:
        raise ValueError(
            "pixel scales are compared at the likeliest amplitude of each; leave amplitude out, or give one pixel_scale"
        )
    found = [si.amplitude_by_evidence(prior, seen.likelihood, seen.y) for seen in choices]
    best = max(range(len(found)), key=lambda i: found[i][1])
    lines = [
        f"{seen.grid.pixel_scale:g} arcsec: log Z {evidence - found[best][1]:+.1f}, amplitude {a:.4g}"
        for seen, (a, evidence) in zip(choices, found, strict=True)
    ]
    # to the four digits that it is known to: the last bits depend on the threads, and a run that goes on elsewhere must
    # find the same
    return choices[best], float(f"{found[best][0]:.4g}"), lines if len(found) > 1 else []


def say(name: str, text: Any) -> None:
    """A line of the report on the terminal."""
    print(f"{name:<14}{text}".rstrip())
