"""Networks trained with the score_models package, as priors.

score_models diffuses z_t = mu(t) x_0 + sigma(t) n, n ~ N(0, I), and trains net(t, z) so that the
score of z_t is net(t, z) / sigma(t). Here x_sigma = z_t / mu(t) = x_0 + sigma n with
sigma = sigma(t) / mu(t), so the score of x_sigma is mu(t) net(t, mu(t) x) / sigma(t) and

    E[x_0 | x_sigma = x] = x + sigma net(t, mu(t) x),    t = t(sigma).

The schedules are inverted in closed form:

    VE     sigma(t) = sigma_min (sigma_max / sigma_min)^(t / T),  mu(t) = 1
    TSVE   the same sigma(t) / mu(t),  mu(t) = exp(-beta max(t / T - t_star, 0))
    VP     mu(t)^2 = 1 - sigma(t)^2 = exp(-B(t))
           B(t) = beta_min t + (beta_max - beta_min) t^2 / 2

References: Song et al., Score-Based Generative Modeling through Stochastic Differential Equations
(2021, arXiv:2011.13456), appendix C; score_models 0.5 (github.com/AlexandreAdam/score_models) for
TSVE and for the files.
"""

from __future__ import annotations

import abc
import hashlib
import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from scoreinv.gaussian import Gaussian
from scoreinv.priors.base import Prior, of_network


class Schedule(abc.ABC):
    """The noising z_t = mu(t) (x_0 + sigma n) that a foreign network was trained with.

    Attributes:
        sigma_min: Smallest trained level [model unit].
        sigma_max: Largest trained level [model unit].
    """

    sigma_min: float
    sigma_max: float

    @abc.abstractmethod
    def time(self, sigma: Tensor) -> Tensor:
        """t(sigma), with shape (B,), for sigma with shape (B,)."""

    @abc.abstractmethod
    def scale(self, t: Tensor) -> Tensor:
        """mu(t), with shape (B,), for t with shape (B,)."""


@dataclass(frozen=True)
class VarianceExploding(Schedule):
    """VE; with beta > 0 the truncated scaled VE (TSVE), which shrinks z after t_star T."""

    sigma_min: float
    sigma_max: float
    T: float = 1.0
    beta: float = 0.0
    t_star: float = 1.0

    def __post_init__(self) -> None:
        if not (0 < self.sigma_min < self.sigma_max and self.T > 0):
            raise ValueError(
                f"sigma_min is {self.sigma_min}, sigma_max {self.sigma_max} and T {self.T}, "
                "expected 0 < sigma_min < sigma_max and T > 0"
            )

    def time(self, sigma: Tensor) -> Tensor:
        t = torch.log(sigma / self.sigma_min) / math.log(self.sigma_max / self.sigma_min)
        return self.T * t.clamp(0, 1)

    def scale(self, t: Tensor) -> Tensor:
        return torch.exp(-self.beta * (t / self.T - self.t_star).clamp_min(0))


@dataclass(frozen=True)
class VariancePreserving(Schedule):
    """VP with beta(t) linear from beta_min at t = 0; trained on t from epsilon to T."""

    beta_min: float
    beta_max: float
    T: float = 1.0
    epsilon: float = 1e-5

    def __post_init__(self) -> None:
        if not (0 < self.beta_min <= self.beta_max and 0 < self.epsilon < self.T):
            raise ValueError(
                f"beta_min is {self.beta_min}, beta_max {self.beta_max}, epsilon {self.epsilon} "
                f"and T {self.T}, expected 0 < beta_min <= beta_max and 0 < epsilon < T"
            )

    @property
    def sigma_min(self) -> float:
        return math.sqrt(math.expm1(self._integral(self.epsilon)))

    @property
    def sigma_max(self) -> float:
        return math.sqrt(math.expm1(self._integral(self.T)))

    def time(self, sigma: Tensor) -> Tensor:
        # The root of B(t) = ln(1 + sigma^2), in the form that does not cancel at small sigma.
        B = torch.log1p(sigma**2)
        root = torch.sqrt(self.beta_min**2 + 2 * (self.beta_max - self.beta_min) * B)
        return (2 * B / (self.beta_min + root)).clamp(self.epsilon, self.T)

    def scale(self, t: Tensor) -> Tensor:
        return torch.exp(-0.5 * self._integral(t))

    def _integral(self, t: Any) -> Any:
        """B(t)."""
        return self.beta_min * t + 0.5 * (self.beta_max - self.beta_min) * t**2


class ScoreModelsPrior(Prior):
    """A network net(t, z) of score_models, behind the package's one interface.

    Levels outside the trained range are refused: there the network would extrapolate, silently and
    wrongly.

    Args:
        network: net(t, z) = sigma(t) grad log p_t(z), with shape (B, C, H, W), for t with shape
            (B,) and z with shape (B, C, H, W).
        schedule: The noising that it was trained with.
        size: Shape (C, H, W) of an image, with None for a side that the network leaves open.
        dtype: Precision of the network.
        moments: Mean and covariance of the training images [model unit].
        stride: Every side of an image must be a multiple of it.
        identity: Name and hash, for the provenance of results.
    """

    def __init__(
        self,
        network: Callable[[Tensor, Tensor], Tensor],
        schedule: Schedule,
        size: tuple[int | None, ...],
        dtype: torch.dtype,
        moments: Gaussian | None = None,
        stride: int = 1,
        identity: dict[str, str] | None = None,
    ) -> None:
        self.network, self.schedule, self.dtype = network, schedule, dtype
        self.sigma_min, self.sigma_max = schedule.sigma_min, schedule.sigma_max
        self.size, self.stride, self._moments = tuple(size), stride, moments
        self.identity = identity or of_network(network)
        if moments is not None:
            self._check_shape(tuple(moments.mean.shape))
            self.size = tuple(moments.mean.shape)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape (C, H, W) of an image."""
        if None in self.size:
            raise ValueError(
                "a score_models checkpoint does not record the size of its training images; use "
                f"prior.with_shape(({self.size[0]}, ...)) or prior.with_moments(moments)"
            )
        return self.size

    @property
    def moments(self) -> Gaussian:
        """The Gaussian with the mean and the covariance of the training images."""
        if self._moments is None:
            raise ValueError(
                "a score_models checkpoint does not record the mean and the covariance of its "
                "training images; use prior.with_moments(Gaussian(mean, covariance)), measured on "
                "the training images or on draws of the prior"
            )
        return self._moments

    def with_shape(self, shape: tuple[int, ...]) -> ScoreModelsPrior:
        """The same prior for images of this shape (C, H, W) only."""
        self._check_shape(shape)
        return self._with(shape, self._moments)

    def with_moments(self, moments: Gaussian) -> ScoreModelsPrior:
        """The same prior with these moments, for images of the shape of their mean."""
        return self._with(self.size, moments)

    def _with(self, size: tuple[int | None, ...], moments: Gaussian | None) -> ScoreModelsPrior:
        return ScoreModelsPrior(
            self.network, self.schedule, size, self.dtype, moments, self.stride, self.identity
        )

    def denoise(self, x: Tensor, sigma: Tensor) -> Tensor:
        self.check(x)
        t = self.schedule.time(self._trained(sigma, len(x)))
        # The product is rounded to the network's precision once, at the end.
        z = _column(self.schedule.scale(t), x) * x
        n = self.network(t.to(self.device, self.dtype), z.to(self.device, self.dtype))
        return (x + _column(sigma, x) * n.to(x.device)).to(x.dtype)

    @property
    def device(self) -> torch.device:
        if isinstance(self.network, nn.Module):
            return next(self.network.parameters()).device
        return super().device

    def to(self, device: torch.device | str) -> ScoreModelsPrior:
        """Move the network; returns the prior itself."""
        if isinstance(self.network, nn.Module):
            self.network.to(device)
        return self

    def check(self, x: Tensor) -> None:
        """Raise if x is not a batch of this prior's images."""
        self._check_shape(tuple(x.shape[1:]))

    def _check_shape(self, shape: tuple[int, ...]) -> None:
        expected = ", ".join("any" if n is None else str(n) for n in self.size)
        if len(shape) != len(self.size) or any(
            n not in (None, m) for n, m in zip(self.size, shape, strict=True)
        ):
            raise ValueError(f"images have shape {shape}, expected ({expected})")
        if any(n % self.stride for n in shape[1:]):
            raise ValueError(
                f"images have shape {shape}, but this network also works at 1/{self.stride} of "
                f"the resolution: every side must be a multiple of {self.stride}; pad or crop them"
            )

    def _trained(self, sigma: Tensor, batch: int) -> Tensor:
        """sigma in float64, if it has shape (B,) and every level was trained."""
        if tuple(sigma.shape) != (batch,):
            raise ValueError(
                f"sigma has shape {tuple(sigma.shape)}, expected ({batch},): one level per image"
            )
        sigma = sigma.double()
        # Levels are often rounded to float32 on their way here.
        low, high = self.sigma_min * (1 - 1e-6), self.sigma_max * (1 + 1e-6)
        if not bool(((sigma >= low) & (sigma <= high)).all()):
            seen = sigma.detach()
            raise ValueError(
                f"sigma goes from {float(seen.min()):.6g} to {float(seen.max()):.6g}, but this "
                f"network was trained from {self.sigma_min:.6g} to {self.sigma_max:.6g}; keep the "
                "levels between prior.sigma_min and prior.sigma_max"
            )
        return sigma


def load_score_models(
    path: str | Path,
    shape: tuple[int, ...] | None = None,
    checkpoint: int | None = None,
    moments: Gaussian | None = None,
) -> ScoreModelsPrior:
    """The prior in a checkpoint folder of score_models 0.5.

    The folder holds `model_hparams.json` and `checkpoint_{loss}_{index}.pt`, the weights of a
    `ScoreModel` (an `EnergyModel` writes the same files and cannot be told apart). The files say
    neither the size nor the moments of the training images; samplers need both.

    Args:
        path: The folder.
        shape: Shape (C, H, W) of an image; taken from the moments if they are given.
        checkpoint: Index k of the checkpoint to read; the highest if not given.
        moments: Mean and covariance of the training images [model unit].

    Raises:
        ValueError: If the folder is not such a checkpoint, if its network takes conditions, or if
            shape and moments do not fit it.
    """
    folder = Path(path)
    hparams = _hyperparameters(folder)
    try:
        schedule = _schedule(hparams)
    except ValueError as error:
        raise ValueError(f"{folder / 'model_hparams.json'}: {error}") from error
    file = _checkpoint(folder, checkpoint)
    network = _network(hparams, folder)
    _fill(network, _weights(file), file)

    prior = ScoreModelsPrior(
        network.eval().requires_grad_(False),
        schedule,
        size=(network.channels, *[None] * network.dimensions),
        dtype=next(network.parameters()).dtype,
        stride=2 ** (network.num_resolutions - 1),
        identity={
            "prior": folder.resolve().name,
            "checkpoint": file.name,
            "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
        },
    )
    if shape is not None:
        prior = prior.with_shape(tuple(shape))
    return prior if moments is None else prior.with_moments(moments)


def _hyperparameters(folder: Path) -> dict[str, Any]:
    file = folder / "model_hparams.json"
    if not file.is_file():
        raise ValueError(
            f"{folder} has no model_hparams.json, expected a checkpoint folder of score_models; "
            "give the folder that also holds the checkpoint_*.pt files"
        )
    try:
        hparams = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file} is not JSON ({error}); copy it again") from error
    if not isinstance(hparams, dict):
        raise ValueError(f"{file} holds a {type(hparams).__name__}, expected a JSON object")
    return hparams


def _schedule(hparams: dict[str, Any]) -> Schedule:
    sde = hparams.get("sde")
    if sde is None:
        # Early files have no name; score_models itself goes by these keys, in this order.
        names = {"t_star": "tsve", "sigma_min": "ve", "beta_min": "vp"}
        sde = next((name for key, name in names.items() if key in hparams), None)
    hparams = {"T": 1.0, "epsilon": 1e-5, **hparams}
    match str(sde).lower():
        case "ve" | "vesde":
            return VarianceExploding(**_numbers(hparams, "sigma_min", "sigma_max", "T"))
        case "tsve":
            keys = "sigma_min", "sigma_max", "T", "beta", "t_star"
            return VarianceExploding(**_numbers(hparams, *keys))
        case "vp" | "vpsde":
            values = _numbers(hparams, "beta_min", "beta_max", "T", "epsilon")
            # Below t = 1e-5, 1 - mu(t)^2 vanishes in the float32 of the training.
            return VariancePreserving(**{**values, "epsilon": max(values["epsilon"], 1e-5)})
    raise ValueError(
        f"sde is {sde!r}, expected 've', 'vp' or 'tsve', or the keys of one of them: sigma_min "
        "(ve), beta_min (vp), t_star (tsve)"
    )


def _numbers(hparams: dict[str, Any], *keys: str) -> dict[str, float]:
    missing = [key for key in keys if not isinstance(hparams.get(key), int | float)]
    if missing:
        raise ValueError(
            f"no number for {', '.join(missing)}, which its SDE needs; was the file cut or edited?"
        )
    return {key: float(hparams[key]) for key in keys}


def _checkpoint(folder: Path, checkpoint: int | None) -> Path:
    """The file whose last integer is `checkpoint`, or the highest."""
    indices = {
        file: int(match[1])
        for file in sorted(folder.glob("checkpoint*.pt"))
        if (match := re.search(r"(\d+)\.pt$", file.name))
    }
    if not indices:
        raise ValueError(
            f"{folder} has no checkpoint_*.pt, expected the weights beside model_hparams.json; "
            "was the training stopped before its first checkpoint, or only the settings copied?"
        )
    wanted = max(indices.values()) if checkpoint is None else checkpoint
    files = [file for file, index in indices.items() if index == wanted]
    if not files:
        raise ValueError(
            f"{folder} has no checkpoint {wanted}, only {sorted(indices.values())}; choose one of "
            "these, or none for the latest"
        )
    if len(files) > 1:
        raise ValueError(
            f"{folder} has {len(files)} files with the index {wanted}: "
            f"{', '.join(file.name for file in files)}; move all but one of them away"
        )
    return files[0]


def _network(hparams: dict[str, Any], folder: Path) -> nn.Module:
    """The untrained network, of which score_models keeps only the settings."""
    from score_models.architectures import DDPM, NCSNpp

    # score_models takes files without a name for NCSN++ as well.
    name = str(hparams.get("model_architecture", "ncsnpp"))
    architectures = {"ncsnpp": NCSNpp, "ddpm": DDPM}
    if name.lower() not in architectures:
        raise ValueError(
            f"{folder} holds a network of architecture {name!r}, expected 'NCSNpp' or 'DDPM', the "
            "ones that act on images; wrap another network in ScoreModelsPrior yourself"
        )
    conditions = hparams.get("condition") or hparams.get("conditioning") or []
    if any(str(c).lower() != "none" for c in conditions):
        raise ValueError(
            f"{folder} holds a network with the conditions {conditions}, expected none; fix their "
            "values in a function net(t, z) and wrap that in ScoreModelsPrior"
        )
    settings = {"dimensions": 2, **hparams}
    try:
        # The initial weights are drawn from the global generator, which is not ours to advance.
        with torch.random.fork_rng(devices=[]):
            return architectures[name.lower()](**settings)
    except Exception as error:  # the constructors check their arguments in many ways
        raise ValueError(
            f"{folder / 'model_hparams.json'}: {name} refuses these settings ({error}); was the "
            "file edited, or written by another version of score_models than 0.5?"
        ) from error


def _weights(file: Path) -> dict[str, Tensor]:
    """The state dict in a file, with the names that the network itself gives to its weights."""
    try:
        weights = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many types for truncated and for foreign files
        raise ValueError(
            f"{file} cannot be read as a state dict of tensors ({type(error).__name__}); it is "
            "truncated, or it is not a checkpoint of score_models: copy it again"
        ) from error
    if not isinstance(weights, dict) or not all(isinstance(w, Tensor) for w in weights.values()):
        raise ValueError(
            f"{file} holds a {type(weights).__name__}, expected a state dict of tensors; is it an "
            "optimizer_*.pt under another name?"
        )
    if weights and all(key.startswith("model.") for key in weights):
        # Early files hold the whole ScoreModel, whose network is called `model`.
        weights = {key.removeprefix("model."): w for key, w in weights.items()}
    broken = [key for key, w in weights.items() if not bool(w.isfinite().all())]
    if broken:
        raise ValueError(
            f"{file} has NaN or infinity in {', '.join(broken[:3])}: the training diverged; "
            "choose an earlier checkpoint"
        )
    return weights


def _fill(network: nn.Module, weights: dict[str, Tensor], file: Path) -> None:
    """Load the weights, if every one of them has its place."""
    expected = {key: tuple(w.shape) for key, w in network.state_dict().items()}
    found = {key: tuple(w.shape) for key, w in weights.items()}
    wrong = [
        f"{key} is {found.get(key, 'missing')}, expected {expected.get(key, 'none')}"
        for key in sorted(expected.keys() | found.keys())
        if found.get(key) != expected.get(key)
    ]
    if wrong:
        raise ValueError(
            f"{file} does not fit the network of model_hparams.json in {len(wrong)} of "
            f"{len(expected)} tensors ({'; '.join(wrong[:3])}{'; ...' if wrong[3:] else ''}); do "
            "both files come from the same training run?"
        )
    network.load_state_dict(weights)


def _column(values: Tensor, x: Tensor) -> Tensor:
    return values.reshape(-1, *[1] * (x.ndim - 1))
