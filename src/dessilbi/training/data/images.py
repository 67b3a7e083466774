# SPDX-License-Identifier: Apache-2.0
"""Small images in memory: normalised, cropped and flipped a whole batch at a time."""

from collections.abc import Callable, Iterable, Iterator

import torch
import torch.nn.functional as F  # noqa: N812 - the name everyone reads at once
from torch import Tensor

from dessilbi.training.feeding import Draw, InMemory, OnDevice

Augment = Callable[[Tensor, Draw], Tensor]
PADDING = 4


class Images:
    """Images and their classes, normalised when they are read.

    Args:
        images: (N, C, H, W), uint8 in 0 ... 255 or float32 in [0, 1].
        labels: int64 (N,).
        mean: Of the pixels in [0, 1], one for each channel.
        std: Likewise.
        augment: Changes the images of a shuffled batch, before they are normalised.

    Raises:
        ValueError: There is not one label for each image.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        *,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        augment: Augment | None = None,
    ) -> None:
        self._stored = InMemory(images, labels)
        self._scale = 255.0 if images.dtype == torch.uint8 else 1.0
        self._moments = OnDevice(*(torch.tensor(m).reshape(-1, 1, 1) for m in (mean, std)))
        self._augment = augment

    def __len__(self) -> int:
        return len(self._stored)

    def read(self, plan: Iterable[Draw], device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield float32 images and int64 labels; see :class:`~dessilbi.training.feeding.Source`."""
        mean, std = self._moments(device)
        for draw in plan:
            images, labels = next(self._stored.read((draw,), device))
            if self._augment is not None and draw.seed is not None:
                images = self._augment(images, draw)
            yield images.to(torch.float32).div_(self._scale).sub_(mean).div_(std), labels


def crop_and_flip(images: Tensor, draw: Draw) -> Tensor:
    """Return each image shifted by up to 4 pixels, black coming in, and mirrored half the time.

    Where to and which is drawn on the CPU for the whole batch, so that every device and every
    number of processes makes the same images.

    Args:
        images: This process's share (n, C, H, W), any dtype.
        draw: Tells the seed and the share.
    """
    generator, device = draw.generator(), images.device
    corners = torch.randint(2 * PADDING + 1, (draw.size, 2), generator=generator)[draw.share]
    mirrored = torch.randint(2, (draw.size,), generator=generator)[draw.share].bool()
    height, width = images.shape[-2:]
    padded = F.pad(images, (PADDING,) * 4)
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)  # a view: every crop there is
    row, column = corners.to(device).unbind(1)
    cropped = windows[torch.arange(len(images), device=device), :, row, column]
    return torch.where(mirrored.to(device)[:, None, None, None], cropped.flip(-1), cropped)
