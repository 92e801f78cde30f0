"""Priors on disk: a folder, or a shipped name, with the weights as safetensors and a JSON card.

The card states what the network is (architecture, sigma_data, trained levels), what it learned from (data, steps, seed)
and how well (held-out denoising error against the Wiener filter, power spectra), and the SHA-256 of the weights.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from scoreinv.gaussian import Fourier, Gaussian
from scoreinv.priors.base import Prior
from scoreinv.priors.network import ErrorModel, ScorePrior
from scoreinv.priors.score_models import ScoreModelsPrior, load_score_models
from scoreinv.priors.unet import UNet, error_head, second_look

FORMAT = 4
SHIPPED = Path(__file__).parent / "weights"


def shipped_priors() -> dict[str, dict[str, Any]]:
    """The cards of the priors that come with the package, by name."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(SHIPPED.glob("*.json"))}


def prior_card(source: str | Path) -> dict[str, Any]:
    """What is known of the training of a shipped prior, or of one in a folder; empty if nothing is."""
    shipped, path = shipped_priors(), Path(source) / "card.json"
    if str(source) in shipped:
        return shipped[str(source)]
    return _card(path) if path.is_file() else {}


def load_prior(source: str | Path, device: torch.device | str = "cpu") -> Prior:
    """A prior, ready to sample.

    Args:
        source: A shipped name (see `scoreinv priors`), a folder written by `scoreinv train`, or a score_models
            checkpoint folder.
        device: Where its network runs; particles and data stay on the CPU.

    Raises:
        ValueError: Unknown name, a folder or file that is not a prior, or a device that this machine lacks.
    """
    prior = _found(source)
    try:
        return prior.to(device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"device is {str(device)!r}, expected cpu, cuda or cuda:N of this machine ({error}); try cpu"
        ) from error


def _found(source: str | Path) -> ScorePrior | ScoreModelsPrior:
    if str(source) in shipped_priors():
        return _load(SHIPPED / f"{source}.safetensors", SHIPPED / f"{source}.json")
    folder = Path(source)
    if (folder / "card.json").is_file():
        return _load(folder / "weights.safetensors", folder / "card.json")
    if folder.is_dir():
        return load_score_models(folder)
    names = list(shipped_priors())
    near = difflib.get_close_matches(str(source), names, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ValueError(
        f"no prior {str(source)!r}: expected one of {', '.join(names)}, or an existing folder{hint}"
    )


def save_prior(folder: Path, prior: ScorePrior, card: dict[str, Any]) -> str:
    """Write the weights (in float16), moments and the card; returns the SHA-256 of the weights file.

    Half precision changes the denoiser by less than bfloat16 autocast does, and halves the file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {f"network.{k}": v.half() for k, v in prior.network.state_dict().items()}
    tensors["moments.mean"] = prior.moments.mean.float()
    tensors["moments.spectrum"] = prior.moments.covariance.spectrum.float()
    if prior.error is not None:
        tensors |= {f"error.head.{k}": v.half() for k, v in prior.error.head.state_dict().items()}
        if prior.error.look is not None:
            look = prior.error.look.state_dict()
            tensors |= {f"error.look.{k}": v.half() for k, v in look.items()}
        tensors["error.white"] = prior.error.white.float()
        tensors["error.levels"] = prior.error.levels.float()
        tensors["error.corrections"] = prior.error.corrections.float()
        tensors["error.power"] = prior.error.power.float()
        tensors["error.gamma"] = prior.error.gamma.float()
        tensors["error.excess_noise"] = torch.tensor([prior.error.excess_noise])
    path = folder / "weights.safetensors"
    save_file({k: v.contiguous() for k, v in tensors.items()}, path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    card = {"format": FORMAT, **card, "symmetric": prior.symmetric, "sha256": digest}
    (folder / "card.json").write_text(json.dumps(card, indent=2) + "\n")
    return digest


def _load(weights: Path, card_path: Path) -> ScorePrior:
    card = _card(card_path)
    if card.get("format") != FORMAT:
        raise ValueError(
            f"{card_path} has format {card.get('format')!r}, this version reads {FORMAT}; train or fetch it again"
        )
    if not weights.is_file():
        raise ValueError(f"{weights} is not there; copy it beside its card, or train it again")
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    if digest != card["sha256"]:
        raise ValueError(
            f"{weights} has SHA-256 {digest[:16]}..., its card says {card['sha256'][:16]}...: "
            "the file is truncated or was changed; fetch or train it again"
        )
    try:
        tensors = load_file(weights)
    except SafetensorError as error:
        raise ValueError(
            f"{weights} is not a safetensors file ({error}); fetch or train it again"
        ) from error
    network = UNet(**card["network"]).to(memory_format=torch.channels_last)
    network.load_state_dict(_part(tensors, "network."))
    moments = Gaussian(tensors["moments.mean"], Fourier(tensors["moments.spectrum"].double()))
    return ScorePrior(
        network,
        card["sigma_data"],
        moments,
        card["sigma_min"],
        card["sigma_max"],
        identity={"prior": card["name"], "sha256": digest},
        error=_error(network, tensors),
        symmetric=card.get("symmetric", False),
    )


def _card(path: Path) -> dict[str, Any]:
    try:
        card = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is no card of a prior ({error}); copy it again") from error
    if not isinstance(card, dict):
        raise ValueError(
            f"{path} is no card of a prior, but a {type(card).__name__}; copy it again"
        )
    return card


def _error(network: UNet, tensors: dict[str, Tensor]) -> ErrorModel | None:
    """What the prior learned of its error, if it did."""
    if "error.levels" not in tensors:
        return None
    head = error_head(network, tensors["error.power"].shape[1])
    head.load_state_dict(_part(tensors, "error.head."))
    look = None
    if found := _part(tensors, "error.look."):
        look = second_look(network)
        look.load_state_dict(found)
        look.eval().requires_grad_(False)
    return ErrorModel(
        head.eval().requires_grad_(False),
        tensors["error.white"].double(),
        tensors["error.levels"].double(),
        tensors["error.corrections"].double(),
        tensors["error.power"].double(),
        tensors["error.gamma"].double(),
        float(tensors["error.excess_noise"]),
        look,
    )


def _part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin so, under the rest of their names, in float32."""
    return {k.removeprefix(prefix): v.float() for k, v in tensors.items() if k.startswith(prefix)}
