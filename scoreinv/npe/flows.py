"""Densities of u given features of the data: normalising flows and mixtures of zuko, behind one call.

Papamakarios, Pavlakou & Murray, Masked Autoregressive Flow (2017, arXiv:1705.07057); Durkan et al., Neural Spline Flows
(2019, arXiv:1906.04032); Dinh, Krueger & Bengio, NICE (2014, arXiv:1410.8516), for couplings; Bishop, Mixture Density
Networks (1994).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

KINDS = ("maf", "nsf", "coupling", "mixture")


def new_flow(
    kind: str,
    parameters: int,
    features: int,
    hidden: tuple[int, ...] = (64, 64),
    transforms: int = 5,
) -> nn.Module:
    """q(u | features), a module whose call gives a distribution.

    Args:
        kind: maf, nsf, coupling, or mixture (of Gaussians).
        parameters: Numbers u.
        features: Numbers that it is conditioned on.
        hidden: Widths of the networks.
        transforms: Layers of a flow; half the components of a mixture.

    Raises:
        ValueError: Another kind, or a coupling of one parameter.
    """
    if kind not in KINDS:
        raise ValueError(f"flow is {kind!r}, expected one of {', '.join(KINDS)}")
    if kind == "coupling" and parameters < 2:
        raise ValueError("a coupling needs two parameters or more; take maf, nsf or mixture")
    from zuko import flows

    sizes = {"features": parameters, "context": features, "hidden_features": hidden}
    if kind == "mixture":
        return flows.GMM(components=2 * transforms, **sizes)
    if kind == "maf":
        return flows.MAF(transforms=transforms, **sizes)
    return flows.NSF(transforms=transforms, passes=2 if kind == "coupling" else None, **sizes)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Code that takes no generator, on the CPU under this seed; the global state is left as it was."""
    before = torch.default_generator.get_state()
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        torch.default_generator.set_state(before)
