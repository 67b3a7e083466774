# SPDX-License-Identifier: Apache-2.0
"""MNIST and its like, read from the four idx files in the folders that torchvision uses.

torchvision is only asked to download them; reading is ours (:mod:`dessilbi.training.idx`).
"""

import importlib
from pathlib import Path

import torch
from torch import Tensor

from dessilbi.training.idx import read_idx

# For the training and the test part, images and labels.
FILES = (
    ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
)
SIDE = 28
NUM_CLASSES = 10

Part = tuple[Tensor, Tensor]


def read_mnist(
    root: str | Path | None, download: bool, *, name: str, dataset: str
) -> tuple[Part, Part]:
    """Return (images, labels) for training and for testing: uint8 (N, 1, 28, 28) and int64 (N,).

    Args:
        root: The data folder; the files lie in its ``DATASET/raw``, each plain or as ``.gz``.
        download: Whether missing files are fetched with torchvision.
        name: How error messages call the set.
        dataset: torchvision's class, which is also the name of its folder.

    Raises:
        ValueError: ``root`` is None, or a file is damaged or does not belong here.
        FileNotFoundError: Files are missing and ``download`` is False.
        ImportError: ``download`` needs torchvision, which is not installed.
        OSError: The download failed.
    """
    wanted = [file for pair in FILES for file in pair]
    if root is None:
        listed = ", ".join(f"{dataset}/raw/{file}" for file in wanted)
        raise ValueError(
            f"{name} is read from files and no data folder is given: give --data DIR or set "
            f"$DESSILBI_DATA to a folder that holds {listed} (plain or .gz)"
        )
    folder = Path(root) / dataset / "raw"
    if download and _missing(folder, wanted):
        _download(Path(root), folder, name=name, dataset=dataset)
    missing = _missing(folder, wanted)
    if missing:
        raise FileNotFoundError(
            f"{name} needs {', '.join(wanted)} (plain or .gz) in {folder}, where "
            f"{', '.join(missing)} cannot be found: put the files there, or let --download "
            f"fetch them"
        )
    train, test = (_read_part(folder, images, labels) for images, labels in FILES)
    return train, test


def _find(folder: Path, file: str) -> Path | None:
    candidates = (folder / file, folder / f"{file}.gz")
    return next((path for path in candidates if path.is_file()), None)


def _missing(folder: Path, files: list[str]) -> list[str]:
    return [file for file in files if _find(folder, file) is None]


def _download(root: Path, folder: Path, *, name: str, dataset: str) -> None:
    try:
        datasets = importlib.import_module("torchvision.datasets")
    except ImportError as error:
        raise ImportError(
            f"--download fetches {name} with torchvision, which is not installed: "
            f"run pip install torchvision, or put the files into {folder} yourself"
        ) from error
    try:
        # One part is enough: torchvision always fetches all four files.
        getattr(datasets, dataset)(root=str(root), train=False, download=True)
    except (RuntimeError, OSError) as error:
        reason = " ".join(str(error).split())
        raise OSError(
            f"{name} could not be downloaded into {folder} ({reason}): check the network, "
            f"or put the files there yourself"
        ) from error


def _read_part(folder: Path, images_file: str, labels_file: str) -> Part:
    images_path, labels_path = _find(folder, images_file), _find(folder, labels_file)
    assert images_path is not None
    assert labels_path is not None
    images = read_idx(images_path, ndim=3)
    labels = read_idx(labels_path, ndim=1)
    if images.shape[1:] != (SIDE, SIDE):
        height, width = images.shape[1:]
        raise ValueError(
            f"{images_path} holds images of {height}x{width} pixels, not of {SIDE}x{SIDE}: "
            f"put the original file there"
        )
    if len(labels) != len(images) or not len(labels):
        raise ValueError(
            f"{labels_path} holds {len(labels)} labels for {len(images)} images: "
            f"put the original files of one set there"
        )
    if labels.max() >= NUM_CLASSES:
        raise ValueError(
            f"{labels_path} holds the label {labels.max()}, and 0 to {NUM_CLASSES - 1} are "
            f"allowed: put the original file there"
        )
    return torch.from_numpy(images).unsqueeze(1), torch.from_numpy(labels).to(torch.int64)
