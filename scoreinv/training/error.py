"""What a trained network learns of its error: a second head, and what is measured beside it at each noise level.

The network stays as it is. Its error r is cut into bands of spatial frequency, whose power adds up to that of r. From the
last features the head reads the logarithm v of the variance of each band of F in each pixel, by the Gaussian likelihood of
the squared error,

    loss = 1/2 E [(F* - F)_b^2 exp(-v_b) + v_b],    F* = (x_0 - c_skip x_sigma) / c_out

(Nix & Weigend, Estimating the Mean and Variance of the Target Probability Distribution, 1994), with ln sigma uniform over
the trained levels.

The network was trained by errors that all count the same, in which those on blank sky are nothing beside those of sources:
D has noise there that is as large as faint light. So D may be looked at once more, in units of its error d, beside the same
features, for what it is short of, w d, and the factor e^f by which d is off:

    loss = E [(1/2 (x_0 - D - w d)^2 / s^2 + ln s) s / rms(d)],    s = d e^f, a constant where it is a weight

which counts errors between equally (as the network did) and in units of what is known (where most pixels, of the sky, would
outvote the sources): the beta-NLL with beta = 1/2 of Seitzer et al., On the Pitfalls of Heteroscedastic Uncertainty
Estimation with Probabilistic Neural Networks (2022, arXiv:2203.09168). From here on D and v are those of the second look.

Most pixels are sky, and decide v; the few bright ones, whose errors count, are then overrated. So v is corrected to be
right on average wherever it is the same: pixels of held-out images are sorted by it,

    ln  E (F* - F)_b^2 / exp v_b    over those between two quantiles of v_b,

with ever thinner slices on top. Such slices are how Levi et al. (Evaluating and Calibrating Uncertainty Prediction in
Regression Tasks, 2019, arXiv:1905.11659) tell whether variances are calibrated. With a the standard deviations that come of
it, a band of r = x_0 - D of held-out images has the correlation

    rho(lag) = E sum_i r_i r_(i + lag) / E sum_i a_i a_(i + lag),

each image in units of its own a; rho(0), near 1, corrects what a misses on average.

The errors' third moment says how skewed they are, in units of what Gamma variables of this mean and width would be,

    gamma = E sum_i a_i^2 z_i^3 g_i / E sum_i a_i^2 g_i^2,    z = r / a,  g = 2 a / max(D, 0.3 a),

here with a of all bands together: a least-squares fit in which the pixels that are known worst count most.

Last comes the excess of what is drawn in reverse steps (`scoreinv.samplers.guided`). Posterior draws of noisy held-out
images vary less than their means are off: on its way down a trained network sees images of less detail than it learned
from. The logarithm of their variance grows with the excess; a line between two that are tried tells which sets it right.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor, nn
from tqdm import tqdm

from scoreinv.averages import follow
from scoreinv.likelihood import Likelihood
from scoreinv.noise import GaussianNoise
from scoreinv.operators import Identity
from scoreinv.posterior import Posterior
from scoreinv.priors.network import ErrorModel, ScorePrior, gamma_skewness, preconditioning
from scoreinv.priors.unet import ErrorHead, SecondLook, error_head, initialise, second_look
from scoreinv.samplers import Guided
from scoreinv.samplers.path import descend_together
from scoreinv.streams import integer, stream

RATE, EMA, WARMUP = 2e-3, 0.995, 50
CUTS = (1 / 16, 3 / 16)  # between the bands of the error [cycles per pixel]
LEVELS = 12  # at which corrections, correlation and skewness are measured
RARE = 20.0  # standard deviations that an error may be off
SLICES = (0.0, 0.25, 0.5, 0.75, 0.9, 0.97, 0.99, 0.997, 1.0)  # of pixels by their v, quantiles
THINNEST = 100  # pixels of a slice
FLOOR = 1e-3  # least power of the correlation; estimates of it can fall below zero
NOISES = (2.0, 6.0)  # of data with which reverse steps are calibrated [sigma_data]
OBSERVED, DRAWN, TOGETHER = 96, 4, 16  # images, draws of each, and images side by side
# excesses that are tried until draws are wide enough; what more would do is not known
TRIED = (0.1, 0.3, 0.9)
Batch = Callable[[int], tuple[Tensor, Tensor, Tensor]]
M = TypeVar("M", bound=nn.Module)


def learn_error(
    prior: ScorePrior,
    batch: Batch,
    held_out: Tensor,
    steps: int,
    seed: int,
    progress: bool,
    look_steps: int = 0,
) -> ErrorModel:
    """Train the head and perhaps a second look, then measure on held-out images all that else belongs to the error.

    Args:
        prior: With a finished network.
        batch: Clean images, levels and noise of step t, from which the images and the noise are taken.
        held_out: Images that the network was not trained on, with shape (n, C, H, W).
        steps: Of the optimiser for the head.
        seed: Decides weights and levels.
        progress: Show a progress bar.
        look_steps: Of the optimiser for a second look at denoised images; 0 for none.
    """
    head = trained_head(prior, batch, steps, seed, progress)
    look = None
    if look_steps > 0:
        look = trained_look(unmeasured(prior, head), batch, look_steps, seed, progress)
    return measured_error(prior, head, look, held_out, seed, progress)


def trained_head(
    prior: ScorePrior, batch: Batch, steps: int, seed: int, progress: bool
) -> ErrorHead:
    """A head that knows the variance of the network's errors."""
    head, network = error_head(prior.network, len(CUTS) + 1), prior.network
    initialise(head, stream(seed, 6))

    def loss(x0: Tensor, x: Tensor, sigma: Tensor) -> Tensor:
        skip, out, inputs, c = prior.prepared(x, sigma)
        with torch.no_grad(), prior.bfloat16():
            h, e = network.look(inputs, c)
            F = network.read(h).float()
        log_v = head(h.float().contiguous(), e.float())
        r = bands((x0 - skip * x) / out - F)
        return 0.5 * (r.square() * (-log_v).exp() + log_v).mean()

    return _fitted(head, prior, batch, loss, steps, seed, progress, "error")


def trained_look(
    prior: ScorePrior, batch: Batch, steps: int, seed: int, progress: bool
) -> SecondLook:
    """A second look at the denoised images of a prior with a head."""
    look = second_look(prior.network)
    initialise(look, stream(seed, 10))

    def loss(x0: Tensor, x: Tensor, sigma: Tensor) -> Tensor:
        with torch.no_grad():
            seen = prior.first_look(x, sigma)
        # backward passes of torch end in a segmentation fault where formats of memory are mixed
        plain = {k: getattr(seen, k).contiguous() for k in ("h", "D", "d")}
        seen = replace(seen, **plain)
        short, factor = seen.again(look)
        z = (x0 - seen.D) / seen.d - short
        told = 0.5 * z.square() * (-2 * factor).exp() + factor
        weight = seen.d * factor.detach().exp()
        return (told * weight / seen.d.square().mean((1, 2, 3), keepdim=True).sqrt()).mean()

    return _fitted(look, prior, batch, loss, steps, seed, progress, "second look")


def _fitted(
    module: M,
    prior: ScorePrior,
    batch: Batch,
    loss: Callable[[Tensor, Tensor, Tensor], Tensor],
    steps: int,
    seed: int,
    progress: bool,
    name: str,
) -> M:
    """A module with the mean of its last weights, fitted to clean images, noisy ones and their levels by a loss."""
    optimiser = torch.optim.Adam(module.parameters(), lr=RATE, betas=(0.9, 0.99))
    average = {k: v.clone() for k, v in module.state_dict().items()}
    low, high = math.log(prior.sigma_min), math.log(prior.sigma_max)
    for t in tqdm(range(steps), disable=not progress, unit="step", desc=name):
        x0, _, noise = batch(t)
        u = (torch.randperm(len(x0), generator=stream(seed, 7, t)) + 0.5) / len(x0)
        sigma = (low + (high - low) * u).exp()
        lost = loss(x0, x0 + sigma.reshape(-1, 1, 1, 1) * noise, sigma)
        if not bool(torch.isfinite(lost)):
            raise FloatingPointError("the likelihood of the network's errors is not finite")
        for group in optimiser.param_groups:
            warm = min(1.0, (t + 1) / WARMUP)
            group["lr"] = RATE * warm * 0.5 * (1 + math.cos(math.pi * t / steps))
        optimiser.zero_grad()
        lost.backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimiser.step()
        follow(average.values(), module.state_dict().values(), EMA, 1 + t)
    module.load_state_dict(average)
    return module.eval().requires_grad_(False)


def unmeasured(prior: ScorePrior, head: ErrorHead, look: SecondLook | None = None) -> ScorePrior:
    """The prior with a head whose word is taken, before anything is measured."""
    # at the ends the network is cut off, or knows nothing
    low, high = math.log(prior.sigma_min) + 0.3, math.log(prior.sigma_max) - 0.3
    levels = torch.linspace(low, high, LEVELS, dtype=torch.float64).exp()
    alone = torch.ones(LEVELS, head.bands, 1, *prior.shape[-2:], dtype=torch.float64)
    none = torch.zeros(LEVELS, head.bands, 1, 2, dtype=torch.float64)
    unlimited = torch.full((head.bands,), math.inf, dtype=torch.float64)
    error = ErrorModel(head, unlimited, levels, none, alone, torch.zeros_like(levels), look=look)
    return ScorePrior(
        prior.network,
        prior.sigma_data,
        prior.moments,
        prior.sigma_min,
        prior.sigma_max,
        error=error,
        symmetric=prior.symmetric,
    )


def measured_error(
    prior: ScorePrior,
    head: ErrorHead,
    look: SecondLook | None,
    held_out: Tensor,
    seed: int,
    progress: bool,
) -> ErrorModel:
    """What a head is short of on held-out images, the correlations, the skewness and the excess noise, in turn."""
    knows = unmeasured(prior, head, look)
    levels = knows.error.levels

    def measured(what: Callable[[ScorePrior, Tensor, float, torch.Generator], Tensor]) -> Tensor:
        known = [what(knows, held_out, float(s), stream(seed, 8, i)) for i, s in enumerate(levels)]
        return torch.stack(known)

    knows.error = replace(knows.error, corrections=measured(corrections))
    knows.error = replace(knows.error, white=white_noise(held_out.shape[-2:]))
    knows.error = replace(knows.error, power=measured(spectrum))
    knows.error = replace(knows.error, gamma=measured(skewness))
    return replace(
        knows.error, excess_noise=excess_noise(knows, held_out[:OBSERVED], seed, progress)
    )


def excess_noise(prior: ScorePrior, images: Tensor, seed: int, progress: bool = False) -> float:
    """The excess with which posterior draws of noisy images vary as much as their means are off, or the largest of `TRIED`.

    Args:
        prior: Knows its error.
        images: Not trained on, with shape (n, C, H, W).
        seed: Decides the noise, the same for every excess.
        progress: Show a progress bar.
    """
    known, short = prior.error, []
    with tqdm(total=len(TRIED) * len(NOISES), disable=not progress, desc="excess noise") as bar:
        for excess in TRIED:
            prior.error, found = replace(known, excess_noise=excess), []
            for i, noise in enumerate(NOISES):
                ratio = too_narrow(prior, images, noise * prior.sigma_data, integer(seed, 9, i))
                found.append(math.log(ratio))
                bar.update()
            short.append(sum(found) / len(found))
            if len(short) > 1 and short[-1] < 0:
                break
    prior.error = known
    if short[-1] >= 0:
        return TRIED[-1]
    (low, at_low), (high, at_high) = list(zip(TRIED, short, strict=False))[-2:]
    if at_low <= at_high:
        # too wide already, and not for this noise
        return 0.0
    return max(low - at_low * (high - low) / (at_high - at_low), 0.0)


def too_narrow(prior: ScorePrior, images: Tensor, noise: float, seed: int) -> float:
    """Squared error of the posterior mean of images with white noise, over the variance of draws."""
    seen = Likelihood(Identity(prior.shape), GaussianNoise(std=noise))
    images = images.double()
    y = images + noise * torch.randn(images.shape, generator=stream(seed), dtype=images.dtype)
    islands = [
        Guided().island(Posterior(prior, seen, v), DRAWN, stream(seed, i)) for i, v in enumerate(y)
    ]
    for i in range(0, len(islands), TOGETHER):
        for _ in descend_together(prior, islands[i : i + TOGETHER]):
            pass
    if failure := next((island.error for island in islands if island.error), None):
        raise failure
    draws = torch.stack([island.x for island in islands]).double()
    variance = float(draws.var(1).sum())
    # the mean of a few draws is itself uncertain
    error = float((draws.mean(1) - images).square().sum()) - variance / DRAWN
    return error / variance


def bands(r: Tensor) -> Tensor:
    """Images cut at `CUTS`, softly, with shape (B, bands, C, H, W): their power adds up to that of the images.

    Args:
        r: Images, with shape (B, C, H, W).
    """
    H, W = r.shape[-2:]
    k2 = torch.fft.fftfreq(H)[:, None] ** 2 + torch.fft.rfftfreq(W) ** 2
    below = [torch.zeros_like(k2), *((-k2 / cut**2).exp() for cut in CUTS), torch.ones_like(k2)]
    share = torch.stack([high - low for low, high in itertools.pairwise(below)])
    k = torch.fft.rfft2(r)[:, None] * share.sqrt()[:, None]
    return torch.fft.irfft2(k, s=(H, W))


def looks(
    prior: ScorePrior, images: Tensor, s: float, generator: torch.Generator
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Images, what a prior makes of them at level s, and how far it thinks that is off, in batches."""
    for x0 in images.split(64):
        x = x0 + s * torch.randn(x0.shape, generator=generator)
        yield x0, *prior.denoise_with_error(x, x.new_full((len(x),), s))


def cuts(n: int) -> list[int]:
    """Where n sorted pixels are cut into slices; those of too few pixels go with the next."""
    found = [0]
    for q in SLICES[1:-1]:
        i = round(q * n)
        if min(i - found[-1], n - i) >= THINNEST:
            found.append(i)
    return [*found, n]


def white_noise(shape: tuple[int, int]) -> Tensor:
    """Variance of white noise of variance 1 in each of the bands, with shape (bands,)."""
    point = torch.zeros(1, 1, *shape, dtype=torch.float64)
    point[..., 0, 0] = 1
    return bands(point).square().sum((0, 2, 3, 4))


@torch.no_grad()
def corrections(prior: ScorePrior, images: Tensor, s: float, generator: torch.Generator) -> Tensor:
    """`ErrorModel.corrections` of a prior that has none, at level s, with shape (bands, knots, 2)."""
    out, v, e = preconditioning(torch.tensor([s]), prior.sigma_data)[1], [], []
    for x0, denoised, a in looks(prior, images, s, generator):
        v.append(2 * (a / out).log())
        e.append((bands(x0 - denoised) / out).square())
    pairs = []
    for at, squared in zip(
        *(torch.cat(w).transpose(0, 1).flatten(1) for w in (v, e)), strict=True
    ):
        order = at.argsort(stable=True)
        for i, j in itertools.pairwise(cuts(len(at))):
            said, found = at[order[i:j]].double(), squared[order[i:j]].double().sum()
            foreseen = said.exp().sum()
            pairs.append(
                torch.stack([(said * said.exp()).sum() / foreseen, (found / foreseen).log()])
            )
    return torch.stack(pairs).unflatten(0, (len(CUTS) + 1, -1))


@torch.no_grad()
def spectrum(prior: ScorePrior, images: Tensor, s: float, generator: torch.Generator) -> Tensor:
    """Power of rho in each band at each frequency, the same in all directions, with shape (bands, 1, H, W)."""
    H, W = images.shape[-2:]
    errors, widths = (torch.zeros(len(CUTS) + 1, H, W).double() for _ in range(2))
    for x0, denoised, a in looks(prior, images, s, generator):
        unit = a.double().square().mean((2, 3, 4), keepdim=True).sqrt()
        for total, values in ((errors, bands(x0 - denoised)), (widths, a)):
            power = torch.fft.fft2(values.double() / unit).abs().square()
            total += torch.fft.ifft2(power).real.sum((0, 2))
    power = torch.fft.fft2(errors / widths).real
    ky, kx = torch.fft.fftfreq(H) * H, torch.fft.fftfreq(W) * W
    ring = (ky[:, None] ** 2 + kx**2).sqrt().round().long()
    total = power.new_zeros(len(power), int(ring.max()) + 1)
    total = total.index_add(1, ring.flatten(), power.flatten(1))
    return (total / ring.flatten().bincount()).clamp_min(FLOOR)[:, None, ring]


@torch.no_grad()
def skewness(prior: ScorePrior, images: Tensor, s: float, generator: torch.Generator) -> Tensor:
    """How skewed the errors at level s are, over Gamma variables of the same mean and width, a number."""
    found = foreseen = torch.zeros((), dtype=torch.float64)
    for x0, denoised, a in looks(prior, images, s, generator):
        width = prior.error_covariance(a, s).deviation
        # a miss by more would decide alone what all others say
        z = ((x0 - denoised) / width).clamp(-RARE, RARE)
        g = gamma_skewness(denoised / width)
        found = found + (width**2 * z**3 * g).double().sum()
        foreseen = foreseen + (width * g).double().square().sum()
    return found / foreseen
