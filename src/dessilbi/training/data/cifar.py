# SPDX-License-Identifier: Apache-2.0
"""CIFAR-10 and CIFAR-100, read from the pickles of their "python version".

torchvision is only asked to download them. A file whose MD5 sum is not the known one is refused;
what is then read still passes :mod:`dessilbi.training.data.pickles`, as MD5 can be forged.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from dessilbi.training.data.fetching import fetch, folder_of
from dessilbi.training.data.generated import Part
from dessilbi.training.data.pickles import read_pickle

SIDE = 32
_PIXELS = 3 * SIDE * SIDE


@dataclass(frozen=True)
class Layout:
    """The files of one of the sets.

    Attributes:
        dataset: torchvision's class.
        folder: Where torchvision puts the files.
        train: File and MD5 sum, in order.
        test: Likewise.
        labels: The key of the classes.
        num_classes: How many there are.
    """

    dataset: str
    folder: str
    train: tuple[tuple[str, str], ...]
    test: tuple[tuple[str, str], ...]
    labels: bytes
    num_classes: int


CIFAR10 = Layout(
    dataset="CIFAR10",
    folder="cifar-10-batches-py",
    train=(
        ("data_batch_1", "c99cafc152244af753f735de768cd75f"),
        ("data_batch_2", "d4bba439e000b95fd0a9bffe97cbabec"),
        ("data_batch_3", "54ebc095f3ab1f0389bbae665268c751"),
        ("data_batch_4", "634d18415352ddfa80567beed471001a"),
        ("data_batch_5", "482c414d41f54cd18b22e5b47cb7c3cb"),
    ),
    test=(("test_batch", "40351d587109b95175f43aff81a1287e"),),
    labels=b"labels",
    num_classes=10,
)
CIFAR100 = Layout(
    dataset="CIFAR100",
    folder="cifar-100-python",
    train=(("train", "16019d7e3df5f24257cddd939b257f8d"),),
    test=(("test", "f0ef6b0ae62326f3e7ffdfab6717acfc"),),
    labels=b"fine_labels",
    num_classes=100,
)


def read_cifar(
    root: str | Path | None, download: bool, *, name: str, layout: Layout
) -> tuple[Part, Part]:
    """Return (images, labels) for training and for testing: uint8 (N, 3, 32, 32) and int64 (N,).

    Args:
        root: The data folder; the files lie in the layout's folder.
        download: Whether missing files are fetched with torchvision.
        name: How error messages call the set.
        layout: Which set.

    Raises:
        ValueError: ``root`` is None, or a file is damaged or is not the original.
        FileNotFoundError: Files are missing and ``download`` is False.
        ImportError: ``download`` needs torchvision, which is not installed.
        OSError: The download failed.
    """
    files = [file for file, _ in (*layout.train, *layout.test)]
    listed = ", ".join(f"{layout.folder}/{file}" for file in files)
    folder = folder_of(root, name=name, listed=listed) / layout.folder
    if download and _missing(folder, files):
        fetch(folder.parent, folder, name=name, dataset=layout.dataset)
    if missing := _missing(folder, files):
        raise FileNotFoundError(
            f"{name} needs {', '.join(files)} (its python version, unpacked) in {folder}, where "
            f"{', '.join(missing)} cannot be found: put the files there, or let --download "
            f"fetch them"
        )
    return _read_part(folder, layout.train, layout), _read_part(folder, layout.test, layout)


def _missing(folder: Path, files: list[str]) -> list[str]:
    return [file for file in files if not (folder / file).is_file()]


def _read_part(folder: Path, files: tuple[tuple[str, str], ...], layout: Layout) -> Part:
    images, labels = zip(*(_read(folder / file, md5, layout) for file, md5 in files), strict=True)
    joined = torch.from_numpy(np.concatenate(images)).reshape(-1, 3, SIDE, SIDE)
    return joined, torch.tensor([label for part in labels for label in part])


def _read(path: Path, md5: str, layout: Layout) -> tuple[np.ndarray, list[int]]:
    with path.open("rb") as stream:
        found = hashlib.file_digest(stream, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
    if found != md5:
        raise ValueError(
            f"{path} is damaged or not the original file (its MD5 sum is {found}, not {md5}): "
            f"delete it and fetch it again"
        )
    content = read_pickle(path)
    images, labels = content.get(b"data"), content.get(layout.labels)
    fits = (
        isinstance(images, np.ndarray)
        and images.shape[1:] == (_PIXELS,)
        and isinstance(labels, list)
        and len(labels) == len(images)
        and all(type(label) is int and 0 <= label < layout.num_classes for label in labels)
    )
    if not fits:
        raise ValueError(
            f"{path} does not hold images of {_PIXELS} bytes and as many "
            f"{layout.labels.decode()} from 0 to {layout.num_classes - 1}: "
            f"put the original file there"
        )
    assert isinstance(images, np.ndarray)
    assert isinstance(labels, list)
    return images, labels
