# SPDX-License-Identifier: Apache-2.0
"""Structures: aliases, blocks, norms and the proximal operator, against plain Python loops."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import block_of, cut_shapes, cut_tensors, shapes, tensors
from torch.testing import assert_close

from dessilbi.blocks.structure import (
    alias_of,
    block_norms,
    block_size,
    expand,
    grid_shape,
    is_elementwise,
    resolve,
    shrink,
    shrink_scale,
)

LAMBDAS = st.floats(1e-3, 30.0)


def elements(shape):
    return itertools.product(*(range(size) for size in shape))


def brute_norms(x, block):
    squares = {}
    for index in elements(x.shape):
        key = block_of(index, block, x.shape)
        squares[key] = squares.get(key, 0.0) + float(x[index]) ** 2
    return {key: math.sqrt(square) for key, square in squares.items()}


def same_block_by_alias(alias, a, b):
    """Whether two elements belong together, straight from the table's words."""
    if alias in ("filter", "neuron"):
        return a[0] == b[0]
    if alias == "channel":
        return a[1] == b[1]
    if alias == "kernel":
        return a[:2] == b[:2]
    if alias.startswith("head:"):
        return a[0] // int(alias[5:]) == b[0] // int(alias[5:])
    return alias == "layer" or a == b


ALIAS_CASES = [
    (alias, shape)
    for shape in [(3,), (4, 3), (2, 3, 2), (2, 3, 2, 2), (2, 2, 1, 3, 2)]
    for alias, lowest, highest in [
        ("element", 0, 9),
        ("layer", 0, 9),
        ("filter", 2, 9),
        ("neuron", 2, 9),
        ("channel", 2, 9),
        ("kernel", 3, 9),
        ("head:2", 2, 2),
    ]
    if lowest <= len(shape) <= highest
]


@pytest.mark.parametrize(("alias", "shape"), ALIAS_CASES)
def test_alias_joins_exactly_the_elements_its_name_says(alias, shape):
    block = resolve(alias, shape)
    together = 0
    for a, b in itertools.combinations(elements(shape), 2):
        expected = same_block_by_alias(alias, a, b)
        assert (block_of(a, block, shape) == block_of(b, block, shape)) == expected
        together += expected
    assert (together > 0) == (alias != "element")


@pytest.mark.parametrize("alias", ["element", "layer"])
def test_a_tensor_without_dimensions_is_one_block(alias):
    assert resolve(alias, ()) == ()
    assert grid_shape((), ()) == ()
    assert block_size((), ()) == 1


@given(cut_shapes())
def test_a_block_tuple_resolves_to_itself(case):
    shape, block = case
    assert resolve(block, shape) == block
    assert resolve(list(block), torch.Size(shape)) == block


def test_packed_parts_may_be_lists_and_one_part_is_a_plain_length():
    assert resolve(([2, 1], [4]), (6, 8)) == ((2, 1), 4)
    assert resolve("head:2+1+1", (8, 3)) == ((2, 1, 1), None)
    assert alias_of(((2, 1, 1), None)) == "head:2+1+1"


@given(shapes())
def test_element_and_layer_fit_every_shape(shape):
    assert resolve("element", shape) == (1,) * len(shape)
    assert resolve("layer", shape) == (None,) * len(shape)


@pytest.mark.parametrize(
    ("structure", "shape", "message"),
    [
        ("filters", (4, 3), r"'filters' of fc\.weight is not known: use one of element, filter"),
        ("", (4, 3), r"'' of fc\.weight is not known"),
        ("filter:2", (4, 3), r"'filter:2' of fc\.weight is not known"),
        ("head", (4, 3), r"'head' of fc\.weight is not known"),
        ("head:0", (4, 3), r"'head:0' of fc\.weight is not known"),
        ("head:-2", (4, 3), r"'head:-2' of fc\.weight is not known"),
        ("head:\N{ARABIC-INDIC DIGIT TWO}", (4, 3), r"of fc\.weight is not known"),
        ("filter", (4,), r"'filter' needs .* 2 or more dimensions but fc\.weight has shape \(4,\)"),
        ("neuron", (), r"'neuron' needs .* 2 or more dimensions but fc\.weight has shape \(\)"),
        ("channel", (4,), r"'channel' needs .* 2 or more .* use \"element\", \"layer\", None or a"),
        ("kernel", (4, 3), r"'kernel' needs .* 3 or more dimensions"),
        ("head:2", (4, 3, 2), r"'head:2' needs a tensor with 2 dimensions .* give a tuple"),
        ("head:3", (4, 3), r"does not divide fc\.weight .* blocks of 3 .* dimension 0 of size 4"),
        ((1,), (4, 3), r"\(1,\) has 1 entries but fc\.weight has shape \(4, 3\): give one"),
        ((1, None, None), (4, 3), r"has 3 entries"),
        ((3, None), (4, 3), r"does not divide fc\.weight .* dimension 0 of size 4; choose a div"),
        ((None, 6), (4, 3), r"blocks of 6 do not fit dimension 1 of size 3"),
        ((0, None), (4, 3), r"fc\.weight has the block length 0: each entry is a whole number"),
        ((-1, None), (4, 3), r"block length -1"),
        ((True, None), (4, 7), r"block length True"),
        ((1.0, None), (4, 9), r"block length 1\.0"),
        (("1", None), (4, 3), r"block length '1'"),
        ((np.int64(2), None), (4, 11), r"block length np\.int64\(2\)"),
        (
            ((), None),
            (4, 3),
            r"block length \(\): .* a tuple of them \(one per packed part\), or None",
        ),
        (((1, 0), None), (4, 3), r"block length \(1, 0\)"),
        (((2, 1), None), (4, 3), r"blocks of 3 in all do not fit dimension 0 of size 4"),
        ("head:2+1", (4, 3), r"blocks of 3 in all do not fit dimension 0 of size 4"),
        ("head:2+", (4, 3), r"'head:2\+' of fc\.weight is not known"),
        (5, (4, 3), r"structure 5 of fc\.weight is not allowed: use one of"),
        ({1, 2}, (4, 3), r"structure \{1, 2\} of fc\.weight is not allowed"),
    ],
)
def test_a_structure_that_does_not_fit_is_refused_with_its_remedy(structure, shape, message):
    with pytest.raises(ValueError, match=message):
        resolve(structure, shape, name="fc.weight")


@pytest.mark.parametrize("entry", [True, 1.0])
def test_a_bad_entry_is_refused_also_after_an_equal_good_one(entry):
    assert resolve((1, None), (4, 5)) == (1, None)
    with pytest.raises(ValueError, match="block length"):
        resolve((entry, None), (4, 5))


def test_an_unhashable_entry_is_refused_like_any_other_bad_entry():
    with pytest.raises(ValueError, match="block length"):
        resolve(({1}, None), (4, 5))


@given(cut_shapes())
def test_grid_and_block_size_count_blocks_and_their_elements(case):
    shape, block = case
    counts = {}
    for index in elements(shape):
        key = block_of(index, block, shape)
        counts[key] = counts.get(key, 0) + 1
    grid = grid_shape(block, shape)
    assert set(counts) == set(elements(grid))
    assert set(counts.values()) == {block_size(block, shape)}


@given(cut_tensors())
def test_block_norms_equal_a_loop_over_elements(case):
    x, block = case
    norms = block_norms(x, block)
    assert norms.dtype == x.dtype
    assert tuple(norms.shape) == grid_shape(block, x.shape)
    for key, norm in brute_norms(x, block).items():
        assert float(norms[key]) == pytest.approx(norm, rel=1e-12, abs=1e-300)


@given(cut_shapes())
def test_expand_gives_every_element_the_value_of_its_block(case):
    shape, block = case
    grid = grid_shape(block, shape)
    values = torch.arange(math.prod(grid)).reshape(grid)
    full = expand(values, block, shape)
    assert tuple(full.shape) == shape
    for index in elements(shape):
        assert full[index] == values[block_of(index, block, shape)]


@given(cut_tensors(), LAMBDAS)
def test_shrink_equals_a_loop_over_blocks(case, lam):
    x, block = case
    norms = brute_norms(x, block)
    result = shrink(x, block, lam)
    for index in elements(x.shape):
        norm = norms[block_of(index, block, x.shape)]
        scale = max(0.0, 1 - lam / norm) if norm else 0.0
        assert float(result[index]) == pytest.approx(scale * float(x[index]), rel=1e-9, abs=1e-12)


@given(cut_tensors(), LAMBDAS, st.data())
def test_prox_is_non_expansive(case, lam, data):
    x, block = case
    y = data.draw(tensors(tuple(x.shape)))
    moved = torch.linalg.vector_norm(shrink(x, block, lam) - shrink(y, block, lam))
    assert moved <= torch.linalg.vector_norm(x - y) * (1 + 1e-12)


@given(cut_tensors(), LAMBDAS)
def test_prox_satisfies_its_optimality_condition(case, lam):
    """x - prox is in lam times the subdifferential of the sum of block norms at prox."""
    x, block = case
    p = shrink(x, block, lam)
    rest, norms = x - p, block_norms(p, block)
    dead = expand(norms == 0, block, x.shape)
    assert (block_norms(rest * dead, block) <= lam * (1 + 1e-12)).all()
    direction = p / expand(norms, block, x.shape)
    assert_close(rest[~dead], (lam * direction)[~dead], rtol=1e-8, atol=1e-12)


@given(cut_tensors(), LAMBDAS)
def test_prox_keeps_exactly_the_blocks_above_the_threshold(case, lam):
    x, block = case
    above = block_norms(x, block) > lam
    assert torch.equal(shrink_scale(block_norms(x, block), lam) > 0, above)


def test_the_smallest_excess_over_the_threshold_is_kept():
    for dtype in (torch.float32, torch.float64):
        lam = torch.tensor(0.1, dtype=dtype)
        norms = torch.stack([lam, torch.nextafter(lam, torch.ones_like(lam))])
        assert (shrink_scale(norms, float(lam)) > 0).tolist() == [False, True]


@given(shapes().flatmap(tensors), LAMBDAS)
def test_prox_of_single_elements_is_soft_thresholding(x, lam):
    soft = x.sign() * (x.abs() - lam).clamp(min=0)
    assert_close(shrink(x, (1,) * x.dim(), lam), soft, rtol=1e-9, atol=1e-12)


@given(cut_tensors(), LAMBDAS, st.floats(1e-2, 1e2))
def test_prox_is_positively_homogeneous(case, lam, factor):
    x, block = case
    assert_close(
        shrink(factor * x, block, factor * lam),
        factor * shrink(x, block, lam),
        rtol=1e-9,
        atol=1e-9 * factor,
    )


@given(cut_tensors())
def test_prox_with_infinite_lambda_is_zero(case):
    x, block = case
    assert torch.count_nonzero(shrink(x, block, math.inf)) == 0
    assert not shrink(x, block, math.inf).isnan().any()


@given(cut_tensors())
def test_prox_with_lambda_zero_is_the_identity(case):
    x, block = case
    assert torch.equal(shrink(x, block, 0.0), x)


def test_a_lambda_below_the_smallest_float32_makes_no_nan():
    scales = shrink_scale(torch.tensor([0.0, 1.0]), 1e-50)
    assert_close(scales, torch.tensor([0.0, 1.0]))


@pytest.mark.parametrize(
    ("shape", "block"),
    [((0,), (1,)), ((0,), (None,)), ((0, 3), (1, None)), ((4, 0), (2, None)), ((0, 4), (None, 2))],
)
def test_tensors_without_elements_pass_through(shape, block):
    x = torch.zeros(shape)
    assert resolve(block, shape) == block
    assert tuple(block_norms(x, block).shape) == grid_shape(block, shape)
    assert torch.count_nonzero(block_norms(x, block)) == 0
    assert tuple(shrink(x, block, 1.0).shape) == shape


def test_a_tensor_without_dimensions_is_soft_thresholded():
    assert_close(shrink(torch.tensor(-3.0), (), 1.0), torch.tensor(-2.0))
    assert_close(block_norms(torch.tensor(-3.0), ()), torch.tensor(3.0))
    assert expand(torch.tensor(True), (), ()).shape == ()


@pytest.mark.parametrize("structure", ["element", "filter", "channel", "kernel", "layer", (2, 3)])
@pytest.mark.parametrize("layout", ["transposed", "strided", "channels_last"])
def test_memory_layout_does_not_change_results(structure, layout):
    if layout == "channels_last" or structure == "kernel":
        x = torch.randn(4, 6, 3, 2).contiguous(memory_format=torch.channels_last)
        x = x if layout == "channels_last" else x[:, :, ::2]
        structure = (2, 3, None, 1) if structure == (2, 3) else structure
    else:
        x = torch.randn(6, 4).t() if layout == "transposed" else torch.randn(4, 12)[:, ::2]
    block = resolve(structure, x.shape)
    plain = x.clone(memory_format=torch.contiguous_format)
    assert plain.stride() != x.stride()
    assert_close(block_norms(x, block), block_norms(plain, block))
    lam = float(block_norms(plain, block).median()) / 2
    assert_close(shrink(x, block, lam), shrink(plain, block, lam))
    assert torch.count_nonzero(shrink(x, block, lam)) > 0


def test_is_elementwise_goes_by_form():
    assert is_elementwise((1, 1))
    assert is_elementwise(())
    assert not is_elementwise((1, None))
