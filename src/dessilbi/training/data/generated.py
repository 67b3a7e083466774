# SPDX-License-Identifier: Apache-2.0
"""Data sets that need no file: scikit-learn's embedded digits, images and text made of numbers.

They are the same on every machine.
"""

import math
from functools import partial

import torch
import torch.nn.functional as F  # noqa: N812 - the name everyone reads at once
from torch import Tensor

SIDE = 28
NUM_CLASSES = 10

Part = tuple[Tensor, Tensor]


def digits() -> tuple[Part, Part]:
    """Return scikit-learn's handwritten digits as (images, labels), 1,437 to train and 360 to test.

    The 8x8 images are enlarged to 28x28 (bilinear) with values in [0, 1]. The test part is the
    same for everybody: every fifth image of each class, in an order of its own. Writers are not
    kept apart, so accuracies are kinder than those of a set that does.
    """
    from sklearn.datasets import load_digits  # slow to import, and not needed for other sets

    pixels, classes = load_digits(return_X_y=True)
    small = torch.from_numpy(pixels).to(torch.float32).reshape(-1, 1, 8, 8) / 16
    images = F.interpolate(small, size=(SIDE, SIDE), mode="bilinear", align_corners=False)
    targets = torch.from_numpy(classes).to(torch.int64)
    # Sorted by class after a shuffle, every fifth image is a sample stratified to within one.
    shuffled = torch.randperm(len(targets), generator=torch.Generator().manual_seed(360))
    by_class = shuffled[targets[shuffled].argsort(stable=True)]
    is_test = torch.zeros(len(targets), dtype=torch.bool)
    is_test[by_class[::5]] = True
    return (images[~is_test], targets[~is_test]), (images[is_test], targets[is_test])


def synthetic(*, num_train: int = 2000, num_test: int = 500) -> tuple[Part, Part]:
    """Return generated (images, labels) of MNIST's shape; see :func:`blobs`.

    >>> (images, labels), _ = synthetic(num_train=20, num_test=10)
    >>> images.shape, labels.bincount().tolist()
    (torch.Size([20, 1, 28, 28]), [2, 2, 2, 2, 2, 2, 2, 2, 2, 2])
    """
    generator = torch.Generator().manual_seed(28)
    made = partial(blobs, generator, side=SIDE, channels=1, num_classes=NUM_CLASSES)
    return made(num_train), made(num_test)


def blobs(
    generator: torch.Generator, num_images: int, *, side: int, channels: int, num_classes: int
) -> Part:
    """Return generated images (N, channels, side, side) and labels, classes equally frequent.

    Each image is one Gaussian blob under noise, with values in [0, 1]. The class decides where on
    a circle the blob stands, and in which colour; place, width and brightness vary, so that
    neighbouring classes touch.
    """
    order = torch.randperm(num_images, generator=generator)
    labels = order % num_classes
    angle = 2 * math.pi * labels / num_classes
    jitter = 0.8 * torch.randn(2, num_images, generator=generator)
    middle, scale = (side - 1) / 2, side / SIDE
    row = middle + scale * (8 * angle.sin() + jitter[0])
    column = middle + scale * (8 * angle.cos() + jitter[1])
    width, brightness = 0.5 + torch.rand(2, num_images, generator=generator) / 2
    width = scale * 3 * width  # standard deviation in pixels
    pixel = torch.arange(side, dtype=torch.float32)
    vertical = torch.exp(-(((pixel - row[:, None]) / width[:, None]) ** 2) / 2)
    horizontal = torch.exp(-(((pixel - column[:, None]) / width[:, None]) ** 2) / 2)
    images = brightness[:, None, None] * vertical[:, :, None] * horizontal[:, None, :]
    phase = 2 * math.pi * torch.arange(channels) / channels
    colour = (1 + torch.cos(angle[:, None] - phase)) / 2 if channels > 1 else torch.ones(1, 1)
    images = images[:, None] * colour[:, :, None, None]
    noise = 0.2 * torch.randn(images.shape, generator=generator)
    return (images + noise).clamp(0, 1), labels


def chatter(num_characters: int) -> str:
    """Return generated text: words in no order, in lines that end in a full stop.

    >>> print(chatter(30))
    not and this this night.
    will.
    """
    generator = torch.Generator().manual_seed(28)
    words = ("all", "for", "one", "and", "love", "will", "not", "sleep", "to", "this", "night")
    drawn = torch.randint(len(words), (num_characters // 2 + 1,), generator=generator).tolist()
    text = " ".join(words[i] + (".\n" if i % 5 == 0 else "") for i in drawn)
    return text.replace("\n ", "\n")[:num_characters]
