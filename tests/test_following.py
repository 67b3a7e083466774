# SPDX-License-Identifier: Apache-2.0
"""The optimizer goes on with the compacted model as it would have gone on with the big one."""

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from dessilbi import DessiLBI, compact, wrap
from dessilbi.blocks.naming import canonical_name
from dessilbi.blocks.ticket import TensorSpec, Ticket
from dessilbi.cuts.closing import close_on
from dessilbi.cuts.cutting import cut_tensor
from dessilbi.graph import read_graph

torch.manual_seed(0)
IMAGES = torch.randn(40, 6, 2, 6, 6, dtype=torch.float64)
CLASSES = torch.randint(3, (40, 6))


class Net(nn.Module):
    """A residual block with a grouped convolution, batch norms and two linear layers."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(2, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.a = nn.Conv2d(8, 12, 3, padding=1, bias=False)
        self.a_norm = nn.BatchNorm2d(12)
        self.b = nn.Conv2d(12, 8, 3, padding=1, groups=2, bias=False)
        self.b_norm = nn.BatchNorm2d(8)
        self.fc = nn.Linear(8 * 4, 12)
        self.out = nn.Linear(12, 3)

    def forward(self, x):
        x = F.relu(self.norm(self.stem(x)))
        x = F.relu(x + self.b_norm(self.b(F.relu(self.a_norm(self.a(x))))))
        return self.out(F.gelu(self.fc(F.adaptive_avg_pool2d(x, 2).flatten(1))))


def build(net=Net, seed=0):
    torch.manual_seed(seed)
    return net().double().train()


def split(model, *, decayed=None, **structured):
    """Weights with a structure, everything else without."""
    named = list(model.named_parameters())
    return [
        {"params": [(n, p) for n, p in named if p.dim() > 1]} | structured,
        {"params": [(n, p) for n, p in named if p.dim() == 1]} | (decayed or {}),
    ]


def in_units(model, block_scale):
    """The filters that meet in the sum live or die together; linear layers by element."""
    named = dict(model.named_parameters())
    lam = {"unit": 0.3, "sqrt": 0.02}[block_scale]
    filters = {"structure": "filter", "lam": lam, "block_scale": block_scale}

    def group(*names, **options):
        return {"params": [(n, named.pop(n)) for n in names]} | options

    return [
        group("stem.weight", "b.weight", unit="sum", **filters),
        group("a.weight", **filters),
        group("fc.weight", "out.weight", structure="element", lam=0.02, block_scale=block_scale),
        group(*named),
    ]


LBI = {"lr": 0.05, "nu": 0.5, "kappa": 2.0}
MAKE = {
    "filters": lambda m: DessiLBI(split(m, structure="filter", lam=0.3), **LBI),
    "momentum and dampening": lambda m: DessiLBI(
        split(m, structure="filter", lam=0.1), momentum=0.9, dampening=0.3, weight_decay=0.1, **LBI
    ),
    "nesterov": lambda m: DessiLBI(
        split(m, structure="element", lam=0.02),
        momentum=0.8,
        nesterov=True,
        weight_decay=0.1,
        **LBI,
    ),
    "layers by sqrt": lambda m: DessiLBI(
        split(m, structure="layer", lam=0.03, block_scale="sqrt"), weight_decay=0.1, **LBI
    ),
    "channels": lambda m: DessiLBI(
        [
            {"params": [("a.weight", m.a.weight)], "structure": "channel"},
            {"params": [(n, p) for n, p in m.named_parameters() if n != "a.weight"]},
        ],
        lam=0.3,
        momentum=0.9,
        **LBI,
    ),
    "units": lambda m: DessiLBI(in_units(m, "unit"), momentum=0.9, **LBI),
    "units by sqrt": lambda m: DessiLBI(in_units(m, "sqrt"), momentum=0.9, **LBI),
    "wrapped AdamW": lambda m: wrap(
        torch.optim.AdamW(split(m, structure="filter"), lr=0.01, amsgrad=True, weight_decay=0.1),
        nu=0.1,
        lam=0.3,
    ),
    "wrapped SGD": lambda m: wrap(
        torch.optim.SGD(in_units(m, "sqrt"), lr=0.05, momentum=0.9), nu=0.5, lam=0.3
    ),
    "SGD": lambda m: torch.optim.SGD(
        m.parameters(), lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.1
    ),
    "AdamW": lambda m: torch.optim.AdamW(
        split(m, decayed={"weight_decay": 0.0}), lr=0.01, weight_decay=0.2
    ),
    "Adam with a tensor lr": lambda m: torch.optim.Adam(
        m.parameters(), lr=torch.tensor(0.01, dtype=torch.float64), weight_decay=0.1
    ),
}


def dead_rows(model, **dead):
    """A ticket in which rows of weights are dead; ``a_weight=[0]`` stands for "a.weight"."""
    masks, specs = {}, {}
    for key, rows in dead.items():
        name = key.replace("_weight", ".weight")
        shape = tuple(model.get_parameter(name).shape)
        specs[name] = TensorSpec(shape, (1,) + (None,) * (len(shape) - 1))
        masks[name] = torch.ones(specs[name].grid, dtype=torch.bool)
        masks[name][rows] = False
    return Ticket(masks, specs)


def filters(model):
    # One of each group of the grouped convolution could go; a third dead one is revived.
    return dead_rows(
        model, stem_weight=[1, 2, 6], b_weight=[1, 2, 6], a_weight=[0, 3, 4, 7], fc_weight=[2, 9]
    )


def elements(model):
    """Whole rows and single elements of every weight."""
    generator, rows = torch.Generator().manual_seed(1), filters(model)
    masks, specs = {}, {}
    for name, param in model.named_parameters():
        if param.dim() > 1:
            masks[name] = torch.rand(param.shape, generator=generator) < 0.6
            if name in rows:
                masks[name] &= rows.mask_of(name)
            specs[name] = TensorSpec(tuple(param.shape), (1,) * param.dim())
    return Ticket(masks, specs)


@pytest.fixture(scope="module")
def graph():
    """Reading the net is the slow part and does not depend on its weights."""
    return read_graph(build(), IMAGES[0])


@pytest.fixture
def quick(graph, monkeypatch):
    monkeypatch.setattr("dessilbi.compaction.compaction.read_graph", lambda *_: graph)
    return lambda model, ticket: close_on(graph, ticket)


def advance(model, optimizer, k, scheduler=None, clip=None):
    optimizer.zero_grad()
    F.cross_entropy(model(IMAGES[k]), CLASSES[k]).backward()
    norm = clip and nn.utils.clip_grad_norm_(model.parameters(), clip)
    optimizer.step()
    if scheduler is not None:
        scheduler.step()
    return norm


def state_of(model, optimizer):
    """Everything that training goes on from, by name."""
    found = {canonical_name(n): p.detach() for n, p in model.named_parameters()}
    found |= {n: b for n, b in model.named_buffers() if b.is_floating_point()}
    for name, param in model.named_parameters():
        for key, value in optimizer.state.get(param, {}).items():
            found[f"{name}:{key}"] = value
    return found


def largest_gap(big, big_optimizer, small):
    """The largest difference of anything, relative to the size of its tensor."""
    ours, theirs = state_of(small.model, small.optimizer), state_of(big, big_optimizer)
    assert ours.keys() == theirs.keys()
    worst = 0.0
    for name, value in ours.items():
        plain = name.split(":")[0]
        whole = theirs[name]
        if whole.dim():
            whole = cut_tensor(whole, small.cuts.get(plain, ()))
        assert whole.dtype == value.dtype
        gap, size = (whole - value).abs().max(), whole.abs().max()
        worst = max(worst, float(gap / size.clamp(min=1e-6)))
    return worst


def test_filters_kept_as_zeros_stay_dead(quick):
    model = build()
    optimizer = MAKE["momentum and dampening"](model)
    for k in range(4):
        advance(model, optimizer, k)
    ticket = quick(model, filters(model))
    small = compact(model, ticket, example_inputs=IMAGES[0], optimizer=optimizer, multiple_of=4)
    assert small.proof.rounded
    assert small.model.fc.out_features == 12
    ticket.enforce(model, optimizer)
    for k in range(4, 12):
        advance(model, optimizer, k)
        advance(small.model, small.optimizer, k)
        assert largest_gap(model, optimizer, small) < 1e-10, k
    for row in (2, 9):
        assert not small.model.fc.weight[row].any()
        assert not small.model.out.weight[:, row].any()
        assert not small.optimizer.state[small.model.fc.weight]["v"][row].any()


@pytest.mark.parametrize("tickets", [filters, elements])
@pytest.mark.parametrize("name", MAKE)
def test_the_small_model_trains_as_the_big_one_under_the_ticket(name, tickets, quick):
    model = build()
    optimizer = MAKE[name](model)
    for k in range(8):
        advance(model, optimizer, k)
    ticket = quick(model, tickets(model))
    small = compact(model, ticket, example_inputs=IMAGES[0], optimizer=optimizer)
    assert small.proof.removed == (6 if tickets is filters else 7)  # one is only unread
    assert sum(small.proof.revived.values()) == 3
    assert type(small.optimizer) is type(optimizer)
    ticket.enforce(model, optimizer)
    for k in range(8, 33):
        advance(model, optimizer, k)
        advance(small.model, small.optimizer, k)
        assert largest_gap(model, optimizer, small) < 1e-10, k
    group = small.optimizer.param_groups[0]
    if group.get("structure"):
        gamma = small.optimizer.gamma()
        assert any(bool(gamma[name].any()) for name in group["param_names"]), "nothing was selected"
