"""Fetch the public data that examples and tests use, and verify every byte.

    python data_scripts/fetch.py [NAME ...] --to DIR

Each file comes from a public repository at a fixed commit and must have the SHA-256 given here.
Files that are already right are skipped, so an interrupted run is continued by repeating it.
Only the standard library is used.
"""

import argparse
import hashlib
import logging
import shutil
import sys
import urllib.request
from dataclasses import dataclass
from pathlib import Path

GITHUB = "https://raw.githubusercontent.com"
VISILENS = f"{GITHUB}/jspilker/visilens/4b8da5a3e2074d73a222dfe472885236f0f65f9b/examples"
TOOLKIT = f"{GITHUB}/LSSTDESC/BlendingToolKit"
IMAGES = f"{TOOLKIT}/0a9ca7cf82bec7c28927cefae4233952a6c3264c/data/cosmos"
CATALOGUES = f"{TOOLKIT}/90f1d531dc3db74d0fd6852fb6e82d457f062899/data/cosmos"

logger = logging.getLogger("fetch")


@dataclass(frozen=True)
class RemoteFile:
    """A file of a public repository, and its place below the data folder."""

    path: str
    url: str
    sha256: str


DATASETS = {
    "spt0346": [
        RemoteFile(
            "interferometry/alma/SPT0346-52_cont.bin",
            f"{VISILENS}/SPT0346-52_cont.bin",
            "6d4927bb763f88d7308ab468d5a462e0bc0a2fe994393ad93e34b970984e88f2",
        ),
    ],
    "cosmos": [
        RemoteFile(
            "hst/cosmos_ext/real_galaxy_images_extension.fits",
            f"{IMAGES}/real_galaxy_images_extension.fits",
            "ae01f2d7fa66e5c987f5d5426189de0140d5e3136081c9307e7e63ff2abb3bd1",
        ),
        RemoteFile(
            "hst/cosmos_ext/real_galaxy_PSF_images_extension.fits",
            f"{IMAGES}/real_galaxy_PSF_images_extension.fits",
            "137b1b27344e8cad6fb5354bc7727547e436aaaa172eec7a28e5ddb2c4128c8a",
        ),
        RemoteFile(
            "hst/cosmos_ext/real_galaxy_catalog_26_extension_example.fits",
            f"{CATALOGUES}/real_galaxy_catalog_26_extension_example.fits",
            "b73b0c3c546774cff5d55c016e04f0b2d3d0089298a4516ae3ddf8d1846317cd",
        ),
        RemoteFile(
            "hst/cosmos_ext/real_galaxy_catalog_26_extension_example_fits.fits",
            f"{CATALOGUES}/real_galaxy_catalog_26_extension_example_fits.fits",
            "193bd46d0c89ed75c9d9fe79abdddd08132a45e806a10ba0a7c308d405a1017b",
        ),
    ],
}


def digest(path):
    """SHA-256 of a file, as hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fetch(remote, folder):
    """Fetch one file into a folder, unless it is there already.

    Returns:
        True if the file was fetched, False if it was there.

    Raises:
        ValueError: If the file, there or fetched, has another hash.
        OSError: If the network or the disk fails.
    """
    target = Path(folder) / remote.path
    if target.exists():
        _verify(target, remote, f"{target} is there with other content; remove it to fetch it")
        return False
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(target.name + ".part")
    with urllib.request.urlopen(remote.url, timeout=60) as reply, open(part, "wb") as file:
        shutil.copyfileobj(reply, file)
    try:
        _verify(part, remote, f"{remote.url} gave other content than expected; try again")
    except ValueError:
        part.unlink()
        raise
    part.rename(target)
    return True


def _verify(path, remote, problem):
    found = digest(path)
    if found != remote.sha256:
        raise ValueError(f"{problem}: SHA-256 is {found}, expected {remote.sha256}")


def main(arguments=None):
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help=f"data sets: {', '.join(DATASETS)} (default: all)"
    )
    parser.add_argument("--to", required=True, type=Path, metavar="DIR", help="data folder")
    options = parser.parse_args(arguments)
    unknown = sorted(set(options.names) - set(DATASETS))
    if unknown:
        parser.error(f"no data set {', '.join(unknown)}; there are {', '.join(DATASETS)}")
    failed = 0
    for remote in (r for name in options.names or DATASETS for r in DATASETS[name]):
        try:
            fetched = fetch(remote, options.to)
            logger.info("%s %s", "fetched" if fetched else "present", options.to / remote.path)
        except (ValueError, OSError) as error:
            failed += 1
            logger.error("failed  %s: %s", remote.path, error)
    return 1 if failed else 0


if __name__ == "__main__":
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    sys.exit(main())
