"""Posterior draws with everything that is needed to trust them: evidence, effective sample sizes, cost, provenance.

`write` makes a FITS file (mean, standard deviation, draws and the images of the data as extensions, with WCS, unit and
provenance cards) or HDF5, by the name's ending; `read_samples` reads both.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from scoreinv.data.grid import Grid, ascii_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SCALARS = ("log_evidence", "log_evidence_std", "evaluations", "vjps", "seconds", "weights")
CURVES = ("levels", "ess", "acceptance", "island_log_evidence")
IMAGES = ("data_image", "residual_image", "truth")


@dataclass(frozen=True)
class Samples:
    """Draws of an image posterior.

    Attributes:
        x: Draws, equally weighted, with shape (n, C, H, W).
        log_evidence: log p(y) [nat].
        log_evidence_std: Its standard error from the spread over the islands [nat]; nan for a single island. The Gaussian
            evidence that they share adds 0.25 nat where its determinant is estimated (images beyond 1,024 pixels whose
            operator is not diagonal in a basis of the prior).
        weights: In words: whether importance weights were used throughout, from which level they were dropped, why.
        levels: Noise levels of the path, with shape (L,).
        ess: Smallest effective sample size over n of an island, mean over islands, on the way from each level to the
            next; nan without weights.
        acceptance: Acceptance of the moves, mean over islands, on the way from each level to the next; nan without moves.
        island_log_evidence: log p(y) by each island.
        evaluations: Network evaluations of all particles, scouts included, per draw.
        seconds: Wall time, over all runs that made the draws.
        vjps: Vector-Jacobian products of the network per draw, which only baselines take.
        meta: Provenance: seed, sampler, prior and hash of its weights, versions, configuration.
        grid: Sky coordinates, if known.
        data_image: The data as an image, with shape (C, H, W).
        residual_image: The same of data minus the mean's prediction.
        truth: The true image, if this is a simulation.
    """

    x: Tensor
    log_evidence: float
    log_evidence_std: float
    weights: str
    levels: Tensor
    ess: Tensor
    acceptance: Tensor
    island_log_evidence: Tensor
    evaluations: float
    seconds: float
    vjps: float = 0.0
    meta: dict[str, Any] = field(default_factory=dict)
    grid: Grid | None = None
    data_image: Tensor | None = None
    residual_image: Tensor | None = None
    truth: Tensor | None = None

    @property
    def mean(self) -> Tensor:
        """Posterior mean, with shape (C, H, W)."""
        return self.x.double().mean(0)

    @property
    def std(self) -> Tensor:
        """Posterior standard deviation of each pixel, with shape (C, H, W); nan of one draw."""
        x = self.x.double()
        return x.std(0) if len(x) > 1 else torch.full_like(x[0], math.nan)

    def with_(self, **changes: Any) -> Samples:
        """A copy with these fields changed."""
        return replace(self, **changes)

    def __str__(self) -> str:
        n, *shape = self.x.shape
        moved = self.acceptance[~self.acceptance.isnan()]
        spread = self.log_evidence_std
        error = (
            f"+- {spread:.2f} nat"
            if math.isfinite(spread)
            else "nat, error unknown from one island"
        )
        rows = {
            "draws": f"{n} of shape {tuple(shape)}",
            "log evidence": f"{self.log_evidence:.2f} {error}",
            "weights": self.weights,
            "acceptance": f"{float(moved.mean()):.2f}" if len(moved) else "nothing was moved",
            "evaluations": f"{self.evaluations:.0f} per draw",
            "time": f"{self.seconds:.1f} s",
        }
        return "\n".join(f"{k:<14}{v}" for k, v in rows.items())

    def plot(self, **options: Any) -> Figure:
        """The result on one page, see `scoreinv.samplers.figure.result_figure`."""
        from scoreinv.samplers.figure import result_figure

        return result_figure(self, **options)

    def write(self, path: str | Path, overwrite: bool = False) -> Path:
        """Write to .fits, .h5 or .hdf5.

        Raises:
            FileExistsError: The file exists and `overwrite` is False.
            ValueError: Another ending.
        """
        path = Path(path)
        writers: dict[str, Callable[[Samples, Path], None]] = {
            ".fits": _write_fits,
            ".h5": _write_hdf5,
            ".hdf5": _write_hdf5,
        }
        if path.suffix not in writers:
            raise ValueError(
                f"{path.name} ends in {path.suffix!r}, expected one of {', '.join(writers)}"
            )
        if path.exists() and not overwrite:
            raise FileExistsError(
                f"{path} exists; choose another name, or pass overwrite=True (--overwrite)"
            )
        partial = path.with_name(f".{path.name}.part")
        try:
            writers[path.suffix](self, partial)
            os.replace(partial, path)
        except OSError as error:
            raise OSError(
                f"could not write {path}: {error}; no file was left half written"
            ) from error
        finally:
            partial.unlink(missing_ok=True)
        return path


def read_samples(path: str | Path) -> Samples:
    """Read what `Samples.write` wrote.

    Raises:
        ValueError: Not such a file.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    try:
        fields = _read_fits(path) if path.suffix == ".fits" else _read_hdf5(path)
    except (KeyError, OSError) as error:
        raise ValueError(
            f"{path} holds no posterior draws written by scoreinv ({error})"
        ) from error
    return Samples(**fields)


# ---------------------------------------------------------------- FITS


def _write_fits(samples: Samples, path: Path) -> None:
    from astropy.io import fits

    wcs = samples.grid.header() if samples.grid is not None else fits.Header()
    unit = samples.grid.unit if samples.grid is not None else ""

    def image(data: Tensor, name: str, unit: str = unit) -> fits.ImageHDU:
        data = data.squeeze(-3) if data.shape[-3] == 1 else data
        hdu = fits.ImageHDU(data.numpy().astype(np.float32), header=wcs.copy(), name=name)
        hdu.header.remove("BUNIT", ignore_missing=True)
        if unit:
            hdu.header["BUNIT"] = ascii_of(unit)
        return hdu

    first = image(samples.mean, "MEAN")
    primary = fits.PrimaryHDU(first.data, header=first.header)
    primary.header["EXTNAME"] = "MEAN"
    _cards(primary.header, samples)
    hdus = [primary, image(samples.std, "STD"), image(samples.x, "DRAWS")]
    # a dirty image is in Jy/beam, the sky in Jy/pixel
    units = {"truth": unit}
    for name in IMAGES:
        if getattr(samples, name) is not None:
            other = units.get(name, samples.meta.get("data", {}).get("unit", ""))
            hdus.append(image(getattr(samples, name), name.upper(), other))
    columns = [
        fits.Column(name, "D", array=getattr(samples, name).numpy())
        for name in ("levels", "ess", "acceptance")
    ]
    hdus.append(fits.BinTableHDU.from_columns(columns, name="PATH"))
    islands = fits.Column("log_evidence", "D", array=samples.island_log_evidence.numpy())
    hdus.append(fits.BinTableHDU.from_columns([islands], name="ISLANDS"))
    text = np.frombuffer(json.dumps(_provenance(samples)).encode(), dtype=np.uint8)
    hdus.append(fits.BinTableHDU.from_columns([fits.Column("JSON", "B", array=text)], name="META"))
    fits.HDUList(hdus).writeto(path, output_verify="exception")


def _cards(header: Any, samples: Samples) -> None:
    """The provenance a viewer shows; the whole of it is in the META extension."""
    cards = {
        "LOGEVID": (samples.log_evidence, "log evidence [nat]"),
        "LOGEVSTD": (samples.log_evidence_std, "its standard error [nat]"),
        "NDRAWS": (len(samples.x), "posterior draws"),
        "NEVAL": (samples.evaluations, "network evaluations per draw"),
        "SECONDS": (samples.seconds, "wall time [s]"),
        "SEED": (samples.meta.get("seed"), "random seed"),
        "SAMPLER": (ascii_of(str(samples.meta.get("sampler", "")))[:68], ""),
        "PRIOR": (ascii_of(str(samples.meta.get("prior", {}).get("prior", "")))[:68], ""),
        "PRIORSHA": (str(samples.meta.get("prior", {}).get("sha256", ""))[:64], ""),
        "CREATOR": (f"scoreinv {samples.meta.get('versions', {}).get('scoreinv', '')}", ""),
    }
    for key, (value, comment) in cards.items():
        if isinstance(value, float) and not np.isfinite(value):
            value = str(value)
        header[key] = (value, comment)
    header.add_comment(ascii_of(f"Weights: {samples.weights}"))


def _read_fits(path: Path) -> dict[str, Any]:
    from astropy.io import fits

    with fits.open(path, memmap=False) as hdus:
        meta = json.loads(np.asarray(hdus["META"].data["JSON"], dtype=np.uint8).tobytes())
        tensor = lambda name: torch.from_numpy(np.array(hdus[name].data, dtype=np.float32))
        image = lambda x: x if x.ndim == 3 else x[None]
        x = tensor("DRAWS")
        fields = {name: image(tensor(name.upper())) for name in IMAGES if name.upper() in hdus}
        for name in ("levels", "ess", "acceptance"):
            fields[name] = torch.from_numpy(np.array(hdus["PATH"].data[name], dtype=np.float64))
        evidence = np.array(hdus["ISLANDS"].data["log_evidence"], dtype=np.float64)
    fields["x"] = x if x.ndim == 4 else x[:, None]
    return {**fields, "island_log_evidence": torch.from_numpy(evidence), **_unpacked(meta)}


# ---------------------------------------------------------------- HDF5


def _write_hdf5(samples: Samples, path: Path) -> None:
    import h5py

    with h5py.File(path, "w") as f:
        f.create_dataset("x", data=samples.x.numpy(), compression="gzip", shuffle=True)
        for name in (*CURVES, *IMAGES):
            if getattr(samples, name) is not None:
                f[name] = getattr(samples, name).numpy()
        f.attrs["meta"] = json.dumps(_provenance(samples))


def _read_hdf5(path: Path) -> dict[str, Any]:
    import h5py

    with h5py.File(path) as f:
        fields = {
            name: torch.from_numpy(f[name][...]) for name in ("x", *CURVES, *IMAGES) if name in f
        }
        return {**fields, **_unpacked(json.loads(f.attrs["meta"]))}


def _provenance(samples: Samples) -> dict[str, Any]:
    scalars = {name: getattr(samples, name) for name in SCALARS}
    grid = asdict(samples.grid) if samples.grid is not None else None
    return {"scalars": scalars, "meta": samples.meta, "grid": grid}


def _unpacked(record: dict[str, Any]) -> dict[str, Any]:
    grid = record["grid"]
    return {
        **record["scalars"],
        "meta": record["meta"],
        "grid": None if grid is None else Grid(**grid),
    }
