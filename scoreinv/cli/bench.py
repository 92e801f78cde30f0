"""`scoreinv bench`: accuracy on exact posteriors, calibration with trained priors, learned controls, speed."""

from __future__ import annotations

import itertools
import json
import os
import shlex
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from matplotlib.figure import Figure

import scoreinv as si
from scoreinv.bench import exact, learned, npe, ranks, rtb, scaling, speed
from scoreinv.bench.document import calibration, cell, controls, costs, document, estimates
from scoreinv.bench.figure import (
    bounds_figure,
    calibration_figure,
    error_figure,
    estimates_figure,
)
from scoreinv.bench.peers import Peer
from scoreinv.bench.records import Records, Rows
from scoreinv.cli.problem import HELD_OUT, PRIOR, truths
from scoreinv.samplers.path import Sampler

Case = TypeVar("Case")
FEW = 20  # draws
TABLES = ("exact", "coverage", "learned", "rtb", "npe", "speed", "scaling")


@dataclass(frozen=True)
class BenchConfig:
    """What to measure; `what` decides which of the keys count.

    Args:
        what: "exact" (posteriors in closed form), "coverage" (truths ranked among 31 draws, on the same problems), "learned"
            (calibration with a trained prior), "rtb" (learned controls), "npe" (scalar parameters), "speed", or "scaling"
            (with pixels, data, draws and levels). Exit status 1 if a target of "rtb" or "npe" is missed.
        methods: Samplers of all but "rtb", "npe" and "scaling": SMC and Guided (as in their sections), SMC40 and SMC7 (of so
            many levels), Anneal, and the baselines TDS, MMPS, PiGDM, DPS, DiffPIR, DAPS, PnP-DM, convolved, and "PiGDM
            weighted", which stays finite on images; with the extra `bench` azula-MMPS, azula-DPS, azula-DiffPIR,
            deepinv-MMPS, deepinv-PiGDM, deepinv-DPS, by those packages' own code; and "SMC without local covariance",
            "finer steps", "skipping", "network's twist" or "spare particles". If left out, all up to "convolved" of "exact"
            and "coverage", SMC of "learned" and "speed".
        problems: Of "exact" and "coverage", by their names, as in "grid 80 1", of "rtb" and of "npe"; all if left out.
        prior: Trained prior of "learned", "speed" and "scaling".
        kinds: Problems of "learned": psf, uv.
        sources: Of the truths of "learned": prior (its own draws), held out (images like those that it was trained on,
            simulated anew), or folders of images.
        noises: Noise of "learned", over the peak.
        truths: Of "learned": from the prior, and as many held-out images; of "coverage": problems of each kind.
        n: Draws of each posterior; if left out 400 in "exact" (a fifth from 512 pixels on), 16 in "learned", 64 in "speed".
        island: Weighted particles that share resampling, in "exact".
        seeds: Problems drawn of each kind, in "exact".
        slow_seeds: The same where a run takes minutes: from 512 pixels on, of learned scores, and of DPS and PnP-DM.
        repeats: Runs of each problem, in "speed"; the median counts.
        workers: Processes of "exact", of one thread each; as many as there are cores if left out.
        seed: First random seed.
        quick: Some of the problems; in "exact" without DPS and PnP-DM, which take half of the time.
        members: Networks of an ensemble, in "npe".
        peers: Estimates of sbi, lampe and nbi beside ours, in "npe"; with the extra `bench`.
        smc: The sampler.
        guided: The steps that all draws take where weights collapse, without scouts.
        output: JSON file of the rows; the outcomes of all but "speed" and "scaling" are kept beside it and found again.
            "exact", "learned", "rtb", "npe" and "scaling" also write a figure and a page of the same name.
    """

    what: str
    methods: tuple[str, ...] | None = None
    problems: tuple[str, ...] | None = None
    prior: str = "galaxy64"
    kinds: tuple[str, ...] = ("psf", "uv")
    sources: tuple[str, ...] = (PRIOR, HELD_OUT)
    noises: tuple[float, ...] = (0.1, 0.033, 0.01)
    truths: int = 64
    n: int | None = None
    island: int = 100
    seeds: int = 5
    slow_seeds: int = 1
    repeats: int = 3
    workers: int | None = None
    seed: int = 0
    quick: bool = False
    members: int = 1
    peers: bool = False
    smc: si.SMC = field(default_factory=si.SMC)
    guided: si.Guided = field(default_factory=si.Guided)
    output: str | None = None

    def __post_init__(self) -> None:
        if self.what not in TABLES:
            raise ValueError(f"what is {self.what!r}, expected one of {', '.join(TABLES)}")
        if unknown := set(self.methods or ()) - set(exact.METHODS):
            raise ValueError(
                f"methods are {', '.join(unknown)}, expected some of {', '.join(exact.METHODS)}"
            )
        suites = {"rtb": rtb.CASES, "npe": npe.PROBLEMS}
        suite = suites[self.what] if self.what in suites else exact.problems()
        if unknown := set(self.problems or ()) - set(suite):
            raise ValueError(
                f"problems are {', '.join(sorted(unknown))}, expected some of {', '.join(suite)}"
            )
        if unknown := set(self.kinds) - set(learned.PROBLEMS):
            raise ValueError(
                f"kinds are {', '.join(unknown)}, expected some of {', '.join(learned.PROBLEMS)}"
            )
        if self.output and Path(self.output).suffix != ".json":
            raise ValueError(f"output is {self.output}, expected a name in .json")
        if self.methods is not None and not self.methods:
            raise ValueError(f"methods is empty, expected some of {', '.join(exact.METHODS)}")
        if self.what == "exact" and self.n is not None and self.n < FEW:
            raise ValueError(
                f"n is {self.n}, expected at least {FEW} draws to compare with exact ones"
            )
        least = dict.fromkeys(("seeds", "slow_seeds", "repeats", "workers", "members"), 1)
        least |= {"truths": 2, "n": 2}
        for key, value in least.items():
            given = getattr(self, key)
            if given is not None and given < value:
                raise ValueError(f"{key} is {given}, expected at least {value}")


def bench(config: BenchConfig) -> int:
    """Measure samplers: accuracy on exact posteriors, calibration with a trained prior, learned controls, speed."""
    tables = (_exact, _coverage, _learned, _rtb, _npe, _speed, _scaling)
    rows = dict(zip(TABLES, tables, strict=True))[config.what](config)
    if config.output:
        Path(config.output).parent.mkdir(parents=True, exist_ok=True)
        # JSON knows no nan
        known = json.loads(json.dumps(rows), parse_constant=lambda _: None)
        Path(config.output).write_text(json.dumps(known, indent=1) + "\n")
    return 1 if any(row.get("missed", "-") != "-" for row in rows) else 0


def _exact(config: BenchConfig) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for group in exact.scores(
        _samplers(config),
        config.n or 400,
        range(config.seed, config.seed + config.seeds),
        config.island,
        _problems(config),
        _store(config),
        sys.stderr.isatty(),
        config.workers or os.cpu_count() or 1,
        config.slow_seeds,
    ):
        new = [exact.row(title, scores) for title, scores in group.items()]
        rows += new
        print(table(new), end="\n\n", flush=True)
    if not rows:
        raise ValueError(
            f"none of {', '.join(_methods(config))} takes the data of {', '.join(_problems(config))}"
        )
    if config.output:
        page = partial(document, rows, suite=len(exact.problems()))
        _publish(config, error_figure(rows), page)
    return rows


def _coverage(config: BenchConfig) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for group in ranks.coverage(
        _samplers(config),
        config.truths,
        config.seed,
        names=_problems(config),
        store=_store(config),
        progress=sys.stderr.isatty(),
    ):
        rows += group
        print(table(group), end="\n\n", flush=True)
    return rows


def _samplers(config: BenchConfig) -> dict[str, Sampler]:
    for name in _methods(config):
        method = exact.METHODS[name]
        if isinstance(method, Peer) and (reason := method.missing()):
            raise ValueError(f"methods has {name}, and {reason}")
    of_sections = {"SMC": config.smc, "Guided": config.guided}
    return {name: of_sections.get(name, exact.METHODS[name]) for name in _methods(config)}


def _methods(config: BenchConfig) -> tuple[str, ...]:
    if config.methods is not None:
        return config.methods
    if config.what in ("learned", "speed"):
        return ("SMC",)
    return tuple(m for m in exact.DEFAULT if not (config.quick and m in exact.SLOW))


def _problems(config: BenchConfig) -> list[str]:
    return list(config.problems or (exact.QUICK if config.quick else exact.problems()))


def _store(config: BenchConfig) -> Path | None:
    return Path(config.output).with_suffix(".jsonl") if config.output else None


def _changed(config: BenchConfig) -> str:
    """What of the configuration is not its default, as words of a command."""
    changed = {
        f.name: getattr(config, f.name)
        for f in fields(config)
        if f.name not in ("what", "smc", "guided", "output", "workers")
        and getattr(config, f.name) != f.default
    }
    for section in ("smc", "guided"):
        chosen = getattr(config, section)
        for f in fields(chosen):
            if getattr(chosen, f.name) != f.default:
                changed[f"{section}.{f.name}"] = getattr(chosen, f.name)
    text = lambda v: str(v).lower() if isinstance(v, bool) else str(v)
    joined = lambda v: ",".join(map(text, v)) if isinstance(v, tuple) else text(v)
    return " ".join(f"--{name} {shlex.quote(joined(value))}" for name, value in changed.items())


def _speed(config: BenchConfig) -> list[dict[str, Any]]:
    prior, rows = si.load_prior(config.prior), speed.gradient()
    for method, sampler in _samplers(config).items():
        found = speed.overhead(prior, sampler, config.n or 64, repeats=config.repeats)
        rows += [{"method": method, **row} for row in found]
    print(table(rows))
    return rows


def _scaling(config: BenchConfig) -> list[dict[str, Any]]:
    rows = []
    for row in scaling.scaling(si.load_prior(config.prior)):
        rows.append(row)
        print(table(rows[-1:]), flush=True)
    print(table(rows))
    if config.output:
        _publish(config, scaling.scaling_figure(rows), partial(costs, rows))
    return rows


def _publish(config: BenchConfig, figure: Figure, page: Callable[[str, str], str]) -> None:
    """A figure and a page beside the output; the page is made of the command and the figure's name."""
    text, picture = (Path(config.output).with_suffix(end) for end in (".md", ".png"))
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=100)
    command = f"scoreinv bench {config.what} {_changed(config)}".strip()
    text.write_text(page(command, picture.name))


def _rtb(config: BenchConfig) -> list[dict[str, Any]]:
    names = config.problems or (rtb.QUICK if config.quick else rtb.CASES)
    keys = {name: f"{name} {config.seed}" for name in names}
    rows = _kept(config, keys, lambda name: [rtb.row(name, config.seed)])
    print(table(rows))
    if config.output:
        _publish(config, bounds_figure(rows), partial(controls, rows))
    return rows


def _npe(config: BenchConfig) -> list[dict[str, Any]]:
    names = config.problems or (npe.QUICK if config.quick else npe.PROBLEMS)
    fits, observations, epochs = (
        (1, 2, npe.QUICK_EPOCHS) if config.quick else (2, 10, npe.Suite.epochs)
    )
    shown = sys.stderr.isatty()
    suite = npe.Suite(config.seed, fits, observations, config.members, epochs, shown)
    keys = {
        (name, package): f"{name} {package} {config.seed} {fits} {observations} {config.members}"
        for name in names
        for package in npe.packages(name, config.peers)
    }
    rows = npe.beside_sbi(_kept(config, keys, lambda case: [npe.npe(case[0], suite, case[1])]))
    print(table(rows))
    if config.output:
        _publish(config, estimates_figure(rows), partial(estimates, rows))
    return rows


def _kept(
    config: BenchConfig,
    keys: Mapping[Case, str],
    found: Callable[[Case], Iterable[dict[str, Any]]],
) -> list[dict[str, Any]]:
    """Rows of all cases, printed; those that are kept beside the output are found again by their key."""
    records, rows = Records(_store(config), Rows), []
    for case, key in keys.items():
        if key not in records:
            records.add(Rows(key, tuple(found(case))))
        rows += records[key].rows
        print(table(list(records[key].rows)), end="\n\n", flush=True)
    return rows


def _learned(config: BenchConfig) -> list[dict[str, Any]]:
    prior = si.load_prior(config.prior)
    images = {
        source: truths(source, config.prior, prior, config.truths, config.seed + 1)
        for source in config.sources
    }
    n, rows = config.n or 16, []
    for kind, noise in itertools.product(config.kinds, config.noises):
        likelihood = learned.problem(kind, prior, noise)
        cases = itertools.product(images.items(), _samplers(config).items())
        for (source, sought), (method, sampler) in cases:
            name = f"{kind}-{noise:g}-{Path(source).name.replace(' ', '-')}.jsonl"
            store = Path(config.output).with_suffix("") / name if config.output else None
            shown = sys.stderr.isatty()
            outcomes = learned.calibrate(
                prior, likelihood, sought, sampler, n, config.seed, store, shown
            )
            row = learned.summary(outcomes, n)
            lost = f", {row['failed']} of {len(sought)} failed" if row["failed"] else ""
            case = {
                "problem": kind,
                "noise": noise,
                "truths from": source,
                "method": method + lost,
            }
            rows.append(case | row)
            print(table(rows[-1:]), end="\n\n", flush=True)
    print(table(rows))
    if config.output:
        _publish(config, calibration_figure(rows), partial(calibration, rows))
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Rows as aligned text, a new table where the columns change; lists of numbers in one cell."""
    groups = [list(group) for _, group in itertools.groupby(rows, key=list)]
    return "\n\n".join(_aligned(group) for group in groups)


def _aligned(rows: list[dict[str, Any]]) -> str:
    heads = list(rows[0])
    cells = [heads, *([cell(row[h]) for h in heads] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join(f"{c:<{w}}" for c, w in zip(row, widths, strict=True)).rstrip() for row in cells
    )
