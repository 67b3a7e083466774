# SPDX-License-Identifier: Apache-2.0
"""Filters: what the filters of a run's layer look for, in the order in which they entered."""

from dataclasses import dataclass
from pathlib import Path as FilePath
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from dessilbi.blocks.structure import expand
from dessilbi.files.runs import Run
from dessilbi.maximising import layer_of, listed, maximise, num_filters
from dessilbi.outcomes.tickets import Drawer
from dessilbi.path.history import NEVER
from dessilbi.path.path import Path

Kind = Literal["maximised", "weights"]
MOST = 256  # images of one figure, unless more are asked for


@dataclass(frozen=True, eq=False)
class Filter:
    """One filter or neuron.

    Attributes:
        index: Its place in the layer.
        step: Of the point at which it was first seen in Gamma; None: it never was.
        epoch: Likewise; None also where the path does not tell its epochs.
        stays: Whether it was in Gamma at the end.
        before: Its mean activation on the noise that the ascent started from; None for weights.
        after: ... and on its image.
        image: (channels, ...): the input that excites it most, or its weights.
    """

    index: int
    step: int | None
    epoch: float | None
    stays: bool
    before: float | None
    after: float | None
    image: Tensor

    def to_json(self) -> dict[str, Any]:
        """Return plain values, all but the image."""
        return {name: value for name, value in vars(self).items() if name != "image"}


@dataclass(frozen=True, eq=False)
class Filters:
    """The filters of a layer: those that entered Gamma by first entry, then those that never did.

    Ties are broken by the norm of the weights, larger first. ``total`` and ``total_entered`` count
    all of the layer, also those left out of ``filters``. ``reads_input``: the layer reads the input
    itself, so that its kernels can be shown.
    """

    run: FilePath
    recipe: str
    layer: str
    kind: Kind
    filters: tuple[Filter, ...]
    total: int
    total_entered: int
    reads_input: bool

    @property
    def entered(self) -> tuple[Filter, ...]:
        """Those that entered, in that order."""
        return tuple(each for each in self.filters if each.step is not None)

    @property
    def never(self) -> tuple[Filter, ...]:
        """Those that never did."""
        return tuple(each for each in self.filters if each.step is None)

    def to_json(self) -> dict[str, Any]:
        """Return plain values, all but the images."""
        return {
            "run": str(self.run),
            "layer": self.layer,
            "kind": self.kind,
            "total": self.total,
            "entered": self.total_entered,
            "filters": [each.to_json() for each in self.filters],
        }


def filters_of(
    folder: str | FilePath,
    layer: str,
    *,
    weights: bool = False,
    most: int = MOST,
    seed: int = 0,
    steps: int = 128,
    data_root: str | None = None,
) -> Filters:
    """Look at the filters of a finished run: its final W, in the order of first entry into Gamma.

    Args:
        folder: The run folder.
        layer: Name of a convolution or linear layer; that of its weight will do.
        weights: Take the kernels themselves as images, instead of what they look for.
        most: At most so many filters: first those that entered first.
        seed: See :func:`~dessilbi.maximising.maximise`.
        steps: Likewise.
        data_root: Folder of the data sets; without the data only its shape is made up.

    Raises:
        FileNotFoundError: The folder is no run, or the run has not finished.
        ValueError: The layer is unknown or has no blocks, nothing was recorded, the input is a
            text, the kernels are no images, or a file is damaged.
    """
    drawer = Drawer(Run(FilePath(folder)), data_root=data_root)
    run, path, model = drawer.run, drawer.path, drawer.model
    if not run.model.is_file():
        raise FileNotFoundError(f"{run.folder} has no {run.model.name}: let the run finish")
    if drawer.data.length is not None:
        raise ValueError(
            f"{run.folder} was trained on a text, whose characters cannot change gradually: "
            f"filters are shown of models of images"
        )
    layer = layer if layer in dict(model.named_modules()) else layer.removesuffix(".weight")
    module, name = layer_of(model, layer), f"{layer}.weight"
    _check_recorded(path, run, name)
    weight = module.get_parameter("weight").detach()
    order, steps_of, stays = _in_order(path, name, module, weight)
    chosen = order[: max(1, most)]
    sample = drawer.example[:1]
    before: list[float] | None = None
    if weights:
        images = _kernels(module, weight, sample, layer)[torch.from_numpy(chosen.copy())]
    else:
        found = maximise(
            model, layer, example_inputs=sample, filters=chosen.tolist(), steps=steps, seed=seed
        )
        images, before, after = found.images, found.before.tolist(), found.after.tolist()
    filters = tuple(
        Filter(
            index=int(i),
            step=None if steps_of[i] == NEVER else int(steps_of[i]),
            epoch=_epoch(path, int(steps_of[i])),
            stays=bool(stays[i]),
            before=None if before is None else before[k],
            after=None if before is None else after[k],
            image=images[k],
        )
        for k, i in enumerate(chosen)
    )
    return Filters(
        run=run.folder,
        recipe=drawer.recipe.name,
        layer=layer,
        kind="weights" if weights else "maximised",
        filters=filters,
        total=len(order),
        total_entered=int((steps_of != NEVER).sum()),
        reads_input=_reads_input(module, sample),
    )


def _check_recorded(path: Path, run: Run, name: str) -> None:
    if not path.points:
        raise ValueError(
            f"{run.folder} has no recorded points, so nothing is known of Gamma: let the run go on"
        )
    if name not in path.specs:
        known = [each.removesuffix(".weight") for each in path.specs]
        raise ValueError(
            f"{name.removesuffix('.weight')} has no blocks in the path of {run.folder}, it was "
            f"trained without a structure: name one of {listed(known)}"
        )


def _in_order(path: Path, name: str, module: nn.Module, weight: Tensor) -> tuple[Any, Any, Any]:
    """The filters by first entry, ties by norm; the step of each; whether each is in Gamma yet."""
    spec = path.specs[name]
    if spec.shape != tuple(weight.shape):
        raise ValueError(
            f"{name} has the shape {tuple(weight.shape)} in the weights of this run and "
            f"{spec.shape} in its path: restore the run folder from a copy"
        )
    late = torch.iinfo(torch.int64).max
    entry = path.entry()[name].to(torch.int64)
    entry = expand(entry.masked_fill(entry == NEVER, late), spec.block, spec.shape)
    first = _rows(entry, module).amin(1)
    stays = _rows(path.support(step=path.points[-1].step).mask_of(name), module).any(1)
    norms = _rows(weight, module).double().norm(dim=1)
    order = np.lexsort((-norms.numpy(), first.numpy()))
    return order, first.masked_fill(first == late, NEVER).numpy(), stays.numpy()


def _rows(values: Tensor, module: nn.Module) -> Tensor:
    """The elements of a weight, a row for each filter."""
    if not isinstance(module, nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d):
        return values.flatten(1)
    # (inputs, outputs / groups, ...): the outputs of a group belong to its inputs alone
    parts = values.reshape(module.groups, -1, *values.shape[1:])
    return parts.movedim(2, 1).reshape(num_filters(module), -1)


def _epoch(path: Path, step: int) -> float | None:
    """The epoch of a step, as the points tell it."""
    told = [(p.step, p.metrics["epoch"]) for p in path.points if p.metrics.get("epoch")]
    if step == NEVER or not told:
        return None
    steps, epochs = zip((0, 0.0), *told, strict=True)
    return float(np.interp(step, steps, epochs))


def _reads_input(module: nn.Module, sample: Tensor) -> bool:
    """Whether the weights of a layer have the form of the input, or of patches of it."""
    if isinstance(module, nn.Linear):
        return module.in_features == sample.numel()
    return module.get_parameter("weight").shape[1] == sample.shape[1]


def _kernels(module: nn.Module, weight: Tensor, sample: Tensor, layer: str) -> Tensor:
    """The weights of a layer as images.

    Raises:
        ValueError: They are none.
    """
    if not _reads_input(module, sample) or sample.dim() != 4:
        raise ValueError(
            f"the weights of {layer} are no images, for it does not read the input "
            f"{tuple(sample.shape[1:])} itself: name the first layer, or leave out --weights"
        )
    return weight.reshape(-1, *sample.shape[1:]) if isinstance(module, nn.Linear) else weight
