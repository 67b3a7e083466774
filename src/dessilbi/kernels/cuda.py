# SPDX-License-Identifier: Apache-2.0
"""The plan of a fused step on CUDA: tables on the device, and the launches of kernels/triton.py.

Not run on a GPU yet: its tests run it on the CPU in Triton's interpreter and compile it for one.
"""

import struct
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dessilbi.kernels import triton as launched
from dessilbi.kernels.layout import Levels
from dessilbi.kernels.pieces import Options, Piece
from dessilbi.kernels.triton import BLOCKS, COLUMNS, ELEMENTS, UNIT_COLUMNS, WORDS

_LINE = 32  # elements

_TYPES: dict[torch.dtype, Any] = {
    torch.float32: tl.float32,
    torch.float64: tl.float64,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}


def _bits(x: float) -> int:
    """The bits of a float64 as a word."""
    word: int = struct.unpack("q", struct.pack("d", x))[0]
    return word


class _Table:
    """Words on the device, and what they are, so that only changes are written."""

    def __init__(self, words: Sequence[int], device: torch.device):
        self._known = list(words)
        self.words = torch.tensor(self._known, dtype=torch.int64, device=device)

    def write(self, at: int, words: Sequence[int]) -> None:
        """Write words from a place on, by launches."""
        for start in range(0, len(words), WORDS):
            new, place = list(words[start : start + WORDS]), at + start
            if self._known[place : place + len(new)] != new:
                self._known[place : place + len(new)] = new
                padded = new + [0] * (WORDS - len(new))
                launched.write[(1,)](self.words, place, len(new), *padded, enable_fp_fusion=True)


class TritonKernel:
    """Triton's kernels; they compile at their first launch."""

    name = "fused-cuda"

    def takes(self, param: Tensor) -> bool:
        """Return whether the weights' dtype is known."""
        return param.dtype in _TYPES

    def walks(self, levels: Levels | None) -> bool:
        """Return whether the kernel can go through these levels: grid, inside, grid, inside."""
        return levels is not None and len(levels.sizes) + levels.innermost_is_grid <= 4

    def plan(
        self, pieces: Sequence[Piece], units: Sequence[Sequence[int]], num_groups: int
    ) -> "TritonPlan":
        """Return a step over fixed pieces; see :class:`TritonPlan`."""
        return TritonPlan(pieces, units, num_groups)


class _Shape:
    """How a piece is cut: its levels as A, B, C, D and the tiles over them."""

    def __init__(self, piece: Piece):
        flat = Levels((piece.param.numel(),), (1,), False)
        levels = flat if piece.levels is None else piece.levels
        sizes = [*levels.sizes, *([1] if levels.innermost_is_grid else [])]
        self.A, self.B, self.C, self.D = [1] * (4 - len(sizes)) + sizes
        self.num_blocks, self.num_inner = self.A * self.C, self.B * self.D
        # Where blocks lie side by side, enough of them that a program reads whole cache lines.
        beside = min(self.num_blocks, -(-_LINE // self.D))
        widest = ELEMENTS // triton.next_power_of_2(beside)
        self.width = min(widest, triton.next_power_of_2(self.num_inner))
        self.high = ELEMENTS // self.width
        self.num_tiles = -(-self.num_inner // self.width)

    def places(self, number: int) -> list[int]:
        """The tiles of the piece: its number, first block, first inner element."""
        return [
            word
            for block in range(0, self.num_blocks, self.high)
            for inner in range(0, self.num_inner, self.width)
            for word in (number, block, inner)
        ]


class TritonPlan:
    """A fused step over fixed tensors of one device; see kernels/pieces.py.

    Args:
        pieces: The tensors.
        units: Indices of pieces whose blocks live together; all pieces with levels are in one.
        num_groups: Number of param groups.
    """

    def __init__(self, pieces: Sequence[Piece], units: Sequence[Sequence[int]], num_groups: int):
        self._pieces, self._units = list(pieces), [list(unit) for unit in units]
        device = pieces[0].param.device
        self._shapes = [_Shape(piece) for piece in pieces]
        counted = [piece.levels is not None for piece in pieces]
        sums = [s.num_blocks * s.num_tiles * c for s, c in zip(self._shapes, counted, strict=True)]
        blocks = [s.num_blocks * c for s, c in zip(self._shapes, counted, strict=True)]
        self.sums = torch.zeros(sum(sums), dtype=torch.float64, device=device)
        self._scales = torch.zeros(sum(blocks), dtype=torch.float64, device=device)
        self._zero, self._one = torch.zeros(1, device=device), torch.ones(1, device=device)
        rows: list[int] = []
        at_sums, at_scales = self.sums.data_ptr(), self._scales.data_ptr()
        for piece, shape, num_sums, num_blocks in zip(
            pieces, self._shapes, sums, blocks, strict=True
        ):
            rows += self._row(piece, shape, at_sums, at_scales)
            at_sums, at_scales = at_sums + 8 * num_sums, at_scales + 8 * num_blocks
        self._tensors = _Table(rows, device)
        self._options = _Table([0] * WORDS * num_groups, device)
        self._grads = _Table([0] * len(pieces), device)
        self._lams: dict[int, Tensor] = {}
        self._make_units(device)
        self._make_launches(device)

    @staticmethod
    def _row(piece: Piece, shape: _Shape, sums: int, scale: int) -> list[int]:
        def address(x: Tensor | None) -> int:
            return 0 if x is None else x.data_ptr()

        tensors = (piece.param, piece.buffer, piece.v, piece.old)
        return [
            *map(address, tensors),
            *(scale, sums, 0, piece.group, int(piece.fresh), int(piece.moves)),
            *(shape.B, shape.C, shape.D, shape.num_blocks, shape.num_inner, shape.num_tiles),
        ]

    def _make_units(self, device: torch.device) -> None:
        words, places, first = [], [], 0
        for number, unit in enumerate(self._units):
            num_blocks = self._shapes[unit[0]].num_blocks
            words += [first, len(unit), num_blocks, 0, 0]
            first += len(unit)
            places += [w for block in range(0, num_blocks, BLOCKS) for w in (number, block)]
        self._unit_table = _Table(words, device)
        self._members = _Table([i for unit in self._units for i in unit], device)
        self._unit_places = torch.tensor(places, dtype=torch.int64, device=device)

    def _make_launches(self, device: torch.device) -> None:
        """Sort the pieces by what a launch is compiled for."""
        by_kind: dict[tuple[Any, ...], list[int]] = {}
        for i, (piece, shape) in enumerate(zip(self._pieces, self._shapes, strict=True)):
            kind = launched.PLAIN if piece.v is None else launched.SOFT
            if piece.levels is not None:
                kind = launched.MANY
            stored = piece.param.dtype
            wide = torch.promote_types(stored, torch.float32)
            has = (piece.buffer is not None, piece.old is not None)
            key = (stored, wide, kind, shape.high, shape.width, *has)
            by_kind.setdefault(key, []).append(i)
        self._launches: list[tuple[dict[str, Any], Tensor]] = []
        self._rebuilds: dict[int, tuple[dict[str, Any], Tensor]] = {}
        for (stored, wide, kind, high, width, momentum, couple), numbers in by_kind.items():
            named = {"STORED": _TYPES[stored], "WIDE": _TYPES[wide], "KIND": kind, "HIGH": high}
            named |= {"WIDTH": width, "MOMENTUM": momentum, "COUPLE": couple}
            words = [self._shapes[i].places(i) for i in numbers]
            flat = torch.tensor([w for own in words for w in own], device=device)
            if any(self._pieces[i].moves for i in numbers):
                self._launches.append((named, flat))
            start = 0
            for i, own in zip(numbers, words, strict=True):
                self._rebuilds[i] = (named, flat[start : start + len(own)])
                start += len(own)

    @property
    def nbytes(self) -> int:
        """Bytes held beside the optimizer's state."""
        places = [self._unit_places, *[places for _, places in self._launches]]
        return self.sums.nbytes + self._scales.nbytes + sum(p.nbytes for p in places)

    def set_gradients(self, grads: Sequence[Tensor | None]) -> None:
        """Say what the gradients of the pieces are, laid out as the parameters; None: none."""
        self._grads.write(0, [0 if g is None else g.data_ptr() for g in grads])

    def set_options(self, group: int, options: Options) -> None:
        """Set the numbers of a param group; a tensor lr is read on the device."""
        lr, *others = options
        known = 0.0 if isinstance(lr, Tensor) else lr
        flags = [int(option) for option in others[5:]]
        words = [_bits(known), *[_bits(float(x)) for x in others[:5]], *flags]
        self._options.write(WORDS * group, words)
        if isinstance(lr, Tensor):
            place = self._options.words.view(torch.float64)[WORDS * group : WORDS * group + 1]
            place.copy_(lr.reshape(1), non_blocking=True)

    def set_soft_threshold(self, piece: int, lam: float) -> None:
        """Set lam of independent single elements."""
        self._tensors.write(piece * len(COLUMNS) + COLUMNS.index("lam"), [_bits(lam)])

    def set_threshold(self, unit: int, lam: float | Tensor) -> None:
        """Set the norm of V above which blocks of a unit are selected: one, or one per block."""
        place = unit * len(UNIT_COLUMNS) + UNIT_COLUMNS.index("lam")
        if not isinstance(lam, Tensor):
            self._unit_table.write(place, [_bits(lam), 0])
            return
        levels = self._pieces[self._units[unit][0]].levels
        assert levels is not None
        if lam.dim() == len(levels.order):  # else blocks along one dimension, in any order
            lam = lam.permute(levels.order)
        self._lams[unit] = lam.to(self.sums.device, torch.float64).contiguous()
        self._unit_table.write(place, [0, self._lams[unit].data_ptr()])

    def mark_filled(self) -> None:
        """Say that all momentum buffers hold something from now on."""
        for i in range(len(self._pieces)):
            self._tensors.write(i * len(COLUMNS) + COLUMNS.index("fresh"), [0])

    def rebuild(self, piece: int) -> None:
        """Compute the sums of a piece from its V, to the bit as a step would have left them."""
        self._advance(*self._rebuilds[piece], 0, None, None)

    def step(self, found_inf: Tensor | None = None, grad_scale: Tensor | None = None) -> None:
        """Advance all pieces that move."""
        if self._units:
            launched.scales[(self._unit_places.numel() // 2,)](
                self._tensors.words,
                self._options.words,
                self._unit_table.words,
                self._members.words,
                self._unit_places,
                enable_fp_fusion=True,
            )
        for named, places in self._launches:
            self._advance(named, places, 1, found_inf, grad_scale)

    def _advance(
        self,
        named: dict[str, Any],
        places: Tensor,
        stepping: int,
        found_inf: Tensor | None,
        grad_scale: Tensor | None,
    ) -> None:
        launched.advance[(places.numel() // 3,)](
            self._tensors.words,
            self._options.words,
            self._grads.words,
            places,
            self._zero if found_inf is None else found_inf,
            self._one if grad_scale is None else grad_scale,
            stepping,
            **named,
            enable_fp_fusion=True,
        )
