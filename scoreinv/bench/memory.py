"""How much memory a piece of work takes beyond what was there before."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

STATUS = Path("/proc/self/status")
EVERY = 0.002  # between two looks [s]


class Peak:
    """The answer of `peak_memory`.

    Attributes:
        megabytes: Largest resident set seen inside the block over that at its start; nan where the system does not say (only
            Linux does).
    """

    megabytes: float = math.nan


@contextmanager
def peak_memory() -> Iterator[Peak]:
    """Watch the resident set while the block runs, from a thread that looks every two milliseconds."""
    peak, done = Peak(), threading.Event()
    if not STATUS.exists():
        yield peak
        return
    before, most = _resident(), [0.0]

    def watch() -> None:
        while not done.wait(EVERY):
            most[0] = max(most[0], _resident() - before)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield peak
    finally:
        done.set()
        watcher.join()
    peak.megabytes = max(most[0], _resident() - before)


def _resident() -> float:
    """The process' resident set [MB]."""
    lines = STATUS.read_text().splitlines()
    return float(next(line.split()[1] for line in lines if line.startswith("VmRSS:"))) / 1024
