# SPDX-License-Identifier: Apache-2.0
"""Fetching: what is said where files are missing, and downloads with torchvision."""

import importlib
from pathlib import Path


def folder_of(root: str | Path | None, *, name: str, listed: str) -> Path:
    """Return the data folder as a path.

    Args:
        root: What the user gave.
        name: How error messages call the set.
        listed: The files that are wanted below it.

    Raises:
        ValueError: There is none.
    """
    if root is None:
        raise ValueError(
            f"{name} is read from files and no data folder is given: give --data DIR or set "
            f"$DESSILBI_DATA to a folder that holds {listed}"
        )
    return Path(root)


def inside(root: Path, part: str, *, name: str) -> Path:
    """Return a place in the data folder that a recipe names; it cannot lead out of it.

    Args:
        root: The data folder.
        part: What the recipe says.
        name: How error messages call the set.

    Raises:
        ValueError: It would.
    """
    if Path(part).is_absolute() or ".." in Path(part).parts or "\0" in part:
        raise ValueError(
            f"{name} leads out of the data folder: name a place inside the folder that --data gives"
        )
    return root / part


def fetch(root: Path, folder: Path, *, name: str, dataset: str) -> None:
    """Download a set with torchvision.

    Args:
        root: The data folder.
        folder: Where in it the files are wanted.
        name: How error messages call the set.
        dataset: torchvision's class.

    Raises:
        ImportError: torchvision is not installed.
        OSError: The download failed.
    """
    try:
        datasets = importlib.import_module("torchvision.datasets")
    except ImportError as error:
        raise ImportError(
            f"--download fetches {name} with torchvision, which is not installed: "
            f"pip install 'dessilbi[vision]', or put the files into {folder} yourself"
        ) from error
    try:
        # One part is enough: torchvision always fetches all files.
        getattr(datasets, dataset)(root=str(root), train=False, download=True)
    except (RuntimeError, OSError) as error:
        reason = " ".join(str(error).split())
        raise OSError(
            f"{name} could not be downloaded into {folder} ({reason}): check the network, "
            f"or put the files there yourself"
        ) from error
