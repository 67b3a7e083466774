# SPDX-License-Identifier: Apache-2.0
"""The fused step on CUDA: Triton kernels over tables of addresses, so that few launches do.

One launch turns the carried sums into factors kappa max(0, 1 - lam/||V_g||), then one per shape of
tile advances all tensors of that shape. All that a launch reads lies in memory of the device and
is written by launches: a captured CUDA graph holds nothing of the host, and follows a tensor lr.
Each sum is stored by one program in one order; nothing is added atomically.
"""

from typing import Any

import triton
import triton.language as tl

ELEMENTS = 1024  # of one program of `advance`
BLOCKS = 128  # of one program of `scales`
WORDS = 8  # of one launch of `write`
PLAIN, SOFT, MANY = range(3)  # what V is: none, independent single elements, blocks

# Columns of the tables, in 64-bit words: integers, addresses, or the bits of a float64.
COLUMNS = (
    *("w", "m", "v", "old", "scale", "sums", "lam", "group", "fresh", "moves"),
    *("B", "C", "D", "num_blocks", "num_inner", "num_tiles"),
)
UNIT_COLUMNS = ("first_member", "num_members", "num_blocks", "lam", "lams")
_ROW: Any = tl.constexpr(len(COLUMNS))
_UNIT_ROW: Any = tl.constexpr(len(UNIT_COLUMNS))
_OPTIONS_ROW: Any = tl.constexpr(8)
_BLOCKS: Any = tl.constexpr(BLOCKS)
_SOFT: Any = tl.constexpr(SOFT)
_PLAIN: Any = tl.constexpr(PLAIN)

_WORDS = [f"w{i}" for i in range(WORDS)]


@triton.jit(do_not_specialize=["at", "count", *_WORDS])  # type: ignore[untyped-decorator]
def write(  # type: ignore[no-untyped-def]
    table,
    at: tl.int64,
    count: tl.int64,
    w0: tl.int64,
    w1: tl.int64,
    w2: tl.int64,
    w3: tl.int64,
    w4: tl.int64,
    w5: tl.int64,
    w6: tl.int64,
    w7: tl.int64,
):
    """Write up to eight words into a table; they travel as arguments of the launch."""
    i = tl.arange(0, 8)
    low = tl.where(i == 0, w0, tl.where(i == 1, w1, tl.where(i == 2, w2, w3)))
    high = tl.where(i == 4, w4, tl.where(i == 5, w5, tl.where(i == 6, w6, w7)))
    tl.store(table + at + i, tl.where(i < 4, low, high), mask=i < count)


@triton.jit
def _float(word):  # type: ignore[no-untyped-def]
    return word.to(tl.float64, bitcast=True)


@triton.jit
def scales(tensors, options, units, members, places):  # type: ignore[no-untyped-def]
    """Turn the sums of 128 blocks of a unit into their factors, for all members."""
    place = tl.program_id(0) * 2
    unit = units + tl.load(places + place) * _UNIT_ROW
    first, count, num_blocks = tl.load(unit), tl.load(unit + 1), tl.load(unit + 2)
    block = tl.load(places + place + 1) + tl.arange(0, _BLOCKS)
    inside = block < num_blocks
    total = tl.zeros([_BLOCKS], dtype=tl.float64)
    for j in range(count):
        tensor = tensors + tl.load(members + first + j) * _ROW
        sums = tl.load(tensor + 5).to(tl.pointer_type(tl.float64))
        own = tl.zeros([_BLOCKS], dtype=tl.float64)
        for k in range(tl.load(tensor + 15)):
            own += tl.load(sums + k * num_blocks + block, mask=inside, other=0.0)
        total += own
    norm = tl.sqrt(total)
    lams = tl.load(unit + 4)
    many = tl.where(lams != 0, inside, False)
    lam = tl.load(lams.to(tl.pointer_type(tl.float64)) + block, mask=many, other=0.0)
    lam = tl.where(many, lam, _float(tl.load(unit + 3)))
    # As structure.shrink_scale: positive exactly above lam, and a NaN stays visible.
    scale = tl.where(norm <= lam, 0.0, (norm - lam) / tl.where(norm == 0.0, 1.0, norm))
    for j in range(count):
        tensor = tensors + tl.load(members + first + j) * _ROW
        kappa = _float(tl.load(options + tl.load(tensor + 7) * _OPTIONS_ROW + 1))
        out = tl.load(tensor + 4).to(tl.pointer_type(tl.float64))
        tl.store(out + block, scale * kappa, mask=inside)


@triton.jit(do_not_specialize=["stepping"])  # type: ignore[untyped-decorator]
def advance(  # type: ignore[no-untyped-def]
    tensors,
    options,
    grads,
    places,
    found_inf,
    grad_scale,
    stepping,
    STORED: tl.constexpr,
    WIDE: tl.constexpr,
    KIND: tl.constexpr,
    HIGH: tl.constexpr,
    WIDTH: tl.constexpr,
    MOMENTUM: tl.constexpr,
    COUPLE: tl.constexpr,
):
    """Advance HIGH blocks by WIDTH of their elements; leave the sums of squares of the new V.

    With ``stepping`` 0, or where an infinite gradient was found, only the sums are computed: by the
    same instructions, so that they are the same to the bit.
    """
    place = places + tl.program_id(0) * 3
    number, first_block, first_inner = tl.load(place), tl.load(place + 1), tl.load(place + 2)
    tensor = tensors + number * _ROW
    moves = (tl.load(tensor + 9) * stepping != 0) & (tl.load(found_inf) == 0.0)
    B, C, D = tl.load(tensor + 10), tl.load(tensor + 11), tl.load(tensor + 12)
    num_blocks, num_inner = tl.load(tensor + 13), tl.load(tensor + 14)
    block, inner = first_block + tl.arange(0, HIGH), first_inner + tl.arange(0, WIDTH)
    at = ((block // C) * (B * C * D) + (block % C) * D)[:, None]
    at = at + ((inner // D) * (C * D) + inner % D)[None, :]
    inside = (block < num_blocks)[:, None] & (inner < num_inner)[None, :]
    stored = tl.where(moves, inside, False)

    own = options + tl.load(tensor + 7) * _OPTIONS_ROW
    lr, kappa = _float(tl.load(own)), _float(tl.load(own + 1))
    minus_klr, alpha = (-(kappa * lr)).to(WIDE), lr.to(WIDE)
    w = tl.load(tensor).to(tl.pointer_type(STORED)) + at
    now = tl.load(w, mask=inside, other=0.0).to(WIDE)
    after = now
    if not COUPLE:
        g = tl.load(grads + number).to(tl.pointer_type(STORED)) + at
        d = tl.load(g, mask=stored, other=0.0).to(WIDE) / tl.load(grad_scale).to(WIDE)
        d = tl.where(tl.load(own + 7) != 0, -d, d) + _float(tl.load(own + 5)).to(WIDE) * now
        if MOMENTUM:
            momentum = _float(tl.load(own + 3)).to(WIDE)
            undamped = (1.0 - _float(tl.load(own + 4))).to(WIDE)
            undamped = tl.where(tl.load(tensor + 8) != 0, 1.0, undamped)
            m = tl.load(tensor + 1).to(tl.pointer_type(STORED)) + at
            b = tl.load(m, mask=stored, other=0.0).to(WIDE) * momentum + undamped * d
            tl.store(m, b.to(STORED), mask=stored)
            d = tl.where(tl.load(own + 6) != 0, d + momentum * b, b)
        after = now + minus_klr * d

    if KIND != _PLAIN:
        v_at = tl.load(tensor + 2).to(tl.pointer_type(WIDE)) + at
        v = tl.load(v_at, mask=inside, other=0.0)
        if KIND == _SOFT:
            lam = _float(tl.load(tensor + 6)).to(WIDE)
            gamma = (v - tl.minimum(tl.maximum(v, -lam), lam)) * kappa.to(WIDE)
        else:
            factor = tl.load(tensor + 4).to(tl.pointer_type(tl.float64)) + block
            scale = tl.load(factor, mask=block < num_blocks, other=0.0).to(WIDE)
            gamma = v * scale[:, None]
        before = now
        if COUPLE:
            old = tl.load(tensor + 3).to(tl.pointer_type(STORED)) + at
            before = tl.load(old, mask=inside, other=0.0).to(WIDE)
        # Old W and old Gamma on purpose: both updates use the values before the step.
        r = (before - gamma) / _float(tl.load(own + 2)).to(WIDE)
        v = tl.where(stored, v + alpha * r, v)
        after = after + minus_klr * r
        tl.store(v_at, v, mask=stored)
        if KIND != _SOFT:
            sums = tl.load(tensor + 5).to(tl.pointer_type(tl.float64))
            sums = sums + (first_inner // WIDTH) * num_blocks + block
            squares = tl.sum(tl.where(inside, v * v, 0.0), axis=1)
            tl.store(sums, squares.to(tl.float64), mask=block < num_blocks)
    tl.store(w, after.to(STORED), mask=stored)
