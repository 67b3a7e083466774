# SPDX-License-Identifier: Apache-2.0
"""Plans: what can be removed, in numbers that compaction confirms."""

import copy
import json

import numpy as np
import pytest
import torch
from coupled import Concat, Depthwise, Residual, Transformer, grouped, lenet
from test_compaction import NETS, Gate, make
from torch import nn

from dessilbi import Plan, plan
from dessilbi.blocks.ticket import TensorSpec, Ticket
from dessilbi.compaction.compaction import compact
from dessilbi.cuts.closing import close_on
from dessilbi.files.storage import to_json
from dessilbi.graph import read_graph

IMAGE = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))
SMALL = {
    "residual": (Residual, IMAGE),
    "depthwise": (Depthwise, IMAGE),
    "transformer": (Transformer, IMAGE),
    "grouped": (grouped, IMAGE),
    "gate": (Gate, IMAGE),
    "folded bias": (NETS["folded bias"][0], torch.randn(2, 3, 9, 9)),
    "lenet": (lenet, torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))),
}


@pytest.fixture(scope="module")
def plans():
    """Name -> model, inputs and plan, made once."""
    torch.manual_seed(0)
    return {
        name: (model := build(), x, plan(model, example_inputs=x))
        for name, (build, x) in SMALL.items()
    }


def unit_of(planned, name):
    (unit,) = [u for u in planned.units if u.name == name]
    return unit


def tensor_of(planned, name):
    (tensor,) = [t for t in planned.tensors if t.name == name]
    return tensor


# Numbers


def without(graph, unit, blocks):
    """A closed ticket in which these blocks of a unit are dead."""
    masks, specs = {}, {}
    for member in unit.producers:
        shape = graph.shapes[member.name]
        cut = tuple(1 if d == member.dim else None for d in range(len(shape)))
        spec = specs.setdefault(member.name, TensorSpec(shape, cut))
        mask = masks.setdefault(member.name, torch.ones(spec.grid, dtype=torch.bool))
        mask.index_fill_(member.dim, torch.from_numpy(member.index[blocks].ravel()), False)
    return close_on(graph, Ticket(masks, specs))


@pytest.mark.parametrize("name", SMALL)
def test_removing_one_block_saves_what_the_plan_says(plans, name):
    model, x, planned = plans[name]
    graph = read_graph(model, x)
    for unit, told in zip(graph.units, planned.units, strict=True):
        # A grouped convolution gives up as many of each group.
        blocks = [0, unit.num_blocks // 2] if name == "grouped" else [0]
        proof = compact(model, without(graph, unit, blocks), example_inputs=x).proof
        assert proof.removed == len(blocks)
        saved = proof.params_before - proof.params_after
        assert saved == len(blocks) * told.parameters_per_block > 0
        macs = proof.macs_before - proof.macs_after
        assert macs == len(blocks) * told.macs_per_block > 0
        assert proof.macs_before == planned.macs


def test_a_whole_unit_has_every_element_that_it_touches(plans):
    _, _, planned = plans["residual"]
    unit = unit_of(planned, "stem.weight")
    stem, inner, outer, norms, columns = 8 * 27, 2 * 6 * 8 * 9, 2 * 8 * 6 * 9, 3 * 2 * 8, 4 * 8
    assert unit.parameters == stem + inner + outer + norms + columns
    assert unit.macs == planned.macs  # every layer writes or reads the sum


def test_the_removable_share_counts_every_element_once(plans):
    model, _, planned = plans["residual"]
    total = sum(p.numel() for p in model.parameters())
    assert planned.parameters == total
    assert planned.removable_parameters == total - 4  # all but the bias of the output
    assert sum(unit.parameters for unit in planned.units) > total
    assert planned.structured_parameters == sum(
        p.numel() for n, p in model.named_parameters() if p.dim() > 1
    )


def test_a_note_says_where_a_constant_stays_or_moves():
    model, x, _ = make("carrier")
    first, second = plan(model, example_inputs=x).units
    assert first.notes == ("one dead block stays: it carries a constant into 2.weight",)
    assert second.notes == ()
    model, x, _ = make("folded bias")
    notes = [unit.notes for unit in plan(model, example_inputs=x).units]
    assert all("becomes part of the bias behind" in told for (told,) in notes)


def test_a_note_says_that_groups_lose_as_many(plans):
    _, _, planned = plans["grouped"]
    for unit in planned.units:
        assert unit.notes == ("as many must go from each of the 2 groups of 2.weight",)


# What is selected how


def test_units_are_whole_where_all_producers_are_selected_together(plans):
    _, _, planned = plans["transformer"]
    assert {u.name: u.removal for u in planned.units} == {
        "q.weight": "whole",
        "up.weight": "whole",
        "fc1.weight": "apart",
    }
    assert unit_of(planned, "q.weight").producers == ("q.weight", "k.weight", "v.weight")
    assert unit_of(planned, "fc1.weight").why == (
        "it has structure 'element'; structure 'neuron' selects it as a whole"
    )


def test_a_rule_moves_a_unit_from_apart_to_whole(plans):
    model, x, before = plans["transformer"]
    after = plan(model, {"fc1.weight": "unit"}, example_inputs=x)
    assert unit_of(after, "fc1.weight").removal == "whole"
    assert after.removable_parameters > before.removable_parameters


def test_without_coupling_only_units_of_one_producer_are_whole(plans):
    model, x, planned = plans["residual"]
    apart = plan(model, example_inputs=x, coupled=False)
    assert [u.removal for u in apart.units] == ["apart", "whole", "whole"]
    assert apart.units[0].why.endswith("coupling joins them")
    assert 0 < apart.removable_parameters < planned.removable_parameters
    assert apart.macs == planned.macs


def test_a_member_that_is_taken_out_is_named(plans):
    model, x, _ = plans["residual"]
    unit = plan(model, {"stem.weight": "element"}, example_inputs=x).units[0]
    assert unit.removal == "apart"
    assert unit.why == "apart: stem.weight (element); structure 'unit' joins them"


def test_a_member_without_structure_keeps_its_unit_alive(plans):
    model, x, _ = plans["residual"]
    unit = plan(model, {"stem.weight": None}, example_inputs=x).units[0]
    assert unit.removal == "never"
    assert unit.why.startswith("without structure: stem.weight;")


def test_parts_of_one_convolution_that_are_units_of_their_own_are_whole():
    model, x, _ = make("split")
    planned = plan(model, example_inputs=x)
    assert {u.name: u.removal for u in planned.units} == {
        "a.weight": "whole",
        "a.weight#2": "whole",
        "b.weight": "whole",
    }


def test_every_parameter_is_listed_with_its_structure_and_reason(plans):
    model, _, planned = plans["depthwise"]
    assert [t.name for t in planned.tensors] == [n for n, _ in model.named_parameters()]
    assert tensor_of(planned, "head.weight").why == "it is an output of the model"
    assert tensor_of(planned, "depthwise.weight").why == "goes with a unit"
    assert tensor_of(planned, "head.bias").why == "nothing that it belongs to can be removed"
    project = tensor_of(planned, "project.weight")
    assert (project.structure, project.unit, project.why) == ("filter", "stem.weight", "")


def test_heads_of_packed_attention_are_selected_as_a_whole_unless_a_rule_cuts_them():
    model = nn.TransformerEncoderLayer(8, 2, 6, batch_first=True)
    planned = plan(model, example_inputs=torch.ones(1, 3, 8))
    heads = unit_of(planned, "self_attn.in_proj_weight")
    assert (heads.removal, heads.kind, heads.num_blocks) == ("whole", "head", 2)
    cut = plan(model, {"self_attn.in_proj_weight": "head:4"}, example_inputs=torch.ones(1, 3, 8))
    assert unit_of(cut, "self_attn.in_proj_weight").removal == "apart"


def test_a_parameter_that_forward_does_not_use_is_said_to_be_unused():
    model = lenet()
    model[0].register_parameter("spare", nn.Parameter(torch.ones(3)))
    planned = plan(model, example_inputs=torch.ones(1, 1, 8, 8))
    assert tensor_of(planned, "0.spare").why == "forward does not use it in eval mode"


# The value and its print


def test_nothing_to_remove_is_a_loud_warning():
    with pytest.warns(UserWarning, match="nothing in Concat can be removed .*2 units"):
        planned = plan(Concat(), example_inputs=torch.ones(1, 3, 3, 3))
    assert planned.removable_parameters == 0
    assert "WARNING: nothing of it can be removed" in str(planned)


def test_a_model_without_a_layer_that_is_known_is_planned_as_well():
    model = nn.PReLU(3)
    with pytest.warns(UserWarning, match=r"nothing in PReLU .*\(no layer of it"):
        planned = plan(model, example_inputs=torch.ones(1, 3, 2))
    assert (planned.macs, planned.units) == (0, ())
    assert "3 parameters, 0 MACs" in str(planned)


def test_the_print_names_all_sorts_in_80_columns(plans):
    for _, _, planned in plans.values():
        lines = str(planned).splitlines()
        assert max(map(len, lines)) <= 80
    text = str(plans["transformer"][2])
    for words in (
        "Transformer: 817 parameters",
        "Units that the penalty selects as a whole",
        "  with k.weight, v.weight",
        "Units whose parts are selected apart",
        "filter: layer_norm in norm1 takes its statistics over it",
        "Without structure",
    ):
        assert words in text
    assert "WARNING" not in text


def test_units_that_differ_in_the_numbers_of_their_names_share_a_row(plans):
    text = str(plans["residual"][2])
    assert "blocks.{0,1}.0.weight (2 units, each)" in text
    assert "  with blocks.{0,1}.3.weight" in text


def test_a_long_table_shares_rows_of_unequal_numbers():
    kernels = [nn.Conv1d(4, 4, 2 * n + 1, padding=n) for n in range(45)]
    planned = plan(nn.Sequential(*kernels), example_inputs=torch.ones(1, 4, 1))
    assert len({unit.parameters for unit in planned.units}) > 40
    text = str(planned)
    assert "{0-43}.weight (44 units, on average)" in text
    assert len(text.splitlines()) < 30


def test_a_plan_is_a_frozen_value_of_plain_json(plans):
    _, _, planned = plans["residual"]
    assert isinstance(planned, Plan)
    told = json.loads(to_json(planned.to_json()))
    assert told["removable_parameters"] == planned.removable_parameters
    assert told["units"][0]["producers"] == list(planned.units[0].producers)
    assert copy.deepcopy(planned) == planned
    with pytest.raises(AttributeError):
        planned.macs = 0


def test_planning_leaves_the_model_as_it_was(plans):
    model, x, planned = plans["residual"]
    state = copy.deepcopy(model.state_dict())
    model.train()
    assert plan(model, example_inputs=x) == planned
    assert model.training
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


def test_units_of_the_graph_and_of_the_plan_are_the_same(plans):
    model, x, planned = plans["lenet"]
    graph = read_graph(model, x)
    assert [u.num_blocks for u in planned.units] == [len(u.blocks) for u in graph.units]
    assert np.sum([u.num_blocks for u in planned.units]) == graph.num_blocks
