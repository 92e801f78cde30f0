"""Simulations that are made once and kept: memory-mapped arrays, filled by several processes, resumed after a stop.

A folder holds theta.npy, one x-NAME.npy for each input, done.npy, which says what batches are finished, and store.json.
Batch i depends on (seed, i) alone, so the arrays are the same for any number of processes.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from scoreinv.digests import digest_of_json
from scoreinv.npe.data import ALONE, Inputs, count, named
from scoreinv.npe.examples import EXAMPLES
from scoreinv.npe.featurizers import Data
from scoreinv.npe.simulator import Simulator
from scoreinv.processes import shared
from scoreinv.streams import integer, stream

FORMAT = 1  # of the files


@dataclass(frozen=True)
class Store:
    """A folder of simulations.

    Args:
        folder: Where they are.
    """

    folder: Path

    @cached_property
    def card(self) -> dict:
        """What was simulated.

        Raises:
            ValueError: Nothing there, or of another format.
        """
        try:
            card = json.loads((self.folder / "store.json").read_text())
        except (OSError, json.JSONDecodeError) as error:
            raise ValueError(
                f"{self.folder} holds no simulations that can be read ({error}); make some by `scoreinv npe data`"
            ) from error
        if card.get("format") != FORMAT:
            raise ValueError(
                f"{self.folder} is of format {card.get('format')}, expected {FORMAT}; simulate again"
            )
        return card

    @property
    def hash(self) -> str:
        """Of what was simulated: the same for the same parameters, simulator and seed."""
        return digest_of_json(self.card)

    @property
    def theta(self) -> Tensor:
        """With shape (n, d), in float64."""
        return self._read("theta")

    @property
    def x(self) -> Data:
        """Simulations, left on the disc until they are looked at."""
        inputs = {name: self._read(f"x-{name}") for name in self.card["shapes"]}
        return inputs[ALONE] if self.card["alone"] else inputs

    def missing(self) -> list[int]:
        """Batches that are not finished."""
        return np.flatnonzero(self.array("done", "r") == 0).tolist()

    def array(self, name: str, mode: str) -> np.ndarray:
        """One of its arrays, left on the disc; `mode` as `numpy.memmap` takes it.

        Raises:
            ValueError: Not there, or cut off.
        """
        file = self.folder / f"{name}.npy"
        try:
            return np.load(file, mmap_mode=mode)
        except (OSError, ValueError, EOFError) as error:
            raise ValueError(
                f"{file} cannot be read ({error}); simulate again, by `scoreinv npe data --overwrite`"
            ) from error

    def _read(self, name: str) -> Tensor:
        # copied where it is written to, which never reaches the file
        return torch.from_numpy(self.array(name, "c"))


def read_json(file: Path) -> dict:
    """What a stage has left.

    Raises:
        ValueError: Nothing, or half of it.
    """
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{file} cannot be read ({error}); remove it, and it is made again"
        ) from error


def load_simulator(name: str) -> Simulator:
    """One of `scoreinv.npe.examples`, by its name, or one in a file of one's own, as in `folder/mine.py:simulator`.

    Raises:
        ValueError: No such simulator, or a file that does not make one.
    """
    if name in EXAMPLES:
        return EXAMPLES[name]()
    file, colon, variable = name.rpartition(":")
    if not colon or not Path(file).is_file() or Path(file).suffix != ".py":
        raise ValueError(
            f"simulator is {name!r}, expected one of {', '.join(EXAMPLES)}, or FILE.py:NAME, a Simulator in a file of yours"
        )
    spec = importlib.util.spec_from_file_location(f"simulator_{Path(file).stem}", file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where its own classes are looked for
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ValueError(f"{file} cannot be run: {type(error).__name__}: {error}") from error
    found = getattr(module, variable, None)
    if not isinstance(found, Simulator):
        raise ValueError(
            f"{file} has no Simulator called {variable!r}, but {type(found).__name__}"
        )
    return found


def source(name: str) -> str:
    """What tells one version of a simulator from another: of a file its hash, of ours the package's version."""
    if name in EXAMPLES:
        return f"scoreinv {version('scoreinv')}"
    return hashlib.sha256(Path(name.rpartition(":")[0]).read_bytes()).hexdigest()


def simulated(
    name: str,
    n: int,
    folder: str | Path,
    seed: int,
    workers: int = 1,
    batch: int = 1000,
    progress: bool = False,
) -> Store:
    """n simulations of draws of the prior, kept in a folder; the same call goes on after an interruption.

    Args:
        name: Of the simulator, as `load_simulator` takes it.
        n: How many.
        folder: Where.
        seed: Decides all of them.
        workers: Processes.
        batch: Simulations that are made together.
        progress: Show a progress bar.

    Raises:
        ValueError: A folder of other simulations.
    """
    for what, value in {"n": n, "workers": workers, "batch": batch}.items():
        if value < 1:
            raise ValueError(f"{what} is {value}, expected at least 1")
    store, simulator = Store(Path(folder)), load_simulator(name)
    first = _batch(simulator, 1, seed, 0)[1]
    one = named(first)
    card = {
        "format": FORMAT,
        "simulator": name,
        "source": source(name),
        "parameters": simulator.prior.card,
        "n": n,
        "seed": seed,
        "batch": batch,
        "alone": not isinstance(first, Mapping),
        "shapes": {k: list(v.shape[1:]) for k, v in one.items()},
        "types": {k: str(v.numpy().dtype) for k, v in one.items()},
    }
    if (store.folder / "store.json").exists():
        if store.card != card:
            other = [k for k, v in card.items() if store.card.get(k) != v]
            raise ValueError(
                f"{folder} holds simulations of "
                + ", ".join(f"{k} {store.card.get(k)!r}" for k in other)
                + ", expected "
                + ", ".join(f"{k} {card[k]!r}" for k in other)
                + "; choose another folder, or remove it"
            )
    else:
        _prepare(store.folder, card, len(simulator.prior))
    parts = store.missing()
    jobs = [(name, str(store.folder), i) for i in parts]
    with tqdm(total=len(jobs), disable=not progress, unit="batch", desc="simulations") as bar:
        for _ in shared(_simulate, jobs, workers):
            bar.update()
    return store


def _prepare(folder: Path, card: dict, parameters: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    n, batches = card["n"], -(-card["n"] // card["batch"])
    new = lambda name, dtype, shape: np.lib.format.open_memmap(
        folder / f"{name}.npy", "w+", dtype, shape
    )
    new("theta", "float64", (n, parameters))
    for name, shape in card["shapes"].items():
        new(f"x-{name}", card["types"][name], (n, *shape))
    new("done", "uint8", (batches,))
    # last, for what has no card is not there
    (folder / "store.json").write_text(json.dumps(card, indent=1) + "\n")


def _batch(simulator: Simulator, n: int, seed: int, i: int) -> tuple[Tensor, Data]:
    theta = simulator.prior.sample(n, integer(seed, 0, i))
    return theta, simulator.simulate(theta, stream(seed, 1, i))


def _simulate(name: str, folder: str, i: int) -> None:
    """Fill batch i."""
    store = Store(Path(folder))
    card, simulator = store.card, load_simulator(name)
    first = i * card["batch"]
    rows = slice(first, min(first + card["batch"], card["n"]))
    theta, x = _batch(simulator, rows.stop - rows.start, card["seed"], i)
    inputs: Inputs = named(x)
    if count(inputs) != len(theta):
        raise ValueError(
            f"{name} made {count(inputs)} simulations of {len(theta)} parameters, expected as many"
        )
    for key, values in {"theta": theta, **{f"x-{k}": v for k, v in inputs.items()}}.items():
        array = store.array(key, "r+")
        array[rows] = values.numpy()
        array.flush()
    done = store.array("done", "r+")
    done[i] = 1
    done.flush()
