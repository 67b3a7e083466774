# SPDX-License-Identifier: Apache-2.0
"""Pieces: what a fused kernel is given, whatever device it runs on."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from torch import Tensor

from dessilbi.kernels.layout import Levels


@dataclass(frozen=True, eq=False)
class Piece:
    """One tensor of a fused step, with what belongs to it.

    ``levels`` are None where there are no norms: for a tensor without structure (``v`` is None) and
    for independent single elements. ``buffer`` is the momentum, None without; ``fresh`` says that
    it holds nothing yet (it must hold zeros). ``old`` is W from before another optimizer moved it
    (wrap). ``moves`` is False for members of a unit that only lend their norms. ``group`` counts
    param groups.
    """

    param: Tensor
    v: Tensor | None
    buffer: Tensor | None
    levels: Levels | None
    group: int
    fresh: bool = False
    moves: bool = True
    old: Tensor | None = None

    @property
    def num_sums(self) -> int:
        """Partial sums of squares that a step leaves."""
        return self.levels.num_blocks * self.levels.num_inner_tiles if self.levels else 0


class Options(NamedTuple):
    """The numbers of one param group, as the kernels of :mod:`dessilbi.kernels` take them."""

    lr: float | Tensor
    kappa: float
    nu: float
    momentum: float = 0.0
    dampening: float = 0.0
    weight_decay: float = 0.0
    nesterov: bool = False
    maximize: bool = False


class KernelPlan(Protocol):
    """A fused step over fixed pieces, which carries the sums of squares of V."""

    def set_gradients(self, grads: Sequence[Tensor | None]) -> None:
        """Say what the gradients of the pieces are; None for pieces that do not move by one."""

    def set_options(self, group: int, options: Options) -> None:
        """Set the numbers of a param group."""

    def set_soft_threshold(self, piece: int, lam: float) -> None:
        """Set lam of independent single elements."""

    def set_threshold(self, unit: int, lam: float | Tensor) -> None:
        """Set the norm of V above which blocks of a unit are selected: one, or one per block."""

    def mark_filled(self) -> None:
        """Say that all momentum buffers hold something from now on."""

    @property
    def nbytes(self) -> int:
        """Bytes held beside the optimizer's state."""

    def rebuild(self, piece: int) -> None:
        """Compute the sums of a piece from its V, to the bit as a step would have left them."""

    def step(self, found_inf: Tensor | None = None, grad_scale: Tensor | None = None) -> None:
        """Advance all pieces that move; with ``found_inf`` not 0 none does.

        Args:
            found_inf: One element, on the device of the pieces.
            grad_scale: What gradients are multiples of, likewise.
        """


class Kernel(Protocol):
    """A fused kernel that is ready to run on one kind of device."""

    @property
    def name(self) -> str:
        """What users see."""

    def takes(self, param: Tensor) -> bool:
        """Return whether it can step weights of this dtype."""

    def walks(self, levels: Levels | None) -> bool:
        """Return whether it can go through a tensor of these levels (None: it has gaps)."""

    def plan(
        self, pieces: Sequence[Piece], units: Sequence[Sequence[int]], num_groups: int
    ) -> KernelPlan:
        """Return a step over fixed pieces.

        Args:
            pieces: The tensors, all on one device.
            units: Indices of pieces whose blocks live together; every piece with levels is in one.
            num_groups: Number of param groups.
        """
