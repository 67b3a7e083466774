# SPDX-License-Identifier: Apache-2.0
"""Registry: models that a file may name, built without weights from plain options.

A name is looked up in lists of known models; it is never imported, fetched or executed.
"""

import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from dessilbi.growth.planting import resized
from dessilbi.models import MODELS, build_model

WIDTHS = "widths"  # of a network that has grown, as "conv1.weight=7 conv2.weight=12"
OPTIONS = frozenset(
    {"num_classes", "in_channels", "in_chans", "img_size", "image_size", "patch_size", "stride"}
    | {"side", "length", WIDTHS}
    | {"width_mult", "global_pool", "drop_rate", "drop_path_rate", "dropout", "shortcut"}
    | {"aux_logits", "init_weights", "transform_input"}
)
LARGEST = 1 << 16  # of a whole number among the options
_NAME = re.compile(
    r"(dessilbi|torchvision|timm):((?:(?<=dessilbi:)(?:torchvision|timm):)?[A-Za-z0-9][A-Za-z0-9_.\-]{0,99})"
)

Options = Mapping[str, bool | int | float | str]


def build_registered(name: str, options: Options) -> nn.Module:
    """Return a fresh model by name; global random state is left as it was.

    Args:
        name: ``"dessilbi:lenet"``, ``"torchvision:resnet18"``, ``"timm:resnet18d"``, or, as
            recipes build a library's model, ``"dessilbi:timm:resnet18d"``.
        options: Plain keyword arguments, such as num_classes.

    Raises:
        ValueError: The name or an option is not known, or the model does not take it.
        ImportError: The library is not installed.

    >>> build_registered("dessilbi:lenet", {"num_classes": 3}).fc2
    Linear(in_features=84, out_features=3, bias=True)
    """
    library, model = check_registered(name, options)
    build = _BUILDERS[library]
    try:
        with torch.random.fork_rng(devices=[]):
            return build(model, dict(options))
    except (TypeError, RuntimeError, AssertionError, LookupError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{name} cannot be built with {dict(options)}: {reason}") from None


def check_registered(name: str, options: Options) -> tuple[str, str]:
    """Return library and model of a name, after checking it and the options.

    Raises:
        ValueError: They are not allowed.
    """
    found = _NAME.fullmatch(name)
    if found is None:
        raise ValueError(
            f"{name!r} is not a registered model: use dessilbi:NAME, torchvision:NAME or timm:NAME"
        )
    for key, value in options.items():
        if key not in OPTIONS:
            raise ValueError(
                f"the option {key!r} of {name} is not allowed (weights are never fetched): use "
                f"{', '.join(sorted(OPTIONS))}"
            )
        if isinstance(value, str) and len(value) > (LARGEST if key == WIDTHS else 64):
            raise ValueError(f"the option {key!r} of {name} is {len(value)} characters long")
        if not isinstance(value, bool | int | float | str) or (
            not isinstance(value, str) and not 0 <= value <= LARGEST
        ):
            raise ValueError(
                f"the option {key}={value!r} of {name} is not allowed: give a word or a number "
                f"from 0 to {LARGEST:,}"
            )
    return found[1], found[2]


def _dessilbi(name: str, options: dict[str, Any]) -> nn.Module:
    if WIDTHS not in options:
        return _own(name, options)
    widths = {}
    for part in str(options.pop(WIDTHS)).split():
        unit, _, width = part.rpartition("=")
        if not unit or not width.isdecimal() or not 0 < int(width) <= LARGEST:
            raise ValueError(f"the width {part!r} of {name} is not allowed: give LAYER=NUMBER")
        widths[unit] = int(width)
    side = options.get("side", 32) if ":" in name else options.pop("side", 32)
    example = (
        torch.zeros(2, options["length"], dtype=torch.int64)
        if "length" in options
        else torch.zeros(2, options.get("in_channels", 3), side, side)
    )
    return resized(_own(name, options), widths, example_inputs=example, seed=0)


def _own(name: str, options: dict[str, Any]) -> nn.Module:
    if ":" in name:  # a library's model as recipes build it, fitted to the data
        return build_model(name, **options)
    if name not in MODELS:
        raise ValueError(f"dessilbi has no model {name!r}: it has {', '.join(MODELS)}")
    return MODELS[name](**options)


def _torchvision(name: str, options: dict[str, Any]) -> nn.Module:
    try:
        from torchvision import models
    except ImportError:
        raise ImportError(
            f"torchvision:{name} needs torchvision, which is not installed: "
            f"pip install 'dessilbi[vision]'"
        ) from None
    if name not in models.list_models():
        raise ValueError(f"torchvision has no model {name!r}; see torchvision.models.list_models()")
    taken = inspect.signature(models.get_model_builder(name)).parameters
    # A segmentation or detection model would fetch its backbone's weights by itself.
    without = {key: None for key in ("weights", "weights_backbone") if key in taken}
    model: nn.Module = models.get_model(name, **without, **options)
    return model


def _timm(name: str, options: dict[str, Any]) -> nn.Module:
    try:
        import timm
    except ImportError:
        raise ImportError(
            f"timm:{name} needs timm, which is not installed: pip install 'dessilbi[vision]'"
        ) from None
    if not timm.is_model(name):
        raise ValueError(f"timm has no model {name!r}; see timm.list_models()")
    model: nn.Module = timm.create_model(name, pretrained=False, **options)
    return model


_BUILDERS: dict[str, Callable[[str, dict[str, Any]], nn.Module]] = {
    "dessilbi": _dessilbi,
    "torchvision": _torchvision,
    "timm": _timm,
}
