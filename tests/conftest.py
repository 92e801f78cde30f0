"""What all tests share."""

import os
from pathlib import Path

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # workers and what they start share the cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def data_root():
    """Folder of real data, laid out as `data_scripts/fetch.py` does."""
    folder = os.environ.get("SCOREINV_DATA")
    if not folder:
        pytest.skip("SCOREINV_DATA is unset: run data_scripts/fetch.py --to DIR and set it to DIR")
    return Path(folder)
