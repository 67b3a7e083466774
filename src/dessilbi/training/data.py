# SPDX-License-Identifier: Apache-2.0
"""Data sets as tensors in memory, cut into training, validation and test parts.

The sets themselves come from :mod:`dessilbi.training.generated` and
:mod:`dessilbi.training.mnist`; here they are named, normalised, split and cut into batches.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from dessilbi.training.generated import Part, digits, synthetic
from dessilbi.training.mnist import read_mnist

Read = Callable[[str | Path | None, bool], tuple[Part, Part]]


@dataclass(frozen=True, eq=False)
class Split:
    """Samples to train, to choose or to test with.

    Attributes:
        inputs: Normalised images, float32 (N, C, H, W).
        targets: Their classes, int64 (N,).
    """

    inputs: Tensor
    targets: Tensor

    def __post_init__(self) -> None:
        if len(self.inputs) != len(self.targets):
            raise ValueError(
                f"a split of {len(self.inputs)} inputs and {len(self.targets)} targets is "
                f"not allowed: give one target for each input"
            )

    def __len__(self) -> int:
        return len(self.targets)


@dataclass(frozen=True, eq=False)
class Data:
    """A data set, its training part cut into training and validation.

    Attributes:
        name: A key of ``DATA_SETS``.
        train: To train with.
        validation: To choose settings and tickets with.
        test: To report with, once.
        num_classes: Targets are 0 ... num_classes - 1.
        in_channels: Channels of the images.
    """

    name: str
    train: Split
    validation: Split
    test: Split
    num_classes: int
    in_channels: int


@dataclass(frozen=True)
class DataSet:
    """How a named set is read, and the mean and deviation of its training pixels in [0, 1]."""

    read: Read
    mean: float
    std: float
    num_classes: int = 10
    in_channels: int = 1


DATA_SETS: dict[str, DataSet] = {
    "digits": DataSet(lambda root, download: digits(), mean=0.3055, std=0.3248),
    "synthetic-mnist": DataSet(lambda root, download: synthetic(), mean=0.1038, std=0.1531),
    "mnist": DataSet(partial(read_mnist, name="mnist", dataset="MNIST"), mean=0.1307, std=0.3081),
    "fashion-mnist": DataSet(
        partial(read_mnist, name="fashion-mnist", dataset="FashionMNIST"), mean=0.2860, std=0.3530
    ),
}


def load_data(
    name: str,
    *,
    root: str | Path | None,
    validation: int,
    seed: int,
    download: bool = False,
    normalise: bool = True,
) -> Data:
    """Read a data set into memory, on the CPU.

    Args:
        name: A key of ``DATA_SETS``. "digits" and "synthetic-mnist" need no files and ignore
            ``root`` and ``download``.
        root: The data folder, laid out as torchvision does (``MNIST/raw/...``).
        validation: How many training samples are set apart for validation.
        seed: Decides which; both parts keep the order of the set.
        download: Whether missing files are fetched, with torchvision.
        normalise: Shift and scale pixels by the set's mean and standard deviation; else they lie
            in [0, 1].

    Raises:
        ValueError: The name is unknown, ``validation`` leaves nothing on one side, ``root`` is
            None but needed, or a file is damaged.
        FileNotFoundError: Files are missing and ``download`` is False.
        ImportError: ``download`` needs torchvision, which is not installed.
        OSError: The download failed.

    >>> data = load_data("digits", root=None, validation=237, seed=0)
    >>> len(data.train), len(data.validation), len(data.test)
    (1200, 237, 360)
    """
    if name not in DATA_SETS:
        raise ValueError(f"data set {name!r} is unknown: use one of {', '.join(DATA_SETS)}")
    source = DATA_SETS[name]
    with torch.device("cpu"):
        (images, labels), test = source.read(root, download)
        if not 1 <= validation <= len(labels) - 1:
            raise ValueError(
                f"a validation split of {validation} samples does not fit {name}, which has "
                f"{len(labels)} to train with: give a number from 1 to {len(labels) - 1}"
            )
        if not normalise:
            source = replace(source, mean=0.0, std=1.0)
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
        chosen, rest = order[:validation].sort().values, order[validation:].sort().values
        return Data(
            name=name,
            train=_split(source, images[rest], labels[rest]),
            validation=_split(source, images[chosen], labels[chosen]),
            test=_split(source, *test),
            num_classes=source.num_classes,
            in_channels=source.in_channels,
        )


def _split(source: DataSet, images: Tensor, labels: Tensor) -> Split:
    scale = 255 if images.dtype == torch.uint8 else 1
    inputs = images.to(torch.float32, copy=True)
    return Split(inputs.div_(scale).sub_(source.mean).div_(source.std), labels)


def batches(
    split: Split, batch_size: int, *, generator: torch.Generator | None, drop_last: bool = False
) -> Iterator[tuple[Tensor, Tensor]]:
    """Return the batches of one epoch as (inputs, targets).

    Args:
        split: The samples.
        batch_size: Samples per batch; the last batch may be smaller.
        generator: Shuffles: each call draws one permutation from it, at once. None keeps the
            order, and the batches are then views of the split: do not write into them.
        drop_last: Whether a smaller last batch is left out.

    Raises:
        ValueError: ``batch_size`` is below 1, or ``drop_last`` would leave no batch at all.

    >>> split = Split(torch.zeros(5, 1, 2, 2), torch.arange(5))
    >>> [targets.tolist() for _, targets in batches(split, 2, generator=None)]
    [[0, 1], [2, 3], [4]]
    """
    if batch_size < 1:
        raise ValueError(f"batches of {batch_size} samples are not allowed: give 1 or more")
    if drop_last and batch_size > len(split):
        raise ValueError(
            f"batches of {batch_size} do not fit a split of {len(split)} samples when the last, "
            f"smaller one is dropped: give a batch size of at most {len(split)}"
        )
    if generator is None:
        order = None
    else:
        drawn = torch.randperm(len(split), generator=generator, device=generator.device)
        order = drawn.to(split.inputs.device)
    stop = len(split) - len(split) % batch_size if drop_last else len(split)
    return _cut(split, batch_size, order, stop)


def _cut(
    split: Split, batch_size: int, order: Tensor | None, stop: int
) -> Iterator[tuple[Tensor, Tensor]]:
    for start in range(0, stop, batch_size):
        end = start + batch_size
        if order is None:
            yield split.inputs[start:end], split.targets[start:end]
        else:
            index = order[start:end]
            yield split.inputs.index_select(0, index), split.targets.index_select(0, index)
