# SPDX-License-Identifier: Apache-2.0
"""Reader: walks a program once and lets one small rule per operation say where labels go.

A rule is called with the reader and the operation's own arguments. Activations arrive as label
tensors, parameters as :class:`Weight`, everything that does not depend on the input as
:class:`Known`; it returns the labels of the result. Operations without a rule freeze what they
read: nothing that is not understood is ever removed.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from dessilbi.graph.labels import Axis, Ids, Labels, blank, small, tidy
from dessilbi.graph.program import Program, op_name

MAX_ELEMENTS = 1 << 20  # a weight used element by element gets a label per element up to here

Rule = Callable[..., Any]
RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Teach the reader operations by name: ``"relu"``, or ``"library::name"`` outside aten.

    The decorated function takes the reader and the operation's arguments and returns the labels of
    its result; raise nothing, call ``reader.labels.freeze`` where exactness is not certain.

    >>> @rule("mylib::twice")
    ... def twice(reader, x):
    ...     return x
    """

    def register(function: Rule) -> Rule:
        for name in names:
            RULES[name] = function
        return function

    return register


@dataclass(frozen=True)
class Weight:
    """A parameter of the model."""

    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Known:
    """A tensor that depends neither on the input nor on parameters; ``name`` if it is a buffer."""

    value: Tensor
    name: str | None = None


@dataclass(frozen=True)
class Constant:
    """A consumer whose dead columns hold a constant other than 0 when their unit is dead."""

    axis: Axis
    labels: Ids
    foldable: bool
    node: str


@dataclass(frozen=True)
class Even:
    """A grouped convolution: labels of inputs and outputs, one row per group."""

    name: str
    inputs: Ids
    outputs: Ids


@dataclass
class Reader:
    """What is collected while a program is read."""

    program: Program
    labels: Labels = field(default_factory=Labels)
    node: fx.Node | None = None
    values: dict[fx.Node, Any] = field(default_factory=dict)
    flat: list[tuple[Tensor, tuple[int, ...], str]] = field(default_factory=list)
    constants: list[Constant] = field(default_factory=list)
    evens: list[Even] = field(default_factory=list)
    macs: dict[str, int] = field(default_factory=dict)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    whole: set[str] = field(default_factory=set)
    batch: int = 1

    @property
    def where(self) -> str:
        """The current operation in words, for reasons."""
        assert self.node is not None
        stack = list((self.node.meta.get("nn_module_stack") or {}).values())
        inside = f" in {stack[-1][0]}" if stack and stack[-1][0] else ""
        return f"{op_name(self.node)}{inside}"

    @property
    def out_shape(self) -> tuple[int, ...]:
        """Shape of the current operation's (first) result."""
        assert self.node is not None
        value = self.node.meta["val"]
        return shape_of(value[0] if isinstance(value, tuple | list) else value)

    def labels_of(self, value: Any) -> Tensor:
        """Return the labels of an activation, weight, constant or number."""
        if isinstance(value, Tensor):
            return value
        if isinstance(value, Known):
            return blank(value.value.shape)
        if isinstance(value, Weight):
            count = int(np.prod(value.shape))
            if count > MAX_ELEMENTS:
                self.whole.add(value.name)
                return blank(value.shape)
            ids = self.labels.axis(Axis(value.name, -1, count, "element"))
            return torch.from_numpy(ids).reshape(value.shape)
        return blank(())

    def must_not_vary(self, labels: Tensor, dims: Iterable[int], reason: str) -> None:
        """At the end, freeze labels whose class is not the same all along ``dims``."""
        dims = tuple(d % labels.dim() for d in dims)
        if dims and bool((small([labels])[0] != 0).any()):
            self.flat.append((labels, dims, reason))

    def derive(self, labels: Tensor, dead: Callable[[Ids], Ids]) -> Tensor:
        """Return new labels, merged with the old ones, whose value when dead is another."""
        core = small([labels])[0]
        unique, inverse = np.unique(core.numpy(), return_inverse=True)
        new = self.successors(unique, dead(self.labels.dead[unique]))
        return torch.from_numpy(new[inverse].reshape(tuple(core.shape))).expand(labels.shape)

    def successors(self, ids: Ids, dead: Ids | int) -> Ids:
        """Return one new label per label, merged with it and depending on it; 0 stays 0."""
        needs = np.stack([ids, np.zeros_like(ids)], axis=1)
        new = self.labels.fresh(len(ids), dead, needs)
        new = np.where(ids == 0, 0, new)
        self.labels.merge(new, ids, "")
        return new

    def collapse(self, labels: Tensor, dims: Sequence[int], reason: str) -> Tensor:
        """Return labels with ``dims`` reduced to size 1; their class must not vary along them."""
        if labels.dim() == 0:
            return labels
        dims = sorted({d % labels.dim() for d in dims})
        first = labels
        for dim in dims:
            first = first.narrow(dim, 0, 1)
        core = small([labels])[0]
        if all(core.shape[d] == 1 for d in dims):
            return first
        self.must_not_vary(labels, dims, reason)
        self.labels.require(core.numpy())
        status = torch.from_numpy(self.labels.dead)[core].amax(dims, keepdim=True)
        ids = first.expand(first.shape)
        core_ids = first[tuple(slice(0, n) for n in status.shape)]
        new = self.successors(core_ids.numpy().ravel(), status.numpy().ravel())
        return torch.from_numpy(new.reshape(tuple(core_ids.shape))).expand(ids.shape)

    def channels(self, labels: Tensor, dim: int) -> Ids:
        """Return one label per index of ``dim``, merging what varies along other dimensions."""
        dim %= labels.dim()
        size = labels.shape[dim]
        core = small([labels])[0]
        if core.numel() == core.shape[dim]:
            return core.expand([size if d == dim else 1 for d in range(core.dim())]).numpy().ravel()
        rows = core.movedim(dim, 0).reshape(core.shape[dim], -1).numpy()
        roots = self.labels.roots(rows)
        reason = f"{self.where} reads it along another dimension as well"
        if (roots == roots[:1]).all():  # varies only along the other dimensions
            self.labels.freeze(rows, reason)
            return np.zeros(size, np.int64)
        self.labels.merge(rows[:, :1].repeat(rows.shape[1], axis=1), rows, reason)
        self.labels.require(rows)
        return self.successors(rows[:, 0].copy(), self.labels.dead[rows].max(axis=1))

    def follow(self, value: Any, dim: int, ids: Ids, role: str) -> bool:
        """Tie the indices of a weight or buffer to labels; False where there is no such tensor."""
        name = value.name if isinstance(value, Weight | Known) else None
        if name is None:
            return False
        shape = value.shape if isinstance(value, Weight) else tuple(value.value.shape)
        own = self.labels.axis(Axis(name, dim, shape[dim], role))
        self.labels.merge(own, ids, f"{self.where} shares it with what cannot be removed")
        return True

    def unknown(self, *values: Any, reason: str | None = None) -> Any:
        """Freeze everything that is read here and return unlabelled results."""
        assert self.node is not None
        for value in flatten(values):
            if isinstance(value, Tensor | Weight):
                core = small([self.labels_of(value)])[0]
                self.labels.freeze(core.numpy(), reason or f"{self.where} is not understood")
        return blank_like(self.node.meta.get("val"))


def flatten(values: Any) -> list[Any]:
    """Return the leaves of nested lists, tuples and dicts."""
    if isinstance(values, dict):
        values = list(values.values())
    if isinstance(values, list | tuple):
        return [leaf for value in values for leaf in flatten(value)]
    return [values]


def shape_of(value: Any) -> tuple[int, ...]:
    """Return a shape in plain numbers, an open batch dimension at its example size."""
    return tuple(_number(size) for size in value.shape)


def _number(size: Any) -> int:
    hint: Any = size.node.hint if isinstance(size, torch.SymInt) else size
    return int(hint)


def blank_like(value: Any) -> Any:
    """Return unlabelled results shaped like what torch.export recorded."""
    if isinstance(value, list | tuple):
        return tuple(blank_like(item) for item in value)
    if isinstance(value, Tensor):
        return blank(shape_of(value))
    return _number(value) if isinstance(value, torch.SymInt) else value


def read(program: Program) -> Reader:
    """Walk the program once."""
    reader = Reader(program)
    for node in program.module.graph.nodes:
        reader.node = node
        value = _value(reader, node)
        reader.values[node] = (
            reader.labels.simplify(tidy(value)) if isinstance(value, Tensor) else value
        )
    later, reader.labels.frozen = reader.labels.frozen, []
    for labels, dims, reason in reader.flat:
        roots = torch.from_numpy(reader.labels.roots(small([labels])[0].numpy()))
        first = roots
        for dim in dims:
            first = first.narrow(dim, 0, 1)
        odd = (roots != first).any(dim=dims, keepdim=True).expand(roots.shape)
        reader.labels.freeze(roots[odd].numpy(), reason)
    reader.labels.frozen += later
    return reader


def _value(reader: Reader, node: fx.Node) -> Any:
    if node.op == "placeholder":
        value = node.meta.get("val")
        if isinstance(value, Tensor) and value.dim():
            reader.batch = shape_of(value)[0]
        return blank_like(value)
    if node.op == "get_attr":
        return _attribute(reader, str(node.target))
    args = fx.map_arg(node.args, reader.values.__getitem__)
    kwargs = fx.map_arg(node.kwargs, reader.values.__getitem__)
    if node.op == "output":
        return reader.unknown(args, reason="it is an output of the model")
    leaves = flatten((args, kwargs))
    if op_name(node) == "sym_size" or not any(isinstance(x, Tensor | Weight) for x in leaves):
        return _compute(reader, node, args, kwargs)
    if node not in reader.program.variable:
        return _compute(reader, node, *_example_values((args, kwargs)))
    found = RULES.get(op_name(node))
    if found is None:
        return reader.unknown(args, kwargs)
    return found(reader, *args, **kwargs)


def _attribute(reader: Reader, target: str) -> Any:
    value: Any = reader.program.module
    for part in target.split("."):
        value = getattr(value, part)
    if not isinstance(value, Tensor):
        return value
    if target in reader.program.weights:
        name = reader.program.weights[target]
        reader.shapes[name] = tuple(value.shape)
        return Weight(name, tuple(value.shape))
    name_or_none = reader.program.buffers.get(target)
    if name_or_none is not None:
        reader.shapes[name_or_none] = tuple(value.shape)
    if isinstance(value, nn.Parameter):
        return blank(value.shape)
    return Known(value.detach(), name_or_none)


def _example_values(values: Any) -> Any:
    """Stand-ins for activations where an operation looks at shape and type only."""

    def stand_in(value: Any) -> Any:
        if isinstance(value, tuple | list):
            return type(value)(stand_in(item) for item in value)
        if isinstance(value, dict):
            return {key: stand_in(item) for key, item in value.items()}
        if isinstance(value, Weight):
            return torch.zeros(value.shape)
        return torch.zeros(value.shape) if isinstance(value, Tensor) else value

    return stand_in(values)


def _compute(reader: Reader, node: fx.Node, args: Any, kwargs: Any) -> Any:
    """Run an operation on plain values; its result does not depend on the input."""

    def plain(value: Any) -> Any:
        if isinstance(value, tuple | list):
            return type(value)(plain(item) for item in value)
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        return value.value if isinstance(value, Known) else value

    if callable(node.target):
        result = node.target(*plain(args), **plain(kwargs))
    else:
        return reader.unknown(args, kwargs)
    if isinstance(result, tuple | list):
        return tuple(Known(item) if isinstance(item, Tensor) else item for item in result)
    return Known(result) if isinstance(result, Tensor) else result
