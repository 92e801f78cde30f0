"""A Gaussian of its own for each image, conditioned on the data.

With K = sum_b a_b rho_b a_b, stationary parts that are modulated in each image by standard deviations a_b, the shift

    u = (K^-1 + H)^-1 (D - H m)

comes from conjugate gradients with K itself as the preconditioner, which never meets K^-1. The few directions that the data
see well come first, and that is what they need: the circulant nearest to H, with one number for a, takes more iterations.

What is not known of an image is skewed: a faint place is blank, or holds a source. A Gaussian lets the data pull every such
source in a little, and a few of them fully; the draws then miss them. So each pixel is taken as a Gamma variable of variance
d^2 and skewness g, shifted to the mean D. A force e of the data, the gradient of their log-likelihood, moves its mean by

    d^2 e / (1 - t),    t = 1/2 g d e,

as it would that of a Gaussian of variance d^2 / (1 - t). The Gaussian's own shift is u = K e, with the forces on the pixels
that go together: e is taken as u / d^2, and K is widened, or narrowed, by f = (1 - t)^-1 before the image is drawn, t
within `TILTS`. Over all data that such an image may give that raises the mean of a pixel. With r = E u^2 / d^2, the share of
its variance that the data explain, and z = u / d, a pixel by itself is moved by f z d / (1 - r + r f), and a change of its
mean counts by (1 - r) / (1 - r + r f). So

    b  =  d E[f z / (1 - r + r f)] / E[(1 - r) / (1 - r + r f)]

is taken off the mean first, with z a Gamma variable of the variance r and the third cumulant g r^3 that its sum with the
noise has. r comes from how a few images respond to data simulated around them, averaged over near pixels.

A network can be sure of blank sky where there is a source, whose like it has rarely seen beside such a galaxy: K is then too
small for the data to pull the source in, and all draws lose it. So the data are asked once more. Where what they still miss,
A^T S^-1 (y - A x), stands out of its own noise, nothing is believed there but the noisy image itself, x_0 ~ N(x_s, s^2): K
is widened to that, and the image drawn again. High up, where a solve is left unfinished on purpose, they are not asked.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from scoreinv.conditioning.base import Conditioner
from scoreinv.gaussian import Modulated

DOUBT = 4.0  # standard deviations of their noise by which the data must miss an image
TILTS = (-0.5, 0.9)  # between which t is taken; at 1 a Gamma variable has no mean
ITERATIONS = 500  # of a solve, at most
ROUGH = 5.0  # times the length that matters of a draw is enough for t
REACH = 2  # pixels around such a place that are doubted, too
PROBES = 2  # images that respond to simulated data
STEEPEST = 5.0  # half the skewness, at most
NEAR = 3  # pixels on each side over which their responses are averaged


class LocalConditioned:
    """N(., K) conditioned on the data.

    Args:
        conditioner: The data.
        K: Covariance of each image.
        s: Noise level of the images that K is of.
        length: Updates of a solve that are shorter do not matter [model unit].
        skewness: Of each pixel, with shape (B, C, H, W); None for Gaussians.
        noise: Standard deviation of A^T S^-1 n in each pixel, with shape (C, H, W), for noise n of the data; None if they
            must not doubt K.
    """

    def __init__(
        self,
        conditioner: Conditioner,
        K: Modulated,
        s: float,
        length: float,
        skewness: Tensor | None = None,
        noise: Tensor | None = None,
    ) -> None:
        self.conditioner, self.K, self.s = conditioner, K, s
        self.length, self.skewness, self.noise = length, skewness, noise

    def draw(self, m: Tensor, generator: torch.Generator, wider: float = 1.0) -> Tensor:
        """Draws with means m before the data are known, with shape (B, C, H, W); K is widened where the data doubt it.

        Args:
            m: Means, with shape (B, C, H, W).
            generator: Of the draws.
            wider: Factor by which draws are wider than that Gaussian, about the same mean.
        """
        m, K = self.tilted(m, generator)
        x, n = self._drawn(m, K, generator, wider)
        if self.noise is None:
            return x
        missed = self.conditioner.misfit(x, n)
        # what is missed has the noise of the data and that of the draw
        scatter = math.sqrt(1 + wider**2) * self.noise
        doubted = (missed.abs() > DOUBT * scatter) & (self.noise > 0)
        again = doubted.flatten(1).any(1)
        if bool(again.any()):
            near = F.max_pool2d(doubted[again].to(m.dtype), 2 * REACH + 1, 1, REACH)
            doubtful = Modulated(K.a[again], K.rho, self.s * near)
            x[again], _ = self._drawn(m[again], doubtful, generator, wider)
        return x

    def tilted(self, m: Tensor, generator: torch.Generator) -> tuple[Tensor, Modulated]:
        """Means and covariances of the Gaussians that the data move as they would images of means m, skewed as they are."""
        if self.skewness is None:
            return m, self.K
        half, d = 0.5 * self.skewness, self.K.deviation
        t = half * self.shift(m, ROUGH) / d
        b = d * raised(half, self.heard(generator))
        return m - b, self.K.widened((1 - t.clamp(*TILTS)).rsqrt())

    def heard(self, generator: torch.Generator) -> Tensor:
        """E u^2 / d^2, the share of a pixel's variance that the data explain, with shape (1, C, H, W)."""
        K = self.K[torch.arange(min(PROBES, len(self.K.a)))]
        x, n = K.draw(generator), self.conditioner.noise(len(K.a), generator)
        e = self.conditioner.misfit(x, n) - self.conditioner.misfit(0 * x[:1])
        u = respond(K, self.conditioner.inform, e, ROUGH * self.length)
        around = lambda v: F.avg_pool2d(v.mean(0, keepdim=True), 2 * NEAR + 1, 1, NEAR)
        return (around(u.square()) / around(K.deviation.square())).clamp(0, 1)

    def _drawn(
        self, m: Tensor, K: Modulated, generator: torch.Generator, wider: float
    ) -> tuple[Tensor, Tensor]:
        """Draws by Matheron's rule, and the noise that the data were perturbed by for them.

        With both perturbations enlarged, what comes out is wider about the same mean.
        """
        x = m + wider * K.draw(generator)
        n = wider * self.conditioner.noise(len(m), generator)
        u = respond(K, self.conditioner.inform, self.conditioner.misfit(x, n), self.length)
        return x + u, n

    def shift(self, m: Tensor, slack: float = 1.0) -> Tensor:
        """By which the data move means m, with shape (B, C, H, W); updates may be longer by `slack`."""
        e = self.conditioner.misfit(m)
        return respond(self.K, self.conditioner.inform, e, slack * self.length)


def raised(half: Tensor, heard: Tensor) -> Tensor:
    """b / d of pixels of half the skewness, with shape (B, C, H, W), of whose variance the data explain a share."""
    place = torch.stack([half / STEEPEST, 2 * heard.expand_as(half) - 1], -1).flatten(0, 2)[None]
    table = _raised().to(half.dtype)[None, None]
    found = F.grid_sample(table, place, padding_mode="border", align_corners=True)
    return found.reshape(half.shape)


@cache
def _raised() -> Tensor:
    """b / d, with shape (shares, halves), from the quantiles of z."""
    from scipy.special import gammaincinv

    half = np.linspace(-STEEPEST, STEEPEST, 41)[None, :, None]
    r = np.linspace(0, 1, 21).clip(1e-6, 1 - 1e-6)[:, None, None]
    skewness = 2 * half * r**1.5
    k = 4 / np.maximum(skewness**2, 1e-6)
    z = np.where(skewness < 0, -1, 1) * gammaincinv(k, (np.arange(200) + 0.5) / 200)
    z = z - z.mean(-1, keepdims=True)
    z *= np.sqrt(r) / z.std(-1, keepdims=True)
    f = 1 / (1 - (half * z).clip(*TILTS))
    moved, counts = f * z / (1 - r + r * f), (1 - r) / (1 - r + r * f)
    return torch.from_numpy(moved.mean(-1) / counts.mean(-1))


def respond(K: Modulated, H: Callable[[Tensor], Tensor], e: Tensor, length: float) -> Tensor:
    """(K^-1 + H)^-1 e, with shape (B, C, H, W), by conjugate gradients on each image until nothing of this length is left.

    An image is finished when K r, which bounds what is left, or two updates in a row are shorter; the others go on alone.

    Args:
        K: Covariance of each image, the preconditioner.
        H: Acts on images.
        e: Right-hand sides, with shape (B, C, H, W).
        length: Euclidean norm [model unit].
    """
    u, rows = torch.zeros_like(e), torch.arange(len(e))
    x, r = torch.zeros_like(e), e
    p, Kp = torch.zeros_like(e), torch.zeros_like(e)
    before, last = e.new_ones(len(e)), e.new_full((len(e),), math.inf)
    tiny = torch.finfo(e.dtype).tiny
    for _ in range(ITERATIONS):
        z = K.apply(r)
        rz = _dot(r, z)
        p, Kp = (v + _column(rz / before.clamp_min(tiny)) * w for v, w in ((z, p), (r, Kp)))
        q = Kp + H(p)
        step = rz / _dot(p, q).clamp_min(tiny)
        x, r = x + _column(step) * p, r - _column(step) * q
        moved, before = step * _dot(p, p).sqrt(), rz
        finished = (torch.maximum(moved, last) < length) | (_dot(z, z) < length**2)
        last = moved
        if bool(finished.any()):
            u[rows[finished]] = x[finished]
            on = ~finished
            if not bool(on.any()):
                return u
            K, rows, x, r, p, Kp, before, last = (
                v[on] for v in (K, rows, x, r, p, Kp, before, last)
            )
    u[rows] = x
    return u


def _dot(x: Tensor, y: Tensor) -> Tensor:
    return (x * y).flatten(1).sum(1)


def _column(c: Tensor) -> Tensor:
    return c[:, None, None, None]
