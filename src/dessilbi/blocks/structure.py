# SPDX-License-Identifier: Apache-2.0
"""Structure: how a tensor is cut into blocks that are selected or dropped together.

A structure is a plain tuple with one entry per dimension: how long a block is along it, ``None``
for all of it. The blocks of a tensor form its *grid*: one entry per dimension, how many blocks lie
along it. Values per block (norms, scales, masks) are tensors of the grid's shape.

A dimension that packs several parts one behind the other (q, k and v) has a tuple as its entry, one
length per part: with ``(64, 64, 64)`` block b takes the b-th 64 indices of each third.
"""

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

Length = int | None | tuple[int, ...]
Block = tuple[Length, ...]
Structure = str | Sequence[int | Sequence[int] | None]

ALIASES = ("element", "filter", "neuron", "channel", "kernel", "head:N", "layer")
_ALLOWED = f"one of {', '.join(ALIASES)}, or a tuple with one block length (or None) per dimension"


def resolve(structure: Structure, shape: Sequence[int], *, name: str = "tensor") -> Block:
    """Return the block shape that ``structure`` means for a tensor of ``shape``.

    | alias | block | rank |
    |---|---|---|
    | ``"element"`` | all 1 | any |
    | ``"filter"`` = ``"neuron"`` | (1, None, ...): dimension 0 | >= 2 |
    | ``"channel"`` | (None, 1, None, ...): dimension 1 | >= 2 |
    | ``"kernel"`` | (1, 1, None, ...) | >= 3 |
    | ``"head:64"`` | (64, None) | 2 |
    | ``"head:64+64+64"`` | ((64, 64, 64), None): q, k and v in one weight | 2 |
    | ``"layer"`` | all None | any |

    Args:
        structure: An alias of the table, or one block length per dimension: None for all of it, a
            tuple of lengths where several parts lie one behind the other.
        shape: The tensor's shape.
        name: How error messages call the tensor.

    Returns:
        The block, a tuple with ``len(shape)`` entries.

    Raises:
        ValueError: The structure is unknown, has the wrong rank, or does not divide the tensor.

    >>> resolve("filter", (16, 6, 5, 5))
    (1, None, None, None)
    >>> resolve((4, 4), (84, 120))
    (4, 4)
    """
    shape = tuple(int(size) for size in shape)
    if isinstance(structure, str):
        block = _from_alias(structure, shape, name)
    else:
        block = _as_tuple(structure, name)
    if len(block) != len(shape):
        raise ValueError(
            f"structure {structure!r} has {len(block)} entries but {name} has shape {shape}: "
            f"give one block length (or None) for each of its {len(shape)} dimensions"
        )
    for dim, (length, size) in enumerate(zip(block, shape, strict=True)):
        if length is not None and size % extent(length, size):
            told = length if isinstance(length, int) else f"{extent(length, size)} in all"
            raise ValueError(
                f"structure {structure!r} does not divide {name} of shape {shape}: blocks of "
                f"{told} do not fit dimension {dim} of size {size}; choose a divisor or None"
            )
    return block


def _as_tuple(structure: object, name: str) -> Block:
    if not isinstance(structure, Sequence) or isinstance(structure, bytes):
        raise ValueError(f"structure {structure!r} of {name} is not allowed: use {_ALLOWED}")
    block: list[Length] = []
    for entry in structure:
        parts = tuple(entry) if isinstance(entry, list | tuple) else (entry,)
        if entry is not None and not (parts and all(type(n) is int and n >= 1 for n in parts)):
            raise ValueError(
                f"structure {structure!r} of {name} has the block length {entry!r}: each entry is "
                f"a whole number >= 1, a tuple of them (one per packed part), or None"
            )
        block.append(parts if len(parts) > 1 else parts[0])
    return tuple(block)


def _from_alias(alias: str, shape: tuple[int, ...], name: str) -> Block:
    rank = len(shape)
    kind, _, length = alias.partition(":")
    needed = {"element": 0, "layer": 0, "filter": 2, "neuron": 2, "channel": 2, "kernel": 3}
    parts = length.split("+")
    if kind == "head" and all(n.isascii() and n.isdecimal() and int(n) >= 1 for n in parts):
        if rank != 2:
            raise ValueError(
                f"structure {alias!r} needs a tensor with 2 dimensions but {name} has shape "
                f"{shape}: give a tuple with one block length (or None) per dimension"
            )
        return (tuple(map(int, parts)) if len(parts) > 1 else int(length), None)
    if alias not in needed:
        raise ValueError(f"structure {alias!r} of {name} is not known: use {_ALLOWED}")
    if rank < needed[alias]:
        raise ValueError(
            f"structure {alias!r} needs a tensor with {needed[alias]} or more dimensions but "
            f'{name} has shape {shape}: use "element", "layer", None or a tuple'
        )
    if kind == "element":
        return (1,) * rank
    ones = {"layer": (), "filter": (0,), "neuron": (0,), "channel": (1,), "kernel": (0, 1)}[kind]
    return tuple(1 if dim in ones else None for dim in range(rank))


def alias_of(block: Block) -> Structure:
    """Return the alias that means ``block`` where rows or columns are cut, else ``block`` itself.

    >>> alias_of((1, None, None, None)), alias_of((64, None)), alias_of((4, 4))
    ('filter', 'head:64', (4, 4))
    """
    cut = [(dim, length) for dim, length in enumerate(block) if length is not None]
    if len(block) >= 2 and len(cut) == 1:
        (dim, length) = cut[0]
        if length == 1 and dim < 2:
            return "channel" if dim else "neuron" if len(block) == 2 else "filter"
        if dim == 0 and len(block) == 2 and set(_parts(length)) != {1}:
            return f"head:{'+'.join(map(str, _parts(length)))}"
    return block


def _parts(length: int | tuple[int, ...]) -> tuple[int, ...]:
    return length if isinstance(length, tuple) else (length,)


def extent(length: Length, size: int) -> int:
    """Return how many indices one block takes along a dimension.

    >>> extent(None, 84), extent(4, 84), extent((2, 1, 1), 84)
    (84, 4, 4)
    """
    return size if length is None else sum(_parts(length))


def indices(length: Length, size: int) -> Tensor:
    """Return the indices that each block takes along a dimension, one row per block.

    >>> indices((2, 1), 6)
    tensor([[0, 1, 4],
            [2, 3, 5]])
    """
    parts = (size,) if length is None else _parts(length)
    count, start, found = size // max(1, sum(parts)), 0, []
    for part in parts:
        found.append(torch.arange(start, start + count * part).reshape(count, part))
        start += count * part
    return torch.cat(found, dim=1)


def owners(length: Length, size: int) -> Tensor:
    """Return the block that each index along a dimension belongs to.

    >>> owners((2, 1), 6)
    tensor([0, 0, 1, 1, 0, 1])
    """
    taken = indices(length, size)
    found = torch.empty(size, dtype=torch.int64)
    found[taken.reshape(-1)] = torch.arange(len(taken)).repeat_interleave(taken.shape[1])
    return found


def even_parts(length: Length) -> tuple[int, int] | None:
    """Return how many parts of which one length a block has; None: parts of several lengths."""
    if length is None or isinstance(length, int):
        return None if length is None else (1, length)
    return (len(length), length[0]) if len(set(length)) == 1 else None


def grid_shape(block: Block, shape: Sequence[int]) -> tuple[int, ...]:
    """Return how many blocks lie along each dimension.

    >>> grid_shape((1, None), (84, 120))
    (84, 1)
    """
    return tuple(
        1 if length is None else size // extent(length, size)
        for length, size in zip(block, shape, strict=True)
    )


def block_size(block: Block, shape: Sequence[int]) -> int:
    """Return the number of elements in one block.

    >>> block_size((1, None), (84, 120))
    120
    """
    return prod(extent(length, size) for length, size in zip(block, shape, strict=True))


def is_elementwise(block: Block) -> bool:
    """Return whether every block is a single element by its form (all entries are 1)."""
    return all(length == 1 for length in block)


def _split(x: Tensor, block: Block) -> tuple[Tensor, list[int]]:
    """View ``x`` so that every block's own dimensions are apart; return them as well."""
    shape: list[int] = []
    inner: list[int] = []
    for dim, (length, size) in enumerate(zip(block, x.shape, strict=True)):
        if length is None:
            inner.append(len(shape))
            shape.append(size)
            continue
        if length == 1:
            shape.append(size)
            continue
        if even_parts(length) is None:  # bring the parts of a block together
            x = x.index_select(dim, indices(length, size).reshape(-1).to(x.device))
        parts, run = even_parts(length) or (1, extent(length, size))
        if parts > 1:
            inner.append(len(shape))
            shape.append(parts)
        inner.append(len(shape) + 1)
        shape += [size // (parts * run), run]
    return (x if len(shape) == x.dim() else x.reshape(shape)), inner


def block_norms(x: Tensor, block: Block) -> Tensor:
    """Return the Euclidean norm of every block.

    Args:
        x: A floating point tensor.
        block: Its block shape (see :func:`resolve`).

    Returns:
        A tensor of the grid's shape, in the dtype of ``x``.

    >>> block_norms(torch.tensor([[3.0, 4.0], [0.0, 2.0]]), (1, None))
    tensor([[5.],
            [2.]])
    """
    if is_elementwise(block):
        return x.abs()
    if torch.compiler.is_compiling():
        # Inductor fails to fuse this reduction with the step around it; as one opaque operator
        # it compiles.
        opaque: Tensor = torch.ops.dessilbi.block_norms(x, _as_numbers(block))
        return opaque
    return _reduce(x, block)


def _reduce(x: Tensor, block: Block) -> Tensor:
    parts, inner = _split(x, block)
    norms: Tensor = torch.linalg.vector_norm(parts, dim=inner)
    return norms.reshape(grid_shape(block, x.shape))


def _as_numbers(block: Block) -> list[int]:
    """A block in a form that an operator's schema can hold: each entry after its number of parts.

    >>> _as_numbers((None, 4, (2, 1)))
    [0, 1, 4, 2, 2, 1]
    """
    entries = [() if length is None else _parts(length) for length in block]
    return [n for parts in entries for n in (len(parts), *parts)]


def _from_numbers(numbers: list[int]) -> Block:
    block: list[Length] = []
    while numbers:
        count, numbers = numbers[0], numbers[1:]
        parts, numbers = tuple(numbers[:count]), numbers[count:]
        block.append(None if not parts else parts[0] if count == 1 else parts)
    return tuple(block)


@torch.library.custom_op("dessilbi::block_norms", mutates_args=())
def _block_norms_op(x: Tensor, block: list[int]) -> Tensor:
    """block_norms as an operator."""
    return _reduce(x, _from_numbers(block)).contiguous()


@_block_norms_op.register_fake
def _(x: Tensor, block: list[int]) -> Tensor:
    return x.new_empty(grid_shape(_from_numbers(block), x.shape))


def expand(values: Tensor, block: Block, shape: Sequence[int]) -> Tensor:
    """Give every element the value of its block.

    Args:
        values: One value per block, of the grid's shape, any dtype.
        block: The block shape.
        shape: The tensor's shape.

    Returns:
        A tensor of ``shape``; a view where the grid allows it, so do not write into it.

    >>> expand(torch.tensor([[True], [False]]), (1, None), (2, 3))
    tensor([[ True,  True,  True],
            [False, False, False]])
    """
    cut: list[int] = []
    wide: list[int] = []
    for dim, (length, size) in enumerate(zip(block, shape, strict=True)):
        if isinstance(length, tuple) and even_parts(length) is None:
            values = values.index_select(dim, owners(length, size).to(values.device))
            length = 1
        count = values.shape[dim]
        parts, run = even_parts(length) or (1, 1)
        if length is None or parts * run == 1:
            cut.append(count)
            wide.append(size)
        else:
            packed = [parts] if parts > 1 else []
            cut += [*(1 for _ in packed), count, 1]
            wide += [*packed, count, run]
    return values.reshape(cut).expand(wide).reshape(tuple(shape))


def shrink(x: Tensor, block: Block, lam: float) -> Tensor:
    """Group soft-thresholding, the proximal operator of the (group) lasso.

    prox(x)_g = max(0, 1 - lam / ||x_g||_2) x_g   for every block g. With blocks of one element
    this is sign(x) max(|x| - lam, 0).

    Args:
        x: A floating point tensor.
        block: Its block shape.
        lam: The threshold, >= 0; ``inf`` gives zeros.

    Returns:
        A new tensor shaped like ``x``.

    Raises:
        ValueError: ``lam`` is negative or NaN.

    >>> shrink(torch.tensor([-3.0, 0.5]), (1,), 1.0)
    tensor([-2.,  0.])
    """
    if not lam >= 0:
        raise ValueError(f"lam={lam!r} is not allowed: it must be >= 0 (inf is allowed)")
    return x * expand(shrink_scale(block_norms(x, block), lam), block, x.shape)


def shrink_scale(norms: Tensor, lam: float | Tensor) -> Tensor:
    """Return max(0, 1 - lam / norm), positive exactly where norm > lam (one for all or per block).

    Written as (norm - lam) / norm: the difference of two close floats is exact, so the factor never
    rounds to 0 for a block above the threshold.

    >>> shrink_scale(torch.tensor([0.0, 1.0, 4.0]), 1.0)
    tensor([0.0000, 0.0000, 0.7500])
    """
    # A NaN norm must stay visible, so the test is for "not above", not for "above".
    return torch.where(norms <= lam, 0.0, (norms - lam) / norms)
