# SPDX-License-Identifier: Apache-2.0
"""Budgets on paths of real searches: met from below and to within one block, counted by hand."""

import atexit
import functools
import random
import shutil
import tempfile
from bisect import bisect, bisect_left
from pathlib import Path as FilePath
from unittest.mock import patch

import pytest
import torch
from tiny import denormals_kept
from torch import nn

from dessilbi import Ticket, close, compact
from dessilbi.choosing.choosing import QUANTITIES
from dessilbi.compaction.blueprint import tensors_of
from dessilbi.compaction.certifying import SilentError
from dessilbi.cuts.closing import close_on, settle_on
from dessilbi.cuts.costs import CostModel
from dessilbi.cuts.cutting import cut_module, find_cuts
from dessilbi.graph import read_graph
from dessilbi.outcomes import measuring
from dessilbi.outcomes.tickets import BUDGETS, Drawer, Wish
from dessilbi.path.history import NEVER
from dessilbi.path.settling import settled
from dessilbi.training.evaluation import accuracy, masked
from dessilbi.training.loop import train
from dessilbi.training.recipes import load_recipe

pytestmark = pytest.mark.filterwarnings("ignore:many units are dead", "ignore:nothing is left of")

# Short searches on scikit-learn's digits: the shipped recipes, some seconds each.
KEPT = ("checkpoint_every=1.0", "keep_checkpoints=99")
STOP = "stop={window=4, tolerance=0.8, gain=1.0, gap=0.4}"
SEARCHES = {
    "lenet": (  # ends with its ticket; smaller nu and lam, so that much enters in few epochs
        *("digits-lenet", "epochs=10", "points=40", "optimizer.nu=1.5", "optimizer.lam=0.1", STOP),
        *('structure={"conv*.weight" = {structure = "filter", lam = 1.2}}', *KEPT),
    ),
    "resnet": ("digits-resnet", "epochs=2", "points=12", "optimizer.nu=2.0", *KEPT),
    "resnet20": (
        *("digits-resnet", "model=resnet20", "epochs=2", "batch_size=64", "points=12"),
        *("optimizer.nu=1.0", 'structure={"fc.weight" = "none"}', *KEPT),
    ),
}
NETS = ["lenet", "resnet", pytest.param("resnet20", marks=pytest.mark.full)]
ORDERS = ("relative", "weight", "dual", "entry")


@functools.cache
def searched(name):
    """A short real search, opened to take tickets from."""
    folder = tempfile.mkdtemp(prefix="dessilbi-budgets-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    recipe, *more = SEARCHES[name]
    with denormals_kept():
        return Drawer(train(load_recipe(recipe, more), FilePath(folder) / "run", device="cpu"))


@functools.cache
def graph_of(name):
    drawer = searched(name)
    return read_graph(drawer.model, drawer.example)


def everything(drawer):
    specs = drawer.path.specs
    return Ticket({n: torch.ones(s.grid, dtype=torch.bool) for n, s in specs.items()}, specs)


def counted(model, example):
    """Parameters, bytes and MACs of one sample, counted on the model itself."""
    macs = 0

    def count(module, inputs, output):
        nonlocal macs
        macs += module.weight[0].numel() * output.numel()

    layers = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    handles = [layer.register_forward_hook(count) for layer in layers]
    with torch.no_grad():
        model.eval()(example[:1])
    for handle in handles:
        handle.remove()
    tensors = [*model.parameters(), *model.buffers()]
    size = sum(t.numel() * t.element_size() for t in tensors)
    return {"params": sum(p.numel() for p in model.parameters()), "bytes": size, "macs": macs}


def after_cut(name, ticket):
    """What is left of the net once a closed ticket is cut, and how much of it the ticket keeps."""
    drawer, graph = searched(name), graph_of(name)
    cuts = find_cuts(graph, settle_on(graph, ticket).gone)
    small = cut_module(drawer.model, cuts, tensors_of(drawer.model))
    kept = [ticket.mask_of(n) for n in ticket]  # with the norms and columns that closing adds
    density = sum(int(m.sum()) for m in kept) / sum(m.numel() for m in kept)
    return {"density": density, **counted(small, drawer.example)}


def members_like(family, ticket):
    """The numbers of the members that are this ticket once they are closed."""
    counts = range(family.smallest, len(family) + 1)

    def kept(count):
        return family.member(count)[0].kept_elements

    first, last = (end(counts, ticket.kept_elements, key=kept) for end in (bisect_left, bisect))
    assert all(family.member(count)[0] == ticket for count in (counts[first], counts[last - 1]))
    return counts[first:last]


def most_of(drawer, quantity, limit):
    """The limit as a number: shares are of the dense model."""
    if quantity == "density" or limit > 1:
        return limit
    return limit * counted(drawer.model, drawer.example)[quantity]


WISHES = [
    Wish(density=0.4),
    Wish(density=0.25, order="weight"),
    Wish(params=0.5),
    Wish(params=7_000.0, order="entry"),
    Wish(macs=0.45),
    Wish(macs=100_000.0),
    Wish(bytes=0.4),
    Wish(bytes=30_000.0),
    Wish(density=0.3, epoch=1.0),
    Wish(macs=0.4, epoch=1.0),
]
SCALE = {"lenet": 1.0, "resnet": 1.0, "resnet20": 20.0}  # of absolute limits


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("wish", WISHES, ids=lambda wish: wish.name)
def test_a_budget_is_met_from_below_and_one_more_block_would_exceed_it(name, wish):
    drawer = searched(name)
    ((quantity, limit),) = wish.given(BUDGETS).items()
    limit = limit * SCALE[name] if limit > 1 else limit
    wish = Wish(**{quantity: limit, "epoch": wish.epoch, "order": wish.order})
    drawn, most = drawer.draw(wish), most_of(drawer, quantity, limit)
    moment = drawn.ticket.origin["step"] if wish.epoch else None
    family = drawer.family(wish.order, step=moment)
    count = family.choose(quantity, limit).count

    assert after_cut(name, drawn.ticket)[quantity] <= most
    one_more, _ = family.member(count + 1)
    assert after_cut(name, one_more)[quantity] > most
    pair = [family._ranking.prefix(c, {}).kept_elements for c in (count, count + 1)]
    assert pair[1] - pair[0] == family._ranking.elements[count]
    assert family.smallest < count < len(family)
    assert all(drawn.ticket[n].any() for n in drawer.path.specs)
    assert (moment is None) or moment < drawer.path.step


def test_no_member_of_a_whole_family_that_fits_is_larger():
    family = searched("resnet").family()
    for quantity in QUANTITIES:
        measure, counts = family.measure(quantity), range(family.smallest, len(family) + 1)
        dense = 1.0 if quantity == "density" else getattr(family.costs.dense, quantity)
        for share in (0.2, 0.3, 0.5, 0.7, 0.9):
            fitting = [count for count in counts if measure(count) <= share * dense]
            assert family.choose(quantity, share).count == max(fitting) < len(family)


@pytest.mark.parametrize("name", NETS[:2])  # so short a search leaves ResNet-20 nothing to lose
def test_a_drop_is_held_and_one_block_less_would_lose_more(name):
    drawer = searched(name)
    dense = accuracy(drawer.model, drawer.data.validation)
    drawn = drawer.draw(Wish(max_drop=10.0))
    judged = accuracy(masked(drawer.model, drawn.ticket, drawer.data.train), drawer.data.validation)
    assert drawn.accuracy == judged >= dense - 0.1
    family = drawer.family()
    count = members_like(family, drawn.ticket)[0]
    assert family.smallest < count < len(family)
    assert drawer.judge(family.member(count - 1)[0]) < dense - 0.1


@pytest.mark.parametrize("name", NETS[1:])
def test_a_latency_is_met_within_its_spread_and_one_more_block_would_be_slower(name):
    drawer = searched(name)
    timed = []

    def clock(model, arguments, repeats):
        """A machine that takes a nanosecond for each MAC."""
        timed.append(counted(model, drawer.example)["macs"])
        return 1e-6 * timed[-1], 0.0

    dense = counted(drawer.model, drawer.example)["macs"]
    with patch.object(measuring, "measure_latency", clock):
        drawn = drawer.draw(Wish(latency_ms=0.5e-6 * dense))
    macs = after_cut(name, drawn.ticket)["macs"]
    assert macs in timed
    assert macs <= 0.5 * dense
    family = drawer.family()
    count = members_like(family, drawn.ticket)[-1]
    assert after_cut(name, family.member(count + 1)[0])["macs"] > 0.5 * dense


@pytest.mark.parametrize("name", NETS)
def test_a_moment_keeps_what_had_entered_by_then(name):
    drawer = searched(name)
    points = drawer.path.points
    step = next(p.step for p in points if p.density > 0.5 * points[-1].density)
    drawn = drawer.draw(Wish(step=step))
    entry = drawer.path.entry()
    entered = {n: (entry[n] != NEVER) & (entry[n] <= step) for n in entry}
    expected = close(
        Ticket(entered, drawer.path.specs), drawer.model, example_inputs=drawer.example
    )
    assert 0 < drawn.ticket.density < 1
    assert all(torch.equal(drawn.ticket[n], expected[n]) for n in expected)
    count = drawer.path.points[-1].metrics["epoch"]
    epoch = step * count / drawer.path.step
    assert drawer.draw(Wish(epoch=epoch)).ticket == drawn.ticket


def test_a_search_that_ended_with_its_ticket_gives_it_as_the_early_one():
    drawer = searched("lenet")
    told = drawer.run.read_status()
    assert told["epochs_saved"] > 0
    drawn = drawer.draw(Wish(early=True))
    found = settled(drawer.path, **drawer.recipe.stop.model_dump())
    assert drawn.ticket.origin["step"] == found.step == told["steps"]
    support = close(
        drawer.path.support(step=found.step), drawer.model, example_inputs=drawer.example
    )
    assert all(torch.equal(drawn.ticket[n], support[n]) for n in support)
    assert 0 < drawn.ticket.density < 1


def random_tickets(name, count):
    """Closed tickets of a path: members of its orders, supports, what had entered, any blocks."""
    drawer, draw = searched(name), random.Random(0)
    specs, last = drawer.path.specs, drawer.path.points[-1].density
    points = [p.step for p in drawer.path.points if p.density > 0.1 * last]
    for number in range(count):
        if number % 4 == 0:
            family = drawer.family(draw.choice(ORDERS))
            yield family.member(draw.randint(family.smallest, len(family)))[0]
            continue
        if number % 4 == 1:
            ticket = drawer.path.support(step=draw.choice(points))
        elif number % 4 == 2:
            ticket = drawer.path.ticket(step=draw.choice(points))
        else:
            generator, share = torch.Generator().manual_seed(number), draw.uniform(0.1, 0.95)
            grids = {n: torch.rand(s.grid, generator=generator) < share for n, s in specs.items()}
            ticket = Ticket(grids, specs)
        yield close_on(graph_of(name), ticket)


@pytest.mark.parametrize(
    ("name", "count"),
    [("lenet", 140), ("resnet", 60), pytest.param("resnet20", 60, marks=pytest.mark.full)],
)
def test_costs_of_random_tickets_of_a_path_are_a_count_on_the_model_after_the_cut(name, count):
    drawer = searched(name)
    costs, seen = CostModel(graph_of(name), drawer.model), set()
    for ticket in random_tickets(name, count):
        cost, found = costs.of(ticket), after_cut(name, ticket)
        assert (cost.params, cost.macs) == (found["params"], found["macs"])
        assert cost.bytes == found["bytes"]
        assert ticket.density == found["density"]
        seen.add((cost.params, found["density"]))
    assert len(seen) > count / 2


@pytest.mark.parametrize(
    ("name", "count"),
    [
        *(pytest.param(name, 67, marks=pytest.mark.full) for name in SEARCHES),
        *(("lenet", 8), ("resnet", 8)),
    ],
)
def test_costs_of_random_tickets_of_a_path_are_those_of_what_compact_makes(name, count):
    drawer = searched(name)
    costs, sizes = CostModel(graph_of(name), drawer.model), set()
    for ticket in random_tickets(name, count):
        if not all(ticket[n].any() for n in drawer.path.specs):
            continue  # a layer is wholly dead, and compact refuses what no longer reads its input
        cost = costs.of(ticket)
        try:
            small = compact(drawer.model, ticket, example_inputs=drawer.example)
        except SilentError:
            continue  # every layer has something left, but no way leads through
        found = counted(small.model, drawer.example)
        assert found == {"params": cost.params, "bytes": cost.bytes, "macs": cost.macs}
        assert small.proof.macs_after == cost.macs
        sizes.add(cost.params)
    assert len(sizes) > count / 3
