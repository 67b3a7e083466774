# SPDX-License-Identifier: Apache-2.0
"""Residual networks for small images: three narrow stages, or the four wide ones of ResNet-18.

He et al., "Deep residual learning for image recognition" (2016), section 4.2, the bottleneck net of
the same layout that the authors of DessiLBI call "ResNet-56", and the ResNet-18 of section 4.1 with
a first layer for small images.
"""

from typing import ClassVar, Literal

import torch.nn.functional as F  # noqa: N812 - the name everyone reads at once
from torch import Tensor, nn

WIDTHS = (16, 32, 64)
WIDE = (64, 128, 256, 512)
Shortcut = Literal["projection", "pad"]


class PadShortcut(nn.Module):
    """Option A of He et al.: every ``stride``-th pixel, zeros for the channels that are missing."""

    def __init__(self, num_missing: int, *, stride: int) -> None:
        super().__init__()
        self.num_missing = num_missing
        self.stride = stride

    def forward(self, inputs: Tensor) -> Tensor:
        """Return ``inputs`` with fewer pixels and more channels; there is nothing to learn."""
        strided = inputs[:, :, :: self.stride, :: self.stride]
        return F.pad(strided, (0, 0, 0, 0, 0, self.num_missing))


def _shortcut(kind: Shortcut, in_channels: int, out_channels: int, *, stride: int) -> nn.Module:
    if in_channels == out_channels and stride == 1:
        return nn.Identity()
    if kind == "pad":
        return PadShortcut(out_channels - in_channels, stride=stride)
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, kernel_size=1, stride=stride, bias=False),
        nn.BatchNorm2d(out_channels),
    )


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut."""

    expansion: ClassVar[int] = 1

    def __init__(self, in_channels: int, width: int, *, stride: int, shortcut: Shortcut) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 3, stride=stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        self.shortcut = _shortcut(shortcut, in_channels, width, stride=stride)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return relu(branch + shortcut)."""
        y = F.relu(self.norm1(self.conv1(inputs)))
        y = self.norm2(self.conv2(y))
        return F.relu(y + self.shortcut(inputs))


class Bottleneck(nn.Module):
    """1x1, 3x3 (which carries the stride) and 1x1 convolutions beside a shortcut."""

    expansion: ClassVar[int] = 4

    def __init__(self, in_channels: int, width: int, *, stride: int, shortcut: Shortcut) -> None:
        super().__init__()
        out_channels = width * self.expansion
        self.conv1 = nn.Conv2d(in_channels, width, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride=stride, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, out_channels, 1, bias=False)
        self.norm3 = nn.BatchNorm2d(out_channels)
        self.shortcut = _shortcut(shortcut, in_channels, out_channels, stride=stride)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return relu(branch + shortcut)."""
        y = F.relu(self.norm1(self.conv1(inputs)))
        y = F.relu(self.norm2(self.conv2(y)))
        y = self.norm3(self.conv3(y))
        return F.relu(y + self.shortcut(inputs))


Block = type[BasicBlock] | type[Bottleneck]


class ResNet(nn.Module):
    """A convolution, stages of ``num_blocks`` residual blocks, averaging, a linear layer.

    With :class:`BasicBlock` this is He et al.'s CIFAR net of depth 6n + 2: n = 3, 5, 8, 9 are
    ResNet-20, -32, -50, -56. With :class:`Bottleneck` and n = 9 it is the "ResNet-56" of the
    DessiLBI authors, whose code takes n = (56 - 2) / 6 and then switches to bottleneck blocks. Its
    depth is 83, not 56: 82 convolutions in a row and the linear layer; the three projections stand
    beside. With :class:`BasicBlock`, n = 2 and the widths ``WIDE`` it is ResNet-18 as it is
    commonly used on CIFAR: a 3x3 convolution and no pooling where ImageNet's has 7x7 and pooling.

    Convolutions start from He's normal distribution (``fan_out``), batch norms from the identity.

    Args:
        block: The kind of residual block.
        num_blocks: n, blocks per stage.
        widths: Filters of the 3x3 convolutions of each stage; all but the first halve the image.
        num_classes: Width of the output.
        in_channels: Channels of the images, whose height and width are free.
        stride: Of the first convolution; 2 makes the whole net about four times as quick.
        shortcut: What joins two shapes: "projection" (option B: 1x1 convolution and batch norm, as
            in the authors' code) or "pad" (option A: zeros, no parameters, He et al. on CIFAR).

    Raises:
        ValueError: ``num_blocks`` or ``in_channels`` is below 1, or ``shortcut`` is unknown.

    >>> import torch
    >>> net = ResNet(BasicBlock, 1, num_classes=10, in_channels=3)
    >>> net(torch.zeros(2, 3, 32, 32)).shape
    torch.Size([2, 10])
    """

    def __init__(
        self,
        block: Block,
        num_blocks: int,
        *,
        widths: tuple[int, ...] = WIDTHS,
        num_classes: int = 10,
        in_channels: int = 3,
        stride: int = 1,
        shortcut: Shortcut = "projection",
    ) -> None:
        super().__init__()
        _check(num_blocks, in_channels, shortcut)
        self.conv1 = nn.Conv2d(in_channels, widths[0], 3, stride=stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(widths[0])
        channels = widths[0]
        self.num_stages = len(widths)
        for number, width in enumerate(widths, start=1):
            step = 1 if number == 1 else 2
            stage = _stage(block, num_blocks, channels, width, stride=step, shortcut=shortcut)
            self.add_module(f"stage{number}", stage)
            channels = width * block.expansion
        self.fc = nn.Linear(channels, num_classes)
        for module in self.modules():
            self.initialise(module)

    @staticmethod
    def initialise(module: nn.Module) -> None:
        """Draw the weights of a convolution; other layers keep what they drew themselves."""
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the logits (N, classes) of images (N, C, H, W)."""
        y = F.relu(self.norm1(self.conv1(inputs)))
        for number in range(1, self.num_stages + 1):
            y = self.get_submodule(f"stage{number}")(y)
        # The plain mean has a deterministic backward on every device; adaptive pooling has not.
        logits: Tensor = self.fc(y.mean(dim=(2, 3)))
        return logits


def _stage(
    block: Block,
    num_blocks: int,
    in_channels: int,
    width: int,
    *,
    stride: int,
    shortcut: Shortcut,
) -> nn.Sequential:
    first = block(in_channels, width, stride=stride, shortcut=shortcut)
    channels = width * block.expansion
    others = (block(channels, width, stride=1, shortcut=shortcut) for _ in range(1, num_blocks))
    return nn.Sequential(first, *others)


def _check(num_blocks: int, in_channels: int, shortcut: str) -> None:
    if num_blocks < 1:
        raise ValueError(f"a ResNet of {num_blocks} blocks per stage is not one: give 1 or more")
    if in_channels < 1:
        raise ValueError(
            f"a ResNet reads images of 1 or more channels, not of {in_channels}: "
            f"give in_channels >= 1"
        )
    if shortcut not in ("projection", "pad"):
        raise ValueError(f"shortcut {shortcut!r} is unknown: use 'projection' or 'pad'")
