# SPDX-License-Identifier: Apache-2.0
"""Hypothesis strategies: shapes, blocks that fit them, tensors cut into blocks; blocks by loops."""

import torch
from hypothesis import strategies as st

MAX_SIDE = (12, 8, 5, 3, 3)  # longest side by rank, so that tensors stay small


def shapes(min_rank=1, max_rank=5, min_side=1):
    """Shapes of rank 1 to 5."""
    return st.integers(min_rank, max_rank).flatmap(
        lambda rank: st.tuples(*[st.integers(min_side, MAX_SIDE[rank - 1])] * rank)
    )


def block_lengths(size):
    """Every length that divides ``size``, None, or lengths of packed parts."""
    plain = [None, *(n for n in range(1, size + 1) if size % n == 0)]
    parts = [(n, n) for n in range(1, size + 1) if size % (2 * n) == 0]
    parts += [(n, 1) for n in range(2, size) if size % (n + 1) == 0]
    parts += [(1, 2, 1)] * (size % 4 == 0)
    return st.sampled_from([*plain, *parts])


@st.composite
def cut_shapes(draw, min_rank=1, max_rank=5):
    """A shape and a block that divides it."""
    shape = draw(shapes(min_rank, max_rank))
    return shape, tuple(draw(block_lengths(size)) for size in shape)


@st.composite
def tensors(draw, shape):
    """A float64 tensor with entries over several magnitudes, some of them zero."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    x *= 10.0 ** torch.randint(-2, 2, shape, generator=generator).double()
    return x * (torch.rand(shape, generator=generator) > draw(st.sampled_from([0.0, 0.3])))


@st.composite
def cut_tensors(draw):
    """A float64 tensor and a block that divides it."""
    shape, block = draw(cut_shapes())
    return draw(tensors(shape)), block


def block_of(index, block, shape):
    """Grid position of the block that holds the element at ``index``."""
    return tuple(place(*where) for where in zip(index, block, shape, strict=True))


def place(i, length, size):
    """The block of an index along one dimension."""
    if not isinstance(length, tuple):
        return 0 if length is None else i // length
    count = size // sum(length)
    for part in length:
        if i < part * count:
            return i // part
        i -= part * count
    raise AssertionError("behind the last part")
