# SPDX-License-Identifier: Apache-2.0
"""Param groups: which module gets which structure, and how rules change that."""

import pytest
import torch
from test_dual import Compiled
from torch import nn

from dessilbi import DessiLBI, param_groups


def structures(model, rules=None):
    """Parameter name -> structure."""
    groups = param_groups(model, rules)
    return {name: group["structure"] for group in groups for name, _ in group["params"]}


def lenet():
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 6), nn.Linear(6, 2)
    )


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (nn.Conv1d(2, 4, 3), "filter"),
        (nn.Conv2d(2, 4, 3), "filter"),
        (nn.Conv3d(2, 4, 3), "filter"),
        (nn.Conv2d(4, 4, 3, groups=4), "filter"),
        (nn.ConvTranspose1d(2, 4, 3), "channel"),
        (nn.ConvTranspose2d(2, 4, 3), "channel"),
        (nn.ConvTranspose3d(2, 4, 3), "channel"),
        (nn.Linear(4, 3), "element"),
        (nn.Bilinear(2, 2, 3), None),
        (nn.Embedding(5, 3), None),
        (nn.EmbeddingBag(5, 3), None),
        (nn.BatchNorm2d(3), None),
        (nn.LayerNorm(3), None),
        (nn.GroupNorm(1, 3), None),
        (nn.PReLU(3), None),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else str(value),
)
def test_the_weight_of_a_module_has_its_default_structure(module, expected):
    found = structures(module)
    assert found.pop("weight") == expected
    assert set(found.values()) <= {None}  # biases


@pytest.mark.parametrize("module", [nn.RNN(3, 4), nn.LSTM(3, 4), nn.GRUCell(3, 4)], ids=repr)
def test_recurrent_weights_stay_without_structure(module):
    found = structures(module)
    assert len(found) == 4
    assert set(found.values()) == {None}


def test_packed_attention_stays_without_structure_but_its_output_is_linear():
    found = structures(nn.MultiheadAttention(4, 2))
    assert found["in_proj_weight"] is None
    assert found["out_proj.weight"] == "element"


@pytest.mark.parametrize("embedding", [nn.Embedding, nn.EmbeddingBag])
def test_a_linear_weight_that_is_tied_to_an_embedding_stays_without_structure(embedding):
    model = nn.ModuleDict({"head": nn.Linear(4, 7, bias=False), "tokens": embedding(7, 4)})
    model["head"].weight = model["tokens"].weight
    assert structures(model) == {"head.weight": None}


def test_weights_shared_by_two_layers_are_in_one_group_once():
    layer = nn.Linear(3, 3)
    assert structures(nn.Sequential(layer, layer)) == {"0.weight": "element", "0.bias": None}


def test_every_parameter_is_in_exactly_one_group_in_order():
    model = lenet()
    groups = param_groups(model, {"0.weight": {"lam": 0.1}, "3.*": "element"})
    found = [(name, id(param)) for group in groups for name, param in group["params"]]
    assert sorted(found) == sorted((n, id(p)) for n, p in model.named_parameters())
    firsts = [group["params"][0][0] for group in groups]
    order = [name for name, _ in model.named_parameters()]
    assert sorted(firsts, key=order.index) == firsts


def test_parameters_with_the_same_options_share_a_group():
    assert [group["structure"] for group in param_groups(lenet())] == ["filter", None, "element"]


def test_groups_are_plain_dicts_of_plain_values():
    for group in param_groups(lenet(), {"0.weight": {"structure": [1, None, 3, 3], "lam": 2}}):
        assert type(group) is dict
        for key, value in group.items():
            if key != "params":
                assert type(value) in (str, int, float, tuple, type(None))


def test_the_first_rule_that_matches_decides():
    rules = {"0.weight": "kernel", "*.weight": "layer", "3.weight": "filter"}
    found = structures(lenet(), rules)
    assert (found["0.weight"], found["3.weight"], found["4.weight"]) == ("kernel", "layer", "layer")
    assert structures(lenet(), list(rules.items())) == found


def test_a_rule_may_leave_a_weight_without_structure():
    found = structures(lenet(), {"3.weight": None})
    assert (found["3.weight"], found["4.weight"]) == (None, "element")


def test_a_rule_may_give_a_bias_a_structure():
    assert structures(lenet(), {"*.bias": "element"})["0.bias"] == "element"


def test_a_rule_of_options_keeps_the_default_for_what_it_does_not_name():
    groups = param_groups(lenet(), {"*": {"lam": 0.3}})
    assert {group["structure"] for group in groups} == {"filter", "element", None}
    assert {group["lam"] for group in groups} == {0.3}


def test_a_tuple_is_a_structure():
    assert structures(lenet(), {"0.weight": (2, None, None, None)})["0.weight"][0] == 2


def test_rules_are_not_changed():
    rules = {"0.weight": {"lam": 0.3}}
    param_groups(lenet(), rules)
    assert rules == {"0.weight": {"lam": 0.3}}


def test_a_rule_that_matches_nothing_is_refused_with_the_names_there_are():
    with pytest.raises(ValueError, match=r"rule 'conv\*' matches no parameter: .* are 0\.weight, "):
        param_groups(lenet(), {"conv*": "filter"})


def test_case_matters_in_patterns():
    with pytest.raises(ValueError, match=r"'0\.WEIGHT' matches no parameter"):
        param_groups(lenet(), {"0.WEIGHT": "filter"})


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"0.weight": (3, None, None, None)}, r"does not divide 0\.weight of shape"),
        ({"3.weight": "kernel"}, r"'kernel' needs .* 3\.weight has shape"),
        ({"0.bias": "filter"}, r"'filter' needs .* 0\.bias has shape"),
        ({"3.weight": "rows"}, r"'rows' of 3\.weight is not known"),
        ({"3.weight": 7}, r"structure 7 of 3\.weight is not allowed"),
        ({"3.weight": {"structure": "nope"}}, r"'nope' of 3\.weight is not known"),
    ],
    ids=str,
)
def test_a_structure_that_does_not_fit_is_refused_by_name(rules, message):
    with pytest.raises(ValueError, match=message):
        param_groups(lenet(), rules)


def test_an_option_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match="lamb"):
        DessiLBI(param_groups(lenet(), {"*.weight": {"lamb": 0.3}}))


@pytest.mark.parametrize(
    "wrap",
    [nn.DataParallel, Compiled, lambda m: nn.DataParallel(Compiled(m)), lambda m: m],
    ids=["parallel", "compiled", "both", "plain"],
)
def test_names_and_rules_are_those_of_the_plain_model(wrap):
    found = structures(wrap(lenet()), {"0.weight": "kernel"})
    assert found == structures(lenet(), {"0.weight": "kernel"})


def test_a_compiled_part_keeps_the_plain_names():
    model = lenet()
    model[0] = Compiled(model[0])
    assert list(structures(model)) == list(structures(lenet()))


def test_a_model_trains_with_its_groups():
    torch.manual_seed(0)
    model = lenet()
    optimizer = DessiLBI(
        param_groups(model, {"0.weight": {"lam": 0.4}}), lr=0.1, nu=2.0, lam=0.05, momentum=0.9
    )
    x, y = torch.randn(64, 1, 8, 8), torch.arange(64) % 2
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    support = optimizer.support()
    assert set(support) == {"0.weight", "3.weight", "4.weight"}
    assert 0 < support.density < 1
