# SPDX-License-Identifier: Apache-2.0
"""Reader: walks a program once and lets one small rule per operation say where labels go.

A rule is called with the reader and the operation's own arguments. Activations arrive as label
tensors, parameters as :class:`Weight`, everything that does not depend on the input as
:class:`Known`; it returns the labels of the result. Operations without a rule freeze what they
read: nothing that is not understood is ever removed.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from dessilbi.graph.labels import Axis, Ids, Labels, blank, small
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
    """A consumer whose dead columns hold a constant other than 0 when their unit is dead.

    ``bias`` names the parameter that can take the constant up, None where none can.
    """

    axis: Axis
    labels: Ids
    bias: str | None
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
    flat: list[tuple[Tensor, tuple[int, ...], str, int, Tensor | None]] = field(
        default_factory=list
    )
    constants: list[Constant] = field(default_factory=list)
    evens: list[Even] = field(default_factory=list)
    uses: Counter[str] = field(default_factory=Counter)
    rescaled: set[str] = field(default_factory=set)
    macs: dict[str, int] = field(default_factory=dict)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    whole: set[str] = field(default_factory=set)
    unread: dict[str, str] = field(default_factory=dict)
    attended: list[Ids] = field(default_factory=list)
    summed: list[Ids] = field(default_factory=list)
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

    def must_not_vary(
        self, labels: Tensor, dims: Iterable[int], reason: str, *, only: Tensor | None = None
    ) -> None:
        """At the end, freeze labels (``only`` these) if classes differ along ``dims``."""
        dims = tuple(d % labels.dim() for d in dims)
        if dims and bool((small([labels])[0] != 0).any()):
            self.flat.append((labels, dims, reason, len(self.labels.frozen), only))

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
        self.labels.attach(new, ids)
        return new

    def collapse(self, labels: Tensor, dims: Sequence[int], reason: str) -> Tensor:
        """Return labels with ``dims`` reduced to size 1.

        What varies along ``dims`` only is frozen; what varies along others too lives or dies as a
        whole along ``dims``.
        """
        if labels.dim() == 0:
            return labels
        dims = sorted({d % labels.dim() for d in dims})
        first = labels
        for dim in dims:
            first = first.narrow(dim, 0, 1)
        core = small([labels])[0]
        if all(core.shape[d] == 1 for d in dims):
            return first
        if self.varies(core, [d for d in range(core.dim()) if d not in dims]):
            start = first[tuple(slice(0, 1 if d in dims else n) for d, n in enumerate(core.shape))]
            self.labels.merge(start.expand(core.shape).numpy(), core.numpy(), reason)
        self.must_not_vary(labels, dims, reason)
        self.labels.require(core.numpy())
        status = torch.from_numpy(self.labels.dead)[core].amax(dims, keepdim=True)
        ids = first.expand(first.shape)
        core_ids = first[tuple(slice(0, n) for n in status.shape)]
        new = self.successors(core_ids.numpy().ravel(), status.numpy().ravel())
        return torch.from_numpy(new.reshape(tuple(core_ids.shape))).expand(ids.shape)

    def varies(self, labels: Tensor, dims: Iterable[int]) -> bool:
        """Whether classes of labels differ along one of ``dims``."""
        roots = self.labels.roots(small([labels])[0].numpy())
        return any((roots != roots.take([0], axis=dim)).any() for dim in dims)

    def add_up(self, labels: Tensor, dims: Sequence[int]) -> Tensor:
        """Return labels of a sum over ``dims``, size 1 there: what is 0 when dead may leave it."""
        dims = sorted({d % labels.dim() for d in dims}) if labels.dim() else []
        if not self.varies(labels, dims):
            return self.collapse(labels, dims, "")
        core = small([labels])[0].numpy()
        reason = f"{self.where} sums over it and it is not 0 when dead"
        self.labels.freeze(core[self.labels.dead[core] != 0], reason)
        self.labels.require(core)
        if not self.varies(labels, [d for d in range(labels.dim()) if d not in dims]):
            return blank(1 if d in dims else n for d, n in enumerate(labels.shape))
        why = f"{self.where} sums over it together with what cannot be removed"
        return self.collapse(labels, dims, why)

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
        """Tie the indices of a weight or buffer to labels; whether masking can make it 0.

        Buffers lose the same indices but no ticket masks them. What is computed, or has no name to
        be cut by, holds the labels back.
        """
        name = value.name if isinstance(value, Weight | Known) else None
        if name is None:
            reason = f"{self.where} joins it with what cannot be cut by name"
            if isinstance(value, Tensor):
                self.labels.freeze(small([value])[0].numpy(), reason)
            if value is not None:
                self.labels.freeze(ids, reason)
            return False
        shape = value.shape if isinstance(value, Weight) else tuple(value.value.shape)
        if not isinstance(value, Weight):
            role = "statistic"
        own = self.labels.axis(Axis(name, dim, shape[dim], role))
        self.labels.merge(own, ids, f"{self.where} shares it with what cannot be removed")
        return isinstance(value, Weight)

    def unknown(self, *values: Any, reason: str | None = None) -> Any:
        """Freeze everything that is read here and return unlabelled results."""
        assert self.node is not None
        for value in flatten(values):
            if isinstance(value, Weight):
                self.unread.setdefault(value.name, reason or f"{self.where} is not understood")
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
