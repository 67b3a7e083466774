# SPDX-License-Identifier: Apache-2.0
"""Models by name: what recipes and the command line can train without the user's own code."""

from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from dessilbi.training.models.lenet import LeNet
from dessilbi.training.models.resnet import BasicBlock, Bottleneck, ResNet
from dessilbi.training.models.vgg import VGG16

__all__ = ["MODELS", "build_model"]

# Each factory takes num_classes and in_channels, by keyword.
MODELS: dict[str, Callable[..., nn.Module]] = {
    "lenet": LeNet,
    "resnet8": partial(ResNet, BasicBlock, 1),
    "resnet20": partial(ResNet, BasicBlock, 3),
    "resnet32": partial(ResNet, BasicBlock, 5),
    "resnet56": partial(ResNet, BasicBlock, 9),
    "resnet56-bottleneck": partial(ResNet, Bottleneck, 9),
    "vgg16-bn": VGG16,
}


def build_model(
    name: str, *, num_classes: int, in_channels: int, seed: int | None = None
) -> nn.Module:
    """Return a freshly initialised model, in train mode.

    Args:
        name: A key of ``MODELS``.
        num_classes: Width of the output, 2 or more.
        in_channels: Channels of the images.
        seed: Decides the initialisation alone: it is drawn on the CPU, and no global random state
            is read or moved. Without it, the initialisation is drawn as PyTorch always does.

    Raises:
        ValueError: The name is unknown, or the model does not fit ``num_classes`` or
            ``in_channels``.

    >>> net = build_model("lenet", num_classes=10, in_channels=1, seed=0)
    >>> sum(p.numel() for p in net.parameters())
    61706
    """
    if name not in MODELS:
        raise ValueError(f"model {name!r} is unknown: use one of {', '.join(MODELS)}")
    if num_classes < 2:
        raise ValueError(f"a model for {num_classes} classes has nothing to decide: give 2 or more")
    if seed is None:
        return MODELS[name](num_classes=num_classes, in_channels=in_channels)
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        # Not torch.manual_seed: it reseeds the accelerators' generators too, which are not forked.
        torch.default_generator.manual_seed(seed)
        return MODELS[name](num_classes=num_classes, in_channels=in_channels)
