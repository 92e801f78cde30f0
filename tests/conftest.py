"""What all tests share."""

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def data_root():
    """Folder of real data, laid out as `data_scripts/fetch.py` does."""
    folder = os.environ.get("SCOREINV_DATA")
    if not folder:
        pytest.skip("SCOREINV_DATA is unset: run data_scripts/fetch.py --to DIR and set it to DIR")
    return Path(folder)
