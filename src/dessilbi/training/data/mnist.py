# SPDX-License-Identifier: Apache-2.0
"""MNIST and its like, read from the four idx files in the folders that torchvision uses.

torchvision is only asked to download them; reading is ours (:mod:`dessilbi.training.data.idx`).
"""

from pathlib import Path

import torch

from dessilbi.training.data.fetching import fetch, folder_of
from dessilbi.training.data.generated import Part
from dessilbi.training.data.idx import read_idx

# For the training and the test part, images and labels.
FILES = (
    ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
)
SIDE = 28
NUM_CLASSES = 10


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
    listed = ", ".join(f"{dataset}/raw/{file}" for file in wanted) + " (plain or .gz)"
    folder = folder_of(root, name=name, listed=listed) / dataset / "raw"
    if download and _missing(folder, wanted):
        fetch(folder.parents[1], folder, name=name, dataset=dataset)
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
