"""Controls that are the prior's own network, adapted.

    u  =  V^-1/2 (1 - a) (C_sigma / c) (D'(x, y) - D(x))  +  gate(clock) g

C_sigma is the error that a Gaussian prior would leave, of mean variance c, so that images are moved where they are not
known: elsewhere u would only learn noise. D' is the denoiser with a copy of the prior's network, whose first layer sees an
image of the data, too, or which is told a few numbers with the noise level. Either all of its weights are trained, or to
each matrix W of weights, which stays as it is, a product of two narrow ones is added,

    W' = W + B A,    A: r x inputs,  B: outputs x r

(Hu et al., LoRA: Low-Rank Adaptation of Large Language Models, 2021, arXiv:2106.09685). B is zero at first, and what the
first layer makes of the data: D' = D. Each step costs two passes of the network more than the prior's own.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from scoreinv.finetune.chain import PriorChain
from scoreinv.finetune.control import (
    Control,
    Guide,
    ImageControl,
    LearnedControl,
    VectorControl,
    convolves,
)
from scoreinv.kernels import conditional
from scoreinv.priors.base import Prior, RescaledPrior
from scoreinv.priors.network import ScorePrior
from scoreinv.priors.unet import UNet
from scoreinv.streams import seeded, stream


@dataclass(frozen=True)
class Adapted:
    """The prior's own network learns, in the place of one beside it.

    Args:
        rank: r of LoRA, 8 for instance; all weights are trained if not given.
    """

    rank: int | None = None

    def __post_init__(self) -> None:
        if self.rank is not None and self.rank < 1:
            raise ValueError(f"rank is {self.rank}, expected at least 1")


class AdaptedControl(LearnedControl):
    """The prior's network with weights of its own.

    Args:
        chain: Of a prior that is a U-Net of this package, at any amplitude.
        image: The image of data y, with shape (B, C, H, W) of the chain's images; none if not given.
        guide: See `LearnedControl`.
        adapted: What of the network is trained.
        seed: Of the first weights.
        examples: Data like those to come, with shape (n, *data), for y that are no image but a few numbers.

    Raises:
        ValueError: A prior without such a network.
    """

    @seeded(0)
    def __init__(
        self,
        chain: PriorChain,
        image: Callable[[Tensor], Tensor] | None = None,
        guide: Guide | None = None,
        adapted: Adapted = Adapted(),
        seed: int = 0,
        examples: Tensor | None = None,
    ) -> None:
        super().__init__(chain, guide, examples)
        prior, self._amplitude = _network_of(chain.prior)
        self._chain, self._image, self._prior, self.adapted = chain, image, prior, adapted
        left = [conditional(C, s) for C, s in zip(chain.covariances, chain.levels, strict=True)]
        self._left = torch.tensor([C.marginal_variance(chain.shape) for C in left])
        self.network = deepcopy(prior.network).train()
        if image is not None:
            self.network.first = _listening(self.network.first)
        rank = adapted.rank
        self.network.requires_grad_(rank is None)
        if rank is not None:
            generator = stream(seed)
            matrices = (m for m in self.network.modules() if isinstance(m, nn.Conv2d | nn.Linear))
            for layer in list(matrices):
                low = LowRank(layer.weight, rank, generator).to(layer.weight.device)
                parametrize.register_parametrization(layer, "weight", low)
        if len(self.middle):
            self.network.tell = nn.Linear(len(self.middle), self.network.features, bias=False)
            nn.init.zeros_(self.network.tell.weight)
        self.network.to(prior.device)

    def correction(
        self, inputs: list[Tensor], k: Tensor, features: Tensor, y: Tensor | None
    ) -> Tensor:
        over = lambda v: v.float().reshape(-1, 1, 1, 1)
        x = inputs[0] * over(self.reference.scale(k)) / self._amplitude
        sigma = self._chain.sigma(k).float() / self._amplitude
        _, out, seen, c = self._prior.prepared(x, sigma)
        # without autocast, so that nothing is left of the difference where weights are the same
        with torch.no_grad():
            before = self._prior.network(seen, c)
        images = [seen] if self._image is None else [seen, self._image(y).to(seen)]
        told = self.told(y)
        after = self.network(torch.cat(images, 1), c, None if told is None else told.to(seen))
        moved = self._amplitude * out * (after - before).to(out)
        return self.reference.steered(moved / over(self._left[k]), k)


def new_control(
    chain: PriorChain,
    adapted: Adapted | None,
    *,
    image: Callable[[Tensor], Tensor] | None = None,
    examples: Tensor | None = None,
    guide: Guide | None = None,
    seed: int = 0,
) -> LearnedControl:
    """A control that suits the images' size, or the prior's network.

    Args:
        chain: That is moved.
        adapted: How the prior's network is; if not given, a network beside it corrects its steps.
        image: The image of data y, with shape (B, C, H, W), where there is one; a perceptron takes numbers.
        examples: Data like those to come, with shape (n, *data); None if there is no y.
        guide: How the data pull, see `LearnedControl`.
        seed: Of the first weights.
    """
    if adapted is None and not convolves(chain.shape):
        return VectorControl(chain, examples, guide, seed=seed)
    told = examples if image is None else None
    if adapted is None:
        return ImageControl(chain, image, guide, seed=seed, examples=told)
    return AdaptedControl(chain, image, guide, adapted, seed, told)


def check_control(control: Control | Adapted | None, prior: Prior) -> None:
    """Raise if a prior has no network that can be adapted as is asked for."""
    if isinstance(control, Adapted):
        _network_of(prior)


class LowRank(nn.Module):
    """W + B A of weights W with any shape (outputs, ...).

    Args:
        weight: W, at first W'.
        rank: Rows of A.
        generator: Of the first A.
    """

    def __init__(self, weight: Tensor, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        outputs, inputs = weight.flatten(1).shape
        self.A = nn.Parameter(torch.randn(rank, inputs, generator=generator) * inputs**-0.5)
        self.B = nn.Parameter(torch.zeros(outputs, rank))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + (self.B @ self.A).reshape(weight.shape)


def _network_of(prior: Prior) -> tuple[ScorePrior, float]:
    """The prior whose network is adapted, and the amplitude at which it is used."""
    amplitude = 1.0
    while isinstance(prior, RescaledPrior):
        prior, amplitude = prior.prior, amplitude * prior.amplitude
    if not isinstance(prior, ScorePrior) or not isinstance(prior.network, UNet):
        raise ValueError(
            f"a {type(prior).__name__} has no network to adapt; expected a prior trained by this package, "
            "or another kind of control"
        )
    return prior, amplitude


def _listening(first: nn.Conv2d) -> nn.Conv2d:
    """A layer that sees as many channels more, and makes nothing of them yet."""
    wider = nn.Conv2d(2 * first.in_channels, first.out_channels, 3, padding=1)
    with torch.no_grad():
        wider.weight.zero_()[:, : first.in_channels] = first.weight
        wider.bias.copy_(first.bias)
    return wider.to(first.weight.device, memory_format=torch.channels_last)
