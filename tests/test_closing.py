# SPDX-License-Identifier: Apache-2.0
"""A closed ticket marks everything that hangs on a dead block, and counts what compaction keeps."""

import pytest
import torch
from torch import nn

from dessilbi import close, compact
from dessilbi.blocks.ticket import TensorSpec, Ticket
from dessilbi.cuts.cutting import Cut, cut_tensor, cut_ticket
from dessilbi.testing import random_ticket

X = torch.randn(2, 4, 8, 8)


def dead_filters(model, dead):
    """A ticket from {name: dead filters}."""
    masks, specs = {}, {}
    for name, index in dead.items():
        shape = tuple(model.get_parameter(name).shape)
        specs[name] = TensorSpec(shape, (1,) + (None,) * (len(shape) - 1))
        masks[name] = torch.ones(specs[name].grid, dtype=torch.bool)
        masks[name][index] = False
    return Ticket(masks, specs)


def closed(model, dead):
    return close(dead_filters(model, dead), model, example_inputs=X)


def dead_columns(ticket, name):
    mask = ticket.mask_of(name)
    return (~mask.movedim(1, 0).reshape(mask.shape[1], -1).any(1)).nonzero().flatten().tolist()


def test_columns_that_read_a_dead_filter_are_dead():
    model = nn.Sequential(nn.Conv2d(4, 6, 3), nn.ReLU(), nn.Conv2d(6, 5, 3))
    ticket = closed(model, {"0.weight": [1, 4]})
    assert dead_columns(ticket, "2.weight") == [1, 4]
    assert int(ticket.mask_of("2.weight").sum()) == 5 * 4 * 9
    assert ticket.specs["2.weight"].block == (None, 1, None, None)


def test_a_filter_structure_gets_finer_where_its_columns_die():
    model = nn.Sequential(nn.Conv2d(4, 6, 3), nn.ReLU(), nn.Conv2d(6, 5, 3), nn.ReLU())
    model.append(nn.Conv2d(5, 2, 1))
    ticket = closed(model, {"0.weight": [1, 4], "2.weight": [0]})
    wanted = torch.ones(5, 6, 3, 3, dtype=torch.bool)
    wanted[:, [1, 4]] = False
    wanted[0] = False
    assert torch.equal(ticket.mask_of("2.weight"), wanted)


def test_behind_a_flatten_columns_die_in_runs_and_the_mask_stays_small():
    model = nn.Sequential(nn.Conv2d(4, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 36, 3))
    ticket = closed(model, {"0.weight": [1, 4]})
    assert ticket.specs["3.weight"].block == (None, 36)
    assert dead_columns(ticket, "3.weight") == [*range(36, 72), *range(144, 180)]


def test_in_a_grouped_convolution_every_group_has_columns_of_its_own():
    model = nn.Sequential(
        nn.Conv2d(4, 6, 3), nn.ReLU(), nn.Conv2d(6, 8, 3, groups=2), nn.ReLU(), nn.Conv2d(8, 2, 1)
    )
    ticket = closed(model, {"0.weight": [0, 5], "2.weight": [2]})
    wanted = torch.ones(8, 3, 3, 3, dtype=torch.bool)
    wanted[:4, 0] = False  # filter 0 is the first channel of the first group
    wanted[4:, 2] = False
    assert ticket.origin["revived"] == {"2.weight": [2]}  # the groups would be uneven
    assert torch.equal(ticket.mask_of("2.weight"), wanted)


def test_columns_that_read_another_constant_act_and_stay():
    model = nn.Sequential(
        *(nn.Conv2d(4, 6, 3), nn.Sigmoid(), nn.Conv2d(6, 5, 3, padding=1), nn.ReLU()),
        nn.Conv2d(5, 2, 1),
    )
    ticket = closed(model, {"0.weight": [1, 4], "2.weight": [3]})
    assert dead_columns(ticket, "2.weight") == []
    assert dead_columns(ticket, "4.weight") == [3]


def starved(bias):
    """A net and a ticket in which a row of the second layer reads two dead neurons only."""
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 5, bias=bias), nn.ReLU(), nn.Linear(5, 2))
    )
    mask = torch.ones(5, 6, dtype=torch.bool)
    mask[2] = False
    mask[2, [1, 4]] = True
    rows = dead_filters(model, {"0.weight": [1, 4]})
    spec = TensorSpec((5, 6), (1, 1))
    ticket = Ticket({**rows, "2.weight": mask}, {**rows.specs, "2.weight": spec})
    return model, close(ticket, model, example_inputs=X)


def test_a_row_that_reads_dead_blocks_only_is_dead_if_it_has_no_bias():
    model, ticket = starved(bias=False)
    assert dead_columns(ticket, "4.weight") == [2]
    assert close(ticket, model, example_inputs=X) == ticket
    assert compact(model, ticket, example_inputs=X).model[2].weight.shape == (4, 4)


def test_a_row_that_reads_dead_blocks_only_still_adds_its_bias():
    model, ticket = starved(bias=True)
    assert not ticket.mask_of("2.weight")[2].any()
    assert ticket.mask_of("4.weight").all() if "4.weight" in ticket else True
    assert close(ticket, model, example_inputs=X) == ticket
    small = compact(model, ticket, example_inputs=X)
    assert small.model[2].weight.shape == (5, 4)
    assert not small.ticket.mask_of("2.weight")[2].any()
    masked = ticket.apply_(model)
    torch.testing.assert_close(small.model(X), masked(X))


def test_a_closed_ticket_counts_what_compaction_keeps():
    model = nn.Sequential(
        *(nn.Conv2d(4, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.Conv2d(8, 6, 3, groups=2), nn.GELU(), nn.Flatten(), nn.Linear(6 * 36, 3)),
    ).eval()
    ticket = random_ticket(model, example_inputs=X, density=0.5)
    small = compact(model, ticket, example_inputs=X)
    assert not small.proof.kept_zero
    left = small.proof.params_after / small.proof.params_before
    assert left < 0.6
    assert ticket.density_of_model(model) == pytest.approx(left, rel=1e-12)
    assert small.ticket.density == 1.0
    assert small.ticket.density_of_model(small.model) == 1.0


def test_zeroing_the_columns_changes_no_output():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 6, 3), nn.ReLU(), nn.Conv2d(6, 5, 3))
    ticket = closed(model, {"0.weight": [1, 4]})
    with torch.no_grad():
        model[0].weight[[1, 4]] = 0
        model[0].bias[[1, 4]] = 0
        expected = model(X)
        before = model[2].weight.clone()
        assert torch.equal(ticket.apply_(model)(X), expected)
    assert not torch.equal(model[2].weight, before)


CUTS = {
    "rows": (Cut("w", 0, 6, torch.tensor([0, 3, 4, 5]).numpy()),),
    "both": (
        Cut("w", 0, 6, torch.tensor([0, 1, 4, 5]).numpy()),
        Cut("w", 1, 4, torch.tensor([1, 2]).numpy()),
    ),
    "groups": (
        Cut("w", 0, 6, torch.tensor([0, 1, 3, 4]).numpy()),
        Cut("w", 1, 8, torch.tensor([0, 1, 6, 7]).numpy(), groups=2),
    ),
}


@pytest.mark.parametrize(
    "block", [(1, None), (None, 1), (2, 2), (1, 1), (None, None), (3, None), ((1, 1), None)]
)
@pytest.mark.parametrize("name", CUTS)
def test_a_cut_ticket_says_of_what_stays_what_it_said_before(name, block):
    spec = TensorSpec((6, 4), block)
    mask = torch.rand(spec.grid, generator=torch.Generator().manual_seed(0)) < 0.5
    other = TensorSpec((3,), (None,))
    ticket = Ticket({"w": mask, "other": torch.tensor([True])}, {"w": spec, "other": other})
    smaller = cut_ticket(ticket, {"w": CUTS[name]})
    assert torch.equal(smaller.mask_of("w"), cut_tensor(ticket.mask_of("w"), CUTS[name]))
    assert smaller.specs["other"] == other
    if block in [(1, None), (1, 1), (None, None)]:
        assert smaller.specs["w"].block == block
