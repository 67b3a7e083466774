# SPDX-License-Identifier: Apache-2.0
"""Labels: integers that travel through the operations and say what can only be removed together.

Every index along a dimension of a weight gets a label; activations carry the labels of the
indices they come from, element by element (0: none). Labels that meet are merged (union-find).
Besides, a label knows the value its elements have once it is dead, and which labels must die for
that. Label tensors keep size-1 strides along dimensions where nothing varies, so they are small.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

import numpy as np
import torch
from torch import Tensor

Ids = np.ndarray[Any, np.dtype[np.int64]]


class Dead(IntEnum):
    """The value of an element whose label is dead."""

    ZERO = 0  # exactly 0
    CONSTANT = 1  # the same number for every input
    VARIES = 2


@dataclass(frozen=True)
class Axis:
    """The indices along one dimension of a weight, as the holder of a run of labels.

    ``role`` is ``"producer"`` (rows whose death makes an output 0), ``"follower"`` (masked and
    removed with its unit), ``"statistic"`` (a buffer, removed with its unit), ``"consumer"``
    (columns that read the unit) or ``"element"`` (``dim`` -1: every element has its own label).
    ``groups`` > 1 marks the columns of a grouped convolution, counted over all groups.
    """

    name: str
    dim: int
    size: int
    role: str
    groups: int = 1


@dataclass
class Labels:
    """Union-find with what is known of every label. Label 0 means "no label" and never merges."""

    parent: Ids = field(default_factory=lambda: np.zeros(1, np.int64))
    dead: Ids = field(default_factory=lambda: np.zeros(1, np.int64))
    needs: Ids = field(default_factory=lambda: np.zeros((1, 2), np.int64))
    axes: dict[Axis, int] = field(default_factory=dict)
    held: np.ndarray[Any, np.dtype[np.bool_]] = field(default_factory=lambda: np.zeros(1, bool))
    frozen: list[tuple[Ids, str]] = field(default_factory=list)
    required: list[Ids] = field(default_factory=list)

    def fresh(self, count: int, dead: int | Ids = 0, needs: Ids | None = None) -> Ids:
        """Return ``count`` new labels."""
        start = len(self.parent)
        new = np.arange(start, start + count)
        links = np.zeros((count, 2), np.int64) if needs is None else needs
        self.parent = np.concatenate([self.parent, new])
        self.dead = np.concatenate([self.dead, np.broadcast_to(dead, (count,))])
        self.needs = np.concatenate([self.needs, links])
        self.held = np.concatenate([self.held, np.zeros(count, bool)])
        return new

    def attach(self, new: Ids, ids: Ids) -> None:
        """Merge labels that were just made with older ones, pairwise; 0 is left alone."""
        both = (new != 0) & (ids != 0)
        self.parent[new[both]] = self.roots(ids[both])

    def axis(self, axis: Axis) -> Ids:
        """Return the labels of ``axis``, the same ones every time; a size of 1 has none."""
        if axis.size <= 1:
            return np.zeros(axis.size, np.int64)
        if axis not in self.axes:
            self.axes[axis] = int(self.fresh(axis.size)[0])
        start = self.axes[axis]
        return np.arange(start, start + axis.size)

    def roots(self, labels: Ids) -> Ids:
        """Return the representative of each label's class, the smallest label in it."""
        found = self.parent[labels]
        while True:
            above = self.parent[found]
            if np.array_equal(above, found):
                self.parent[labels] = found  # the next search is shorter
                return found
            found = above

    def merge(self, first: Ids, second: Ids, reason: str) -> None:
        """Merge labels pairwise; a label that meets no label (0) is frozen for ``reason``."""
        pairs = np.stack([first.ravel(), second.ravel()])
        alone = (pairs == 0).any(axis=0)
        if alone.any():
            self.freeze(pairs[:, alone].ravel(), reason)
        pairs = pairs[:, ~alone]
        while True:
            pairs = np.sort(self.roots(pairs), axis=0)
            pairs = pairs[:, pairs[0] != pairs[1]]
            if not pairs.size:
                return
            low, high = pairs  # a root with several partners meets the others next time
            np.minimum.at(self.parent, high, low)
            np.logical_or.at(self.held, self.roots(high), self.held[high])

    def freeze(self, labels: Ids, reason: str) -> None:
        """Remember that these labels, and all that merge with them, cannot be removed."""
        found = np.unique(labels)
        found = found[found != 0]
        if len(found):
            self.frozen.append((found, reason))
            self.held[self.roots(found)] = True

    def simplify(self, labels: Tensor) -> Tensor:
        """Give all labels of a frozen class the same number: nothing of it matters any more."""
        core = small([labels])[0].numpy()
        roots = self.roots(core)
        held = self.held[roots]
        if not held.any():
            return labels
        return tidy(torch.from_numpy(np.where(held, roots, core)).expand(labels.shape))

    def require(self, labels: Ids) -> None:
        """Remember that these labels must be 0 when dead, so their producers must all be dead."""
        self.required.append(np.unique(labels))

    def frozen_roots(self) -> dict[int, str]:
        """Return class -> first reason why it cannot be removed."""
        reasons: dict[int, str] = {}
        for labels, reason in self.frozen:
            for root in np.unique(self.roots(labels)).tolist():
                reasons.setdefault(root, reason)
        return reasons

    def required_labels(self) -> Ids:
        """Return all labels that must die for something to be 0, through what they depend on."""
        known = np.zeros(len(self.parent), bool)
        front = np.unique(np.concatenate([np.zeros(1, np.int64), *self.required]))
        while len(front):
            known[front] = True
            below = np.unique(self.needs[front])
            front = below[~known[below]]
        known[0] = False
        return np.flatnonzero(known)


def small(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Cut dimensions along which no tensor varies (stride 0) to size 1; shapes must agree."""
    tensors = list(tensors)
    for dim in range(tensors[0].dim()):
        if all(t.stride(dim) == 0 or t.shape[dim] == 1 for t in tensors):
            tensors = [t.narrow(dim, 0, min(1, t.shape[dim])) for t in tensors]
    return tensors


def tidy(labels: Tensor) -> Tensor:
    """Return the same labels with stride 0 along every dimension where they do not vary."""
    shape = labels.shape
    for dim in range(labels.dim()):
        if labels.shape[dim] > 1:
            first = labels.narrow(dim, 0, 1)
            if labels.stride(dim) == 0 or bool((labels == first).all()):
                labels = first
    return labels.expand(shape)


def blank(shape: Iterable[int]) -> Tensor:
    """Return labels of an unlabelled tensor."""
    return torch.zeros((), dtype=torch.int64).expand(tuple(shape))


def along(labels: Ids, dim: int, shape: Iterable[int]) -> Tensor:
    """Spread one label per index of ``dim`` over a tensor of ``shape``."""
    shape = tuple(shape)
    dim %= len(shape)
    view = [1] * len(shape)
    view[dim] = len(labels)
    return torch.from_numpy(labels).reshape(view).expand(shape)
