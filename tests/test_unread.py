# SPDX-License-Identifier: Apache-2.0
"""Blocks that nobody reads go as well, and only those."""

import copy

import pytest
import torch
from test_compaction import NETS, make
from torch import nn

from dessilbi.blocks.ticket import TensorSpec, Ticket
from dessilbi.compaction.compaction import close, compact
from dessilbi.cuts.unread import unread_blocks
from dessilbi.graph import read_graph


def columns_ticket(model, names, dead):
    """A ticket of single weights in which whole columns are dead."""
    weights = dict(model.named_parameters())
    masks, specs = {}, {}
    for name in names:
        shape = tuple(weights[name].shape)
        masks[name] = torch.ones(shape, dtype=torch.bool)
        masks[name][:, dead] = False
        specs[name] = TensorSpec(shape, (1,) * len(shape))
    return Ticket(masks, specs)


def chain():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 7), nn.GELU(), nn.Linear(7, 3)
    ).eval()


def test_a_row_whose_column_is_dead_goes():
    model, x = chain(), torch.randn(4, 5)
    ticket = columns_ticket(model, ["2.weight"], [1, 4])
    closed = close(ticket, model, example_inputs=x)
    assert closed["0.weight"].flatten().tolist() == [True, False, True, True, False, True]
    result = compact(model, closed, example_inputs=x)
    assert result.model[0].out_features == 4
    with torch.no_grad():
        before = ticket.apply_(copy.deepcopy(model))(x)
        torch.testing.assert_close(result.model(x), before)


def test_it_goes_on_upwards_until_nothing_more_is_unread():
    model, x = chain(), torch.randn(4, 5)
    # Row 2 of layer 2 is unread; it was the only one to read row 3 of layer 0.
    upper = columns_ticket(model, ["4.weight"], [2])
    mask = torch.ones(7, 6, dtype=torch.bool)
    mask[:2, 3] = mask[3:, 3] = False
    masks = {**upper, "2.weight": mask}
    specs = {**upper.specs, "2.weight": TensorSpec((7, 6), (1, 1))}
    ticket = Ticket(masks, specs)
    closed = close(ticket, model, example_inputs=x)
    assert not closed["2.weight"][2].any()
    assert closed["0.weight"].flatten().tolist() == [True, True, True, False, True, True]
    assert close(closed, model, example_inputs=x) == closed
    result = compact(model, closed, example_inputs=x)
    with torch.no_grad():
        torch.testing.assert_close(result.model(x), ticket.apply_(copy.deepcopy(model))(x))


def test_one_living_reader_is_enough_to_stay():
    model, x, _ = make("gate")  # the channels of a are read by down and by out
    one = columns_ticket(model, ["out.weight"], [0, 3])
    assert not unread_blocks(read_graph(model, x), one).any()
    both = columns_ticket(model, ["out.weight", "down.weight"], [0, 3])
    closed = close(both, model, example_inputs=x)
    assert (~closed["a.weight"].flatten()).nonzero().flatten().tolist() == [0, 3]
    result = compact(model, closed, example_inputs=x)
    with torch.no_grad():
        torch.testing.assert_close(result.model(x), both.apply_(copy.deepcopy(model))(x))


def test_columns_of_grouped_convolutions_belong_to_their_group():
    model, x, _ = make("grouped")  # 12 channels, 3 groups of 4 columns, 6 rows each
    mask = torch.ones(18, 4, 3, 3, dtype=torch.bool)
    mask[0:6, 1] = mask[6:12, 2] = mask[12:18, 2] = False  # channels 1, 6 and 10
    ticket = Ticket({"2.weight": mask}, {"2.weight": TensorSpec(tuple(mask.shape), (1, 1, 1, 1))})
    closed = close(ticket, model, example_inputs=x)
    assert (~closed["0.weight"].flatten()).nonzero().flatten().tolist() == [1, 6, 10]
    result = compact(model, closed, example_inputs=x)
    assert result.model[0].out_channels == 9
    with torch.no_grad():
        torch.testing.assert_close(result.model(x), ticket.apply_(copy.deepcopy(model))(x))


def test_unread_blocks_that_would_leave_groups_uneven_stay_as_they_were():
    model, x, _ = make("grouped")
    mask = torch.ones(18, 4, 3, 3, dtype=torch.bool)
    mask[0:6, 1] = False
    ticket = Ticket({"2.weight": mask}, {"2.weight": TensorSpec(tuple(mask.shape), (1, 1, 1, 1))})
    closed = close(ticket, model, example_inputs=x)
    assert "0.weight" not in closed or bool(closed["0.weight"].all())
    assert torch.equal(closed.mask_of("2.weight"), mask), "an element ticket became denser"
    assert close(closed, model, example_inputs=x) == closed


class Scored(nn.Module):
    """The first layer is read by a product of activations as well as by a weight."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x):
        y = torch.relu(self.a(x))
        return (y @ y.transpose(-1, -2)).softmax(-1) @ self.b(y)


def test_what_a_product_of_activations_reads_is_not_unread():
    torch.manual_seed(0)
    model, x = Scored().eval(), torch.randn(2, 5, 4)
    graph = read_graph(model, x)
    assert graph.num_blocks == 6
    ticket = columns_ticket(model, ["b.weight"], [1, 2])
    assert not unread_blocks(graph, ticket).any()
    closed = close(ticket, model, example_inputs=x)
    with torch.no_grad():
        expected = ticket.apply_(copy.deepcopy(model))(x)
        assert torch.equal(closed.apply_(copy.deepcopy(model))(x), expected)


@pytest.mark.parametrize("name", [n for n in NETS if n != "gated embedding"])
def test_closing_what_nobody_reads_never_changes_the_output(name):
    """Dead columns everywhere; what closing adds to it by reading alone must not matter."""
    model, x, _ = make(name)
    graph = read_graph(model, x)
    generator = torch.Generator().manual_seed(1)
    masks, specs = {}, {}
    for unit in graph.units:
        gone = torch.rand(unit.num_blocks, generator=generator) < 0.4
        for member in unit.consumers:
            if member.groups == 1:
                shape = graph.shapes[member.name]
                mask = masks.setdefault(member.name, torch.ones(shape, dtype=torch.bool))
                index = torch.from_numpy(member.index[gone.numpy()].ravel())
                mask.index_fill_(member.dim, index, False)
                specs[member.name] = TensorSpec(shape, (1,) * len(shape))
    if not masks:
        pytest.skip("it has no plain readers")
    ticket = Ticket(masks, specs)
    unread = unread_blocks(graph, ticket)
    assert unread.any() or name == "shuffle"  # whose reader is grouped or reads more than one half
    everything = dict(ticket)
    for unit in graph.units:
        for member in unit.producers:
            shape = graph.shapes[member.name]
            mask = everything.setdefault(member.name, torch.ones(shape, dtype=torch.bool)).clone()
            index = torch.from_numpy(member.index[unread[unit.blocks]].ravel())
            everything[member.name] = mask.index_fill(member.dim, index, False)
            specs[member.name] = TensorSpec(shape, (1,) * len(shape))
    more = Ticket(everything, specs)
    with torch.no_grad():
        one = ticket.apply_(copy.deepcopy(model).double())(x.double())
        two = more.apply_(copy.deepcopy(model).double())(x.double())
    torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-12)
