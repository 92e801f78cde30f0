"""What path weights say of a control, in nats.

With w the weights of paths of the control and Z the evidence of the discretised chain,

    ELBO = E log w  <=  log Z  =  log E w,        P(log mean w > log Z + c) <= exp(-c),

the second by Markov's inequality, for any control however badly trained: -log(alpha) below the estimate is a bound from
below with probability 1 - alpha. From above, E log w over paths of the target (EUBO): for data that were simulated from an
image of the chain, the image noised is such a path. EUBO - ELBO is the one number to watch: a control that misses modes has
an ELBO and an effective sample size that look well, and a gap that does not.

Z of the chain differs from that of the continuous process by O(1 / T): twice the result at 2T less that at T is closer.

Pareto k-hat: Vehtari et al., Pareto Smoothed Importance Sampling (2024, arXiv:1507.02646); bounds: Blessing et al., Beyond
ELBOs: A Large-Scale Evaluation of Variational Methods for Sampling (2024, arXiv:2406.07423).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from scoreinv.finetune.paths import Engine
from scoreinv.streams import stream

ALPHA = 0.05
HEAVY = 0.7  # k-hat from which importance sampling is not to be trusted
COLLAPSED = 5.0  # EUBO - ELBO from which modes are missing [nat]


@dataclass(frozen=True)
class Evidence:
    """Bounds and estimates of log Z from n paths.

    Attributes:
        elbo: Mean of log w [nat].
        log_z: Importance-sampled log Z [nat].
        at_least: Bound on log Z from below, with 95 % probability [nat].
        eubo: Mean of log w over paths of the target [nat]; nan where there are none.
        ess: Effective sample size over n.
        k_hat: Shape of the tail of w: above 0.7 the estimate is not to be trusted.
        std: Standard deviation of log w [nat].
        n: Paths.
    """

    elbo: float
    log_z: float
    at_least: float
    eubo: float
    ess: float
    k_hat: float
    std: float
    n: int

    @property
    def gap(self) -> float:
        """EUBO - ELBO [nat]."""
        return self.eubo - self.elbo

    @property
    def warnings(self) -> list[str]:
        """What is wrong with it, in words; empty if nothing is."""
        found = []
        if self.gap > COLLAPSED:
            found.append(
                f"paths of the target are {self.gap:.1f} nat likelier than the control's own: it misses modes"
            )
        if self.n * self.ess < 10:
            found.append(
                f"{self.n} paths count as {self.n * self.ess:.1f}: log Z is not known; keep to the ELBO"
            )
        elif self.k_hat > HEAVY:
            found.append(
                f"the weights have a heavy tail (k-hat {self.k_hat:.2f}): log Z may be too low"
            )
        return found

    def __str__(self) -> str:
        lines = [
            ("log Z", f"{self.log_z:.3f}, at least {self.at_least:.3f} (95 %)"),
            ("bounds", f"{self.elbo:.3f} (ELBO) to {self.eubo:.3f} (EUBO)"),
            ("weights", f"{100 * self.ess:.1f} % effective of {self.n}, k-hat {self.k_hat:.2f}"),
            *(("warning", w) for w in self.warnings),
        ]
        return "\n".join(f"{name:<10}{text}" for name, text in lines)


def evidence(log_w: Tensor, log_w_target: Tensor | None = None) -> Evidence:
    """The report on log-weights of paths of a control, with shape (n,), and of the target if there are any."""
    if log_w.ndim != 1 or len(log_w) < 10:
        raise ValueError(f"log-weights have shape {tuple(log_w.shape)}, expected at least 10")
    if bool((wrong := ~log_w.isfinite()).any()):
        raise ValueError(
            f"{int(wrong.sum())} of {len(log_w)} log-weights are {float(log_w[wrong][0])}, expected finite numbers; are "
            "the data far outside of what the estimate or the control was trained on?"
        )
    log_w = log_w.double()
    log_z = float(torch.logsumexp(log_w, 0)) - math.log(len(log_w))
    w = torch.softmax(log_w, 0)
    return Evidence(
        elbo=float(log_w.mean()),
        log_z=log_z,
        at_least=log_z + math.log(ALPHA),
        eubo=math.nan if log_w_target is None else float(log_w_target.double().mean()),
        ess=float(1 / w.square().sum()) / len(w),
        k_hat=k_hat(log_w),
        std=float(log_w.std()),
        n=len(log_w),
    )


def simulated_bounds(
    engine: Engine, observe: Callable[[Tensor, int], Tensor], sims: int, paths: int, seed: int
) -> list[Evidence]:
    """Reports for simulated data, each with an upper bound that is strict for the chain.

    An image of the chain and the path that made it are, given the data observed of it, an exact draw of the target.

    Args:
        engine: Of the control.
        observe: Data of images, with shape (B, *shape), and a seed.
        sims: Data sets.
        paths: Of the control for each.
        seed: Decides all.
    """
    reports = []
    for i in range(sims):
        g = stream(seed, 5, i)
        one = engine.unsteered(1, g)
        y = observe(one.x, int(torch.randint(2**62, (1,), generator=g)))
        _, target = engine.onwards(one.states, y, g)
        _, log_w = engine.paths(paths, y.expand(paths, *y.shape[1:]), g)
        reports.append(evidence(log_w, target))
    return reports


def k_hat(log_w: Tensor) -> float:
    """Shape of the generalised Pareto distribution that fits the largest weights."""
    from scipy.stats import genpareto

    tail = min(len(log_w) // 5, int(3 * math.sqrt(len(log_w))))
    top = log_w.double().sort().values[-tail - 1 :]
    w = (top - top[-1]).exp()
    over = (w[1:] - w[0]).numpy()
    if not over.max() > 0:
        return 0.0  # equal weights
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        shape, _, _ = genpareto.fit(over / over.mean(), floc=0)
    return float(shape)


def extrapolated(coarse: float, fine: float) -> float:
    """log Z without the chain's discretisation, from those of T and of 2T steps."""
    return 2 * fine - coarse
