# SPDX-License-Identifier: Apache-2.0
"""Blueprint: what turns a fresh model into the small one, as a plain value.

Kept indices of every tensor, biases that folding added, sizes held by attributes. The same cut can
so be made again on a model that was just built, by its own code and before any weight is loaded.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn

from dessilbi.blocks.naming import tensor_names
from dessilbi.compaction.adapting import Resized
from dessilbi.compaction.guarding import guard
from dessilbi.compaction.rewriting import rewrite
from dessilbi.cuts.cutting import Cut, Cuts, cut_module, find_cuts
from dessilbi.graph import Graph, read_graph
from dessilbi.graph.foreign import is_conv1d
from dessilbi.graph.inputs import Input, draw

Form = Literal["module", "sized module", "program"]
FORMS: tuple[Form, ...] = get_args(Form)
_WITH_BIAS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class Size:
    """An attribute of a module that holds a size: its old and its new value."""

    module: str
    attribute: str
    old: int
    new: int


@dataclass(frozen=True)
class Blueprint:
    """How a fresh model becomes the small one.

    Args:
        form: ``"module"`` (tensors and layers are cut), ``"sized module"`` (attributes as well)
            or ``"program"`` (the exported operations are rewritten).
        cuts: What stays of every tensor.
        biases: Biases the model did not have, into which constants were folded.
        sizes: Attributes that change, for a sized module.
        folded: Whether constants moved between weights, which rounds them to the model's type.
    """

    form: Form
    cuts: Cuts
    biases: tuple[str, ...] = ()
    sizes: tuple[Size, ...] = ()
    folded: bool = False

    def then(self, later: "Blueprint") -> "Blueprint":
        """Return this cut and a later one, of the model that this one makes, as a single cut.

        Raises:
            ValueError: One of them is of a program, whose later cuts are of another.

        >>> one = Blueprint("module", {"w": (Cut("w", 0, 4, np.array([0, 2, 3])),)})
        >>> two = Blueprint("module", {"w": (Cut("w", 0, 3, np.array([1, 2])),)})
        >>> one.then(two).cuts["w"][0].index.tolist()
        [2, 3]
        """
        if "program" in (self.form, later.form):
            raise ValueError(
                "a model that was compacted as an exported program cannot be cut once more: "
                "cut the model it came from"
            )
        names = [*self.cuts, *(name for name in later.cuts if name not in self.cuts)]
        cuts = {name: _both(self.cuts.get(name, ()), later.cuts.get(name, ())) for name in names}
        sizes = {(size.module, size.attribute): size for size in self.sizes}
        for size in later.sizes:
            key = (size.module, size.attribute)
            sizes[key] = Size(*key, sizes[key].old if key in sizes else size.old, size.new)
        return Blueprint(
            "sized module" if sizes else "module",
            cuts,
            tuple(dict.fromkeys((*self.biases, *later.biases))),
            tuple(sizes.values()),
            self.folded or later.folded,
        )


def _both(first: tuple[Cut, ...], second: tuple[Cut, ...]) -> tuple[Cut, ...]:
    """Two cuts of one tensor, one after the other."""
    cuts = {cut.dim: cut for cut in first}
    for cut in second:
        before = cuts.get(cut.dim)
        index = cut.index if before is None else before.index[cut.index]
        cuts[cut.dim] = replace(cut if before is None else before, index=index)
    return tuple(cuts[dim] for dim in sorted(cuts))


class OtherModelError(ValueError):
    """A fresh model is not the one that was compacted."""

    def __init__(self, detail: str):
        super().__init__(
            f"the factory makes another model than the one that was compacted ({detail}): "
            f"give the factory of that model, with the same arguments"
        )


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Return parameters and buffers by canonical name, shared ones once."""
    named, canonical = (*model.named_parameters(), *model.named_buffers()), tensor_names(model)
    return {canonical[name]: tensor.detach() for name, tensor in named}


def find_sizes(model: nn.Module, resized: Iterable[Resized]) -> tuple[Size, ...]:
    """Return the attributes that equal an old size, where the program changed."""
    found = []
    for change in resized:
        module = model.get_submodule(change.module)
        if is_conv1d(module):  # its sizes are those of its weight, as cut_module has set them
            continue
        for key, value in vars(module).items():
            if type(value) is int and value == change.old and not key.startswith("_"):
                found.append(Size(change.module, key, change.old, change.new))
    return tuple(dict.fromkeys(found))


def set_sizes(model: nn.Module, sizes: Sequence[Size]) -> nn.Module:
    """Write new sizes into attributes, in place; they must hold the old ones.

    Raises:
        OtherModelError: An attribute does not.
    """
    before: dict[tuple[str, str], Any] = {}
    for size in sizes:
        module = dict(model.named_modules()).get(size.module)
        key = (size.module, size.attribute)
        held = before.setdefault(key, None if module is None else vars(module).get(size.attribute))
        if module is None or type(held) is not int or held != size.old:
            where = ".".join(part for part in key if part)
            raise OtherModelError(f"{where} is {held}, not {size.old}")
        setattr(module, size.attribute, size.new)
    return model


def rebuild(model: nn.Module, blueprint: Blueprint, inputs: Sequence[Input]) -> nn.Module:
    """Return a small model with the values of ``model``, which stays as it is.

    Args:
        model: A fresh model of the kind that was compacted.
        blueprint: What stays of it.
        inputs: What forward takes; only looked at for the form ``"program"``.

    Raises:
        OtherModelError: The blueprint is not of this model.
        ValueError: The program cannot be read or rewritten.
    """
    tensors = tensors_of(model)
    added = {name: _zero_bias(model, name, tensors) for name in blueprint.biases}
    _check(blueprint.cuts, {**tensors, **added})
    if blueprint.form == "program":
        return _rewritten(model, blueprint, {**tensors, **added}, inputs)
    # The values are copied: tensors that stay whole would be shared with the fresh model.
    fresh = {name: tensor.clone() for name, tensor in {**tensors, **added}.items()}
    return set_sizes(cut_module(model, blueprint.cuts, fresh), blueprint.sizes)


def _zero_bias(model: nn.Module, name: str, tensors: Mapping[str, Tensor]) -> Tensor:
    owner = dict(model.named_modules()).get(name.rpartition(".")[0])
    if not isinstance(owner, _WITH_BIAS) or name in tensors or not name.endswith("bias"):
        raise OtherModelError(f"{name} cannot be added")
    weight = owner.weight
    return torch.zeros(weight.shape[0], dtype=weight.dtype, device=weight.device)


def _check(cuts: Cuts, tensors: Mapping[str, Tensor]) -> None:
    """Compare names and sizes before anything is cut."""
    for name, own in cuts.items():
        if name not in tensors:
            raise OtherModelError(f"it has no {name}")
        shape = tuple(tensors[name].shape)
        for cut in own:
            size = shape[cut.dim] * cut.groups if cut.dim < len(shape) else None
            if size != cut.size:
                raise OtherModelError(
                    f"dimension {cut.dim} of {name} is {size or 'missing'}, not {cut.size}"
                )


def _rewritten(
    model: nn.Module, blueprint: Blueprint, tensors: Mapping[str, Tensor], inputs: Sequence[Input]
) -> nn.Module:
    args, kwargs = draw(inputs, 1)[0]
    graph = read_graph(model, args or kwargs)
    gone = _gone(graph, blueprint.cuts)
    found = find_cuts(graph, gone)
    wanted = {name: own for name, own in blueprint.cuts.items() if name not in blueprint.biases}
    if _listed(found) != _listed(wanted):
        raise OtherModelError("its tensors hang together in another way")
    return guard(rewrite(graph, gone, blueprint.cuts, tensors).module)


def _gone(graph: Graph, cuts: Cuts) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Return the blocks that are missing from what stays."""
    gone = np.zeros(graph.num_blocks, bool)
    for axis, blocks in graph.axes.items():
        for cut in cuts.get(axis.name, ()):
            if (cut.dim, cut.size) == (axis.dim, axis.size):
                lost = np.delete(blocks, cut.index)
                gone[lost[lost >= 0]] = True
    return gone


def _listed(cuts: Mapping[str, tuple[Cut, ...]]) -> set[tuple[str, int, int, int, bytes]]:
    return {
        (cut.name, cut.dim, cut.size, cut.groups, np.asarray(cut.index, np.int64).tobytes())
        for own in cuts.values()
        for cut in own
    }
