# SPDX-License-Identifier: Apache-2.0
"""Budgets: the largest closed ticket within one, and costs that compaction confirms."""

import functools
import itertools

import pytest
import torch
from torch import nn
from torch.nn.functional import relu

from dessilbi import DessiLBI, Path, compact, param_groups, plan
from dessilbi.blocks.ticket import TensorSpec, Ticket
from dessilbi.choosing.choosing import Family
from dessilbi.cuts.closing import close_on, settle_on
from dessilbi.cuts.costs import CostModel
from dessilbi.cuts.cutting import cut_module, find_cuts
from dessilbi.graph import read_graph
from dessilbi.models import build_model
from dessilbi.testing import random_ticket

X = torch.linspace(-1, 1, 2 * 28 * 28).reshape(2, 1, 28, 28)


class Grouped(nn.Module):
    """A residual net with a grouped convolution and a batch norm."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, 16, 3, stride=2)
        self.grouped = nn.Conv2d(16, 16, 3, padding=1, groups=4)
        self.norm = nn.BatchNorm2d(16)
        self.inner = nn.Conv2d(16, 12, 1)
        self.back = nn.Conv2d(12, 16, 1)
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        x = relu(self.stem(x))
        x = relu(x + self.back(relu(self.inner(relu(self.norm(self.grouped(x)))))))
        return self.head(x.mean((2, 3)))


def make(name):
    torch.manual_seed(0)
    if name == "grouped":
        return Grouped()
    return build_model(name, num_classes=10, in_channels=1, seed=0)


@functools.cache
def trained(name):
    """A path after a few steps, with its model and inputs."""
    model = make(name)
    groups = param_groups(model, {"*head.weight": None} if name == "grouped" else None)
    optimizer = DessiLBI(groups, lr=0.05, nu=10.0, lam=1e-3)
    path = Path(optimizer)
    for _ in range(3):
        optimizer.zero_grad()
        model(X).square().mean().backward()
        optimizer.step()
    return model, path


@functools.cache
def family(name):
    model, path = trained(name)
    return path.family(model, example_inputs=X, order="weight")


NETS = ["lenet", "grouped", "resnet8"]


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("quantity", ["density", "params", "macs", "bytes"])
def test_budgets_are_met_from_below_to_within_one_item(name, quantity):
    found = family(name)
    choice = found.choose(quantity, 0.5)

    measure = found.measure(quantity)
    dense = 1.0 if quantity == "density" else getattr(found.costs.dense, quantity)
    assert measure(choice.count) <= 0.5 * dense
    assert measure(choice.count + 1) > 0.5 * dense


@pytest.mark.parametrize("name", NETS)
def test_costs_are_those_of_the_compacted_model(name):
    model, _ = trained(name)
    choice = family(name).choose("macs", 0.4)

    proof = compact(model, choice.ticket, example_inputs=X).proof

    assert (choice.cost.params, choice.cost.bytes) == (proof.params_after, proof.bytes_after)
    assert choice.cost.macs == proof.macs_after < proof.macs_before


@pytest.mark.parametrize("name", NETS)
def test_costs_of_random_tickets_are_those_of_the_compacted_model(name):
    model = make(name)
    costs = CostModel(read_graph(model, X), model)
    for seed in range(3):
        ticket = random_ticket(model, example_inputs=X, density=0.3 + 0.2 * seed, seed=seed)
        proof = compact(model, ticket, example_inputs=X).proof
        cost = costs.of(ticket)
        assert cost.params == proof.params_after < costs.dense.params
        assert (cost.bytes, cost.macs) == (proof.bytes_after, proof.macs_after)


def test_heads_take_their_products_along():
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, dropout=0.0).eval()
    x = torch.randn(2, 6, 16)
    ticket = random_ticket(layer, example_inputs=x, density=0.5)

    proof = compact(layer, ticket, example_inputs=x).proof
    cost = CostModel(read_graph(layer, x), layer).of(ticket)

    assert (cost.params, cost.macs) == (proof.params_after, proof.macs_after)


class Counted(nn.Module):
    """A unit of eight before something that has to be counted."""

    def __init__(self, function):
        super().__init__()
        self.a, self.wide, self.function = nn.Linear(6, 8), nn.Linear(1, 8), function
        self.weight, self.rnn = nn.Parameter(torch.randn(8, 5)), nn.LSTM(6, 6, batch_first=True)

    def forward(self, *inputs):
        return self.function(self, *inputs)


COUNTED = {
    "product with a weight": (lambda m, x: m.a(x).relu() @ m.weight, [(3, 6)]),
    "einsum with a weight": (
        lambda m, x: torch.einsum("bi,io->bo", m.a(x).relu(), m.weight),
        [(3, 6)],
    ),
    "einsum": (lambda m, x: torch.einsum("bti,bsi->bts", m.a(x), m.a(x)), [(3, 4, 6)]),
    "once per batch": (
        lambda m, x: (m.a(x).relu() + m.wide(torch.ones(7, 1)).relu().sum(0)) @ m.weight,
        [(3, 6)],
    ),
    "no rule": (lambda m, x: m.a(m.rnn(x)[0]).relu() @ m.weight, [(3, 4, 6)]),
    "an input without batch": (
        lambda m, x, mixing: mixing @ m.a(x).relu() @ m.weight,
        [(2, 4, 6), (4, 4)],
    ),
}


@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning", "ignore:.*:UserWarning")
@pytest.mark.parametrize("name", COUNTED)
def test_plan_costs_and_proof_count_the_same_macs_of_one_sample(name):
    torch.manual_seed(0)
    function, shapes = COUNTED[name]
    model, x = Counted(function).eval(), tuple(torch.randn(*shape) for shape in shapes)
    ticket = random_ticket(model, example_inputs=x, density=0.5)

    proof = compact(model, ticket, example_inputs=x).proof
    costs = CostModel(read_graph(model, x), model)

    assert (costs.dense.macs, costs.of(ticket).macs) == (proof.macs_before, proof.macs_after)
    assert plan(model, example_inputs=x).macs == proof.macs_before > proof.macs_after > 0


@pytest.mark.parametrize("samples", [1, 2, 5])
def test_macs_do_not_depend_on_the_number_of_examples(samples):
    model, x = make("lenet"), X[:1].repeat(samples, 1, 1, 1)
    ticket = random_ticket(model, example_inputs=x, density=0.5)
    proof = compact(model, ticket, example_inputs=x).proof
    whole = compact(model, ticket, example_inputs=X).proof
    assert (proof.macs_before, proof.macs_after) == (whole.macs_before, whole.macs_after)


def test_members_are_nested_and_cost_more_and_more():
    found = family("grouped")
    tickets, costs = zip(*(found.member(count) for count in range(1, len(found) + 1)), strict=True)

    for smaller, larger in itertools.pairwise(costs):
        assert smaller.params <= larger.params
        assert smaller.macs <= larger.macs
    assert costs[-1] == found.costs.dense
    assert tickets[0].density < tickets[-1].density == 1.0


def test_blocks_around_a_grouped_convolution_come_evenly_from_its_groups():
    found = family("grouped")
    ticket = found.choose("params", 0.5).ticket

    alive = ticket["grouped.weight"].reshape(4, 4).sum(1)
    assert alive.min() == alive.max() < 4
    assert not ticket.origin["revived"].get("grouped.weight")


def test_what_is_removed_together_is_ranked_together_in_an_uncoupled_run():
    ticket = family("resnet8").choose("macs", 0.1).ticket

    stem = next(name for name in ticket if "stem" in name or name.startswith("conv"))
    unit = next(u for u in family("resnet8").graph.units if stem in {m.name for m in u.producers})
    masks = [ticket.mask_of(m.name).flatten(1).any(1) for m in unit.producers]
    assert len(masks) > 1
    assert 0 < int(masks[0].sum()) < len(masks[0])
    assert all(torch.equal(mask, masks[0]) for mask in masks)


def test_path_ticket_by_budget_is_closed_and_compactable():
    model, path = trained("lenet")

    ticket = path.ticket(params=20_000, order="weight", model=model, example_inputs=X)

    assert ticket.origin["closed"] is True
    assert compact(model, ticket, example_inputs=X).proof.params_after <= 20_000
    share = path.ticket(params=20_000 / 61_706, order="weight", model=model, example_inputs=X)
    assert share == ticket


@pytest.mark.parametrize("order", ["dual", "weight", "entry"])
def test_every_order_has_a_family(order):
    model, path = trained("resnet8")
    found = path.family(model, example_inputs=X, order=order)
    assert found.choose("density", 0.3).ticket.origin["order"] == order


def test_an_infeasible_budget_names_the_smallest_feasible():
    found = family("resnet8")
    smallest = found.member(found.smallest)[1].params
    with pytest.raises(ValueError, match=f"smallest ticket of this run has {smallest:,}; ask for"):
        family("resnet8").choose("params", 2)


@pytest.mark.parametrize(
    ("quantity", "limit", "says"),
    [
        ("macs", 0, "macs=0 is not allowed: it must be above 0"),
        ("macs", float("nan"), "macs=nan is not allowed"),
        ("macs", float("inf"), "macs=inf is not allowed: it must be above 0, and finite"),
        ("density", 1.5, r"density=1.5 is not allowed: it must be in \(0, 1\]"),
        ("flops", 0.5, "'flops' is not a budget: use one of density, params, macs, bytes"),
    ],
)
def test_bad_budgets_are_refused(quantity, limit, says):
    with pytest.raises(ValueError, match=says):
        family("lenet").choose(quantity, limit)


def test_a_budget_without_a_model_says_what_is_missing():
    _, path = trained("lenet")
    with pytest.raises(ValueError, match="a ticket by macs needs the model"):
        path.ticket(macs=0.5)
    with pytest.raises(ValueError, match="give model and example_inputs together"):
        path.ticket(density=0.5, example_inputs=X)


def test_a_family_of_another_model_is_refused():
    _, path = trained("lenet")
    with pytest.raises(ValueError, match="this ticket is for another model"):
        path.family(make("grouped"), example_inputs=X)


def test_no_layer_dies_in_the_smallest_member():
    for name in NETS:
        found = family(name)
        ticket = found._ranking.prefix(found.smallest, {})
        assert min(ticket.densities().values()) > 0
        closed = found.member(found.smallest)[0]
        assert all(closed[name].any() for name in ticket)
        if found.smallest > len(found._ranking.leaders):
            smaller = found.member(found.smallest - 1)[0]
            assert not all(smaller[name].any() for name in ticket)


def test_a_family_is_made_from_scores():
    assert isinstance(family("lenet"), Family)
    assert len(family("resnet8")) < sum(p.numel() for p in make("resnet8").parameters())


def counted(model, ticket, graph):
    """Parameters and MACs of the model after the cut, counted on the cut model itself."""
    cuts = find_cuts(graph, settle_on(graph, ticket).gone)
    small = cut_module(model, cuts, {n: t.detach() for n, t in model.named_parameters()}).eval()
    macs = 0

    def count(module, inputs, output):
        nonlocal macs
        macs += module.weight[0].numel() * output.numel()

    for module in small.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(count)
    with torch.no_grad():
        small(X[:1])
    return sum(p.numel() for p in small.parameters()), macs


@pytest.mark.parametrize(
    ("name", "seeds"),
    [("lenet", range(100)), ("plain", range(100))],
    ids=["lenet", "plain"],
)
def test_costs_of_two_hundred_random_tickets_equal_a_count_on_the_cut_model(name, seeds):
    if name == "lenet":
        model = make("lenet")
    else:  # no norms, whose buffers a plain cut leaves alone
        model = nn.Sequential(
            *(nn.Conv2d(1, 8, 3, stride=2), nn.ReLU(), nn.Conv2d(8, 12, 3, stride=2), nn.ReLU()),
            *(nn.Conv2d(12, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 16, 9), nn.Linear(9, 4)),
        )
    graph = read_graph(model, X[:1])
    costs, seen = CostModel(graph, model), set()
    weights = {n: p for n, p in model.named_parameters() if p.dim() > 1}
    specs = {
        n: TensorSpec(tuple(p.shape), (1, *[None] * (p.dim() - 1))) for n, p in weights.items()
    }
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        share = 0.1 + 0.008 * seed
        masks = {n: torch.rand(s.grid, generator=generator) < share for n, s in specs.items()}
        ticket = close_on(graph, Ticket(masks, specs))
        cost = costs.of(ticket)
        assert (cost.params, cost.macs) == counted(model, ticket, graph)
        brute = sum(int(ticket.mask_of(n).sum()) for n in ticket)
        assert ticket.density == brute / sum(ticket.mask_of(n).numel() for n in ticket)
        seen.add(cost.params)
    assert len(seen) > 20


@pytest.mark.full
def test_budgets_of_a_resnet20_are_met_from_below_to_within_one_item():
    x = torch.linspace(-1, 1, 3 * 32 * 32).reshape(1, 3, 32, 32)
    model = build_model("resnet20", num_classes=10, in_channels=3, seed=0)
    optimizer = DessiLBI(param_groups(model), lr=0.05, nu=10.0, lam=1e-3)
    path = Path(optimizer)
    model(x.repeat(2, 1, 1, 1)).square().mean().backward()
    optimizer.step()
    found = path.family(model, example_inputs=x, order="weight")
    for quantity in ("density", "params", "macs", "bytes"):
        choice = found.choose(quantity, 0.4)
        measure = found.measure(quantity)
        dense = 1.0 if quantity == "density" else getattr(found.costs.dense, quantity)
        assert measure(choice.count) <= 0.4 * dense < measure(choice.count + 1)
    proof = compact(model, choice.ticket, example_inputs=x).proof
    assert (choice.cost.params, choice.cost.macs) == (proof.params_after, proof.macs_after)
