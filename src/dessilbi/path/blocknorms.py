# SPDX-License-Identifier: Apache-2.0
"""Norms of blocks along the path: ||W_g|| of every filter at every recorded point.

Kept for tensors that are cut into whole filters, neurons or heads, as float32, and for at most
``MOST`` blocks in all: single weights would need as much room as the weights themselves.
"""

import base64
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.optim import Optimizer

from dessilbi.blocks import sharding
from dessilbi.blocks.ticket import TensorSpec
from dessilbi.optimizers import dual
from dessilbi.path.lines import Takes, taken

MOST = 5000  # blocks: 20 kB for a point

Floats = npt.NDArray[np.float32]


def followed(specs: Mapping[str, TensorSpec]) -> tuple[str, ...]:
    """Return the tensors whose blocks are followed: whole layers, in order, as far as they fit.

    >>> followed({"conv": TensorSpec((8, 3, 3, 3), (1, None, None, None))})
    ('conv',)
    >>> followed({"fc": TensorSpec((8, 16), (1, 1))})
    ()
    """
    found, left = [], MOST
    for name, spec in specs.items():
        in_one_row = sum(length > 1 for length in spec.grid) <= 1
        if spec.block_size > 1 and in_one_row and spec.num_blocks <= left:
            found.append(name)
            left -= spec.num_blocks
    return tuple(found)


@torch.no_grad()
def norms_of(optimizer: Optimizer, names: Iterable[str]) -> dict[str, Tensor]:
    """Return ||W_g|| of the blocks of these tensors, each for itself also where they are coupled.

    Every process must call it where weights are sharded.
    """
    wanted = set(names)
    found = [member for member in dual.named_members(optimizer) if member.name in wanted]
    values = [member.param.detach().to(dual.dual_dtype(member.param)) for member in found]
    norms = sharding.norms(values, [member.block for member in found])
    return {m.name: n.float().cpu() for m, n in zip(found, norms, strict=True)}


class BlockNorms:
    """The norms that were recorded, by step.

    Args:
        specs: Shapes and blocks of the structured tensors when the path began.
    """

    def __init__(self, specs: Mapping[str, TensorSpec]):
        self.names = followed(specs)
        self._values: dict[int, Floats] = {}

    @property
    def steps(self) -> list[int]:
        """Steps at which norms were recorded, ascending."""
        return sorted(self._values)

    def told(self, step: int, norms: Mapping[str, Tensor]) -> dict[str, Any]:
        """Keep the norms at a step, and return them as plain values for a line of the file."""
        parts = [norms[name].detach().cpu().numpy().reshape(-1) for name in self.names]
        self._values[step] = np.concatenate(parts).astype("<f4")
        return {"step": step, "values": base64.b64encode(self._values[step].tobytes()).decode()}

    def replay(self, told: Mapping[str, Any], specs: Mapping[str, TensorSpec]) -> None:
        """Take what :meth:`told` returned.

        Raises:
            ValueError: It is not of these tensors.
        """
        values = np.frombuffer(base64.b64decode(told["values"], validate=True), "<f4")
        if values.size != sum(specs[name].num_blocks for name in self.names):
            raise ValueError("norms of another number of blocks")
        self._values[int(told["step"])] = values

    def drop(self, steps: Iterable[int]) -> None:
        """Forget points."""
        for step in steps:
            self._values.pop(step, None)

    def reshape(self, before: Mapping[str, TensorSpec], takes: Takes) -> None:
        """Tell what was recorded in the blocks of tensors of other sizes; NaN: not born then."""
        for step in self._values:
            old = self.at(step, before)
            moved = {name: taken(old[name], takes[name], float("nan")) for name in self.names}
            self.told(step, moved)

    def at(self, step: int, specs: Mapping[str, TensorSpec]) -> dict[str, Tensor]:
        """Return the norms at a step by tensor, in the shape of its grid of blocks."""
        sizes = [specs[name].num_blocks for name in self.names]
        parts = torch.split(torch.from_numpy(self._values[step].copy()), sizes)
        named = zip(self.names, parts, strict=True)
        return {name: part.reshape(specs[name].grid) for name, part in named}
