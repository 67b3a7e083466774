# SPDX-License-Identifier: Apache-2.0
"""Models: what recipes, saved files and the command line may call by name."""

from collections.abc import Callable
from difflib import get_close_matches
from functools import partial

import torch
from torch import nn

from dessilbi.models.gpt import GPT
from dessilbi.models.lenet import LeNet
from dessilbi.models.libraries import LIBRARIES, build_from_library
from dessilbi.models.resnet import WIDE, BasicBlock, Bottleneck, ResNet
from dessilbi.models.vgg import VGG, VGG16, VGG19

__all__ = ["IMAGE_MODELS", "MODELS", "TEXT_MODELS", "build_model"]

# Each factory takes num_classes and in_channels, by keyword.
IMAGE_MODELS: dict[str, Callable[..., nn.Module]] = {
    "lenet": LeNet,
    "resnet8": partial(ResNet, BasicBlock, 1),
    "resnet8-small": partial(ResNet, BasicBlock, 1, stride=2),
    "resnet20": partial(ResNet, BasicBlock, 3),
    "resnet32": partial(ResNet, BasicBlock, 5),
    "resnet50": partial(ResNet, BasicBlock, 8),  # 6n + 2 layers; not the ImageNet net of that name
    "resnet56": partial(ResNet, BasicBlock, 9),
    "resnet56-bottleneck": partial(ResNet, Bottleneck, 9),
    "resnet18": partial(ResNet, BasicBlock, 2, widths=WIDE),
    "vgg16-bn": partial(VGG, VGG16),
    "vgg19-bn": partial(VGG, VGG19),
}
# Each takes num_classes and length.
TEXT_MODELS: dict[str, Callable[..., nn.Module]] = {"gpt": GPT}
MODELS = IMAGE_MODELS | TEXT_MODELS


def build_model(
    name: str,
    *,
    num_classes: int,
    in_channels: int | None = None,
    side: int | None = None,
    length: int | None = None,
    seed: int | None = None,
) -> nn.Module:
    """Return a freshly initialised model, in train mode.

    Args:
        name: A key of ``MODELS``, "torchvision:NAME" or "timm:NAME".
        num_classes: Width of the output, 2 or more.
        in_channels: Channels of the images; None where the data are no images.
        side: Pixels of a side of them, for models that have to know.
        length: Characters of a text sample; None where the data are no text.
        seed: Decides the initialisation alone: it is drawn on the CPU, and no global random state
            is read or moved. Without it, the initialisation is drawn as PyTorch always does.

    Raises:
        ValueError: The name is unknown, or the model does not fit the data.
        ImportError: The model's library is not installed.

    >>> net = build_model("lenet", num_classes=10, in_channels=1, seed=0)
    >>> sum(p.numel() for p in net.parameters())
    61706
    """
    factory = _factory(name, in_channels=in_channels, side=side, length=length)
    if num_classes < 2:
        raise ValueError(f"a model for {num_classes} classes has nothing to decide: give 2 or more")
    if seed is None:
        return factory(num_classes=num_classes)
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        # Not torch.manual_seed: it reseeds the accelerators' generators too, which are not forked.
        torch.default_generator.manual_seed(seed)
        return factory(num_classes=num_classes)


def _factory(
    name: str, *, in_channels: int | None, side: int | None, length: int | None
) -> Callable[..., nn.Module]:
    library, _, told = name.partition(":")
    if name not in MODELS and not (library in LIBRARIES and told):
        close = get_close_matches(name, MODELS, n=1)
        meant = f"; did you mean {close[0]}?" if close else ""
        raise ValueError(
            f"model={name!r} is not known: use one of {', '.join(MODELS)}, torchvision:NAME or "
            f"timm:NAME{meant}"
        )
    if name in TEXT_MODELS:
        if length is None:
            raise ValueError(f"model {name} reads text, and the data are images: choose another")
        return partial(TEXT_MODELS[name], length=length)
    if in_channels is None:
        raise ValueError(f"model {name} reads images, and the data are text: choose another")
    if name in IMAGE_MODELS:
        return partial(IMAGE_MODELS[name], in_channels=in_channels)
    return partial(build_from_library, library, told, in_channels=in_channels, side=side)
