# SPDX-License-Identifier: Apache-2.0
"""Planting: a copy of a model with other widths, and the values of what is new in it."""

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dessilbi.blocks.naming import tensor_names, unwrap
from dessilbi.compaction.blueprint import tensors_of
from dessilbi.compaction.certifying import outputs, probes_of
from dessilbi.cuts.cutting import cut_module
from dessilbi.graph import read_graph
from dessilbi.graph.program import ExampleInputs
from dessilbi.growth.widening import Change, Sizes, find_change

Init = Callable[[nn.Module], object]


@dataclass(frozen=True)
class Plant:
    """Where values of new entries come from.

    ``init`` is called with a copy of each layer that changes, after its own ``reset_parameters``;
    ``fresh`` also draws the weights that read new blocks; ``seed`` decides all these values alone.
    """

    fresh: bool
    init: Init | None
    seed: int | None


def built(model: nn.Module, change: Change, plant: Plant) -> nn.Module:
    """Return a copy of a model with its tensors widened and values for what is new."""
    values = {name: tensor.clone() for name, tensor in tensors_of(model).items()}
    wide = cut_module(model, change.cuts, values)
    _set_groups(model, wide)
    tensors = tensors_of(wide)
    done: set[str] = set()
    with torch.no_grad(), _drawing(plant.seed):
        for layer, own in _layers(wide, change.born).items():
            drawn = _drawn(layer, plant.init)
            for key, name in own.items():
                if name not in done:
                    done.add(name)
                    _fill(tensors[name], drawn.get(key), name, change, fresh=plant.fresh)
    return wide


def _set_groups(model: nn.Module, wide: nn.Module) -> None:
    """A depthwise convolution has as many groups as channels."""
    for before, after in zip(model.modules(), wide.modules(), strict=True):
        if (
            isinstance(before, nn.modules.conv._ConvNd)
            and isinstance(after, nn.modules.conv._ConvNd)
            and before.groups == before.in_channels > 1
        ):
            times = before.out_channels // before.groups
            after.groups = before.groups * after.weight.shape[0] // before.weight.shape[0]
            after.in_channels, after.out_channels = after.groups, after.groups * times


def _layers(model: nn.Module, names: Iterable[str]) -> dict[nn.Module, dict[str, str]]:
    """Return the modules that own tensors of these names: module -> own key -> name."""
    wanted, canonical = set(names), tensor_names(model)
    found: dict[nn.Module, dict[str, str]] = {}
    for prefix, module in model.named_modules():
        for key in (*module._parameters, *module._buffers):
            name = canonical.get(f"{prefix}.{key}" if prefix else key)
            if name in wanted:
                found.setdefault(module, {})[key] = name
    return found


def _drawn(layer: nn.Module, init: Init | None) -> dict[str, Tensor]:
    """Return tensors of a layer as a fresh one has them; none where it cannot make any."""
    fresh = copy.deepcopy(layer).cpu()  # drawn there, so that every device sees the same
    if not _reset(fresh, init):
        return {}
    return {**fresh._parameters, **fresh._buffers}  # type: ignore[dict-item]


def _reset(layer: nn.Module, init: Init | None) -> bool:
    """Initialise a layer again; whether anything could."""
    own = getattr(layer, "reset_parameters", None) or getattr(layer, "_reset_parameters", None)
    if own is not None:
        own()
    if init is not None:
        init(layer)
    return own is not None or init is not None


def _fill(tensor: Tensor, drawn: Tensor | None, name: str, change: Change, *, fresh: bool) -> None:
    """Write values for what is new; where none can be drawn, new blocks stay copies of others."""
    rows, columns = change.rows.get(name), change.columns.get(name)
    if columns is not None:
        tensor.masked_fill_(columns.to(tensor.device), 0)
    wanted = change.born[name] if fresh else rows
    if drawn is not None and wanted is not None:
        tensor.copy_(torch.where(wanted.to(tensor.device), drawn.to(tensor), tensor))


@contextmanager
def _drawing(seed: int | None) -> Iterator[None]:
    """Draw numbers from a seed of one's own, or as they come."""
    if seed is None:
        yield
        return
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(seed)
        yield


def resized(
    model: nn.Module,
    sizes: Sizes,
    *,
    example_inputs: ExampleInputs,
    init: Init | None = None,
    seed: int | None = None,
) -> nn.Module:
    """Return a model of the same kind with other widths, freshly initialised throughout.

    Args:
        model: The model; it is not changed.
        sizes: Unit, layer or parameter -> width, smaller or larger.
        example_inputs: As for :func:`grow`.
        init: Called with each module, children first, after its own ``reset_parameters``.
        seed: As for :func:`grow`.

    Raises:
        ValueError: As :func:`grow`.
    """
    model = unwrap(model)
    graph = read_graph(model, example_inputs)
    change = find_change(graph, sizes, narrower=True)
    other = built(model, change, Plant(fresh=True, init=init, seed=seed))
    with _drawing(seed):
        for layer in _layers(other, change.cuts):
            _reset(layer, init)
    try:
        outputs(other, probes_of(example_inputs)[:1])
    except (RuntimeError, TypeError, LookupError) as error:
        raise stiff(model, change, error) from None
    return other


def stiff(model: nn.Module, change: Change, error: Exception) -> ValueError:
    """Return what to say of a forward that breaks once widths change."""
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return ValueError(
        f"the forward of {type(model).__name__} does not follow new widths ({reason}): compute "
        f"sizes from the weights, or leave {', '.join(change.widths)} as it is"
    )
