# SPDX-License-Identifier: Apache-2.0
"""Ingredients: the data, the model and the param groups that a recipe names."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dessilbi.graph import read_graph
from dessilbi.groups import param_groups
from dessilbi.growth.growth import macs_of
from dessilbi.growth.planting import Init, resized
from dessilbi.models import build_model
from dessilbi.training.data import Data, load_data
from dessilbi.training.growth_table import GrowRecipe
from dessilbi.training.recipes import Recipe, RecipeError
from dessilbi.training.widths import check_caps, start_of


def data_of(recipe: Recipe, *, root: str | Path | None, download: bool = False) -> Data:
    """Load the data of a recipe; see :func:`~dessilbi.training.data.load_data`.

    Raises:
        RecipeError: The data set is unknown, or the recipe's values do not fit it.
        ValueError: A file is damaged, or no folder is given.
        FileNotFoundError: Files are missing and ``download`` is False.
        ImportError: A package is missing.
        OSError: The download failed.
    """
    try:
        return load_data(
            recipe.data,
            root=root,
            validation=recipe.validation,
            seed=recipe.seed,
            download=download,
            normalise=recipe.normalise,
            augment=recipe.augment,
            image_size=recipe.image_size,
            length=recipe.length,
            workers=recipe.workers,
        )
    except RecipeError as error:
        raise RecipeError(f"recipe {recipe.name}: {error}") from None


def model_of(recipe: Recipe, data: Data, *, sizes: Mapping[str, int] | None = None) -> nn.Module:
    """Build the model of a recipe, initialised from its seed, on the CPU, in train mode.

    Args:
        recipe: One that grows gives the model it starts with.
        data: Its data.
        sizes: Unit -> width, for the model that a run has grown to.

    Raises:
        RecipeError: The name is unknown, the model does not fit the data, or widths do not fit it.
        ImportError: The package of the model is missing.
    """
    try:
        model = build_model(
            recipe.model,
            num_classes=data.num_classes,
            in_channels=data.in_channels,
            side=data.side,
            length=data.length,
            seed=recipe.seed,
        )
        _try(model, data)
        if recipe.grow is not None:
            model = _at_sizes(recipe, recipe.grow, model, data, sizes)
    except ValueError as error:
        raise RecipeError(f"recipe {recipe.name}: {error}") from None
    return model


def _at_sizes(
    recipe: Recipe,
    options: GrowRecipe,
    model: nn.Module,
    data: Data,
    sizes: Mapping[str, int] | None,
) -> nn.Module:
    example = data.blank(2)
    widths = start_of(read_graph(model, example), options) if sizes is None else sizes
    init = init_of(model)
    model = resized(model, widths, example_inputs=example, init=init, seed=recipe.seed)
    if sizes is None:
        params = sum(p.numel() for p in model.parameters())
        check_caps(options, params, macs_of(model, ((example,), {})))
    return model.train()


def init_of(model: nn.Module) -> Init | None:
    """Return how a model draws values for a layer, where that is not the layer's own way."""
    found: Init | None = getattr(type(model), "initialise", None)
    return found


@torch.no_grad()
def _try(model: nn.Module, data: Data) -> None:
    """Read one empty sample: a model of foreign size is found out before anything is written.

    Raises:
        ValueError: The model does not read it.
    """
    blank = data.blank()
    training = model.training
    try:
        model.eval()(blank)
    except (RuntimeError, AssertionError, ValueError, IndexError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"the model does not read samples of shape {tuple(blank.shape[1:])} ({reason}): "
            f"choose another model for this data, or another image_size"
        ) from None
    finally:
        model.train(training)


def groups_of(recipe: Recipe, model: nn.Module, data: Data) -> list[dict[str, Any]]:
    """Return the param groups of a recipe, its rules and its ``lam_filter`` applied.

    Raises:
        ValueError: A rule does not fit the model; see :func:`~dessilbi.groups.param_groups`.
    """
    examples = data.blank(2) if recipe.coupled else None
    groups = param_groups(model, recipe.structure, example_inputs=examples)
    if recipe.optimizer.lam_filter is not None:
        for group in groups:
            if "unit" in group or group["structure"] in ("filter", "channel"):
                group.setdefault("lam", recipe.optimizer.lam_filter)
    return groups
