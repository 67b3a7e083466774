# SPDX-License-Identifier: Apache-2.0
"""Models of torchvision and timm by name, always freshly initialised."""

import importlib
import inspect
from difflib import get_close_matches
from types import ModuleType
from typing import Any

from torch import nn

LIBRARIES = ("torchvision", "timm")
# These two add a second output in training mode, and a warning about their initialisation.
_AUXILIARY = ("googlenet", "inception_v3")


def build_from_library(
    library: str, name: str, *, num_classes: int, in_channels: int, side: int | None
) -> nn.Module:
    """Return a model for images, without pretrained weights.

    Args:
        library: "torchvision" or "timm".
        name: What the library calls the model.
        num_classes: Width of the output.
        in_channels: Channels of the images; torchvision's models read 3.
        side: Pixels of a side of them, for models that have to know.

    Raises:
        ValueError: The library has no such model, or it does not fit.
        ImportError: The library is not installed.
    """
    try:
        package = importlib.import_module(library)
    except ImportError as error:
        raise ImportError(
            f"model {library}:{name} needs {library}, which is not installed: "
            f"pip install 'dessilbi[vision]'"
        ) from error
    if library == "timm":
        return _from_timm(package, name, num_classes, in_channels, side)
    return _from_torchvision(package, name, num_classes, in_channels)


def _from_torchvision(package: ModuleType, name: str, classes: int, channels: int) -> nn.Module:
    models = package.models
    _check_known(name, models.list_models(module=models), "torchvision")
    if channels != 3:
        raise ValueError(
            f"torchvision:{name} reads images of 3 channels, not of {channels}: "
            f"choose another model for this data"
        )
    auxiliary = {"aux_logits": False, "init_weights": True} if name in _AUXILIARY else {}
    model: nn.Module = models.get_model(name, weights=None, num_classes=classes, **auxiliary)
    return model


def _from_timm(
    package: ModuleType, name: str, classes: int, channels: int, side: int | None
) -> nn.Module:
    _check_known(name, package.list_models(), "timm")
    options: dict[str, Any] = {"num_classes": classes, "in_chans": channels}
    if side is not None and _asks_for_size(package, name):
        options["img_size"] = side
    model: nn.Module = package.create_model(name, pretrained=False, **options)
    return model


def _asks_for_size(package: ModuleType, name: str) -> bool:
    """Whether the model's class has an image size among its arguments (vision transformers)."""
    entry = package.model_entrypoint(name)
    returned = inspect.signature(entry, eval_str=True).return_annotation
    return inspect.isclass(returned) and "img_size" in inspect.signature(returned).parameters


def _check_known(name: str, known: list[str], library: str) -> None:
    if name not in known:
        close = get_close_matches(name, known, n=3)
        meant = f": did you mean {', '.join(close)}?" if close else f" among its {len(known)}"
        raise ValueError(f"{library} has no model {name!r}{meant}")
