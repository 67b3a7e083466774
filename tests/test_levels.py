# SPDX-License-Identifier: Apache-2.0
"""The lambda above which a wanted share lies, against brute force."""

import pytest
import torch
from torch import nn

from dessilbi import DessiLBI
from dessilbi.dynamics import levels
from dessilbi.dynamics.levels import Blocks
from dessilbi.optimizers.dual import members, norms_of, units_of

GROUPS = [
    ((12, 8), "element", 1.0),
    ((9, 4, 2, 2), "filter", 1.0),
    ((6, 10), (2, 5), 1.0),
]


def blocks_of(
    seed, *, scale="unit", dtype=torch.float32, weights=(1.0, 1.0, 1.0), floors=(0, 0, 0)
):
    generator = torch.Generator().manual_seed(seed)
    groups = []
    for i, (shape, structure, _) in enumerate(GROUPS):
        param = nn.Parameter(torch.zeros(shape, dtype=dtype))
        groups.append({"params": [(f"p{i}", param)], "structure": structure, "lam": weights[i]})
    optimizer = DessiLBI(groups, block_scale=scale)
    for group in optimizer.param_groups:
        (param,) = group["params"]
        optimizer.state[param]["v"] = torch.randn(param.shape, generator=generator).to(dtype)
    units = units_of(members(optimizer))
    return Blocks(units, norms_of(optimizer, units), weights, floors), optimizer


def by_brute_force(blocks, budget):
    """The smallest of all norms, as lambdas, under which at most ``budget`` elements are kept."""
    shares = [n.double().flatten() / blocks.threshold(i, 1.0) for i, n in enumerate(blocks.norms)]
    for lam in torch.cat(shares).sort().values.tolist():
        above = [int((share > lam * (1 + 1e-9)).sum()) for share in shares]
        kept = zip(blocks.sizes, above, blocks.floors, strict=True)
        if sum(size * max(count, floor) for size, count, floor in kept) <= budget:
            return lam
    raise AssertionError


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("scale", ["unit", "sqrt"])
@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (1.0, 7.3, 0.31)], ids=str)
@pytest.mark.parametrize("floors", [(0, 0, 0), (1, 1, 1), (20, 0, 3)], ids=str)
@pytest.mark.parametrize("candidates", [4096, 3], ids=["sorted", "bisected"])
def test_the_level_is_that_of_brute_force(dtype, scale, weights, floors, candidates, monkeypatch):
    monkeypatch.setattr(levels, "CANDIDATES", candidates)
    for seed in range(2):
        blocks, _ = blocks_of(seed, scale=scale, dtype=dtype, weights=weights, floors=floors)
        assert blocks.kept([0, 0, 0]) <= 90
        for budget in (90, 130, 200, 299):
            level = blocks.level(budget)
            assert level == pytest.approx(by_brute_force(blocks, budget), rel=1e-12)
            assert blocks.kept(blocks.counts(level)) <= budget


def test_the_level_written_as_lambda_gives_the_support_that_was_counted():
    for seed in range(5):
        blocks, optimizer = blocks_of(seed, scale="sqrt", weights=(1.0, 7.3, 0.31))
        level = blocks.level(150)
        for group, weight in zip(optimizer.param_groups, blocks.weights, strict=True):
            group["lam"] = level * weight
        assert optimizer.support().kept_elements == blocks.kept(blocks.counts(level)) <= 150


def test_a_budget_for_everything_gives_a_lambda_that_is_still_one():
    blocks, optimizer = blocks_of(0)
    level = blocks.level(blocks.elements)
    assert level > 0
    for group in optimizer.param_groups:
        group["lam"] = level
    assert optimizer.support().density == 1


@pytest.mark.parametrize("index", [0, 1, 2])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_a_layers_own_level_keeps_just_its_best_blocks(index, count):
    blocks, _ = blocks_of(1, scale="sqrt", weights=(1.0, 7.3, 0.31))
    assert blocks.counts(blocks.own_level(index, count))[index] == count


def test_a_layers_own_level_for_all_of_its_blocks_keeps_them_all():
    blocks, _ = blocks_of(1)
    assert blocks.counts(blocks.own_level(1, 9))[1] == 9


def test_equal_norms_are_kept_together():
    blocks, _ = blocks_of(0)
    blocks.norms[1].fill_(2.0)
    assert blocks.counts(blocks.own_level(1, 3))[1] == 9
    level = blocks.level(200)
    assert blocks.counts(level)[1] in (0, 9)
    assert blocks.kept(blocks.counts(level)) <= 200
