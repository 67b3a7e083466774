# SPDX-License-Identifier: Apache-2.0
"""Levels and tiles: how a kernel walks through a tensor's memory, block by block.

In memory order a tensor is a box whose dimensions belong in turn to the *grid* of blocks and to the
*inside* of a block: a level is the size of such a (merged) dimension. A filter's weights are two
levels, [grid 64, inside 147]; a linear layer by columns [inside 84, grid 120]; blocks of 4 x 4
[grid 21, inside 4, grid 30, inside 4]; heads of packed q, k and v [inside 3, grid 12, inside
49152]. A *tile* is a piece of the box, the same whatever the number of threads; the sums of a block
over its tiles are added in the order of the tiles.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from dessilbi.blocks.structure import Block, even_parts

TILE = 64 * 1024  # elements: long runs for memory, still many tiles for many threads
_ROWS = 32  # inner elements per block and tile, so that partial sums are few


@dataclass(frozen=True)
class Levels:
    """The levels of a tensor from the outermost to the innermost, and the tiles over them.

    ``innermost_is_grid`` says what the last level is; before it the kinds alternate. ``order`` are
    the tensor's dimensions in memory order: so are the blocks of a fused step.
    """

    sizes: tuple[int, ...]
    tile: tuple[int, ...]
    innermost_is_grid: bool
    order: tuple[int, ...] = ()

    @staticmethod
    def flat(num_elements: int) -> "Levels":
        """Return the levels of elements that need no sums."""
        return Levels((num_elements,), (TILE,), False)

    def is_grid(self, level: int) -> bool:
        """Return whether a level counts blocks (else elements inside of a block)."""
        return ((len(self.sizes) - 1 - level) % 2 == 0) == self.innermost_is_grid

    def _counts(self, grid: bool) -> list[int]:
        return [
            -(-size // tile)
            for k, (size, tile) in enumerate(zip(self.sizes, self.tile, strict=True))
            if self.is_grid(k) == grid
        ]

    @property
    def num_tiles(self) -> int:
        """Tiles of the tensor."""
        return prod(self._counts(True)) * self.num_inner_tiles

    @property
    def num_inner_tiles(self) -> int:
        """Tiles over which each block is spread."""
        return prod(self._counts(False))

    @property
    def num_blocks(self) -> int:
        """Blocks of the tensor."""
        return prod(size for k, size in enumerate(self.sizes) if self.is_grid(k))


def levels_of(shape: Sequence[int], strides: Sequence[int], block: Block) -> Levels | None:
    """Return the levels of a tensor.

    None if its elements do not fill their memory, or blocks are packed in parts of several lengths.

    >>> levels_of((64, 3, 7, 7), (147, 49, 7, 1), (1, None, None, None)).sizes
    (64, 147)
    >>> levels_of((84, 120), (120, 1), (4, 4)).sizes
    (21, 4, 30, 4)
    >>> levels_of((2304, 768), (768, 1), ((64, 64, 64), None)).sizes
    (3, 12, 49152)
    >>> levels_of((2, 2), (4, 1), (1, 1)) is None
    True
    """
    order = memory_order(shape, strides)
    if order is None:
        return None
    merged: list[tuple[int, bool]] = []  # (size, is it of the grid)
    for dim in order:
        length = (1, shape[dim]) if block[dim] is None else even_parts(block[dim])
        if length is None:
            return None
        parts, run = length
        count = shape[dim] // max(1, parts * run)
        for size, in_grid in ((parts, False), (count, True), (run, False)):
            if size == 1:
                continue
            if merged and merged[-1][1] == in_grid:
                size *= merged.pop()[0]
            merged.append((size, in_grid))
    merged = merged or [(1, False)]
    sizes, kinds = tuple(size for size, _ in merged), tuple(kind for _, kind in merged)
    return Levels(sizes, _tile(sizes, kinds), kinds[-1], order)


def memory_order(shape: Sequence[int], strides: Sequence[int]) -> tuple[int, ...] | None:
    """Return the dimensions from the outermost in memory to the innermost, None with gaps.

    >>> memory_order((8, 3, 5, 5), (75, 1, 15, 3))
    (0, 2, 3, 1)
    """
    order = sorted(range(len(shape)), key=lambda d: (shape[d] != 1, -strides[d]))
    expected = prod(shape)
    for dim in order:
        if shape[dim] != 1 and strides[dim] * shape[dim] != expected:
            return None
        expected //= shape[dim]
    return tuple(order)


def _tile(sizes: Sequence[int], kinds: Sequence[bool]) -> tuple[int, ...]:
    """Choose a tile of about TILE elements, from the innermost level outwards."""
    tile, room = [0] * len(sizes), TILE
    for k in reversed(range(len(sizes))):
        outside = prod(size for size, grid in zip(sizes[:k], kinds[:k], strict=True) if not grid)
        most = room // min(_ROWS, outside) if kinds[k] else room
        tile[k] = min(sizes[k], max(1, most))
        room = max(1, room // tile[k])
    return tuple(tile)
