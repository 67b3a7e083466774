# SPDX-License-Identifier: Apache-2.0
"""Data sets that need no file: scikit-learn's embedded digits, and images made of numbers.

Both have the shape of MNIST (1 channel, 28x28, 10 classes) and are the same on every machine.
"""

import math

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
    """Return generated (images, labels) for training and testing, the classes equally frequent.

    Each image is one Gaussian blob under noise, with values in [0, 1]. The class decides where on
    a circle the blob stands; place, width and brightness vary, so that neighbouring classes touch.

    >>> (images, labels), _ = synthetic(num_train=20, num_test=10)
    >>> images.shape, labels.bincount().tolist()
    (torch.Size([20, 1, 28, 28]), [2, 2, 2, 2, 2, 2, 2, 2, 2, 2])
    """
    generator = torch.Generator().manual_seed(28)
    return _blobs(num_train, generator), _blobs(num_test, generator)


def _blobs(num_images: int, generator: torch.Generator) -> Part:
    order = torch.randperm(num_images, generator=generator)
    labels = order % NUM_CLASSES
    angle = 2 * math.pi * labels / NUM_CLASSES
    jitter = 0.8 * torch.randn(2, num_images, generator=generator)
    middle = (SIDE - 1) / 2
    row = middle + 8 * angle.sin() + jitter[0]
    column = middle + 8 * angle.cos() + jitter[1]
    width, brightness = 0.5 + torch.rand(2, num_images, generator=generator) / 2
    width = 3 * width  # standard deviation in pixels
    pixel = torch.arange(SIDE, dtype=torch.float32)
    vertical = torch.exp(-(((pixel - row[:, None]) / width[:, None]) ** 2) / 2)
    horizontal = torch.exp(-(((pixel - column[:, None]) / width[:, None]) ** 2) / 2)
    blobs = brightness[:, None, None] * vertical[:, :, None] * horizontal[:, None, :]
    noise = 0.2 * torch.randn(blobs.shape, generator=generator)
    return (blobs + noise).clamp(0, 1).unsqueeze(1), labels
