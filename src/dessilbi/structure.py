# SPDX-License-Identifier: Apache-2.0
"""Structure: how a tensor is cut into blocks that are selected or dropped together.

A structure is a plain tuple with one entry per dimension: how long a block is along it, ``None``
for all of it. The blocks of a tensor form its *grid*: one entry per dimension, how many blocks lie
along it. Values per block (norms, scales, masks) are tensors of the grid's shape.
"""

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

Block = tuple[int | None, ...]
Structure = str | Sequence[int | None]

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
    | ``"layer"`` | all None | any |

    Args:
        structure: An alias of the table, or one block length per dimension.
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
        if length is not None and size % length:
            raise ValueError(
                f"structure {structure!r} does not divide {name} of shape {shape}: blocks of "
                f"{length} do not fit dimension {dim} of size {size}; choose a divisor or None"
            )
    return block


def _as_tuple(structure: object, name: str) -> Block:
    if not isinstance(structure, Sequence) or isinstance(structure, bytes):
        raise ValueError(f"structure {structure!r} of {name} is not allowed: use {_ALLOWED}")
    for length in structure:
        if length is not None and (type(length) is not int or length < 1):
            raise ValueError(
                f"structure {structure!r} of {name} has the block length {length!r}: "
                f"each entry is a whole number >= 1 or None"
            )
    return tuple(structure)


def _from_alias(alias: str, shape: tuple[int, ...], name: str) -> Block:
    rank = len(shape)
    kind, _, length = alias.partition(":")
    needed = {"element": 0, "layer": 0, "filter": 2, "neuron": 2, "channel": 2, "kernel": 3}
    if kind == "head" and length.isascii() and length.isdecimal() and int(length) >= 1:
        if rank != 2:
            raise ValueError(
                f"structure {alias!r} needs a tensor with 2 dimensions but {name} has shape "
                f"{shape}: give a tuple with one block length (or None) per dimension"
            )
        return (int(length), None)
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
        if dim == 0 and len(block) == 2:
            return f"head:{length}"
    return block


def grid_shape(block: Block, shape: Sequence[int]) -> tuple[int, ...]:
    """Return how many blocks lie along each dimension.

    >>> grid_shape((1, None), (84, 120))
    (84, 1)
    """
    return tuple(
        1 if length is None else size // length for length, size in zip(block, shape, strict=True)
    )


def block_size(block: Block, shape: Sequence[int]) -> int:
    """Return the number of elements in one block.

    >>> block_size((1, None), (84, 120))
    120
    """
    return prod(
        size if length is None else length for length, size in zip(block, shape, strict=True)
    )


def is_elementwise(block: Block) -> bool:
    """Return whether every block is a single element by its form (all entries are 1)."""
    return all(length == 1 for length in block)


def _split(x: Tensor, block: Block) -> tuple[Tensor, list[int]]:
    """View ``x`` so that every block's own dimensions are apart; return them as well."""
    shape: list[int] = []
    inner: list[int] = []
    for length, size in zip(block, x.shape, strict=True):
        if length is None:
            inner.append(len(shape))
            shape.append(size)
        elif length == 1:
            shape.append(size)
        else:
            inner.append(len(shape) + 1)
            shape += [size // length, length]
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
        opaque: Tensor = torch.ops.dessilbi.block_norms(x, [length or 0 for length in block])
        return opaque
    return _reduce(x, block)


def _reduce(x: Tensor, block: Block) -> Tensor:
    parts, inner = _split(x, block)
    norms: Tensor = torch.linalg.vector_norm(parts, dim=inner)
    return norms.reshape(grid_shape(block, x.shape))


@torch.library.custom_op("dessilbi::block_norms", mutates_args=())
def _block_norms_op(x: Tensor, block: list[int]) -> Tensor:
    """block_norms as an operator; 0 stands for None, which a schema cannot hold."""
    return _reduce(x, tuple(length or None for length in block)).contiguous()


@_block_norms_op.register_fake
def _(x: Tensor, block: list[int]) -> Tensor:
    return x.new_empty(grid_shape(tuple(length or None for length in block), x.shape))


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
    for count, length, size in zip(values.shape, block, shape, strict=True):
        if length is None or length == 1:
            cut.append(count)
            wide.append(size)
        else:
            cut += [count, 1]
            wide += [count, length]
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
