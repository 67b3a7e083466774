# SPDX-License-Identifier: Apache-2.0
"""Sharded tensors: norms of blocks whose elements lie on several ranks (FSDP2's DTensors).

Every rank works on its own shard, with the shard's place in the whole tensor. Norms need one
all-reduce of partial sums for all tensors together; straddling blocks and empty shards are no
special case. Plain tensors pass through untouched.
"""

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dessilbi.blocks.structure import Block, Length, block_norms, grid_shape, owners


def is_sharded(x: Tensor) -> bool:
    """Return whether ``x`` is a DTensor."""
    # Whoever holds one has loaded this module; importing it ourselves would be slow.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(x, module.DTensor)


def local(x: Tensor) -> Tensor:
    """Return this rank's part of ``x``, which shares its memory; a plain tensor is itself."""
    part: Tensor = x.to_local() if is_sharded(x) else x  # type: ignore[attr-defined]
    return part


def check_placements(x: Tensor, name: str) -> None:
    """Refuse what cannot be worked on shard by shard.

    Raises:
        ValueError: A placement is neither Replicate nor Shard.
    """
    if not is_sharded(x):
        return
    from torch.distributed.tensor import Replicate, Shard

    for placement in x.placements:  # type: ignore[attr-defined]
        if type(placement) not in (Replicate, Shard):
            raise ValueError(
                f"{name} is placed as {placement}: structures work on tensors that are replicated "
                f"or sharded; use FSDP2 without tensor parallelism for it"
            )


def _offset(x: Any) -> tuple[int, ...]:
    """Where this rank's shard begins in the whole tensor."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    _, offset = compute_local_shape_and_global_offset(x.shape, x.device_mesh, x.placements)
    return tuple(int(start) for start in offset)


def _shard_groups(x: Any) -> tuple[Any, ...]:
    """The process groups over which ``x`` is cut."""
    return tuple(
        x.device_mesh.get_group(dim)
        for dim, placement in enumerate(x.placements)
        if placement.is_shard()
    )


def _block_ids(start: int, count: int, length: Length, size: int, device: torch.device) -> Tensor:
    """For ``count`` indices from ``start`` along a dimension, the block each belongs to."""
    if length is None:
        return torch.zeros(count, dtype=torch.int64, device=device)
    if isinstance(length, tuple):
        return owners(length, size)[start : start + count].to(device)
    return torch.arange(start, start + count, device=device) // length


def _partial_squares(x: Any, block: Block) -> Tensor:
    """Sums of squares per block of the whole grid, of this rank's elements only."""
    squares = local(x).square()
    for dim, (start, length) in enumerate(zip(_offset(x), block, strict=True)):
        blocks = grid_shape(block, x.shape)[dim]
        shape = list(squares.shape)
        ids = _block_ids(start, shape[dim], length, x.shape[dim], squares.device)
        shape[dim] = blocks
        squares = squares.new_zeros(shape).index_add_(dim, ids, squares)
    return squares


def norms(tensors: Sequence[Tensor], blocks: Sequence[Block]) -> list[Tensor]:
    """Return the norm of every block of every tensor, the same on all ranks.

    Args:
        tensors: Plain or sharded tensors.
        blocks: Their block shapes.

    Returns:
        Plain tensors of the grids' shapes.
    """
    result: list[Tensor] = [torch.empty(0)] * len(tensors)
    together: dict[tuple[Any, ...], list[int]] = {}
    for i, (x, block) in enumerate(zip(tensors, blocks, strict=True)):
        if is_sharded(x):
            together.setdefault((_shard_groups(x), x.dtype, local(x).device), []).append(i)
        else:
            result[i] = block_norms(x, block)
    for (groups, *_), indices in together.items():
        partial = [_partial_squares(tensors[i], blocks[i]) for i in indices]
        flat = torch.cat([p.reshape(-1) for p in partial])
        for group in groups:
            torch.distributed.all_reduce(flat, group=group)
        sums = torch.split(flat, [p.numel() for p in partial])
        for i, p, total in zip(indices, partial, sums, strict=True):
            result[i] = total.reshape(p.shape).sqrt()
    return result


def local_values(values: Tensor, block: Block, x: Tensor) -> tuple[Tensor, Block]:
    """Return values per block as this rank needs them, and the block shape of its shard.

    Along dimensions in which blocks may straddle shards, the values are spread to one per index.
    """
    if not is_sharded(x):
        return values, block
    own, cut = values, list(block)
    for dim, (start, length) in enumerate(zip(_offset(x), block, strict=True)):
        if length is None:
            continue
        ids = _block_ids(start, local(x).shape[dim], length, x.shape[dim], values.device)
        own, cut[dim] = own.index_select(dim, ids), 1
    return own, tuple(cut)


def local_part(whole: Tensor, x: Tensor) -> Tensor:
    """Return the part of ``whole`` (a plain tensor of ``x``'s shape) that lies on this rank."""
    if not is_sharded(x):
        return whole
    for dim, (start, count) in enumerate(zip(_offset(x), local(x).shape, strict=True)):
        whole = whole.narrow(dim, min(start, whole.shape[dim]), count)
    return whole


def like(part: Tensor, x: Tensor) -> Tensor:
    """Return ``part``, this rank's shard, as a whole tensor placed as ``x`` is."""
    if not is_sharded(x):
        return part
    from torch.distributed.tensor import DTensor

    whole: Tensor = DTensor.from_local(
        part,
        x.device_mesh,  # type: ignore[attr-defined]
        x.placements,  # type: ignore[attr-defined]
        run_check=False,
        shape=x.shape,
        stride=x.stride(),
    )
    return whole


def any_nonzero(x: Tensor) -> bool:
    """Return whether any element of ``x`` is not zero, the same answer on all ranks."""
    found = local(x).any()
    if is_sharded(x):
        flag = found.to(torch.int32)
        for group in _shard_groups(x):
            torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX, group=group)
        found = flag > 0
    return bool(found)
