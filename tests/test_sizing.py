# SPDX-License-Identifier: Apache-2.0
"""Attributes that hold a size follow a cut; those that only look like one do not."""

import copy

import pytest
import torch
from torch import nn

from dessilbi import compact, load_compact, save_compact
from dessilbi.compaction.blueprint import Size
from dessilbi.compaction.sizing import needed, told
from dessilbi.testing import random_ticket


class Warm(nn.Module):
    """A width that forward needs, and numbers that are the same by chance."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 2)
        self.warm, self.width, self.temperature = 8, 8, 8

    def forward(self, x):
        h = self.a(x).relu().view(-1, self.width)
        if self.training:
            h = h / self.warm
        return self.b(h) / self.temperature


class Nested(nn.Module):
    """Repeated blocks, each with a width of its own, and many other numbers."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 4)
            self.width = self.one = self.two = self.three = self.four = self.five = 8

        def forward(self, x):
            return x + self.down(self.up(x).relu().view(-1, self.width))

    def __init__(self):
        super().__init__()
        self.blocks = nn.Sequential(self.Block(), self.Block())

    def forward(self, x):
        return self.blocks(x)


@pytest.fixture
def x():
    torch.manual_seed(0)
    return torch.randn(6, 4)


def half(model, x):
    ticket = random_ticket(model, example_inputs=x, density=0.5)
    return compact(model, ticket, example_inputs=x), ticket


def test_only_the_attribute_that_forward_needs_follows(x, tmp_path):
    model = Warm().eval()
    result, ticket = half(model, x)
    assert result.proof.form == "sized module"
    assert (result.model.width, result.model.warm, result.model.temperature) == (4, 8, 8)
    assert result.proof.notes[:2] == (
        "attributes that follow the cut: width (8 to 4)",
        "equal to an old size but not needed, so left: warm (8), temperature (8)",
    )
    masked = ticket.apply_(copy.deepcopy(model)).train()
    torch.testing.assert_close(result.model.train()(x), masked(x))
    save_compact(result, tmp_path / "small")
    loaded = load_compact(Warm, tmp_path / "small")
    assert (loaded.width, loaded.warm) == (4, 8)


def test_of_many_attributes_the_fewest_change_in_all_repeated_blocks(x):
    result, _ = half(Nested().eval(), x)
    assert [block.width for block in result.model.blocks] == [4, 4]
    assert all(block.one == block.five == 8 for block in result.model.blocks)
    assert result.proof.notes[0].startswith("attributes that follow the cut: blocks.0.width (8 to")


def test_where_no_attribute_holds_the_size_none_is_changed():
    sizes = [Size("a", name, 8, 4) for name in "pqrstuv"]
    assert needed(sizes, lambda _: False) is None
    assert needed(sizes[:2], lambda _: False) is None
    assert needed([], lambda _: True) is None


def test_long_lists_of_attributes_are_cut_short():
    (note,) = told([Size("", f"n{i}", 8, 4) for i in range(9)], [])
    assert note.endswith("n5 (8 to 4) and 3 more")
