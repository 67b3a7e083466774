# SPDX-License-Identifier: Apache-2.0
"""The sets of small images, by name: read into memory, split, normalised when they are fed."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from dessilbi.training.data.cifar import CIFAR10, CIFAR100, read_cifar
from dessilbi.training.data.generated import Part, blobs, digits, synthetic
from dessilbi.training.data.images import Augment, Images, crop_and_flip
from dessilbi.training.data.mnist import read_mnist
from dessilbi.training.data.parts import Data, Wish
from dessilbi.training.feeding import Split

Read = Callable[[str | Path | None, bool], tuple[Part, Part]]


@dataclass(frozen=True)
class DataSet:
    """How a set of small images is read, and what there is to know about it.

    Attributes:
        read: From the data folder, or by download, to training and test part.
        mean: Of the training pixels in [0, 1], one for each channel or one for all.
        std: Likewise.
        num_classes: Labels are 0 ... num_classes - 1.
        in_channels: Of the images.
        side: Of the images, in pixels.
        augment: What shuffled batches go through.
        needs_files: Whether it is read from the data folder.
    """

    read: Read
    mean: float | tuple[float, ...]
    std: float | tuple[float, ...]
    num_classes: int = 10
    in_channels: int = 1
    side: int = 28
    augment: Augment | None = None
    needs_files: bool = True


DATA_SETS: dict[str, DataSet] = {
    "digits": DataSet(lambda root, download: digits(), mean=0.3055, std=0.3248, needs_files=False),
    "synthetic-mnist": DataSet(
        lambda root, download: synthetic(), mean=0.1038, std=0.1531, needs_files=False
    ),
    "mnist": DataSet(partial(read_mnist, name="mnist", dataset="MNIST"), mean=0.1307, std=0.3081),
    "fashion-mnist": DataSet(
        partial(read_mnist, name="fashion-mnist", dataset="FashionMNIST"), mean=0.2860, std=0.3530
    ),
    "cifar10": DataSet(
        partial(read_cifar, name="cifar10", layout=CIFAR10),
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.2023, 0.1994, 0.2010),
        in_channels=3,
        side=32,
        augment=crop_and_flip,
    ),
    "cifar100": DataSet(
        partial(read_cifar, name="cifar100", layout=CIFAR100),
        mean=(0.5071, 0.4865, 0.4409),
        std=(0.2673, 0.2564, 0.2762),
        num_classes=100,
        in_channels=3,
        side=32,
        augment=crop_and_flip,
    ),
}


def load_image_set(source: DataSet, wish: Wish) -> Data:
    """Read a set of small images into memory and divide it.

    Raises:
        RecipeError: A wish does not fit the set.
        ValueError, FileNotFoundError, ImportError, OSError: As its reader.
    """
    wish.refuse("image_size", f"whose images have {source.side} pixels a side")
    wish.refuse("length", "which is no text")
    train, test = source.read(wish.root, wish.download)
    chosen, rest = wish.divided(len(train[1]))
    made = partial(_images, source, normalise=wish.normalise)
    training = made(train, augment=source.augment if wish.augment else None)
    return Data(
        name=wish.name,
        train=Split(training, rest),
        validation=Split(training, chosen),
        test=Split(made(test, augment=None)),
        num_classes=source.num_classes,
        in_channels=source.in_channels,
        side=source.side,
    )


def _images(source: DataSet, part: Part, *, normalise: bool, augment: Augment | None) -> Images:
    mean, std = (source.mean, source.std) if normalise else (0.0, 1.0)
    return Images(
        *part,
        mean=mean if isinstance(mean, tuple) else (mean,),
        std=std if isinstance(std, tuple) else (std,),
        augment=augment,
    )


def made_up(count: int, side: int, channels: int, num_classes: int) -> Read:
    """Return a reader of generated images, ``count`` to train and as many to test."""

    def read(root: str | Path | None, download: bool) -> tuple[Part, Part]:
        generator = torch.Generator().manual_seed(side)
        made = partial(blobs, side=side, channels=channels, num_classes=num_classes)
        return made(generator, count), made(generator, count)

    return read
