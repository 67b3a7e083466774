# SPDX-License-Identifier: Apache-2.0
"""Folders of images, one folder per class, as ImageNet is laid out; decoded by torchvision.

    train/CLASS/*.jpg    val/CLASS/*.jpg (or test/)

Workers decode and transform; what each image goes through depends on the seed, the batch and its
place in it alone.
"""

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dessilbi.files.storage import told_by
from dessilbi.training.data.fetching import folder_of, inside
from dessilbi.training.data.parts import Data, Wish
from dessilbi.training.feeding import Draw, Split

DEFAULT_SIZE = 224
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, also for other folders
Key = tuple[int, int | None, int]


@dataclass(frozen=True)
class _Damaged:
    """Stands for an image that could not be decoded, until the main process can say so."""

    path: str
    reason: str


class _Decoded(Dataset[Any]):
    """Images by key: sample, seed of the batch (None: as it is), place in the batch."""

    def __init__(self, samples: list[tuple[str, int]], size: int, *, augment: bool) -> None:
        from torchvision.transforms import v2

        self._samples = samples
        self._plain = v2.Compose(
            [v2.Resize(size * 256 // 224), v2.CenterCrop(size), v2.PILToTensor()]
        )
        self._random = v2.Compose(
            [v2.RandomResizedCrop(size), v2.RandomHorizontalFlip(), v2.PILToTensor()]
            if augment
            else [self._plain]
        )

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, key: Key) -> tuple[Tensor, int] | _Damaged:
        from torchvision.datasets.folder import pil_loader

        index, seed, place = key
        path, label = self._samples[index]
        try:
            image = pil_loader(path)
        except MemoryError:
            raise
        except Exception as error:  # Pillow raises many kinds for damaged and oversized images
            return _Damaged(path, told_by(error))
        if seed is None:
            return self._plain(image), label
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(_of_place(seed, place))
            return self._random(image), label


def _of_place(seed: int, place: int) -> int:
    return int(np.random.SeedSequence((seed, place)).generate_state(1)[0])


class _Keys:
    """The keys of all batches, made while they are asked for."""

    def __init__(self, plan: Iterable[Draw]) -> None:
        self._plan = plan

    def __iter__(self) -> Iterator[list[Key]]:
        for draw in self._plan:
            yield [(i, draw.seed, draw.first + at) for at, i in enumerate(draw.indices.tolist())]


def _collated(samples: list[Any]) -> tuple[Tensor, Tensor] | _Damaged:
    for sample in samples:
        if isinstance(sample, _Damaged):
            return sample
    images, labels = zip(*samples, strict=True)
    return torch.stack(images), torch.tensor(labels)


class ImageFiles:
    """Image files and their classes.

    Args:
        samples: File and class of each image.
        size: Pixels of a side.
        augment: Whether shuffled batches are random crops, half of them mirrored; else, as in
            order, the middle.
        normalise: With ImageNet's mean and deviation; else pixels lie in [0, 1].
        workers: Processes that decode, as far as there are CPUs; 0 decodes in this one.
    """

    def __init__(
        self,
        samples: list[tuple[str, int]],
        *,
        size: int,
        augment: bool,
        normalise: bool,
        workers: int,
    ) -> None:
        self._decoded = _Decoded(samples, size, augment=augment)
        self._moments = (MEAN, STD) if normalise else ((0.0,), (1.0,))
        self._workers = min(workers, os.cpu_count() or 1)

    def __len__(self) -> int:
        return len(self._decoded)

    def read(self, plan: Iterable[Draw], device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield float32 (n, 3, size, size) images and int64 labels; see ``feeding.Source``.

        Raises:
            ValueError: A file is no image, or is gone.
            ChildProcessError: A worker died.
        """
        loader = DataLoader(
            self._decoded,
            batch_sampler=_Keys(plan),
            num_workers=self._workers,
            collate_fn=_collated,
            pin_memory=device.type == "cuda",
            generator=torch.Generator(),  # else the loader draws from the global one
        )
        mean, std = (torch.tensor(m, device=device).reshape(-1, 1, 1) for m in self._moments)
        for batch in _alive(loader):
            if isinstance(batch, _Damaged):
                if not Path(batch.path).exists():
                    raise ValueError(f"{batch.path} is not there any more: put it back")
                raise ValueError(
                    f"{batch.path} cannot be read as an image ({batch.reason}): "
                    f"replace it or take it out of the folder"
                )
            images, labels = (tensor.to(device, non_blocking=True) for tensor in batch)
            yield images.to(torch.float32).div_(255).sub_(mean).div_(std), labels


def _alive(loader: "DataLoader[Any]") -> Iterator[Any]:
    """Pass batches on; say it in one sentence where a worker died.

    Raises:
        ChildProcessError: It did.
    """
    try:
        yield from loader
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        detail = str(error).splitlines()[0].rstrip(". ")
        raise ChildProcessError(
            f"a process that decodes images died ({detail}), often because memory ran out: set "
            f"workers=0 or fewer, or close other programs"
        ) from None


def load_folder(folder: str, wish: Wish) -> Data:
    """Find the images below ``folder`` of the data folder; see the head of this file.

    The validation part is drawn from ``train``; ``val`` or ``test`` is kept for testing.

    Raises:
        RecipeError: A wish does not fit.
        ValueError: No data folder is given, or the parts have other classes.
        FileNotFoundError: A folder, or the images of a class, are missing.
        ImportError: torchvision is not installed.
    """
    wish.refuse("length", "which is no text")
    root = folder_of(wish.root, name=wish.name, listed="train/CLASS/*.jpg and val/CLASS/*.jpg")
    place = inside(root, folder, name=wish.name)
    test = next((place / part for part in ("test", "val") if (place / part).is_dir()), None)
    if test is None or not (place / "train").is_dir():
        missing = " and ".join(
            part
            for part, found in (("train", (place / "train").is_dir()), ("val", test))
            if not found
        )
        raise FileNotFoundError(
            f"{wish.name} needs folders of images train/CLASS/*.jpg and val/CLASS/*.jpg (or "
            f"test/CLASS/*.jpg) in {place}, where {missing} cannot be found: put them there"
        )
    samples, classes = _listed(place / "train", wish.name)
    tested, test_classes = _listed(test, wish.name)
    if classes != test_classes:
        other = min(set(classes) ^ set(test_classes))
        raise ValueError(
            f"{place / 'train'} and {test} do not have the same folders of classes "
            f"({other} is in one only): give both the same"
        )
    chosen, rest = wish.divided(len(samples))
    size = wish.image_size or DEFAULT_SIZE

    def files(part: list[tuple[str, int]]) -> ImageFiles:
        return ImageFiles(
            part, size=size, augment=wish.augment, normalise=wish.normalise, workers=wish.workers
        )

    training = files(samples)
    return Data(
        name=wish.name,
        train=Split(training, rest),
        validation=Split(training, chosen),
        test=Split(files(tested)),
        num_classes=len(classes),
        in_channels=3,
        side=size,
    )


def _listed(folder: Path, name: str) -> tuple[list[tuple[str, int]], list[str]]:
    try:
        from torchvision.datasets import ImageFolder
    except ImportError as error:
        raise ImportError(
            f"{name} is decoded with torchvision, which is not installed: "
            f"pip install 'dessilbi[vision]'"
        ) from error
    try:
        found = ImageFolder(str(folder))
    except FileNotFoundError as error:
        reason = str(error).split(". ")[0].removesuffix(".")
        raise FileNotFoundError(
            f"{name} needs images in {folder}/CLASS ({reason}): put them there"
        ) from None
    return found.samples, found.classes
