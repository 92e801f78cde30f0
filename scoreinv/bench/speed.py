"""What a posterior draw costs beside the network's own forward passes, measured side by side in one run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from scoreinv.bench.learned import psf_problem, uv_problem
from scoreinv.noise import GaussianNoise
from scoreinv.operators import NUFFT
from scoreinv.posterior import Posterior
from scoreinv.priors import Prior
from scoreinv.samplers import sample
from scoreinv.samplers.path import Sampler
from scoreinv.streams import stream


def timed(f: Callable[[], object]) -> float:
    """Wall time of one call [s]."""
    began = time.perf_counter()
    f()
    return time.perf_counter() - began


@contextmanager
def one_thread() -> Iterator[None]:
    """The block runs on one thread of torch, however many there are."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@one_thread()
def gradient(size: int = 256, repeats: int = 50) -> list[dict]:
    """Median time of one gradient of a visibility likelihood, D - H x (here D = x), on one core and in float32."""
    rows = []
    for count in (1_000, 100_000):
        uv = 2e5 * (torch.rand(count, 2, generator=stream(0), dtype=torch.float64) - 0.5)
        H = NUFFT(uv, (1, size, size), 0.5).information(GaussianNoise(std=1.0), torch.float32)
        x = torch.randn(1, 1, size, size, generator=stream(1))
        H.apply(x)
        times = [timed(lambda H=H, x=x: x - H.apply(x)) for _ in range(repeats)]
        rows.append(
            {
                "gradient": f"{size} x {size}",
                "visibilities": count,
                "time [ms]": 1e3 * statistics.median(times),
            }
        )
    return rows


def overhead(
    prior: Prior, sampler: Sampler, n: int = 64, island: int = 16, repeats: int = 3
) -> list[dict]:
    """Wall time of `sample` over (evaluations x one bare forward pass), for PSF and uv data.

    Sampling and forward passes alternate, so that a drift of the machine's speed cancels in the ratio; the median of
    the repeats is quoted.
    """
    truth = prior.sample(1, seed=0)
    rows = []
    for name, likelihood in (
        ("PSF", psf_problem(prior, 0.03)),
        ("uv", uv_problem(prior, 0.03)),
    ):
        y = likelihood.simulate(truth, seed=1)[0]
        x = torch.randn(island, *prior.shape, generator=torch.Generator().manual_seed(0))
        sigma = torch.full((island,), 0.1)
        forward = lambda x=x, sigma=sigma: prior.denoise(x, sigma)
        ratios, walls = [], []
        with torch.no_grad():
            forward()
            for repeat in range(repeats):
                bare = [timed(forward) for _ in range(20)]
                posterior = Posterior(prior, likelihood, y)
                result: list = []
                wall = timed(
                    lambda p=posterior, r=result, s=repeat: r.append(
                        sample(p, n, sampler, seed=s, island=island)
                    )
                )
                bare += [timed(forward) for _ in range(20)]
                floor = statistics.median(bare) * result[0].evaluations * n / island
                walls.append(wall)
                ratios.append(wall / floor)
        rows.append(
            {
                "problem": f"{name}, {prior.shape[-2]} x {prior.shape[-1]}",
                "draws": n,
                "evaluations": result[0].evaluations,
                "VJPs": result[0].vjps,
                "forward [ms/image]": 1e3 * statistics.median(bare) / island,
                "wall [s]": statistics.median(walls),
                "wall / forward passes": statistics.median(ratios),
            }
        )
    return rows
