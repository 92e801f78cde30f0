"""From a simulator to the posterior of an observation in four stages, each of which leaves a file that says what it is of.

    data        simulations of the prior, kept (`scoreinv.npe.store`)
    train       estimators, one for each method and seed, side by side; the one that says most of fresh simulations is best
    validate    whether its posteriors cover the truth (`scoreinv.diagnostics`)
    observe     draws for one observation, weighted where the likelihood is known

Every stage may run alone. It finds what the stage before has left, refuses it if that is of other simulations, and is done
when what it would make is there already. Estimators of all kinds are compared by the mean of log q(theta | x) over the same
fresh simulations, which is greatest for the posterior itself.
"""

from __future__ import annotations

import json
import time
import zipfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from scoreinv.diagnostics import Coverage, coverage
from scoreinv.digests import digest_of_json
from scoreinv.npe.conditioned import Weighted
from scoreinv.npe.data import ALONE, mapped, named, usable
from scoreinv.npe.estimator import Estimator
from scoreinv.npe.featurizers import Data
from scoreinv.npe.figure import corner, predictive
from scoreinv.npe.fitting import Fitting
from scoreinv.npe.flows import HIDDEN, KINDS, TRANSFORMS, check_flow
from scoreinv.npe.nle import NLE
from scoreinv.npe.nre import NRE
from scoreinv.npe.posterior import NPE
from scoreinv.npe.simulator import Simulator
from scoreinv.npe.store import Store, load_simulator, read_json
from scoreinv.processes import shared
from scoreinv.streams import integer, stream
from scoreinv.tensors import as_tensor

SPARE = 10  # times as many simulations as are wanted, where some may be dropped
JUDGED = 100  # fresh simulations by which estimators are compared
CHAINS = 500  # for the normalisation of one that is known up to a constant
PREDICTED = 500  # data for a figure
WORTH_SHOWING = 50  # effective draws
TABLE, POSTERIOR = "train.json", "posterior.npz"

FLOWS: dict[str, Callable[..., Estimator]] = {
    **{kind: partial(NPE, flow=kind) for kind in KINDS},
    "nle": lambda featurizer, **options: NLE(**options),
}
RATIOS: dict[str, Callable[..., Estimator]] = {
    "nre": NRE,
    "contrastive": partial(NRE, contrasts=8),
    "balanced": partial(NRE, balance=100.0),
}
METHODS = FLOWS | RATIOS


@dataclass(frozen=True, kw_only=True)
class Training:
    """What is fitted.

    Args:
        methods: Flows of a posterior (maf, nsf, coupling, mixture, matching, score), nle, nre, contrastive or balanced.
        fits: Of each method, from different seeds.
        members: Of each ensemble.
        invalid: What to do with numbers that are not finite: raise, drop or mask.
        hidden: Widths of the networks of flows.
        transforms: Layers of flows.
        plan: How long and how fast.
    """

    methods: tuple[str, ...] = ("nsf",)
    fits: int = 1
    members: int = 1
    invalid: str = "raise"
    hidden: tuple[int, ...] = HIDDEN
    transforms: int = TRANSFORMS
    plan: Fitting = field(default_factory=Fitting)

    def __post_init__(self) -> None:
        wrong = [m for m in self.methods if m not in METHODS]
        if wrong or not self.methods:
            raise ValueError(
                f"methods are {list(self.methods)}, expected some of {', '.join(METHODS)}"
            )
        if self.fits < 1:
            raise ValueError(f"fits is {self.fits}, expected at least 1")
        check_flow(KINDS[0], self.hidden, self.transforms)

    def new(self, method: str, simulator: Simulator) -> Estimator:
        """An estimator that is not fitted."""
        sizes = {"hidden": self.hidden, "transforms": self.transforms}
        return METHODS[method](
            prior=simulator.prior,
            featurizer=simulator.featurizer,
            members=self.members,
            invalid=self.invalid,
            **(sizes if method in FLOWS else {}),
        )


def train(
    store: Store,
    training: Training,
    folder: Path,
    seed: int,
    workers: int = 1,
    device: str = "cpu",
    progress: bool = False,
) -> dict[str, Any]:
    """Fit every method from every seed; those that are there already are found again.

    Returns:
        The table: a row for each fit, the best first, and what all are of.
    """
    of = digest_of_json(store.hash, asdict(training) | {"methods": None, "fits": None}, seed)
    if missing := len(store.missing()):
        raise ValueError(
            f"{missing} batches of {store.folder} are not simulated yet; the data stage goes on with them"
        )
    jobs = [
        (store.folder, training, folder / f"{m}-{i}", of, integer(seed, i), device)
        for m in training.methods
        for i in range(training.fits)
    ]
    rows = []
    with tqdm(total=len(jobs), disable=not progress, unit="fit", desc="train") as bar:
        for row in shared(_fitted, jobs, workers):
            rows.append(row)
            bar.update()
    rows.sort(key=lambda row: -row["log q [nat]"])
    table = {"of": of, "data": store.hash, "rows": rows}
    (folder / TABLE).write_text(json.dumps(table, indent=1) + "\n")
    return table


def _fitted(
    data: Path,
    training: Training,
    folder: Path,
    of: str,
    seed: int,
    device: str,
) -> dict[str, Any]:
    """Fit one estimator, and judge it by fresh simulations; its row of the table."""
    card = folder / "row.json"
    if card.exists():
        row = read_json(card)
        if row["of"] != of:
            raise ValueError(
                f"{folder} was fitted to other simulations or with another plan; pass --overwrite, or choose another output"
            )
        return row
    store = Store(data)
    simulator = load_simulator(store.card["simulator"])
    method = folder.name.rpartition("-")[0]
    began = time.perf_counter()
    estimator = training.new(method, simulator).fit(
        store.theta,
        store.x,
        seed,
        training.plan,
        noise=simulator.noise,
        device=device,
        checkpoint=folder / "checkpoint",
    )
    seconds = time.perf_counter() - began
    estimator.save(folder)
    # of the data's seed, so that all are judged by the same simulations, which none was fitted to
    truths, seen = fresh_pairs(simulator, JUDGED, integer(store.card["seed"], 1), training.invalid)
    log_q = [
        float(given.log_prob(truth[None])[0]) - given.log_evidence(CHAINS, seed)
        for truth, given in zip(truths, (estimator.condition(x) for x in seen), strict=True)
    ]
    row = {
        "name": folder.name,
        "method": method,
        "seed": seed,
        "log q [nat]": float(np.mean(log_q)),
        "+-": float(np.std(log_q) / len(log_q) ** 0.5),
        "held-out loss": min(epoch["held out"] for epoch in estimator.history[0]),
        "epochs": len(estimator.history[0]),
        "seconds": seconds,
        "dropped": estimator.dropped,
        "of": of,
    }
    card.write_text(json.dumps(row, indent=1) + "\n")
    return row


def best(store: Store, training: Training, folder: Path) -> tuple[str, Estimator]:
    """Name and estimator of the first row of the table.

    Raises:
        ValueError: No table, or one of other simulations.
    """
    try:
        table = json.loads((folder / TABLE).read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(
            f"{folder} holds no table of fits ({error}); run the train stage"
        ) from error
    if table["data"] != store.hash:
        raise ValueError(f"{folder} was fitted to other simulations; run the train stage again")
    name = table["rows"][0]["name"]
    simulator = load_simulator(store.card["simulator"])
    return name, training.new(table["rows"][0]["method"], simulator).load(folder / name)


def validate(
    estimator: Estimator,
    simulator: Simulator,
    sims: int,
    draws: int,
    seed: int,
    swaps: int = 1999,
    progress: bool = False,
) -> Coverage:
    """Whether posteriors of fresh simulations cover the truths.

    Args:
        estimator: Fitted.
        simulator: What it was fitted to.
        sims: Simulations.
        draws: Of each.
        seed: Decides them.
        swaps: Draws of the null distribution.
        progress: Show a progress bar.
    """
    truths, seen = fresh_pairs(simulator, sims, integer(seed, 2), estimator.invalid)
    found, log_q = [], []
    for i, x in enumerate(tqdm(seen, disable=not progress, unit="simulation", desc="validate")):
        given = estimator.condition(x)
        theta = given.sample(draws, integer(seed, 3, i))
        found.append(theta)
        log_q.append(given.log_prob(torch.cat([theta, truths[i : i + 1]])))
    levels = torch.stack(log_q)
    # in units of the prior's width, where no parameter is larger than another
    normal = lambda theta: simulator.prior.to_normal(theta)
    return coverage(
        torch.stack([normal(theta) for theta in found]),
        normal(truths),
        seed,
        extra={"log density": (levels[:, :-1], levels[:, -1])},
        coordinates=[name.replace("_", " ") for name in simulator.prior.names],
        swaps=swaps,
    )


@dataclass(frozen=True)
class Observed:
    """What is known of the parameters of one observation.

    Attributes:
        theta: Draws, with shape (n, d).
        weighted: Draws with weights, where the likelihood is known.
        strangeness: Of the observation, see `Estimated.strangeness`.
        log_evidence: Of the data, where their likelihood was learned [nat].
    """

    theta: Tensor
    weighted: Weighted | None
    strangeness: float
    log_evidence: float | None = None


def observe(
    estimator: Estimator,
    simulator: Simulator,
    x: Data,
    n: int,
    folder: Path,
    seed: int,
    truth: Tensor | None = None,
    about: dict[str, Any] | None = None,
    refine: int = 0,
) -> Observed:
    """Draws of the posterior of one observation, posterior.npz, and two pictures, corner.png and predictive.png.

    Args:
        estimator: Fitted.
        simulator: What it was fitted to.
        x: The observation.
        n: Draws.
        folder: Of the files.
        seed: Decides the draws.
        truth: If it is known, with shape (1, d), for the picture.
        about: What else to keep beside the draws; values of JSON.
        refine: See `Estimated.reweighted`.
    """
    given = estimator.condition(x)
    theta = given.sample(n, seed)
    known, weighted = simulator.log_likelihood, None
    if known is not None:
        log_likelihood = lambda theta: known(x, theta)
        weighted = given.reweighted(log_likelihood, n, integer(seed, 1), refine)
    folder.mkdir(parents=True, exist_ok=True)
    more = {} if weighted is None else {"weighted": weighted.theta, "log_w": weighted.log_w}
    arrays = {k: v.numpy() for k, v in {"theta": theta, **more}.items()}
    strange = given.strangeness()
    learned = given.log_evidence(n, integer(seed, 4)) if isinstance(estimator, NLE) else None
    meta = {"seed": seed, "strangeness": strange, "log_evidence": learned, **(about or {})}
    if weighted is not None:
        meta |= {"n_eff": weighted.n_eff, **asdict(weighted.evidence)}
    names = np.array(simulator.prior.names)
    np.savez(folder / POSTERIOR, names=names, meta=json.dumps(meta, default=str), **arrays)
    shown = _shown(theta, weighted, seed)
    known_truth = None if truth is None else truth[0]
    corner(shown, simulator.prior.names, known_truth).savefig(folder / "corner.png", dpi=120)
    some = list(shown.values())[-1][:PREDICTED]
    predicted = named(simulator.data(some, integer(seed, 3)))
    for name, v in named(x).items():
        label, file = ("data", "") if name == ALONE else (name, f"-{name}")
        figure = predictive(v, predicted[name], label)
        figure.savefig(folder / f"predictive{file}.png", dpi=120)
    return Observed(theta, weighted, strange, learned)


def _shown(theta: Tensor, weighted: Weighted | None, seed: int) -> dict[str, Tensor]:
    """Draws for pictures: of the estimate, and by weights where enough of them count."""
    shown = {"estimate": theta}
    if weighted is not None and weighted.n_eff > WORTH_SHOWING:
        w = torch.softmax(weighted.log_w, 0)
        chosen = torch.multinomial(w, len(theta), True, generator=stream(seed, 2))
        shown["weighted by the likelihood"] = weighted.theta[chosen]
    return shown


def fresh_pairs(
    simulator: Simulator, n: int, seed: int, invalid: str = "raise"
) -> tuple[Tensor, list[Data]]:
    """Parameters, with shape (n, d), and the data of each, noise and all; finite ones where `invalid` is drop."""
    draws = (1 if invalid != "drop" else SPARE) * n
    theta = simulator.prior.sample(draws, seed)
    x = simulator.data(theta, seed)
    inputs = named(x)
    theta, inputs, _ = usable(theta, inputs, invalid)
    if len(theta) < n:
        raise ValueError(f"{len(theta)} of {draws} simulations are finite, expected {n} or more")
    each = [mapped(inputs, lambda v, i=i: v[i]) for i in range(n)]
    return theta[:n], [one[ALONE] for one in each] if isinstance(x, Tensor) else each


def posterior_of(file: Path) -> str:
    """What the draws that are kept in posterior.npz are of.

    Raises:
        ValueError: Other content, or half of it.
    """
    try:
        with np.load(file) as kept:
            return json.loads(str(kept["meta"]))["of"]
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"{file} cannot be read ({error}); remove it, and it is made again"
        ) from error


def read_observation(file: str | Path) -> Data:
    """Numbers of .npy, or several inputs by name of .npz.

    Raises:
        ValueError: A file that cannot be read, or another kind.
    """
    path = Path(file)
    if path.suffix not in (".npy", ".npz"):
        raise ValueError(
            f"observation is {file}, expected a name in .npy, or .npz for inputs by name"
        )
    try:
        read = np.load(path)
        arrays = {ALONE: read} if path.suffix == ".npy" else {k: read[k] for k in read.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{file} cannot be read: {error}") from error
    if wrong := [k for k, v in arrays.items() if v.dtype.kind not in "fiub" or v.itemsize > 8]:
        raise ValueError(
            f"{wrong[0]} of {file} is of type {arrays[wrong[0]].dtype}, expected real numbers of 64 bits or fewer"
        )
    tensors = {k: as_tensor(v) for k, v in arrays.items()}
    return tensors[ALONE] if path.suffix == ".npy" else tensors
