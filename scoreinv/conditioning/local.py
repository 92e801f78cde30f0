"""A Gaussian of its own for each image, conditioned on the data.

With K = sum_b a_b rho_b a_b, stationary parts that are modulated in each image by standard deviations a_b, the shift

    u = (K^-1 + H)^-1 (D - H m)

comes from conjugate gradients with K itself as the preconditioner, which never meets K^-1. The few directions that the data
see well come first, and that is what they need: the circulant nearest to H, with one number for a, takes more iterations.

What is not known of an image is skewed: a faint place is blank, or holds a source. A Gaussian would put a little of a source
everywhere, which the network takes off again as noise, and draws would end with less light than there is. So what is drawn
of K is bent in each pixel to a lognormal variable of the same mean, variance d^2 and skewness g,

    k = d (exp(t z / d - t^2 / 2) - 1) / (w - 1)^1/2,    w = exp t^2,    (w + 2) (w - 1)^1/2 = g,    z ~ N(0, K),

which is rarely large and mostly near its least. The data, too, would pull every such source in a little, and a few of them
fully. For a Gamma variable of variance d^2 and skewness g a force e of the data, the gradient of their log-likelihood, moves
the mean by

    d^2 e / (1 - t),    t = 1/2 g d e,

as it would that of a Gaussian of variance d^2 / (1 - t). The Gaussian's own shift is u = K e, with the forces on the pixels
that go together: e is taken as u / d^2, and K is widened, or narrowed, by f = (1 - t)^-1 before the image is drawn, t
within `TILTS`. Over all data that such an image may give this raises its mean, for a force upwards counts more than one
downwards. By how much is found by simulation: data of a bent image are answered with and without the tilt, and so are those
of -z and the noise turned round, for in the mean of the two all that is odd cancels. A share of it, averaged over near
pixels, is to be taken off the draws: `TAKEN`, with which galaxies behind a PSF, seen by ALMA and under white noise keep
their flux best. All of it would be right for one draw; in a chain of them the network takes light off the draws, too. Taking
it off the mean beforehand would do little, for what the data know well, as the total flux, they would pull back.

A network can be sure of blank sky where there is a source, whose like it has rarely seen beside such a galaxy: K is then too
small for the data to pull the source in, and all draws lose it. So the data are asked once more. Where what they still miss,
A^T S^-1 (y - A x), stands out of its own noise, nothing is believed there but the noisy image itself, x_0 ~ N(x_s, s^2): K
is widened to that, and the image drawn again. At the next level the network takes the source off once more, until what is
missed hides in the noise: where the data have doubted before, less is needed to doubt. High up, where a solve is left
unfinished on purpose, they are not asked.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from scoreinv.conditioning.base import Conditioner
from scoreinv.gaussian import Modulated

DOUBT = 4.0  # standard deviations of their noise by which the data must miss an image
AGAIN = 1.0  # of the same, where they did so at the level before
TILTS = (-0.5, 0.9)  # between which t is taken; at 1 a Gamma variable has no mean
ITERATIONS = 500  # of a solve, at most
ROUGH = 5.0  # times the length that matters of a draw is enough for t
REACH = 2  # pixels around such a place that are doubted, too
NEAR = 3  # pixels on each side over which what the tilt raises is averaged
TAKEN = 0.6  # of what the tilt raises
MOST = 6.0  # skewness that draws are given
LEAST = 0.1  # skewness below which they stay as they are


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

    def draw(
        self,
        m: Tensor,
        generator: torch.Generator,
        wider: float = 1.0,
        suspected: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Draws, and where the data doubted K, around which it was widened, both with shape (B, C, H, W).

        Args:
            m: Means before the data are known, with shape (B, C, H, W).
            generator: Of the draws.
            wider: Factor by which draws are wider than that Gaussian where the data say little.
            suspected: Where the data doubted these images at the level before; nowhere if not given.
        """
        K = self.tilted(m)
        g = torch.zeros_like(m) if self.skewness is None else self.skewness
        x, n = self._drawn(m, K, g, generator, wider)
        off = TAKEN * self.raised(generator)
        if self.noise is None:
            return x - off, torch.zeros_like(m, dtype=torch.bool)
        missed = self.conditioner.misfit(x, n)
        # what is missed has the noise of the data and that of the draw
        scatter = math.sqrt(1 + wider) * self.noise
        enough = DOUBT if suspected is None else torch.where(suspected, AGAIN, DOUBT)
        doubted = (missed.abs() > enough * scatter) & (self.noise > 0)
        again = doubted.flatten(1).any(1)
        if bool(again.any()):
            near = F.max_pool2d(doubted[again].to(m.dtype), 2 * REACH + 1, 1, REACH)
            doubtful = Modulated(K.a[again], K.rho, self.s * near)
            # noise is not skewed
            x[again], _ = self._drawn(m[again], doubtful, g[again] * (1 - near), generator, wider)
        return x - off, doubted

    def tilted(self, m: Tensor) -> Modulated:
        """Covariances of the Gaussians that the data move as they would images of means m, skewed as they are."""
        if self.skewness is None:
            return self.K
        u = self.shift(m, ROUGH)
        return self.K.widened(tilt(u, 0.5 * self.skewness, self.K.deviation))

    def raised(self, generator: torch.Generator) -> Tensor:
        """By how much the tilt raises draws, averaged over the data that images may give, with shape (1, C, H, W)."""
        if self.skewness is None:
            return torch.zeros_like(self.K.deviation[:1])
        K, g = self.K[:1], self.skewness[:1]
        z, d = K.draw(generator), K.deviation
        misfit, n = self.conditioner.misfit, self.conditioner.noise(1, generator)
        noise = misfit(0 * z, n) - misfit(0 * z)
        e = self.conditioner.inform(torch.cat([bent(z, d, g), bent(-z, d, g)]))
        e = e + torch.cat([noise, -noise])
        answer = lambda K: respond(K, self.conditioner.inform, e, ROUGH * self.length)
        twice = K[torch.zeros(2, dtype=torch.long)]
        u = answer(twice)
        more = (answer(twice.widened(tilt(u, 0.5 * g, d))) - u).mean(0, keepdim=True)
        around = lambda v: F.avg_pool2d(v, 2 * NEAR + 1, 1, NEAR)
        # most where errors are large and skewed
        share = g.abs() * d
        return share * around(more) / around(share).clamp_min(torch.finfo(d.dtype).tiny)

    def _drawn(
        self, m: Tensor, K: Modulated, g: Tensor, generator: torch.Generator, wider: float
    ) -> tuple[Tensor, Tensor]:
        """Draws by Matheron's rule, and the noise that the data were perturbed by for them.

        With both perturbations enlarged, what comes out is wider about the same mean, and fits good data worse than the
        truth does. With K widened it follows them more closely than it should. Each takes the root of the factor.
        """
        half = math.sqrt(wider)
        K = K.widened(torch.full_like(m, half))
        x = m + half * bent(K.draw(generator), K.deviation, g)
        n = half * self.conditioner.noise(len(m), generator)
        u = respond(K, self.conditioner.inform, self.conditioner.misfit(x, n), self.length)
        return x + u, n

    def shift(self, m: Tensor, slack: float = 1.0) -> Tensor:
        """By which the data move means m, with shape (B, C, H, W); updates may be longer by `slack`."""
        e = self.conditioner.misfit(m)
        return respond(self.K, self.conditioner.inform, e, slack * self.length)


def tilt(u: Tensor, half: Tensor, d: Tensor) -> Tensor:
    """f^1/2, by which the standard deviations of pixels are widened, with shape (B, C, H, W).

    Args:
        u: By how much the data move them.
        half: Half their skewness.
        d: Their standard deviation.
    """
    return (1 - (half * u / d).clamp(*TILTS)).rsqrt()


def bent(z: Tensor, d: Tensor, g: Tensor) -> Tensor:
    """Normal variables z of standard deviation d as lognormal ones of the same mean and variance, and of skewness g."""
    size = g.abs().clamp(LEAST, MOST)
    root = (1 + size.square() / 2 + size * (1 + size.square() / 4).sqrt()).pow(1 / 3)
    w = root + 1 / root - 1
    t = w.log().sqrt()
    k = d / (w - 1).sqrt() * torch.expm1(t * g.sign() * z / d - t.square() / 2)
    return torch.where(g.abs() > LEAST, g.sign() * k, z)


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
