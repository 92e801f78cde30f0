"""Controls: networks that tilt the steps of a reference chain.

    u  =  F(x / scale, denoised / scale, g, clock, y)  +  gate(clock) g

with F zero at first, so that training starts from the reference, and from the reference pulled by the data where there is
guidance g: the shift of the denoised image that linear data with Gaussian noise make,

    g  =  V^-1/2 (1 - a) (K^-1 + H)^-1 A^T S^-1 (y - A D).

K is the error of D that the prior knows around x, as local steps of `scoreinv.samplers.guided` have it, or C_sigma, that
which a Gaussian prior would leave; for a Gaussian prior g is all of u. Of other rewards it is the part that their slope
makes, V^-1/2 (1 - a) C_sigma grad log r.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from scoreinv.conditioning.local import respond
from scoreinv.finetune.chain import PriorChain, foreseen, pulled
from scoreinv.finetune.reference import GaussianStep, Reference, Step
from scoreinv.kernels import conditional, inverse
from scoreinv.likelihood import Likelihood
from scoreinv.operators import Generated
from scoreinv.posterior import SHORT
from scoreinv.priors.unet import UNet, initialise, sinusoidal
from scoreinv.streams import seeded, stream

SLOPES = 2_000_000  # derivatives of pixels that are held at once
LONGEST = 10.0  # of guidance, in units of a step's noise
TIMES = 32  # features of the clock
FEW = 128  # pixels up to which a perceptron serves better than a U-Net
WIDTHS = (32, 64)  # of that
Guide = Callable[[Step, Tensor, Tensor], Tensor]


class Control(nn.Module, abc.ABC):
    """u(x_k, k, y), by which steps are tilted: for Gaussian ones a shift in units of their own noise V^1/2.

    Args:
        reference: The chain that is moved.
    """

    guided = False

    def __init__(self, reference: Reference) -> None:
        super().__init__()
        self.reference = reference

    def guide(self, x: Tensor, step: Step, k: Tensor, y: Tensor | None) -> Tensor | None:
        """How the data pull these steps, with shape (B, *shape), where the control is told."""
        return None

    @abc.abstractmethod
    def forward(
        self, x: Tensor, denoised: Tensor, g: Tensor | None, k: Tensor, y: Tensor | None
    ) -> Tensor:
        """u, with shape (B, *shape).

        Args:
            x: States, with shape (B, *shape).
            denoised: What they are known to become, with that shape.
            g: From `guide`.
            k: Steps, with shape (B,).
            y: Data, with shape (B, *data), or None.
        """


class LearnedControl(Control):
    """F(x / scale, denoised / scale, g, clock, y) + gate(clock) g.

    Args:
        reference: The chain that is moved.
        guide: g of a step, its number k and the data; none if not given.
        examples: Data like those to come, with shape (n, *data), which set the scale of y as numbers; None if y is not told.
    """

    @seeded(0)
    def __init__(
        self, reference: Reference, guide: Guide | None = None, examples: Tensor | None = None
    ) -> None:
        super().__init__(reference)
        self._guide = guide
        seen = torch.zeros(1, 0) if examples is None else numbers(examples)
        self.register_buffer("middle", seen.mean(0))
        self.register_buffer("unit", (seen - self.middle).square().mean(0).sqrt().clamp_min(1e-12))
        self.gate = nn.Sequential(nn.Linear(TIMES, 64), nn.SiLU(), nn.Linear(64, 1))
        initialise(self.gate, stream(0, 1))
        nn.init.zeros_(self.gate[-1].weight)
        nn.init.ones_(self.gate[-1].bias)

    @property
    def guided(self) -> bool:
        """Whether it is told how the data pull."""
        return self._guide is not None

    def told(self, y: Tensor | None) -> Tensor | None:
        """Data as numbers of about unit scale, with shape (B, m); None if they are not told."""
        return (numbers(y) - self.middle) / self.unit if len(self.middle) else None

    @abc.abstractmethod
    def correction(
        self, inputs: list[Tensor], k: Tensor, features: Tensor, y: Tensor | None
    ) -> Tensor:
        """F, with shape (B, *shape).

        Args:
            inputs: Images of about unit scale, each with shape (B, *shape).
            k: Steps, with shape (B,).
            features: Of their clock, with shape (B, TIMES).
            y: Data, with shape (B, *data), or None.
        """

    def guide(self, x: Tensor, step: Step, k: Tensor, y: Tensor | None) -> Tensor | None:
        """g of these steps, no longer than `LONGEST`, with shape (B, *shape); None without guidance."""
        if self._guide is None:
            return None
        g = self._guide(step, k, y)
        length = g.flatten(1).double().square().mean(1).sqrt()
        cut = (LONGEST / length.clamp_min(LONGEST)).to(g.dtype)
        return g * cut.reshape(-1, *[1] * (g.ndim - 1))

    def forward(
        self, x: Tensor, denoised: Tensor, g: Tensor | None, k: Tensor, y: Tensor | None
    ) -> Tensor:
        clock = self.reference.clock(k).float()
        features = sinusoidal(clock, TIMES)
        over = lambda s: s.float().reshape(-1, *[1] * (x.ndim - 1))
        last = torch.full_like(k, self.reference.steps)
        inputs = [
            x.float() / over(self.reference.scale(k)),
            denoised.float() / over(self.reference.scale(last)),
            *([] if g is None else [g.float()]),
        ]
        u = self.correction(inputs, k, features, y)
        if g is not None:
            u = u + over(self.gate(features)[:, 0]) * g.float()
        return u.to(x.dtype)


class VectorControl(LearnedControl):
    """A perceptron over all pixels: for images of few numbers.

    Args:
        reference: The chain that is moved.
        examples: Data like those to come, with shape (n, *data), which set the scale of y; None if there is no y.
        guide: See `LearnedControl`.
        width: Of each hidden layer.
        layers: Hidden ones.
        seed: Of the first weights.
    """

    @seeded(0)
    def __init__(
        self,
        reference: Reference,
        examples: Tensor | None = None,
        guide: Guide | None = None,
        width: int = 128,
        layers: int = 3,
        seed: int = 0,
    ) -> None:
        super().__init__(reference, guide, examples)
        d = math.prod(reference.shape)
        sizes = [d * (2 if guide is None else 3) + TIMES + len(self.middle), *[width] * layers]
        body: list[nn.Module] = []
        for a, b in zip(sizes[:-1], sizes[1:], strict=True):
            body += [nn.Linear(a, b), nn.SiLU()]
        self.body = nn.Sequential(*body)
        initialise(self.body, stream(seed))
        self.last = nn.Linear(width, d)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)
        self.body.to(reference.device)
        self.last.to(reference.device)

    def correction(
        self, inputs: list[Tensor], k: Tensor, features: Tensor, y: Tensor | None
    ) -> Tensor:
        told = self.told(y)
        known = [*inputs, features] if told is None else [*inputs, features, told]
        flat = torch.cat([v.flatten(1) for v in known], 1)
        return answer(nn.Sequential(self.body, self.last), flat).reshape(inputs[0].shape)


class ImageControl(LearnedControl):
    """The U-Net of the shipped priors, over the images stacked as channels.

    It answers the gradient of a log-reward, over the standard deviation of a pixel, and `Reference.steered` makes u of it:
    in directions that a step leaves no choice in, u would only learn noise. Data enter as an image or as numbers, and
    through the guidance.

    Args:
        reference: The chain that is moved.
        image: The image of data y, with shape (B, C, H, W) of the chain's images; none if not given.
        guide: See `LearnedControl`.
        widths: See `scoreinv.priors.unet.UNet`.
        seed: Of the first weights.
        examples: Data like those to come, with shape (n, *data), for y that are no image but a few numbers, such as classes;
            they scale and shift all features, as the clock does.
    """

    def __init__(
        self,
        reference: Reference,
        image: Callable[[Tensor], Tensor] | None = None,
        guide: Guide | None = None,
        widths: tuple[int, ...] = WIDTHS,
        seed: int = 0,
        examples: Tensor | None = None,
    ) -> None:
        super().__init__(reference, guide, examples)
        self._image, channels = image, reference.shape[0]
        stacked = (2 + (guide is not None) + (image is not None)) * channels
        numbered = len(self.middle)
        self.network = UNet(stacked, widths, embedding=64, outputs=channels, told=numbered)
        initialise(self.network, stream(seed))
        self.network.to(reference.device)

    def correction(
        self, inputs: list[Tensor], k: Tensor, features: Tensor, y: Tensor | None
    ) -> Tensor:
        if self._image is not None:
            inputs = [*inputs, self._image(y).float()]
        clock = self.reference.clock(k).float()
        slope = answer(self.network, torch.cat(inputs, 1), clock, self.told(y))
        last = self.reference.scale(torch.full_like(k, self.reference.steps))
        return self.reference.steered(slope / last.float().reshape(-1, 1, 1, 1), k)


def convolves(shape: Sequence[int]) -> bool:
    """Whether a U-Net suits images of this shape: it halves them a few times."""
    return math.prod(shape) > FEW and all(n % 2 ** len(WIDTHS) == 0 for n in shape[-2:])


def answer(network: nn.Module, x: Tensor, *others: Tensor | None) -> Tensor:
    """What a network says of its inputs, on the device of the first; it may run on another."""
    device = next(network.parameters()).device
    seen = (None if v is None else v.to(device) for v in (x, *others))
    return network(*seen).to(x.device)


def numbers(y: Tensor) -> Tensor:
    """Data as real numbers, with shape (B, m), in float32."""
    return (torch.view_as_real(y) if y.is_complex() else y).flatten(1).float()


def guidance(chain: PriorChain, likelihood: Likelihood, local: bool = True) -> Guide:
    """g of data that pull denoised images as far as their error allows, (K^-1 + H)^-1 grad log p(y | D).

    H is exact for linear data with Gaussian noise, and that of the equivalent ones for others; of what a generator makes of
    a few numbers it is found around each of them.

    Args:
        chain: Whose steps are pulled.
        likelihood: Of the data.
        local: For K take the error around each state, if the prior knows it; else the chain's C_sigma.
    """
    prior, local = chain.prior, local and chain.prior.knows_error
    if isinstance(likelihood.operator, Generated):
        return _guidance_around_each(chain, likelihood)
    near = likelihood.equivalent(prior.moments.mean)
    given = None if local else foreseen(chain, near)
    H = near.information(chain.dtype).apply if local else None

    def g(step: GaussianStep, k: Tensor, y: Tensor) -> Tensor:
        def response(i: int, rows: Tensor, e: Tensor) -> Tensor:
            if given is not None:
                return given[i].respond(e)
            s = chain.levels[i]
            return respond(prior.error_covariance(step.error[rows], s), H, e, SHORT * s)

        return chain.followed(step, pulled(likelihood, response, step.denoised, k, y), k)

    return g


def _guidance_around_each(chain: PriorChain, likelihood: Likelihood) -> Guide:
    """`guidance` by Gauss and Newton: H = J^T S^-1 J, with the slope J of the data at each denoised z."""
    d = math.prod(chain.shape)
    eye = torch.eye(d, dtype=torch.float64).reshape(d, *chain.shape)
    pairs = zip(chain.covariances, chain.levels, strict=True)
    precisions = torch.stack(
        [inverse(conditional(C, s)).apply(eye).reshape(d, d) for C, s in pairs]
    )

    together = max(1, SLOPES // (d * math.prod(likelihood.operator.inner.shape)))

    def g(step: GaussianStep, k: Tensor, y: Tensor) -> Tensor:
        D, shift = step.denoised, []
        for rows in torch.arange(len(D)).split(together):
            e = likelihood.log_slope(y[rows], D[rows].double()).flatten(1)
            H = precisions[k[rows]] + likelihood.curvature(D[rows])
            shift.append(torch.linalg.solve(H, e))
        return chain.followed(step, torch.cat(shift).reshape(D.shape).to(D.dtype), k)

    return g


def guidance_by_gradient(
    chain: Reference, reward: Callable[[Tensor, Tensor | None], Tensor]
) -> Guide:
    """`Reference.steered` by grad log r at the denoised image, for rewards of which nothing else is known."""

    def g(step: Step, k: Tensor, y: Tensor | None) -> Tensor:
        with torch.enable_grad():
            x = step.denoised.detach().requires_grad_(True)
            slope = torch.autograd.grad(reward(x, y).sum(), x)[0]
        return chain.steered(slope.nan_to_num(), k)

    return g
