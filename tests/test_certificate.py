# SPDX-License-Identifier: Apache-2.0
"""What the certificate of a compaction sees, and what it works with."""

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from random_nets import any_ticket
from torch import nn

from dessilbi.compaction.certifying import find_references, probes_of
from dessilbi.compaction.compaction import compact
from dessilbi.compaction.comparing import difference
from dessilbi.graph import read_graph
from dessilbi.graph.reader import RULES


class Net(nn.Module):
    """Two layers around a function of the module and what lies between."""

    def __init__(self, function, size=6):
        super().__init__()
        self.a, self.b, self.function = nn.Linear(size, 12), nn.Linear(12, 4), function

    def forward(self, x):
        return self.function(self, torch.relu(self.a(x)))


def compacted(model, x, **options):
    ticket = any_ticket(read_graph(model, x), 0.5, seed=1)
    return compact(model, ticket, example_inputs=x, **options)


def test_a_wrong_rule_leads_to_a_refusal(monkeypatch):
    monkeypatch.setitem(RULES, "sort", lambda reader, x, *_: (x, x))
    with pytest.raises(ValueError, match="no exact compaction of Net was found"):
        compacted(Net(lambda m, y: m.b(y.sort(-1)[0])), torch.randn(3, 6))


def test_a_small_output_beside_a_huge_one_is_not_overlooked():
    torch.manual_seed(0)
    model = Net(lambda m, y: (m.b(y), 1e12 * m.b(y)))
    x = torch.randn(3, 6)
    (reference,) = find_references(model, any_ticket(read_graph(model, x), 1.0, 0), x)
    wrong = Net(lambda m, y: (m.b(y) + 1e-3, 1e12 * m.b(y))).double()
    wrong.load_state_dict(model.state_dict())
    assert reference.certify(model.double()) == 0
    assert reference.certify(wrong) > 1e-4


def test_infinities_that_depend_on_the_input_hide_no_difference():
    torch.manual_seed(0)
    model = Net(lambda m, y: m.b(y).masked_fill(m.b(y) > 0.2, float("-inf")))
    x = torch.randn(3, 6)
    (reference,) = find_references(model, any_ticket(read_graph(model, x), 1.0, 0), x)
    wrong = Net(lambda m, y: (1.001 * m.b(y)).masked_fill(m.b(y) > 0.2, float("-inf"))).double()
    wrong.load_state_dict(model.state_dict())
    assert any(bool(answer.isinf().any()) for (answer,) in reference.expected)
    assert reference.certify(model.double()) == 0
    assert reference.certify(wrong) > 1e-5


def test_infinities_that_agree_are_equal():
    a = [[torch.tensor([1.0, float("-inf")])]]
    assert difference(a, a) == 0
    assert difference(a, [[torch.tensor([1.0, float("inf")])]]) == float("inf")
    assert difference(a, [[torch.tensor([1.0, float("nan")])]]) == float("inf")


def test_masked_scores_can_be_certified():
    model = Net(lambda m, y: m.b(y).masked_fill(torch.eye(4, dtype=torch.bool)[:3], float("-inf")))
    assert compacted(model, torch.randn(3, 6)).proof.removed > 0


def test_a_model_that_ignores_the_order_of_tokens_can_be_certified():
    torch.manual_seed(0)
    model = nn.Sequential(nn.EmbeddingBag(9, 6), nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 3))
    assert compacted(model, torch.tensor([[1, 3, 3, 8, 5]])).proof.removed > 0


def test_inputs_that_cannot_be_drawn_together_are_drawn_one_by_one():
    torch.manual_seed(0)
    bag = nn.EmbeddingBag(9, 6)
    model = Net(lambda m, y: m.b(y))
    model.forward = lambda ids, starts: model.function(model, torch.relu(model.a(bag(ids, starts))))
    inputs = (torch.arange(9), torch.tensor([0, 5]))
    (reference,) = find_references(model, any_ticket(read_graph(model, inputs), 1.0, 0), inputs)
    assert len(probes_of(inputs)) == 3  # the first start is 0 in none that are drawn
    assert reference.numbers == [0, 3]
    assert torch.equal(reference.probes[1][0][1], inputs[1])


def test_models_in_bfloat16_are_certified_in_float64():
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.SiLU(), nn.Conv2d(16, 16, 3), nn.SiLU()),
        *(nn.Flatten(), nn.Linear(16 * 25, 9)),
    ).bfloat16()
    result = compacted(model, torch.randn(2, 3, 9, 9, dtype=torch.bfloat16))
    assert result.proof.relative_diff < 1e-12
    assert {p.dtype for p in result.model.parameters()} == {torch.bfloat16}


def test_numbers_made_in_forward_do_not_stop_the_certificate():
    model = Net(lambda m, y: F.linear(y, m.b.weight, torch.zeros(4)))  # float64 + float32: an error
    assert compacted(model, torch.randn(3, 6)).proof.form == "module"
    assert torch.get_default_dtype() == torch.float32


def test_a_forward_that_casts_is_certified_as_a_program():
    model = Net(lambda m, y: m.b(y.float().cumsum(0).to(y.dtype)))
    result = compacted(model, torch.randn(3, 6))
    assert result.proof.relative_diff < 1e-12


def test_a_forward_that_checks_its_type_is_certified_as_a_program():
    def narrow_only(module, y):
        if y.dtype != torch.float32:
            raise ValueError("only float32")
        return module.b(y)

    assert compacted(Net(narrow_only), torch.randn(3, 6)).proof.relative_diff < 1e-12


def test_a_forward_that_refuses_larger_inputs_is_judged_by_the_examples():
    def small_only(module, y):
        if not torch.compiler.is_exporting() and bool(y.abs().max() > 20):
            raise ValueError("too large")
        return 1e6 + module.b(y)  # varies too little to tell, at the scale of the examples

    torch.manual_seed(0)
    with pytest.raises(ValueError, match="does not depend on the input, so nothing"):
        compacted(Net(small_only), torch.randn(3, 6))


def test_a_model_without_floating_answers_is_refused_in_words():
    model = Net(lambda m, y: m.b(y).argmax(1))
    with pytest.raises(ValueError, match="returns no tensor of floating type"):
        compacted(model, torch.randn(3, 6))


def test_nan_for_the_example_inputs_is_said():
    model = Net(lambda m, y: m.b(y / 0 * 0))
    with pytest.raises(ValueError, match="gives NaN for the example inputs"):
        compacted(model, torch.randn(3, 6))
