"""`scoreinv npe data|train|validate|observe|run|rounds`: scalar parameters, from a simulator to an observation."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from torch import Tensor

from scoreinv.cli.bench import table
from scoreinv.cli.problem import say
from scoreinv.digests import digest_of_json
from scoreinv.finetune.evidence import HEAVY
from scoreinv.npe.data import ALONE, mapped, named
from scoreinv.npe.estimator import Estimator
from scoreinv.npe.featurizers import Data
from scoreinv.npe.rounds import PROPOSALS, sequential
from scoreinv.npe.simulator import Simulator
from scoreinv.npe.stages import (
    POSTERIOR,
    Training,
    best,
    observe,
    posterior_of,
    read_observation,
    train,
    validate,
)
from scoreinv.npe.store import Store, load_simulator, read_json, simulated, source
from scoreinv.samplers.run import installed

STAGES = ("data", "train", "validate", "observe", "run", "rounds")
LEAST = {
    "n": 100,
    "sims": 20,
    "draws": 20,
    "samples": 100,
    "swaps": 99,
    "workers": 1,
    "batch": 1,
    "rounds": 1,
    "refine": 0,
}
SHOWN = ("name", "log q [nat]", "+-", "held-out loss", "epochs", "seconds", "dropped")


@dataclass(frozen=True, kw_only=True)
class NpeConfig:
    """A simulator, what is learned from it, and an observation.

    Args:
        what: The stage: data, train, validate or observe; or run, all of them, those that are done already left out. Or
            rounds, which simulates where the posterior of this one observation may be, again and again.
        simulator: One of cluster, power, chirp, dust, disc; or FILE.py:NAME, a `scoreinv.npe.Simulator` in a file of yours.
        output: Folder of all stages.
        n: Simulations; of each round.
        rounds: At most; they end where fewer draws are effective than before. They fit the first method of `training`, once.
        proposal: Of rounds: "truncated" draws from the prior where the estimate expects the parameters, "clipped" from the
            estimate itself, with weights, for posteriors that are very narrow.
        batch: Simulations that are made together.
        training: What is fitted to them.
        sims: Fresh simulations whose truths should be covered.
        draws: Of the posterior of each.
        swaps: Draws of the null distribution; no p-value is below one in so many.
        observation: Numbers in .npy, or inputs by name in .npz; a simulation, whose truth is known, if left out.
        samples: Draws of its posterior.
        refine: How often at most those that are weighted by a known likelihood are drawn anew, nearer to the posterior.
        workers: Processes that simulate and fit, one thread each.
        device: Where networks are fitted.
        seed: Decides everything random.
        overwrite: Do the stage again, and lose what it made.
    """

    what: str = "run"
    simulator: str
    output: str
    n: int = 10_000
    rounds: int = 4
    proposal: str = "truncated"
    batch: int = 1000
    training: Training = field(default_factory=Training)
    sims: int = 300
    draws: int = 100
    swaps: int = 1999
    observation: str | None = None
    samples: int = 10_000
    refine: int = 5
    workers: int = 1
    device: str = "cpu"
    seed: int = 0
    overwrite: bool = False

    def __post_init__(self) -> None:
        if self.what not in STAGES:
            raise ValueError(f"what is {self.what!r}, expected one of {', '.join(STAGES)}")
        if self.proposal not in PROPOSALS:
            raise ValueError(
                f"proposal is {self.proposal!r}, expected one of {', '.join(PROPOSALS)}"
            )
        for name, least in LEAST.items():
            if (given := getattr(self, name)) < least:
                raise ValueError(f"{name} is {given}, expected at least {least}")

    @property
    def folder(self) -> Path:
        return Path(self.output)

    @property
    def store(self) -> Store:
        return Store(self.folder / "data")

    @property
    def fits(self) -> Path:
        return self.folder / "train"


def npe(config: NpeConfig) -> None:
    """Learn scalar parameters from simulations, test the posteriors, and draw that of an observation."""
    stages = {"data": _data, "train": _train, "validate": _validate, "observe": _observe}
    try:
        for name in stages if config.what == "run" else [config.what]:
            {**stages, "rounds": _rounds}[name](config)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"what is finished stays in {config.folder}; the same command, without --overwrite, goes on from there"
        ) from None


def _data(config: NpeConfig) -> None:
    load_simulator(config.simulator)
    if config.overwrite and (config.store.folder / "store.json").exists():
        shutil.rmtree(config.store.folder)
    progress = sys.stderr.isatty()
    folder, workers = config.store.folder, config.workers
    store = simulated(
        config.simulator, config.n, folder, config.seed, workers, config.batch, progress
    )
    shapes = ", ".join(f"{k} {tuple(v)}" for k, v in store.card["shapes"].items())
    say("simulations", f"{config.n} of {config.simulator}: {shapes}, in {folder}")


def _train(config: NpeConfig) -> None:
    _check(config)
    if config.overwrite:
        for fit in config.fits.glob("*-*"):
            if (fit / "row.json").exists() or (fit / "checkpoint").exists():
                shutil.rmtree(fit)
    found = train(
        config.store,
        config.training,
        config.fits,
        config.seed,
        config.workers,
        config.device,
        sys.stderr.isatty(),
    )
    print(table([{k: row[k] for k in SHOWN} for row in found["rows"]]))
    say("best", f"{found['rows'][0]['name']}, in {config.fits}")


def _check(config: NpeConfig) -> None:
    """That the simulations that are kept are those that the configuration speaks of, and whole."""
    card, store = config.store.card, config.store
    wanted = {
        "simulator": config.simulator,
        "source": source(config.simulator),
        "n": config.n,
        "seed": config.seed,
    }
    if other := [k for k, v in wanted.items() if card[k] != v]:
        k = other[0]
        raise ValueError(
            f"{store.folder} holds simulations of {k} {card[k]!r}, expected {wanted[k]!r}: the simulator or the "
            "configuration has changed; run the data stage with --overwrite"
        )


def _validate(config: NpeConfig) -> None:
    _check(config)
    name, estimator = best(config.store, config.training, config.fits)
    report, sizes = config.folder / "validation.json", (config.sims, config.draws, config.swaps)
    row = read_json(config.fits / name / "row.json")
    of = digest_of_json(row["of"], name, sizes, config.seed)
    if report.exists() and not config.overwrite:
        if read_json(report)["meta"]["of"] == of:
            say("validation", f"{report}, found")
            return
        raise FileExistsError(f"{report} is of another fit or other sizes; pass --overwrite")
    simulator = load_simulator(config.simulator)
    progress = sys.stderr.isatty()
    found = validate(estimator, simulator, *sizes[:2], config.seed, config.swaps, progress)
    say("validation", f"{name}, {config.sims} simulations of {config.draws} draws")
    print(found)
    meta = {"of": of, "scoreinv": installed("scoreinv"), "config": asdict(config)}
    found.write(report, meta)
    picture = report.with_suffix(".png")
    found.plot().savefig(picture, dpi=120)
    say("report", report)
    say("figure", picture)


def _observe(config: NpeConfig) -> None:
    _check(config)
    name, estimator = best(config.store, config.training, config.fits)
    simulator = load_simulator(config.simulator)
    x, truth, seen = _seen(config, simulator)
    row = read_json(config.fits / name / "row.json")
    of = digest_of_json(row["of"], name, seen, config.samples, config.refine, config.seed)
    folder = config.folder / "posterior"
    kept = folder / POSTERIOR
    if kept.exists() and not config.overwrite and posterior_of(kept) != of:
        raise FileExistsError(
            f"{kept} is of another observation or fit, or was drawn otherwise; move it away, or pass --overwrite"
        )
    _posterior(config, estimator, simulator, x, truth, name, of, folder)


def _rounds(config: NpeConfig) -> None:
    simulator, method = load_simulator(config.simulator), config.training.methods[0]
    x, truth, seen = _seen(config, simulator)
    # before anything is overwritten
    if not config.training.new(method, simulator).posterior:
        raise ValueError(f"methods has {method}, which learns no posterior; rounds take a flow")
    # more rounds go on from fewer
    made = config.simulator, source(config.simulator), config.n, config.seed
    of = digest_of_json(*made, config.proposal, asdict(config.training), seen)
    folder, known = config.folder / "rounds", simulator.log_likelihood
    card = folder / "rounds.json"
    if config.overwrite and card.exists():
        shutil.rmtree(folder)
    if card.exists() and read_json(card)["of"] != of:
        raise FileExistsError(
            f"{folder} holds rounds for another observation or of another plan; pass --overwrite, or choose another output"
        )
    folder.mkdir(parents=True, exist_ok=True)
    card.write_text(json.dumps({"of": of, "config": asdict(config)}, indent=1) + "\n")
    found = sequential(
        lambda: config.training.new(method, simulator),
        simulator.simulate,
        x,
        rounds=config.rounds,
        n=config.n,
        seed=config.seed,
        proposal=PROPOSALS[config.proposal],
        log_likelihood=None if known is None else lambda theta: known(x, theta),
        noise=simulator.noise,
        plan=config.training.plan,
        device=config.device,
        progress=sys.stderr.isatty(),
        folder=folder,
    )
    rows = []
    for i, pairs in enumerate(found.pairs):
        row = {"round": i, "pairs": pairs, "taken": "yes" if i == found.best else "-"}
        if found.weighted:
            w = found.weighted[i]
            row |= {"n_eff": w.n_eff, "n_eff / n": w.n_eff / config.n, "k-hat": w.evidence.k_hat}
        rows.append(row)
    print(table(rows))
    name = f"{method} of round {found.best}"
    estimator, of = found.estimators[found.best], digest_of_json(of, config.samples, config.refine)
    _posterior(config, estimator, simulator, x, truth, name, of, folder / "posterior")


def _seen(config: NpeConfig, simulator: Simulator) -> tuple[Data, Tensor | None, dict]:
    """The observation, the truth if it is a simulation, and its numbers by name."""
    truth = simulator.prior.sample(1, config.seed)
    x = mapped(named(made := simulator.data(truth, config.seed)), lambda v: v[0])
    if config.observation is not None:
        truth, x = None, named(read_observation(config.observation))
    if not isinstance(made, Mapping) and set(x) == {ALONE}:
        x = x[ALONE]
    return x, truth, {k: v.double().flatten().tolist() for k, v in named(x).items()}


def _posterior(
    config: NpeConfig,
    estimator: Estimator,
    simulator: Simulator,
    x: Data,
    truth: Tensor | None,
    name: str,
    of: str,
    folder: Path,
) -> None:
    """Draw the posterior of the observation, keep it, and say what is in it."""
    about = {"of": of, "estimator": name, "observation": config.observation or "simulated"}
    about["scoreinv"] = installed("scoreinv")
    n, seed, refine = config.samples, config.seed, config.refine
    found = observe(estimator, simulator, x, n, folder, seed, truth, about, refine)
    say("posterior", f"{name}, {config.samples} draws, in {folder}")
    rows = []
    for i, parameter in enumerate(simulator.prior.names):
        v = found.theta[:, i]
        low, middle, high = v.quantile(v.new_tensor([0.16, 0.5, 0.84])).tolist()
        row = {"parameter": parameter, "median": middle, "16 %": low, "84 %": high}
        rows.append(row | ({} if truth is None else {"truth": float(truth[0, i])}))
    print(table(rows))
    strange = "like those simulated" if found.strangeness <= 1 else "STRANGER than 99 % of those"
    say("data", f"{found.strangeness:.2f} of the distance within which 99 % lie: {strange}")
    if found.log_evidence is not None:
        say(
            "evidence",
            f"log Z = {found.log_evidence:.2f} nat, of the likelihood as it was learned",
        )
    if found.weighted is not None:
        w = found.weighted
        share, k_hat = w.n_eff / config.samples, w.evidence.k_hat
        doubt = ": a FEW draws weigh too much, raise refine" if k_hat > HEAVY else ""
        say("likelihood", f"{share:.1%} of the draws are effective, k-hat {k_hat:.2f}{doubt}")
        say("evidence", f"log Z = {w.evidence.log_z:.2f} nat")
