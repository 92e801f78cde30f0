"""The verb `sample`: islands, seeds, progress and resuming.

Draws come in islands of particles. Island j depends on (seed, j) and on the problem, not on how many others there are or
in which order they run, so a run that was stopped goes on at the first island that is missing and ends with the same
draws. Finished islands are kept in a folder, one file each.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from scoreinv.data.grid import Grid
from scoreinv.digests import rounded
from scoreinv.posterior import Posterior
from scoreinv.samplers.path import Sampler, Trace, descend_together
from scoreinv.samplers.samples import Samples
from scoreinv.samplers.smc import SMC, in_order, systematic
from scoreinv.streams import stream

Finished = tuple[Tensor, Trace, float]  # draws, trace and seconds of an island
SCOUTS = 2  # islands that find out whether weights collapse, at most
SCOUTING = 32  # particles of each; fewer would take the noise of a quartile for a collapse
MOST = 16  # particles of a draw, at most, until they are worth enough
FEWEST = 4  # effective particles of an island, or draws that differ, of which a posterior should not be made


def sample(
    posterior: Posterior,
    n: int,
    sampler: Sampler | None = None,
    *,
    seed: int,
    island: int = 16,
    batch: int = 1,
    folder: str | Path | None = None,
    progress: bool = False,
    grid: Grid | None = None,
    meta: dict[str, Any] | None = None,
    evidence: bool = True,
) -> Samples:
    """Draw from a posterior.

    Args:
        posterior: What to draw from.
        n: Draws wanted; whole islands are run.
        sampler: `SMC()` if not given.
        seed: Decides every draw.
        island: Particles in an island.
        batch: Islands that share a call of the network; more keep a GPU busy, the draws stay the same up to rounding.
        folder: Where finished islands are kept, and found again after an interruption.
        progress: Show a progress bar.
        grid: Sky coordinates to hand on to the result.
        meta: More provenance to hand on to the result.
        evidence: Compute the Gaussian evidence that the islands refine (seconds at 64x64); without it log_evidence is
            relative to that. Local steps of `Guided` need none.

    Returns:
        The draws, equally weighted. With weights the particles of all islands are resampled together, and heavy ones
        can repeat; without weights all count equally.

    Raises:
        ValueError: n < 1, a folder with islands of another problem, or a posterior that the sampler does not take.
        FloatingPointError: An island's draws are not finite; the finished islands stay in the folder.
    """
    sampler = SMC() if sampler is None else sampler
    if n < 1 or island < 2:
        raise ValueError(f"n is {n} and island {island}; expected n >= 1 and island >= 2")
    if batch < 1:
        raise ValueError(
            f"batch is {batch}, expected at least one island in a call of the network"
        )
    if reason := sampler.refuses(posterior):
        raise ValueError(reason)
    began = time.monotonic()
    store = _Store(folder, fingerprint(posterior, sampler, seed, island)) if folder else None
    done: dict[int, Finished] = {}
    method, scouted = sampler, Trace()
    with tqdm(disable=not progress, unit="level", desc="sampling") as bar:
        if (
            isinstance(sampler, SMC) and posterior.likelihood.linear
        ):  # else nothing could follow a collapse
            bar.set_postfix_str("scouting")
            known = store is not None and store.has(0)
            scouted = store.get(0)[1] if known else _scout(posterior, sampler, seed)
            method = sampler if scouted.collapsed_at == 0 else sampler.fallback
        at_first, islands = math.ceil(method.particles * n / island), []
        while count := _wanted(method, islands, n, at_first):
            found = [j in done or (store is not None and store.has(j)) for j in range(count)]
            missing = [j for j in range(count) if not found[j]]
            bar.reset(len(missing) * len(method.noise_levels(posterior)))
            for i in range(0, len(missing), batch):
                group = missing[i : i + batch]
                bar.set_postfix(island=f"{group[0] + 1}/{count}")
                for j, finished in _run(posterior, method, island, seed, group, bar):
                    trace = finished[1]
                    trace.collapsed_at = scouted.collapsed_at
                    trace.evaluations += scouted.evaluations * SCOUTING / island if j == 0 else 0
                    done[j] = finished
                    if store:
                        store.put(j, *finished)
            islands = [done[j] if j in done else store.get(j) for j in range(count)]
    return _pool(posterior, sampler, method, islands, n, seed, grid, meta or {}, evidence, began)


def _wanted(sampler: Sampler, islands: list[Finished], n: int, at_first: int) -> int:
    """How many islands there should be; 0 if those that there are will do."""
    if not islands:
        return at_first
    needed, log_w = sampler.effective * n, _log_weights(islands)
    most = at_first * max(1, MOST // sampler.particles)
    if log_w is None or not needed or len(islands) >= most:
        return 0
    share = needed * float(torch.softmax(log_w, 0).square().sum())
    return min(most, math.ceil(len(islands) * share)) if share > 1 else 0


def _log_weights(islands: list[Finished]) -> Tensor | None:
    """Of all particles; None without weights."""
    if islands[0][1].log_weights is None:
        return None
    return torch.tensor([w for _, t, _ in islands for w in t.log_weights], dtype=torch.float64)


def _log_shares(islands: list[Finished]) -> Tensor:
    """Of all draws: their weights, or those of their island where they count alike."""
    parts = [[t.log_evidence] * len(x) if t.even else t.log_weights for x, t, _ in islands]
    return torch.tensor([w for part in parts for w in part], dtype=torch.float64)


def _scout(posterior: Posterior, sampler: SMC, seed: int) -> Trace:
    """Whether weights collapse on this posterior: they do if they do for every scout, each with a stream of its own."""
    evaluations, collapsed_at = 0.0, []
    while len(collapsed_at) < SCOUTS and 0 not in collapsed_at:
        scout = sampler.scout(posterior, SCOUTING, stream(seed, -3, len(collapsed_at)))
        for _ in descend_together(posterior.prior, [scout]):
            pass
        if scout.error is not None:
            raise _failure("the scout", scout.error) from scout.error
        evaluations += scout.trace.evaluations
        collapsed_at.append(scout.trace.collapsed_at)
    return Trace(collapsed_at=min(collapsed_at), evaluations=evaluations)


def _run(
    posterior: Posterior, sampler: Sampler, n: int, seed: int, group: list[int], bar: tqdm
) -> Iterator[tuple[int, Finished]]:
    """The islands of a group, each with its draws, trace and share of the seconds; then raise what went wrong."""
    began = time.monotonic()
    islands = {j: sampler.island(posterior, n, stream(seed, j)) for j in group}
    for _ in descend_together(posterior.prior, list(islands.values())):
        bar.update()
    seconds = (time.monotonic() - began) / len(group)
    for j, particles in islands.items():
        if particles.error is None:
            yield j, (particles.x, particles.trace, seconds)
    for j, particles in islands.items():
        if particles.error is not None:
            raise _failure(f"island {j}", particles.error) from particles.error


def _failure(name: str, error: FloatingPointError) -> FloatingPointError:
    return FloatingPointError(
        f"{name} failed: {error}. Finished islands are kept. Data far outside the prior's range? Check the amplitude, the "
        "units and the noise; or lower the number of moves, if it moved"
    )


def _pool(
    posterior: Posterior,
    sampler: Sampler,
    method: Sampler,
    islands: list[Finished],
    n: int,
    seed: int,
    grid: Grid | None,
    meta: dict[str, Any],
    with_evidence: bool,
    began: float,
) -> Samples:
    draws, traces = torch.cat([x for x, _, _ in islands]), [t for _, t, _ in islands]
    base = posterior.gaussian_log_evidence if with_evidence and not traces[0].absolute else 0.0
    evidence = base + torch.tensor([t.log_evidence for t in traces], dtype=torch.float64)
    log_w = _log_weights(islands)
    if log_w is not None:
        effective = float(1 / torch.softmax(log_w, 0).square().sum())
        order = in_order(draws, posterior.moments.covariance)
        share = torch.softmax(_log_shares(islands)[order], 0)
        x = draws[order[systematic(share, n, stream(seed, -1))].sort().values]
        log_z = float(torch.logsumexp(evidence, 0)) - math.log(len(evidence))
    else:
        x, log_z = draws[:n], float(evidence.mean())
    levels = torch.tensor(method.noise_levels(posterior), dtype=torch.float64)
    ess = _curve([t.ess for t in traces], len(levels))
    collapsed_at = traces[0].collapsed_at
    label = sampler.dropped(collapsed_at) if collapsed_at > 0 else sampler.label
    if log_w is not None:
        label += _worn(x, islands, effective)
        if effective < sampler.effective * n:
            label += f", worth {effective:.0f} of {n} draws"
        ess[-1] = min(float(ess[-1].nan_to_num(1.0)), effective / len(log_w))
    if log_w is None and not posterior.likelihood.gaussian:
        label += f"; in the place of the {type(posterior.likelihood.noise).__name__} the Gaussian near the data"
    spread = float(evidence.std()) if len(evidence) > 1 else math.nan
    return Samples(
        x=x,
        log_evidence=log_z,
        log_evidence_std=spread / math.sqrt(len(evidence)),
        weights=label,
        levels=levels,
        ess=ess,
        acceptance=_curve([t.acceptance for t in traces], len(levels)),
        island_log_evidence=evidence,
        evaluations=sum(len(x) * trace.evaluations for x, trace, _ in islands) / n,
        vjps=sum(len(x) * trace.vjps for x, trace, _ in islands) / n,
        seconds=max(sum(s for _, _, s in islands), time.monotonic() - began),
        meta={**provenance(posterior, sampler, seed), **meta},
        grid=grid,
        data_image=posterior.data_image(),
        residual_image=posterior.residual_image(x.double().mean(0)),
    )


def _worn(x: Tensor, islands: list[Finished], at_the_end: float) -> str:
    """What the result must say where few particles have become all draws; empty if all is well."""
    on_the_way = [len(x) * min(t.ess) for x, t, _ in islands if t.ess]
    effective = min([*on_the_way, at_the_end])
    distinct = len(x.flatten(1).unique(dim=0))
    if effective >= FEWEST and distinct >= min(FEWEST, len(x)):
        return ""
    return (
        f", and worn out: {effective:.1f} particles carried all weight of an island or of the end, and {distinct} of "
        f"{len(x)} draws differ; do not trust their spread, take more particles or levels"
    )


def _curve(rows: list[list[float]], length: int) -> Tensor:
    """Mean over islands at each level, nan where no island has a value."""
    padded = torch.full((len(rows), length), math.nan, dtype=torch.float64)
    for i, row in enumerate(rows):
        padded[i, : len(row)] = torch.tensor(row[:length], dtype=torch.float64)
    return padded.nanmean(0)


def fingerprint(posterior: Posterior, sampler: Sampler, seed: int, island: int) -> str:
    """A hash of everything that decides an island."""
    h = hashlib.sha256()
    h.update(
        json.dumps(
            [
                provenance(posterior, sampler, seed),
                island,
                posterior.tolerance,
                *posterior.sigma_range,
                *sampler.noise_levels(posterior),
            ],
            sort_keys=True,
            default=str,
        ).encode()
    )
    h.update(posterior.y.contiguous().numpy().tobytes())
    probe = torch.linspace(-1, 1, math.prod(posterior.shape), dtype=torch.float64)
    probe = probe.reshape(1, *posterior.shape)
    likelihood = posterior.likelihood
    if likelihood.gaussian:
        seen = likelihood.noise.whiten(likelihood.operator(probe))
    else:
        seen = likelihood.log_prob(posterior.y, torch.cat([probe, -probe, 0 * probe]))
    moments = posterior.moments
    for values in (seen, moments.mean, moments.covariance.apply(probe)):
        h.update(rounded(values).encode())
    return h.hexdigest()


def provenance(posterior: Posterior, sampler: Sampler, seed: int) -> dict[str, Any]:
    """Seed, sampler, prior and versions."""
    options = (f"{f.name}={getattr(sampler, f.name)}" for f in fields(sampler))
    return {
        "seed": seed,
        "sampler": f"{type(sampler).__name__}({', '.join(options)})",
        "prior": dict(posterior.prior.identity),
        "likelihood": f"{type(posterior.likelihood.operator).__name__}, {type(posterior.likelihood.noise).__name__}",
        "versions": {name: installed(name) for name in ("scoreinv", "torch", "numpy")},
    }


def installed(name: str) -> str:
    """Version of a package."""
    try:
        return version(name)
    except PackageNotFoundError:
        return "unknown"


class _Store:
    """Finished islands on disk, one safetensors file each, written whole or not at all."""

    def __init__(self, folder: str | Path, key: str) -> None:
        self.folder, self.key = Path(folder), key
        self.folder.mkdir(parents=True, exist_ok=True)

    def path(self, j: int) -> Path:
        return self.folder / f"island-{j:05d}.safetensors"

    def has(self, j: int) -> bool:
        path = self.path(j)
        if not path.exists():
            return False
        try:
            with safe_open(path, "pt") as f:
                key = f.metadata()["key"]
        except (SafetensorError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path} is not a finished island ({error}); delete it to run it again"
            ) from error
        if key != self.key:
            raise ValueError(
                f"{self.folder} holds islands of another problem, sampler or seed; "
                "choose another output, or pass --overwrite to delete them"
            )
        return True

    def put(self, j: int, x: Tensor, trace: Trace, seconds: float) -> None:
        record = {"key": self.key, "seconds": str(seconds), "trace": json.dumps(asdict(trace))}
        partial = self.path(j).with_suffix(".part")
        try:
            save_file({"x": x.contiguous()}, partial, metadata=record)
            os.replace(partial, self.path(j))
        except (OSError, SafetensorError) as error:
            raise OSError(
                f"could not keep island {j} in {self.folder}: {error}. The islands finished before stay there; "
                "free some space and run again to go on"
            ) from error
        finally:
            partial.unlink(missing_ok=True)

    def get(self, j: int) -> Finished:
        with safe_open(self.path(j), "pt") as f:
            record, x = f.metadata(), f.get_tensor("x")
        return x, Trace(**json.loads(record["trace"])), float(record["seconds"])
