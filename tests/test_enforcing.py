# SPDX-License-Identifier: Apache-2.0
"""Under an enforced ticket, block_scale "sqrt" counts living entries only."""

import copy
import math

import pytest
import torch
from torch import nn

from dessilbi import DessiLBI, Path, Ticket, wrap
from dessilbi.blocks.enforcing import living_entries
from dessilbi.blocks.ticket import TensorSpec
from dessilbi.optimizers.dual import members, shrinks_of, threshold, units_of

LAM = 0.3
MASK = torch.tensor([[1, 1, 0, 1], [0, 0, 0, 0], [1, 1, 1, 1], [0, 0, 1, 0]]).bool()


def build(structure="filter", scale="sqrt", **options):
    torch.manual_seed(0)
    layer = nn.Linear(4, 4, bias=False)
    group = {"params": [("weight", layer.weight)], "structure": structure, "block_scale": scale}
    return layer, DessiLBI([group | options], lr=0.1, nu=1.0, lam=LAM)


def ticket(mask=MASK):
    return Ticket({"weight": mask}, {"weight": TensorSpec(tuple(mask.shape), (1, 1))})


def lambdas(optimizer):
    (unit,) = units_of(members(optimizer))
    return threshold(unit)


def advance(layer, optimizer, k):
    optimizer.zero_grad()
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(k))
    (layer(x) - x).square().mean().backward()
    optimizer.step()


@pytest.mark.parametrize(
    ("structure", "counts"),
    [("filter", [3, 1, 4, 1]), ("channel", [2, 2, 2, 2]), ("layer", [8]), ((2, 2), [2, 1, 2, 3])],
    ids=str,
)
def test_lambda_is_that_of_the_living_entries(structure, counts):
    layer, optimizer = build(structure)
    whole = lambdas(optimizer)
    assert whole == LAM * math.sqrt(16 / len(counts))
    ticket().enforce(layer, optimizer)
    wanted = LAM * torch.tensor(counts, dtype=torch.float64).sqrt()  # a dead block counts as one
    torch.testing.assert_close(lambdas(optimizer).flatten(), wanted.float())


def test_other_scales_and_free_optimizers_are_left_alone():
    layer, optimizer = build(scale="unit")
    ticket().enforce(layer, optimizer)
    assert lambdas(optimizer) == LAM
    assert living_entries(build()[1], layer.weight, (1, None)) is None


def test_removing_the_handle_restores_lambda_and_a_copy_is_free():
    layer, optimizer = build()
    handle = ticket().enforce(layer, optimizer)
    assert isinstance(lambdas(optimizer), torch.Tensor)
    assert isinstance(lambdas(copy.deepcopy(optimizer)), float)
    handle.remove()
    assert lambdas(optimizer) == LAM * 2


def test_two_enforced_tickets_count_what_lives_in_both():
    layer, optimizer = build()
    ticket().enforce(layer, optimizer)
    assert lambdas(optimizer).flatten()[0] == pytest.approx(LAM * math.sqrt(3))
    other = torch.ones(4, 4).bool()
    other[0, 0] = False
    handle = ticket(other).enforce(layer, optimizer)
    assert lambdas(optimizer).flatten()[0] == pytest.approx(LAM * math.sqrt(2))
    handle.remove()
    assert lambdas(optimizer).flatten()[0] == pytest.approx(LAM * math.sqrt(3))


def test_units_count_over_their_members():
    torch.manual_seed(0)
    one, two = nn.Linear(4, 4, bias=False), nn.Linear(4, 6, bias=False)
    two.weight = nn.Parameter(torch.randn(6, 4))
    options = {"unit": "both", "block_scale": "sqrt"}
    optimizer = DessiLBI(
        [
            {"params": [("weight", one.weight)], "structure": "filter"} | options,
            {"params": [("other", two.weight)], "structure": "channel"} | options,
        ],
        lam=LAM,
    )
    ticket().enforce(one, optimizer)
    wanted = LAM * torch.tensor([3 + 6, 0 + 6, 4 + 6, 1 + 6], dtype=torch.float64).sqrt()
    torch.testing.assert_close(lambdas(optimizer).flatten(), wanted.float())


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("foreach", [False, True])
def test_support_gamma_and_the_step_agree_on_it(wrapped, foreach):
    """The trajectory is that of a layer whose rows are their living entries alone."""
    layer, optimizer = build(foreach=foreach)
    optimizer.param_groups[0]["lam"] = 0.05
    if wrapped:
        groups = [{"params": [("weight", layer.weight)], "structure": "filter"}]
        base = torch.optim.SGD(groups, lr=0.1, foreach=foreach)
        optimizer = wrap(base, nu=1.0, lam=0.05, block_scale="sqrt")
    row = nn.Parameter(layer.weight.detach()[0, MASK[0]].clone())
    alone = DessiLBI([row], lr=0.1, nu=1.0, lam=0.05, structure="layer", block_scale="sqrt")
    ticket().enforce(layer, optimizer)
    chosen = []
    for k in range(40):
        optimizer.zero_grad()
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(k))
        (layer(x) - x).square().mean().backward()
        row.grad = layer.weight.grad[0, MASK[0]].clone()
        optimizer.step()
        alone.step()
        gamma = optimizer.gamma()["weight"]
        chosen.append(bool(gamma[0].any()))
        assert bool(optimizer.support()["weight"][0]) == chosen[-1]
        torch.testing.assert_close(layer.weight.detach()[0, MASK[0]], row.detach())
    assert not chosen[0]
    assert chosen[-1]


def test_scores_and_tickets_of_a_path_stay_finite():
    layer, optimizer = build()
    path = Path(optimizer, every=1)
    ticket().enforce(layer, optimizer)
    for k in range(5):
        advance(layer, optimizer, k)
    scores = path.scores()["dual"]["weight"].flatten()
    assert torch.isfinite(scores).all()
    assert scores[1] == 0
    assert not path.ticket(density=0.8)["weight"][1]


def test_the_scale_of_gamma_keeps_the_precision_of_v():
    layer, optimizer = build()
    ticket().enforce(layer, optimizer)
    advance(layer, optimizer, 0)
    shrink = shrinks_of(optimizer, members(optimizer))[layer.weight]
    assert shrink.scale.dtype == torch.float32
    assert optimizer.state[layer.weight]["v"].dtype == torch.float32


def test_a_v_that_waits_for_its_base_is_masked_as_well():
    layer = nn.Linear(4, 4, bias=False)
    base = torch.optim.AdamW([("weight", layer.weight)], lr=0.1)
    optimizer = wrap(base, nu=1.0, lam=LAM, structure="filter")
    saved = optimizer.state_dict()
    optimizer.load_state_dict({**saved, "state": {0: {"v": torch.ones(4, 4)}}})
    assert not optimizer.state
    ticket().enforce(layer, optimizer)
    assert torch.equal(optimizer._waiting[layer.weight], MASK.float())
