# SPDX-License-Identifier: Apache-2.0
"""The fused step on the CPU: hands tensors to the native kernel (native/step.cpp) by address.

A :class:`CpuPlan` is made once for a set of tensors; a step then fills in what changes (addresses
of gradients, options, thresholds) and makes one call. The kernel writes behind autograd's back:
whoever calls it must say so to the tensors' version counters.
"""

import ctypes
from collections.abc import Sequence
from ctypes import Structure, c_double, c_int64, c_void_p
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dessilbi.kernels.layout import Levels
from dessilbi.kernels.pieces import Options, Piece

_MAX_LEVELS = 16
_DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
_PLAIN, _SOFT, _BLOCKS = range(3)
_PER_THREAD = 64 * 1024  # elements; waking a thread for fewer costs more than it saves


class _Options(Structure):
    _fields_ = [
        *[(name, c_double) for name in Options._fields[:6]],
        *[(name, c_int64) for name in Options._fields[6:]],
    ]


class _Tensor(Structure):
    _fields_ = [
        *[(name, c_void_p) for name in ("w", "m", "v", "scale", "old", "sums")],
        ("lam", c_double),
        *[(name, c_int64) for name in ("dtype", "kind", "group", "fresh", "moves")],
        *[(name, c_int64) for name in ("num_levels", "innermost_is_grid", "num_tiles")],
        *[(name, c_int64) for name in ("first_tile", "num_inner_tiles", "num_blocks")],
        ("size", c_int64 * _MAX_LEVELS),
        ("tile", c_int64 * _MAX_LEVELS),
    ]


class _Unit(Structure):
    _fields_ = [
        *[(name, c_int64) for name in ("first_member", "num_members", "num_blocks")],
        ("lam", c_double),
        ("lams", c_void_p),
    ]


class _Plan(Structure):
    _fields_ = [
        *[(name, c_void_p) for name in ("tensors", "options", "units", "members", "grads")],
        *[(name, c_int64) for name in ("num_tensors", "num_units", "num_tiles", "num_threads")],
        ("parallel_for", c_void_p),
    ]


@lru_cache
def load(path: Path) -> ctypes.CDLL:
    """Load the built kernel.

    Raises:
        OSError: It cannot be loaded, or does not fit this release.
    """
    library = ctypes.CDLL(str(path))
    sizes = [ctypes.sizeof(s) for s in (_Options, _Tensor, _Unit, _Plan)]
    library.dessilbi_size.restype = c_int64
    if [library.dessilbi_size(c_int64(i)) for i in range(4)] != sizes:
        raise OSError(f"{path} does not fit this release of dessilbi; delete it")
    library.dessilbi_step.argtypes, library.dessilbi_step.restype = [c_void_p], None
    library.dessilbi_sums.argtypes, library.dessilbi_sums.restype = [c_void_p, c_int64], None
    return library


@lru_cache
def _parallel_for() -> int:
    """The address of parallel_for of torch's stable C interface: its own pool of threads.

    Raises:
        OSError: This torch has none.
    """
    folder = Path(torch.__file__).parent / "lib"
    for name in ("libtorch_cpu.so", "libtorch_cpu.dylib", "torch_cpu.dll"):
        if (folder / name).exists():
            function = getattr(ctypes.CDLL(str(folder / name)), "torch_parallel_for", None)
            if address := function and ctypes.cast(function, c_void_p).value:
                return address
    raise OSError(f"torch {torch.__version__} has no torch_parallel_for that could be found")


class CpuKernel:
    """The native kernel, loaded.

    Raises:
        OSError: It cannot be loaded.
    """

    name = "fused-cpu"

    def __init__(self, path: Path):
        self._library = load(path)
        _parallel_for()

    def takes(self, param: Tensor) -> bool:
        """Return whether the kernel was built for weights of this dtype."""
        if param.dtype is torch.float16:
            return bool(self._library.dessilbi_has_float16())
        return param.dtype in _DTYPES

    def walks(self, levels: Levels | None) -> bool:
        """Return whether there are not too many levels."""
        return levels is not None and len(levels.sizes) <= _MAX_LEVELS

    def plan(
        self, pieces: Sequence[Piece], units: Sequence[Sequence[int]], num_groups: int
    ) -> "CpuPlan":
        """Return a step over fixed pieces; see :class:`CpuPlan`."""
        return CpuPlan(self._library, pieces, units, num_groups)


class CpuPlan:
    """A fused step over fixed tensors; ``sums`` carries the norms from one step to the next.

    Args:
        library: The loaded kernel.
        pieces: The tensors.
        units: Indices of pieces whose blocks live together; all pieces with levels are in one.
        num_groups: Number of param groups.
    """

    def __init__(
        self,
        library: Any,
        pieces: Sequence[Piece],
        units: Sequence[Sequence[int]],
        num_groups: int,
    ):
        self._library = library
        self._pieces = list(pieces)
        num_sums = sum(piece.num_sums for piece in pieces)
        self.sums = torch.zeros(num_sums, dtype=torch.float64, device="cpu")
        self._keep: list[Tensor] = []
        self._lams: dict[int, Tensor] = {}
        self._tensors = (_Tensor * len(pieces))()
        self._options = (_Options * num_groups)()
        self._units = (_Unit * len(units))()
        self._members = (c_int64 * sum(map(len, units)))(*[i for unit in units for i in unit])
        self._grads = (c_void_p * len(pieces))()
        num_tiles, sums = 0, self.sums.data_ptr()
        for own, piece in zip(self._tensors, pieces, strict=True):
            self._describe(own, piece, num_tiles, sums)
            num_tiles += own.num_tiles
            sums += 8 * piece.num_sums
        first = 0
        for own, unit in zip(self._units, units, strict=True):
            own.first_member, own.num_members = first, len(unit)
            own.num_blocks = self._tensors[unit[0]].num_blocks
            first += len(unit)
        self._plan = _Plan(
            *[ctypes.addressof(x) for x in (self._tensors, self._options, self._units)],
            *[ctypes.addressof(x) for x in (self._members, self._grads)],
            len(pieces),
            len(units),
            num_tiles,
            1,
            _parallel_for(),
        )
        self._address = ctypes.addressof(self._plan)
        self._most_threads = max(1, sum(p.param.numel() for p in pieces) // _PER_THREAD)

    def _describe(self, own: _Tensor, piece: Piece, first_tile: int, sums: int) -> None:
        param, v, levels = piece.param, piece.v, piece.levels
        own.w, own.dtype, own.group = param.data_ptr(), _DTYPES[param.dtype], piece.group
        own.v = None if v is None else v.data_ptr()
        own.m = None if piece.buffer is None else piece.buffer.data_ptr()
        own.old = None if piece.old is None else piece.old.data_ptr()
        own.fresh, own.moves, own.first_tile = piece.fresh, piece.moves, first_tile
        if levels is None:
            own.kind = _PLAIN if v is None else _SOFT
            levels = Levels.flat(param.numel())
        else:
            assert v is not None
            own.kind = _BLOCKS
            own.sums = sums
            scale = torch.empty(levels.num_blocks, dtype=v.dtype, device="cpu")
            self._keep.append(scale)
            own.scale = scale.data_ptr()
        own.num_levels, own.innermost_is_grid = len(levels.sizes), levels.innermost_is_grid
        own.num_tiles, own.num_inner_tiles = levels.num_tiles, levels.num_inner_tiles
        own.num_blocks = levels.num_blocks
        own.size[: len(levels.sizes)] = levels.sizes
        own.tile[: len(levels.tile)] = levels.tile

    def set_gradients(self, grads: Sequence[Tensor | None]) -> None:
        """Say what the gradients of the pieces are, laid out as the parameters; None: none."""
        self._grads[:] = [None if grad is None else grad.data_ptr() for grad in grads]

    def set_options(self, group: int, options: Options) -> None:
        """Set the numbers of a param group."""
        self._options[group] = _Options(*map(float, options[:6]), *map(int, options[6:]))

    def set_soft_threshold(self, piece: int, lam: float) -> None:
        """Set lam of independent single elements."""
        self._tensors[piece].lam = lam

    def set_threshold(self, unit: int, lam: float | Tensor) -> None:
        """Set the norm of V above which blocks of a unit are selected: one, or one per block."""
        own = self._units[unit]
        if isinstance(lam, Tensor):
            levels = self._pieces[self._members[own.first_member]].levels
            assert levels is not None
            if lam.dim() == len(levels.order):  # else blocks along one dimension, in any order
                lam = lam.permute(levels.order)
            self._lams[unit] = lam.to(torch.float64).contiguous()
            own.lams = self._lams[unit].data_ptr()
        else:
            own.lam, own.lams = lam, None

    def mark_filled(self) -> None:
        """Say that all momentum buffers hold something from now on."""
        for own in self._tensors:
            own.fresh = 0

    @property
    def nbytes(self) -> int:
        """Bytes held beside the optimizer's state."""
        return self.sums.nbytes + sum(scale.nbytes for scale in self._keep)

    def rebuild(self, piece: int) -> None:
        """Compute the sums of a piece from its V, to the bit as a step would have left them."""
        self._plan.num_threads = min(torch.get_num_threads(), self._most_threads)
        self._library.dessilbi_sums(self._address, piece)

    def step(self, found_inf: Tensor | None = None, grad_scale: Tensor | None = None) -> None:
        """Advance all pieces that move; on the CPU a GradScaler skips whole steps by itself."""
        assert found_inf is None
        assert grad_scale is None
        self._plan.num_threads = min(torch.get_num_threads(), self._most_threads)
        self._library.dessilbi_step(self._address)
