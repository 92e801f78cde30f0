"""Sets of simulated images, reproducible whatever the number of processes.

Images are made in blocks of 256; block b of a set draws from default_rng([seed, b]) and from
nothing else. So image i depends on (kind, size, seed, i) alone: not on how many images are
asked for, nor on how many processes make them.
"""

from collections.abc import Iterator
from difflib import get_close_matches
from multiprocessing import get_context

import numpy as np
from tqdm import tqdm

from .discs import protoplanetary_disc
from .galaxies import galaxy

GENERATORS = {"galaxy": galaxy, "disc": protoplanetary_disc}
BLOCK = 256

Block = tuple[str, int, int, int, int]  # kind, size, seed, number of the block, images in it


def simulate_block(block: Block) -> np.ndarray:
    """Images of one block, with shape (n, 1, size, size), float16."""
    kind, size, seed, b, n = block
    rng = np.random.default_rng([seed, b])
    return np.stack([GENERATORS[kind](rng, size)[None].astype(np.float16) for _ in range(n)])


def simulate_blocks(blocks: list[Block], workers: int) -> Iterator[np.ndarray]:
    """Blocks of images in order, made here or by `workers` processes."""
    if workers == 1 or len(blocks) == 1:
        yield from map(simulate_block, blocks)
        return
    # Processes that start afresh: a fork would copy the locks of torch's threads. The
    # generators call no BLAS and one-thread FFTs, so that a worker keeps to its own core.
    with get_context("spawn").Pool(min(workers, len(blocks))) as pool:
        yield from pool.imap(simulate_block, blocks)


def check_request(kind: str, n: int, size: int, seed: int, workers: int) -> None:
    if kind not in GENERATORS:
        nearest = get_close_matches(str(kind), GENERATORS, n=1, cutoff=0.0)[0]
        raise ValueError(
            f"unknown kind of image {kind!r}, expected one of {', '.join(GENERATORS)}; "
            f"did you mean {nearest!r}?"
        )
    if n < 1 or workers < 1 or seed < 0:
        raise ValueError(
            f"n = {n}, workers = {workers}, seed = {seed}: expected at least one image, "
            "at least one worker and a seed that is not negative"
        )
    if size < 16:
        raise ValueError(f"size = {size} pixels cannot resolve an image, expected at least 16")


def simulate_images(
    kind: str, n: int, size: int, seed: int, workers: int = 1, progress: bool = False
) -> np.ndarray:
    """Simulate n images of one kind, each normalised to a peak of one.

    More than one worker means new Python processes. A script that asks for them must do so
    under `if __name__ == "__main__":`, as with any use of multiprocessing.

    Arguments:
        kind: What to simulate, a key of `GENERATORS`: "galaxy" or "disc".
        n: Number of images.
        size: Side of the images [pixel].
        seed: Seed of the set, not negative.
        workers: Number of processes.
        progress: Whether to show a progress bar.

    Returns:
        Images, with shape (n, 1, size, size), float16.

    Raises:
        ValueError: If the kind is unknown or a number is out of range.
    """
    check_request(kind, n, size, seed, workers)
    starts = range(0, n, BLOCK)
    blocks = [(kind, size, seed, b, min(BLOCK, n - i)) for b, i in enumerate(starts)]
    images = np.empty((n, 1, size, size), np.float16)
    with tqdm(total=n, unit="image", disable=not progress) as bar:
        for start, block in zip(starts, simulate_blocks(blocks, workers), strict=True):
            images[start : start + len(block)] = block
            bar.update(len(block))
    return images
