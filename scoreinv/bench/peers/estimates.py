"""Estimates of scalar parameters by other packages, at their own defaults where they have any, from the extra `bench`.

sbi: Boelts, Deistler et al., sbi reloaded (2025, 10.21105/joss.07754). lampe: Rozet et al. (github.com/probabilists/lampe),
which leaves the fit to its user, who here takes the plan of ours with the last weights and twice the patience. nbi: Zhang
et al. (2023, arXiv:2312.03824), by the networks of its example. All draw from the global streams of random numbers, which
are set for them and put back.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import math
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from scoreinv.npe import Fitting, ParameterPrior

Draws = Callable[[Tensor, int], Tensor]  # n draws of the posterior of x, with shape (n, d)
HELD_OUT = 0.1  # of the pairs
PATIENCE = 20  # epochs, of lampe's fits


def missing(package: str) -> str:
    """Why a package cannot be used here; empty if it can."""
    if importlib.util.find_spec(package) is None:
        return f"{package} is not installed; pip install 'scoreinv[bench]'"
    return ""


@contextlib.contextmanager
def global_streams(seed: int) -> Iterator[None]:
    """The global streams of torch and numpy, set by a seed within and put back after."""
    kept = np.random.get_state()  # noqa: NPY002, here and below: what those packages draw from
    try:
        with torch.random.fork_rng(devices=()):
            _set(seed)
            yield
    finally:
        np.random.set_state(kept)  # noqa: NPY002


def _set(seed: int) -> None:
    torch.default_generator.manual_seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002


def cpu_seconds() -> float:
    """Of this process, and of those that it has waited for."""
    return time.process_time() + sum(os.times()[2:4])


def by_sbi(
    prior: ParameterPrior, flow: str, theta: Tensor, x: Tensor, seed: int, epochs: int = 2**31 - 1
) -> Draws:
    """NPE of sbi, for parameters that are uniform within their ends, from pairs of shape (n, d) and (n, m)."""
    from sbi.inference import NPE
    from sbi.utils import BoxUniform
    from sbi.utils.tracking import TensorBoardTracker
    from torch.utils.tensorboard import SummaryWriter

    box = BoxUniform(prior.low.float(), prior.high.float())
    kind = "maf" if flow == "maf" else "nsf"  # whose layers are couplings there
    with contextlib.ExitStack() as stack:
        stack.enter_context(global_streams(seed))
        # it would leave its log where the command is given
        log = SummaryWriter(stack.enter_context(tempfile.TemporaryDirectory()))
        stack.callback(log.close)
        nowhere = stack.enter_context(open(os.devnull, "w"))
        stack.enter_context(contextlib.redirect_stdout(nowhere))
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", "Maximum number of epochs")
        learned = NPE(box, kind, show_progress_bars=False, tracker=TensorBoardTracker(log))
        learned.append_simulations(theta.float(), x.float()).train(max_num_epochs=epochs)
        posterior = learned.build_posterior()

    def draws(x: Tensor, n: int) -> Tensor:
        with global_streams(seed):
            return posterior.sample((n,), x=x.float(), show_progress_bars=False).double()

    return draws


def by_lampe(
    prior: ParameterPrior, flow: str, theta: Tensor, x: Tensor, seed: int, epochs: int = 500
) -> Draws:
    """NPE of lampe on standardised numbers."""
    import zuko
    from lampe.inference import NPE, NPELoss
    from lampe.utils import GDStep

    plan, unit = Fitting(epochs=epochs, patience=PATIENCE, average=0), theta.std(0)
    middle, centre, scale = theta.mean(0), x.mean(0), x.std(0)
    pairs = ((theta - middle) / unit).float(), ((x - centre) / scale).float()
    n_held = round(HELD_OUT * len(theta))
    held, trained = ([v[:n_held] for v in pairs], [v[n_held:] for v in pairs])
    with global_streams(seed):
        kind = zuko.flows.MAF if flow == "maf" else zuko.flows.NSF
        layers = {"passes": 2} if flow == "coupling" else {}
        learned = NPE(theta.shape[1], x.shape[1], build=kind, **layers)
        loss = NPELoss(learned)
        step = GDStep(torch.optim.Adam(learned.parameters(), lr=plan.rate), clip=plan.clip)
        best, least, waited = copy.deepcopy(learned.state_dict()), math.inf, 0
        for _ in range(plan.epochs):
            for rows in torch.randperm(len(trained[0])).split(plan.batch):
                step(loss(*(v[rows] for v in trained)))
            with torch.no_grad():
                now = float(loss(*held))
            waited += 1
            if now < least:
                best, least, waited = copy.deepcopy(learned.state_dict()), now, 0
            if waited == plan.patience:
                break
    learned.load_state_dict(best)

    @torch.no_grad()
    def draws(x: Tensor, n: int) -> Tensor:
        with global_streams(seed):
            found = learned.flow(((x - centre) / scale).float()).sample((n,))
        return found.double() * unit + middle

    return draws


ESTIMATES: dict[str, Callable[..., Draws]] = {"sbi": by_sbi, "lampe": by_lampe}


def rounds_by_nbi(
    prior: ParameterPrior,
    curve: Callable[[Tensor], Tensor],
    x: Tensor,
    rounds: int,
    n: int,
    weighted: int,
    epochs: int,
    seed: int,
) -> dict[str, float]:
    """Rounds of nbi for one observation of independent noise of variance 1, of uniform parameters.

    Args:
        prior: Of the parameters.
        curve: Data without noise, with shape (n, m), of theta, with shape (n, d).
        x: The observation, with shape (m,).
        rounds: At most; they end when one is worse than the one before.
        n: Simulations of each.
        weighted: Draws of the last estimate that are weighted by the likelihood.
        epochs: Of each fit, at most.
        seed: Decides everything random.
    """
    from matplotlib import pyplot
    from nbi import NBI
    from scipy.stats import uniform

    shown = pyplot.get_backend()
    noise, began = np.ones(len(x)), cpu_seconds()

    def simulated(theta: Any) -> Any:
        return curve(torch.from_numpy(np.asarray(theta, dtype=float))[None])[0].numpy()

    with contextlib.ExitStack() as stack:
        stack.enter_context(global_streams(seed))
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        nowhere = stack.enter_context(open(os.devnull, "w"))
        stack.enter_context(contextlib.redirect_stdout(nowhere))
        stack.enter_context(contextlib.redirect_stderr(nowhere))
        pyplot.switch_backend("agg")
        stack.callback(pyplot.switch_backend, shown)
        engine = NBI(
            flow={"n_dims": len(prior), "flow_hidden": 64, "num_blocks": 5},
            featurizer={
                "type": "resnet-gru",
                "norm": "weight_norm",
                "dim_in": 1,
                "dim_out": 64,
                "dim_conv_max": 256,
                "depth": 3,
            },
            simulator=simulated,
            priors=[
                uniform(low, high - low)
                for low, high in zip(prior.low.tolist(), prior.high.tolist(), strict=True)
            ],
            path=folder,
            labels=list(prior.names),
        )
        _set(seed)  # the engine has set them itself, always alike
        engine.fit(
            x_obs=x.numpy(),
            noise=noise,
            n_sims=n,
            n_rounds=rounds,
            n_epochs=epochs,
            early_stop_train=True,
            early_stop_patience=10,
            plot=False,
            workers=1,
        )
        trained = cpu_seconds() - began
        _, w = engine.predict(x.numpy(), noise, n_samples=weighted)
        pyplot.close("all")
    return {
        "rounds": engine.round,
        "n_eff of a round": float(max(engine.neff)),
        "n_eff / n": float(1 / np.square(w).sum() - 1) / weighted,
        "k-hat": math.nan,
        "training [CPU s]": trained,
    }
