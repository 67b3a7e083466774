# SPDX-License-Identifier: Apache-2.0
"""Param groups that couple what can only be removed together."""

import pytest
import torch
from coupled import (
    Concat,
    Conditioned,
    Depthwise,
    Residual,
    Tied,
    Transformer,
    grouped,
    lenet,
)
from test_dual import Compiled
from torch import nn

from dessilbi import DessiLBI, Ticket, close, compact, param_groups
from dessilbi.graph import read_graph
from dessilbi.groups import groups_on

IMAGE = torch.ones(1, 3, 6, 6)
MODELS = {
    "residual": (Residual, IMAGE),
    "depthwise": (Depthwise, IMAGE),
    "transformer": (Transformer, IMAGE),
    "concat": (Concat, IMAGE),
    "conditioned": (Conditioned, (IMAGE, torch.ones(1, 2))),
    "tied": (Tied, torch.zeros(1, 5, dtype=torch.long)),
    "lenet": (lenet, torch.ones(1, 1, 8, 8)),
    "grouped": (grouped, IMAGE),
}


@pytest.fixture(scope="module")
def known():
    """Name -> model and graph, each read once."""
    torch.manual_seed(0)
    models = {name: (make(), x) for name, (make, x) in MODELS.items()}
    return {name: (model, read_graph(model, x)) for name, (model, x) in models.items()}


def coupled(known, name, rules=None):
    """Parameter -> (structure, unit) as ``param_groups(model, rules, example_inputs=...)``."""
    model, graph = known[name]
    groups = groups_on(graph, model, rules)
    return {n: (g["structure"], g.get("unit")) for g in groups for n, _ in g["params"]}


def units(known, name, rules=None):
    """Unit -> its members."""
    found = {}
    for member, (_, unit) in coupled(known, name, rules).items():
        if unit is not None:
            found.setdefault(unit, []).append(member)
    return found


# What becomes a unit


def test_filters_that_meet_in_a_sum_are_one_unit(known):
    assert units(known, "residual") == {
        "stem.weight": ["stem.weight", "blocks.0.3.weight", "blocks.1.3.weight"],
        "blocks.0.0.weight": ["blocks.0.0.weight"],
        "blocks.1.0.weight": ["blocks.1.0.weight"],
    }


def test_a_depthwise_convolution_follows_its_unit_and_has_no_structure(known):
    found = coupled(known, "depthwise")
    assert found["depthwise.weight"] == (None, None)
    assert found["expand.weight"] == ("filter", "expand.weight")
    model, _ = known["depthwise"]
    (alone,) = [
        g["structure"] for g in param_groups(model) if "depthwise.weight" in dict(g["params"])
    ]
    assert alone == "filter"  # without a graph nobody knows that it follows


def test_heads_and_hidden_widths_of_a_transformer_are_units(known):
    found = coupled(known, "transformer")
    assert {found[f"{name}.weight"] for name in "qkv"} == {("head:4", "q.weight")}
    assert found["up.weight"] == ("neuron", "up.weight")
    assert found["down.weight"] == found["proj.weight"] == ("element", None)


def test_linear_layers_of_one_vector_per_sample_keep_their_elements(known):
    for name, classifier in (("lenet", ("5.weight", "7.weight")), ("transformer", ("fc1.weight",))):
        found = coupled(known, name)
        assert {found[weight] for weight in classifier} == {("element", None)}


def test_a_linear_layer_that_shares_a_unit_with_a_filter_is_coupled(known):
    found = coupled(known, "conditioned")
    assert found["conv.weight"] == ("filter", "conv.weight")
    assert found["vector.weight"] == ("neuron", "conv.weight")


def test_what_cannot_be_removed_keeps_its_structure(known):
    assert coupled(known, "depthwise")["head.weight"] == ("filter", None)  # the output
    assert coupled(known, "transformer")["patches.weight"] == ("filter", None)  # under a LayerNorm


def test_a_tensor_only_a_part_of_which_belongs_to_a_unit_is_not_coupled(known):
    found = coupled(known, "concat")
    assert found["c.weight"] == ("filter", None)
    assert found["a.weight"] == ("filter", "a.weight")


def test_a_convolution_used_twice_is_coupled_with_itself_and_tied_weights_stay(known):
    found = coupled(known, "tied")
    assert found["first.weight"] == found["twice.weight"] == ("filter", "first.weight")
    assert found["tokens.weight"] == (None, None)
    assert "head.weight" not in found


def test_grouped_convolutions_are_coupled_filter_by_filter(known):
    assert units(known, "grouped") == {"0.weight": ["0.weight"], "2.weight": ["2.weight"]}


@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_is_in_exactly_one_group_and_the_optimizer_takes_them(known, name):
    model, graph = known[name]
    groups = groups_on(graph, model, None)
    names = [n for g in groups for n, _ in g["params"]]
    assert sorted(names) == sorted(n for n, _ in model.named_parameters())
    optimizer = DessiLBI(groups, lr=0.1)
    for members in units(known, name).values():
        masks = [optimizer.support()[member].flatten() for member in members]
        assert all(torch.equal(mask, masks[0]) for mask in masks)


def test_example_inputs_read_the_model_and_leave_it_as_it_was(known):
    model, graph = known["residual"]
    model.train()
    groups = param_groups(model, example_inputs=IMAGE)
    assert [g | {"params": None} for g in groups] == [
        g | {"params": None} for g in groups_on(graph, model, None)
    ]
    assert model.training
    assert not model.norm.num_batches_tracked


@pytest.mark.parametrize(
    "wrap",
    [nn.DataParallel, Compiled, lambda m: nn.DataParallel(Compiled(m))],
    ids=["parallel", "compiled", "both"],
)
def test_wrapped_models_have_the_groups_of_the_plain_one(known, wrap):
    model, graph = known["residual"]
    wrapped = wrap(model)
    assert [g | {"params": None} for g in groups_on(read_graph(wrapped, IMAGE), wrapped, None)] == [
        g | {"params": None} for g in groups_on(graph, model, None)
    ]


def test_a_model_that_is_a_part_called_module_is_coupled_as_well():
    model = nn.ModuleDict({"module": lenet()})
    model.forward = model["module"].forward
    groups = param_groups(model, example_inputs=torch.ones(1, 1, 8, 8))
    assert [g["unit"] for g in groups if "unit" in g] == ["0.weight", "2.weight"]
    optimizer = DessiLBI(groups, lr=0.1)
    for param in model.parameters():
        param.grad = torch.zeros_like(param)
    optimizer.step()
    ticket = close(optimizer.support(), model, example_inputs=torch.ones(1, 1, 8, 8))
    assert ticket.origin["dead_blocks"] == 4 + 5 + 6


def test_a_model_of_which_nothing_is_coupled_is_warned_about():
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    with pytest.warns(UserWarning, match=r"no parameter of Sequential was coupled .* says why"):
        groups = param_groups(model, example_inputs=torch.ones(1, 4))
    assert {g["structure"] for g in groups} == {"element", None}


# Rules


def test_the_structure_unit_couples_a_linear_layer(known):
    found = coupled(known, "lenet", {"5.weight": "unit"})
    assert found["5.weight"] == ("neuron", "5.weight")


def test_the_structure_unit_takes_further_options(known):
    model, graph = known["lenet"]
    groups = groups_on(graph, model, {"5.weight": {"structure": "unit", "lam": 0.3}})
    (group,) = [g for g in groups if "5.weight" in dict(g["params"])]
    assert (group["structure"], group["unit"], group["lam"]) == ("neuron", "5.weight", 0.3)


def test_a_pattern_for_unit_leaves_alone_what_has_none(known):
    found = coupled(known, "lenet", {"*": "unit"})
    assert found == coupled(known, "lenet", {"5.weight": "unit"})
    assert found["7.weight"] == ("element", None)


@pytest.mark.parametrize(
    ("name", "pattern", "reason"),
    [
        ("lenet", "7.weight", "7.weight has none: it is an output of the model"),
        ("transformer", "patches.weight", "layer_norm in norm1 takes its statistics over it"),
        ("depthwise", "depthwise.weight", "it goes with unit 'expand.weight' and has no blocks"),
        ("concat", "c.weight", "rows of c.weight belong to 2 units"),
        ("tied", "tokens.weight", "embedding in tokens looks it up by number"),
        ("residual", "fc.bias", "nothing that it belongs to can be removed"),
    ],
)
def test_unit_for_what_has_none_is_refused_with_the_reason(known, name, pattern, reason):
    with pytest.raises(
        ValueError, match=f"'unit' but {pattern} has none: .*; name another"
    ) as told:
        coupled(known, name, {pattern: "unit"})
    assert reason in str(told.value)


def test_unit_without_example_inputs_is_refused():
    with pytest.raises(
        ValueError, match=r"'5\.weight' asks for structure 'unit', .* example_inputs"
    ):
        param_groups(lenet(), {"5.weight": "unit"})


def test_heads_of_packed_attention_are_blocks_in_three_parts():
    model = nn.TransformerEncoderLayer(8, 2, 6, batch_first=True)
    groups = param_groups(model, example_inputs=torch.ones(1, 3, 8))
    (heads,) = [g for g in groups if g["params"][0][0] == "self_attn.in_proj_weight"]
    assert heads["structure"] == "head:4+4+4"
    assert heads["unit"] == "self_attn.in_proj_weight"


class Interleaved(nn.Module):
    """Rows of the layer meet the second half of another one in reverse order."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.out = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, x):
        return self.out(torch.relu(self.a(x)) * self.b(x).flip(-1))


def test_unit_for_blocks_out_of_order_is_refused_with_the_reason():
    model = Interleaved()
    graph = read_graph(model, torch.ones(1, 3, 4))
    with pytest.raises(ValueError, match=r"the blocks of b\.weight do not follow one another"):
        groups_on(graph, model, {"b.weight": "unit"})


def test_a_structure_that_cuts_the_same_blocks_stays_in_the_unit(known):
    rules = {"blocks.0.3.weight": "filter", "stem.weight": (1, None, 3, 3)}
    assert coupled(known, "residual", rules) == coupled(known, "residual")


@pytest.mark.parametrize("rule", ["element", None, {"unit": None}, {"structure": "kernel"}])
def test_another_structure_takes_one_member_out_and_leaves_the_others_together(known, rule):
    found = units(known, "residual", {"blocks.0.3.weight": rule})
    assert found["stem.weight"] == ["stem.weight", "blocks.1.3.weight"]
    wanted = rule.get("structure", "filter") if isinstance(rule, dict) else rule
    assert coupled(known, "residual", {"blocks.0.3.weight": rule})["blocks.0.3.weight"] == (
        wanted,
        None,
    )


def test_the_first_member_may_leave_its_unit(known):
    found = units(known, "residual", {"stem.weight": "element"})
    assert found["stem.weight"] == ["blocks.0.3.weight", "blocks.1.3.weight"]


def test_a_rule_may_join_units_of_its_own(known):
    rule = {"structure": "filter", "unit": "insides"}
    found = units(known, "residual", {"blocks.*.0.weight": rule})
    assert found["insides"] == ["blocks.0.0.weight", "blocks.1.0.weight"]


def test_unit_as_structure_and_as_option_is_refused(known):
    with pytest.raises(ValueError, match="has structure 'unit' and unit='mine': give one of them"):
        coupled(known, "residual", {"stem.weight": {"structure": "unit", "unit": "mine"}})


def test_options_for_all_members_reach_all(known):
    model, graph = known["residual"]
    rules = {"stem.weight": {"lam": 2.0}, "blocks.*.3.weight": {"lam": 2, "kappa": 3.0}}
    groups = groups_on(graph, model, rules)
    found = {n: g for g in groups for n, _ in g["params"]}
    assert {found[n]["lam"] for n in ("stem.weight", "blocks.1.3.weight")} == {2.0}
    DessiLBI(groups, lr=0.1).support()


@pytest.mark.parametrize(
    ("rule", "told"),
    [
        ({"lam": 0.1}, "blocks.1.3.weight with lam=0.1"),
        ({"block_scale": "sqrt"}, "blocks.1.3.weight with block_scale='sqrt'"),
        ({"structure": "unit", "lam": 0.1}, "blocks.1.3.weight with lam=0.1"),
    ],
)
def test_a_rule_for_one_member_alone_is_refused_and_both_are_named(known, rule, told):
    message = rf"unit 'stem\.weight' both stem\.weight without .* and {told}, .* \{{'unit': None\}}"
    with pytest.raises(ValueError, match=message):
        coupled(known, "residual", {"blocks.1.3.weight": rule})


def test_members_with_different_lam_are_refused_and_both_are_named(known):
    rules = {"stem.weight": {"lam": 1.0}, "blocks.*.3.weight": {"lam": 2.0}}
    with pytest.raises(
        ValueError, match=r"stem\.weight with lam=1\.0 and blocks\.0\.3\.weight with"
    ):
        coupled(known, "residual", rules)


# What it is for


def train(lam, *, example_inputs):
    """A residual net with the penalty on its sum alone, after 150 steps."""
    torch.manual_seed(0)
    model = Residual()
    rules = {"blocks.*.0.weight": None, "fc.weight": None, "*": {"lam": lam}}
    groups = param_groups(model, rules, example_inputs=example_inputs)
    optimizer = DessiLBI(groups, lr=0.05, nu=1.0, momentum=0.9)
    generator = torch.Generator().manual_seed(1)
    for _ in range(150):
        x = torch.randn(32, 3, 6, 6, generator=generator)
        loud = x.abs().mean((2, 3))
        y = (x[:, 0].mean((1, 2)) > 0).long() + 2 * (loud[:, 1] > loud[:, 2]).long()
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model, optimizer.support(), x


def compacted(model, support, x):
    ticket = close(support, model, example_inputs=x[:2])
    return compact(model, ticket, example_inputs=x[:2])


def test_a_coupled_run_removes_whole_units_where_an_uncoupled_one_cannot():
    dead, width = {}, {}
    for lam, inputs in ((2.6, IMAGE), (1.4, None)):
        model, support, x = train(lam, example_inputs=inputs)
        key = "apart" if inputs is None else "coupled"
        dead[key] = sum(int((~mask).sum()) for mask in support.values())
        result = compacted(model, support, x)
        width[key] = result.model.stem.out_channels  # of the residual stream
        if key == "coupled":
            gone = int((~support["stem.weight"]).sum())
            assert 0 < gone < 8
            assert dead[key] == 3 * gone
            assert (result.proof.removed, result.proof.revived) == (gone, {})
            assert result.model.stem.out_channels == 8 - gone
            assert result.model.blocks[1][3].out_channels == 8 - gone
    assert dead["apart"] >= dead["coupled"], "as many filters are dead"
    assert width["coupled"] < width["apart"], "but less of the stream can go"


class PackedGroups(nn.Module):
    """Four query heads of size 2 share two key and value heads; all packed, as gate and up are."""

    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(8, 16), nn.Linear(8, 8)
        self.gate_up, self.down = nn.Linear(8, 12), nn.Linear(6, 8)

    def forward(self, x):
        parts = self.qkv(x).split([8, 4, 4], -1)
        q, k, v = (part.unflatten(-1, (-1, 2)).transpose(1, 2) for part in parts)
        k, v = (part.repeat_interleave(2, 1) for part in (k, v))
        heads = nn.functional.scaled_dot_product_attention(q, k, v)
        x = x + self.out(heads.transpose(1, 2).flatten(2))
        gate, up = self.gate_up(x).chunk(2, -1)
        return x + self.down(nn.functional.silu(gate) * up)


def test_parts_of_different_lengths_are_one_block_and_can_go():
    torch.manual_seed(0)
    model, x = PackedGroups(), torch.randn(2, 3, 8)
    groups = param_groups(model, example_inputs=x)
    structures = {name: g["structure"] for g in groups for name, _ in g["params"]}
    assert structures["qkv.weight"] == "head:4+2+2"
    assert structures["gate_up.weight"] == ((1, 1), None)
    support = DessiLBI(groups).support()
    masks = {name: torch.ones_like(mask) for name, mask in support.items()}
    masks["qkv.weight"][0] = masks["gate_up.weight"][[1, 4]] = False
    closed = close(Ticket(masks, support.specs), model, example_inputs=x)
    assert (~closed.mask_of("qkv.weight")).any(1).nonzero().ravel().tolist() == [
        *(0, 1, 2, 3),  # queries
        *(8, 9, 12, 13),  # key and value
    ]
    small = compact(model, closed, example_inputs=x)
    shapes = {name: tuple(p.shape) for name, p in small.model.named_parameters()}
    assert (shapes["qkv.weight"], shapes["gate_up.weight"]) == ((8, 8), (8, 8))
    assert (shapes["out.weight"], shapes["down.weight"]) == ((8, 4), (8, 4))
    assert small.proof.removed == 3
