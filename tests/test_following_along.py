# SPDX-License-Identifier: Apache-2.0
"""What comes along when an optimizer follows a compaction, and what is refused."""

import copy

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn
from torch.optim import lr_scheduler

from dessilbi import DessiLBI, Path, close, compact, wrap
from dessilbi.blocks.enforcing import enforcements
from dessilbi.blocks.sharding import is_sharded
from dessilbi.blocks.ticket import TensorSpec, Ticket
from dessilbi.cuts.closing import close_on
from dessilbi.cuts.cutting import cut_tensor
from dessilbi.graph import read_graph

torch.manual_seed(0)
X = torch.randn(40, 6, 8, dtype=torch.float64)
Y = torch.randn(40, 6, 3, dtype=torch.float64)


def build():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 6), nn.GELU(), nn.Linear(6, 3)
    ).double()


def advance(model, optimizer, k, *others):
    optimizer.zero_grad()
    (model(X[k]) - Y[k]).square().mean().backward()
    optimizer.step()
    for scheduler in others:
        scheduler.step()


def rows(model, **dead):
    masks, specs = {}, {}
    for number, index in dead.items():
        name = f"{number[1:]}.weight"
        shape = tuple(model.get_parameter(name).shape)
        specs[name] = TensorSpec(shape, (1,) + (None,) * (len(shape) - 1))
        masks[name] = torch.ones(specs[name].grid, dtype=torch.bool)
        masks[name][index] = False
    return Ticket(masks, specs)


@pytest.fixture(scope="module")
def graph():
    return read_graph(build(), X[0])


@pytest.fixture
def quick(graph, monkeypatch):
    """Compact the net above without reading it again."""
    monkeypatch.setattr("dessilbi.compaction.compaction.read_graph", lambda *_: graph)

    def compacted(model, optimizer, ticket=None):
        ticket = rows(model, _0=[1, 4, 5], _2=[0]) if ticket is None else ticket
        return compact(model, close_on(graph, ticket), example_inputs=X[0], optimizer=optimizer)

    return compacted


def lbi(model, **options):
    groups = [
        {"params": [(n, p) for n, p in model.named_parameters() if p.dim() > 1]}
        | {"structure": "filter", "lam": 0.1},
        {"params": [(n, p) for n, p in model.named_parameters() if p.dim() == 1]},
    ]
    return DessiLBI(groups, **{"lr": 0.05, "nu": 0.5, "momentum": 0.9} | options)


def trained(make=lbi, steps=6):
    model = build()
    optimizer = make(model)
    for k in range(steps):
        advance(model, optimizer, k)
    return model, optimizer


def snapshot(model, optimizer):
    return copy.deepcopy((model.state_dict(), optimizer.state_dict()))


def same(one, two):
    """Whether two nested values are equal bit by bit."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, two)
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(same(one[k], two[k]) for k in one)
    if isinstance(one, list | tuple):
        return len(one) == len(two) and all(map(same, one, two))
    return one == two


def test_the_original_goes_on_as_if_nothing_had_happened(quick):
    model, optimizer = trained()
    scheduler = lr_scheduler.ExponentialLR(optimizer, 0.9)
    other, twin = copy.deepcopy((model, optimizer))
    small = quick(model, optimizer)
    follower = small.follow(scheduler)
    for k in range(6, 12):
        advance(small.model, small.optimizer, k, follower)
    assert same(snapshot(model, optimizer), snapshot(other, twin))
    for k in range(6, 9):
        advance(model, optimizer, k)
        advance(other, twin, k)
    assert same(snapshot(model, optimizer), snapshot(other, twin))


def test_groups_keep_order_options_and_names(quick):
    model, optimizer = trained()
    lr_scheduler.StepLR(optimizer, 2)  # puts initial_lr into the groups
    optimizer.param_groups[1]["note"] = "mine"
    small = quick(model, optimizer)
    for old, new in zip(optimizer.param_groups, small.optimizer.param_groups, strict=True):
        assert {k: v for k, v in old.items() if k != "params"} == {
            k: v for k, v in new.items() if k != "params"
        }
        own = dict(small.model.named_parameters())
        assert [id(p) for p in new["params"]] == [id(own[n]) for n in new["param_names"]]
    torch_adds = {"differentiable": False}  # whenever an optimizer is copied
    assert small.optimizer.defaults == optimizer.defaults | torch_adds
    assert "initial_lr" in small.optimizer.param_groups[0]


def test_v_keeps_its_own_precision_and_absent_state_stays_absent():
    model, x = build().bfloat16(), X[0].bfloat16()
    optimizer = lbi(model)
    model[0](x).square().mean().backward()  # the others have no gradient
    optimizer.step()
    ticket = close(rows(model, _0=[1, 4, 5]), model, example_inputs=x)
    small = compact(model, ticket, example_inputs=x, optimizer=optimizer)
    state = small.optimizer.state[small.model[0].weight]
    assert state["v"].dtype == torch.float32
    assert state["v"].shape == (9, 8)
    assert small.model[4].weight not in small.optimizer.state
    assert model[4].weight not in optimizer.state


def test_pending_gradients_come_along(quick):
    model, optimizer = trained()
    small = quick(model, optimizer)
    for name, param in model.named_parameters():
        mine = small.model.get_parameter(name)
        assert torch.equal(mine.grad, cut_tensor(param.grad, small.cuts.get(name, ())))


def test_frozen_and_unnamed_parameters_follow(quick):
    model = build()
    model[2].weight.requires_grad_(False)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    advance(model, optimizer, 0)
    small = quick(model, optimizer)
    assert not small.model[2].weight.requires_grad
    assert "param_names" not in small.optimizer.param_groups[0]
    before = small.model[2].weight.clone()
    advance(small.model, small.optimizer, 1)
    assert torch.equal(small.model[2].weight, before)
    assert len(small.optimizer.param_groups[0]["params"]) == 5


def test_a_shared_weight_stays_shared_and_is_stepped_once():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(8, 6), nn.Linear(6, 6), nn.Linear(6, 6)
            self.d = nn.Linear(6, 3)
            self.c.weight = self.b.weight

        def forward(self, x):
            x = F.relu(self.a(x))
            return self.d(F.relu(self.c(F.relu(self.b(x)))))

    model = Tied().double()
    optimizer = torch.optim.SGD(model.named_parameters(), lr=0.1, momentum=0.9)
    advance(model, optimizer, 0)
    masks = {n: torch.ones(6, 1, dtype=torch.bool) for n in ("a.weight", "b.weight")}
    for mask in masks.values():
        mask[[1, 3]] = False
    specs = {"a.weight": TensorSpec((6, 8), (1, None)), "b.weight": TensorSpec((6, 6), (1, None))}
    ticket = close(Ticket(masks, specs), model, example_inputs=X[0])
    small = compact(model, ticket, example_inputs=X[0], optimizer=optimizer)
    assert small.model.c.weight is small.model.b.weight
    assert small.model.b.weight.shape == (4, 4)
    ticket.enforce(model, optimizer)
    for k in range(1, 6):
        advance(model, optimizer, k)
        advance(small.model, small.optimizer, k)
    kept = cut_tensor(model.b.weight.detach(), small.cuts["b.weight"])
    torch.testing.assert_close(small.model.b.weight.detach(), kept, rtol=1e-12, atol=1e-12)


def test_a_loaded_v_that_waits_for_its_base_is_cut_as_well(quick):
    def make(model):
        base = torch.optim.AdamW(model.named_parameters(), lr=0.01)
        return wrap(base, nu=1.0, lam=0.1, structure="element")

    model, optimizer = trained(make)
    saved = optimizer.state_dict()
    alone = {i: {"v": state["v"]} for i, state in saved["state"].items()}
    fresh = make(model)
    fresh.load_state_dict({**saved, "state": alone})
    small = quick(model, fresh)
    wanted = cut_tensor(optimizer.state[model[0].weight]["v"], small.cuts["0.weight"])
    assert torch.equal(small.optimizer._waiting[small.model[0].weight], wanted)
    advance(small.model, small.optimizer, 0)
    assert small.optimizer.state[small.model[0].weight]["v"].shape == wanted.shape
    assert small.optimizer.base.param_groups is small.optimizer.param_groups


@pytest.mark.parametrize("tensor_lr", [False, True])
@pytest.mark.parametrize(
    "make",
    [
        lambda o: lr_scheduler.CosineAnnealingLR(o, 20),
        lambda o: lr_scheduler.LambdaLR(o, lambda k: 0.9**k),
        lambda o: lr_scheduler.MultiplicativeLR(o, lambda k: 0.9),
        lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=40),
        lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, step_size_up=3),
        lambda o: lr_scheduler.SequentialLR(
            o,
            [lr_scheduler.LinearLR(o, total_iters=8), lr_scheduler.ExponentialLR(o, 0.9)],
            milestones=[9],
        ),
        lambda o: lr_scheduler.ChainedScheduler(
            [lr_scheduler.LinearLR(o, total_iters=8), lr_scheduler.ExponentialLR(o, 0.9)]
        ),
    ],
    ids=["cosine", "lambda", "multiplicative", "one cycle", "cyclic", "sequential", "chained"],
)
def test_a_scheduler_follows_and_both_give_the_same_rates(make, tensor_lr, quick):
    model = build()
    lr = torch.tensor(0.05, dtype=torch.float64) if tensor_lr else 0.05
    optimizer = lbi(model, lr=lr)
    scheduler = make(optimizer)
    for k in range(5):
        advance(model, optimizer, k, scheduler)
    small = quick(model, optimizer)
    follower = small.follow(scheduler)
    assert type(follower) is type(scheduler)
    rates = []
    for k in range(5, 15):
        advance(small.model, small.optimizer, k, follower)
        rates.append([float(g["lr"]) for g in small.optimizer.param_groups])
    assert len({tuple(told) for told in rates}) > 5
    for k in range(5, 15):
        advance(model, optimizer, k, scheduler)
        assert [float(g["lr"]) for g in optimizer.param_groups] == rates[k - 5]
    options = [{k: g[k] for k in ("momentum", "initial_lr")} for g in optimizer.param_groups]
    assert same(options, [{k: g[k] for k in options[0]} for g in small.optimizer.param_groups])


def test_a_plateau_scheduler_follows(quick):
    model, optimizer = trained()
    scheduler = lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)
    scheduler.step(1.0)
    small = quick(model, optimizer)
    small.follow(scheduler).step(2.0)
    assert small.optimizer.param_groups[0]["lr"] == pytest.approx(0.005)
    assert optimizer.param_groups[0]["lr"] == 0.05


def test_a_scheduler_of_the_wrapped_base_follows(quick):
    model, optimizer = trained(
        lambda m: wrap(torch.optim.AdamW(m.named_parameters(), lr=0.01), nu=1.0, lam=0.1)
    )
    scheduler = lr_scheduler.ExponentialLR(optimizer.base, 0.5)
    small = quick(model, optimizer)
    follower = small.follow(scheduler)
    advance(small.model, small.optimizer, 6, follower)
    assert small.optimizer.param_groups[0]["lr"] == 0.005
    assert optimizer.param_groups[0]["lr"] == 0.01


def test_the_first_step_of_a_scheduler_after_compaction_does_not_warn(quick):
    model, optimizer = trained(steps=0)
    scheduler = lr_scheduler.ExponentialLR(optimizer, 0.9)
    advance(model, optimizer, 0)
    small = quick(model, optimizer)
    small.follow(scheduler).step()  # the old optimizer has stepped, so this is in order
    model, optimizer = trained(steps=0)
    scheduler = lr_scheduler.ExponentialLR(optimizer, 0.9)
    small = quick(model, optimizer)
    follower = small.follow(scheduler)
    advance(small.model, small.optimizer, 0, follower)


def test_a_foreign_scheduler_is_refused(quick):
    model, optimizer = trained()
    other = lr_scheduler.ExponentialLR(lbi(build()), 0.9)
    with pytest.raises(ValueError, match="drives another optimizer"):
        quick(model, optimizer).follow(other)
    with pytest.raises(ValueError, match="no optimizer went along"):
        quick(model, None).follow(other)


def test_hooks_of_the_user_are_called_with_the_new_optimizer(quick):
    model, optimizer = trained()
    seen = []
    optimizer.register_step_pre_hook(lambda o, *_: seen.append(("before", o)))
    optimizer.register_step_post_hook(lambda o, *_: seen.append(("after", o)))
    optimizer.register_state_dict_post_hook(lambda o, _: seen.append(("saved", o)))
    optimizer.register_load_state_dict_pre_hook(lambda o, _: seen.append(("loaded", o)))
    small = quick(model, optimizer)
    assert seen == []
    advance(small.model, small.optimizer, 0)
    small.optimizer.load_state_dict(small.optimizer.state_dict())
    assert seen == [(told, small.optimizer) for told in ("before", "after", "saved", "loaded")]


def test_hooks_on_a_wrapped_base_come_along(quick):
    base_of = {}

    def make(model):
        base_of["it"] = torch.optim.SGD(model.named_parameters(), lr=0.1)
        return wrap(base_of["it"], nu=1.0, lam=0.1)

    model, optimizer = trained(make)
    seen = []
    base_of["it"].register_step_post_hook(lambda o, *_: seen.append(o))
    small = quick(model, optimizer)
    advance(small.model, small.optimizer, 0)
    assert seen == [small.optimizer.base]
    with pytest.raises(ValueError, match="wrapped already"):
        wrap(small.optimizer.base, nu=1.0, lam=0.1)


def test_a_path_stays_and_a_new_one_goes_on_from_it(quick):
    model, optimizer = trained(steps=0)
    path = Path(optimizer, every=1)
    for k in range(4):
        advance(model, optimizer, k)
    with pytest.warns(UserWarning, match="stays with the original model"):
        small = quick(model, optimizer)
    advance(small.model, small.optimizer, 4)
    assert path.step == 4
    path.close()
    small = quick(model, optimizer)
    after = Path(small.optimizer, every=1, after=path)
    for k in range(4, 7):
        advance(small.model, small.optimizer, k)
    assert [point.step for point in after.points] == [5, 6, 7]
    assert after.time == pytest.approx(7 * 0.05)
    assert after.ticket(density=0.5).specs["0.weight"].shape == (9, 8)


def test_what_was_enforced_before_is_enforced_on(quick):
    model, optimizer = trained()
    mask = torch.rand(12, 8, generator=torch.Generator().manual_seed(0)) < 0.5
    sparse = Ticket({"0.weight": mask}, {"0.weight": TensorSpec((12, 8), (1, 1))})
    sparse.enforce(model, optimizer)
    small = quick(model, optimizer)
    for k in range(6, 12):
        advance(model, optimizer, k)
        advance(small.model, small.optimizer, k)
    weight = small.model[0].weight.detach()
    dead = ~cut_tensor(mask, small.cuts["0.weight"])
    assert dead.any()
    assert not weight[dead].any()
    assert not small.optimizer.state[small.model[0].weight]["v"][dead].any()
    assert len(enforcements(small.optimizer)) == 1
    assert len(enforcements(optimizer)) == 1


def test_without_dead_entries_nothing_is_enforced(quick):
    small = quick(*trained())
    assert enforcements(small.optimizer) == []
    assert all(bool(mask.all()) for mask in small.ticket.values())


def elements(model):
    generator = torch.Generator().manual_seed(1)
    mask = torch.rand(12, 8, generator=generator) < 0.5
    mask[[1, 4]] = False
    return Ticket({"0.weight": mask}, {"0.weight": TensorSpec((12, 8), (1, 1))})


def test_training_goes_on_from_a_checkpoint_of_the_small_model(quick):
    model, optimizer = trained()
    small = quick(model, optimizer, elements(model))
    twin = copy.deepcopy(small.model)
    fresh = lbi(twin)
    fresh.load_state_dict(small.optimizer.state_dict())
    small.ticket.enforce(twin, fresh)
    for k in range(6, 12):
        advance(small.model, small.optimizer, k)
        advance(twin, fresh, k)
    assert same(snapshot(small.model, small.optimizer), snapshot(twin, fresh))
    assert not twin[0].weight[~small.ticket.mask_of("0.weight")].any()


def test_a_second_compaction_follows_the_first():
    model, optimizer = trained()
    first = close(rows(model, _0=[1, 4]), model, example_inputs=X[0])
    once = compact(model, first, example_inputs=X[0], optimizer=optimizer)
    second = close(rows(once.model, _0=[0], _2=[3]), once.model, example_inputs=X[0])
    twice = compact(once.model, second, example_inputs=X[0], optimizer=once.optimizer)
    both = close(rows(model, _0=[0, 1, 4], _2=[3]), model, example_inputs=X[0])
    both.enforce(model, optimizer)
    for k in range(6, 12):
        advance(model, optimizer, k)
        advance(twice.model, twice.optimizer, k)
    kept = cut_tensor(model[2].weight.detach(), once.cuts["2.weight"])
    kept = cut_tensor(kept, twice.cuts["2.weight"])
    assert kept.shape == (5, 9)
    torch.testing.assert_close(twice.model[2].weight.detach(), kept, rtol=1e-12, atol=1e-12)


def test_clipping_by_norm_sees_the_same_gradients(quick, graph):
    model, optimizer = trained()
    ticket = close_on(graph, rows(model, _0=[1, 4, 5], _2=[0]))
    small = quick(model, optimizer, ticket)
    ticket.enforce(model, optimizer)
    norms = []
    for own, opt in ((model, optimizer), (small.model, small.optimizer)):
        for k in range(6, 10):
            opt.zero_grad()
            (own(X[k]) - Y[k]).square().mean().backward()
            norms.append(float(nn.utils.clip_grad_norm_(own.parameters(), 0.01)))
            opt.step()
    assert min(norms) > 0.01
    assert norms[:4] == pytest.approx(norms[4:], rel=1e-12)


# -- what is refused ------------------------------------------------------------------------------


def refused(quick, model, optimizer, match, ticket=None):
    before = snapshot(model, optimizer)
    with pytest.raises(ValueError, match=match):
        quick(model, optimizer, ticket)
    assert same(before, snapshot(model, optimizer))


def test_blocks_that_would_lose_a_part_are_refused(quick):
    model = build()
    optimizer = DessiLBI([model[0].weight], structure=(3, 4))
    refused(quick, model, optimizer, r"parts of the blocks of 0\.weight.*\(3, 4\).*without optim")
    whole = rows(model, _0=[3, 4, 5])
    assert quick(model, optimizer, whole).optimizer.param_groups[0]["structure"] == (3, 4)


def test_units_that_would_lose_different_blocks_are_refused(quick):
    model = build()
    group = {"structure": "filter", "unit": "odd"}
    optimizer = DessiLBI(
        [
            {"params": [("a", model[0].weight)]} | group,
            {"params": [("b", model[2].weight)]} | group | {"structure": "channel"},
        ]
    )
    assert quick(model, optimizer).optimizer.support()["a"].shape == (9, 1)
    optimizer = DessiLBI(
        [
            {"params": [("a", model[2].weight)]} | group,
            {"params": [("b", model[4].weight)]} | group | {"structure": "channel"},
            {"params": [("c", model[0].weight)]} | group | {"structure": (2, None)},
        ]
    )
    ticket = rows(model, _0=[2, 3], _2=[0])
    refused(quick, model, optimizer, r"unit 'odd' joins 2\.weight and 0\.weight", ticket)


def test_an_optimizer_of_something_else_is_refused(quick):
    model = build()
    extra = nn.Parameter(torch.zeros(5))
    optimizer = torch.optim.SGD([*model.parameters(), extra], lr=0.1)
    refused(quick, model, optimizer, r"of shape \(5,\) that is not in the model: pass")


@pytest.mark.parametrize(
    "make",
    [
        lambda m: torch.optim.Adafactor(m.parameters()),
        lambda m: torch.optim.LBFGS(m.parameters(), max_iter=2),
    ],
    ids=["Adafactor", "LBFGS"],
)
def test_state_that_is_not_shaped_like_its_parameter_is_refused(make, quick):
    model = build()
    optimizer = make(model)

    def closure():
        optimizer.zero_grad()
        loss = (model(X[0]) - Y[0]).square().mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    refused(quick, model, optimizer, "cannot be cut: compact without optimizer=")


def test_sharded_parameters_are_refused(quick, monkeypatch):
    model, optimizer = trained()
    monkeypatch.setattr("dessilbi.compaction.following.is_sharded", lambda p: p is model[0].weight)
    assert not is_sharded(model[0].weight)
    refused(quick, model, optimizer, "compact on one process")


def test_a_model_that_only_compacts_as_a_program_is_refused():
    class Fixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(8, 6), nn.Linear(6, 3)

        def forward(self, x):
            return self.b(F.relu(self.a(x)).view(-1, 6))

    model = Fixed().double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    spec = TensorSpec((6, 8), (1, None))
    mask = torch.tensor([1, 0, 1, 1, 0, 1]).bool().reshape(6, 1)
    ticket = close(Ticket({"a.weight": mask}, {"a.weight": spec}), model, example_inputs=X[0])
    assert compact(model, ticket, example_inputs=X[0]).proof.form == "program"
    with pytest.raises(ValueError, match="forward holds sizes"):
        compact(model, ticket, example_inputs=X[0], optimizer=optimizer)


# -- constants ------------------------------------------------------------------------------------


def constant_net(padding, bias):
    torch.manual_seed(0)
    size = 6 if padding else 4
    return nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1),
        nn.Sigmoid(),
        nn.Conv2d(6, 4, 3, padding=padding, bias=bias),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(4 * size * size, 3),
    ).double()


IMAGES = torch.randn(20, 4, 2, 6, 6, dtype=torch.float64)


def fit(model, optimizer, k):
    optimizer.zero_grad()
    (model(IMAGES[k]) - Y[k, :4]).square().mean().backward()
    optimizer.step()


@pytest.mark.parametrize("padding", [0, 1], ids=["bias", "carrier"])
def test_after_a_constant_is_folded_training_equals_that_of_the_folded_big_model(padding):
    """The columns that read a constant are trained in the big model and gone in the small one."""
    model = constant_net(padding, bias=True)
    optimizer = lbi(model, weight_decay=0.1)
    for k in range(4):
        fit(model, optimizer, k)
    dead = [1, 3, 4]
    ticket = close(rows(model, _0=dead), model, example_inputs=IMAGES[0])
    assert bool(ticket.mask_of("2.weight").all()) if "2.weight" in ticket else True
    small = compact(model, ticket, example_inputs=IMAGES[0], optimizer=optimizer)
    kept = small.cuts["0.weight"][0].index.tolist()
    gone = [j for j in range(6) if j not in kept]
    assert len(gone) == 3 - padding
    with torch.no_grad():  # sigmoid(0) = 1/2 everywhere
        if padding:
            (carrier,) = set(dead) & set(kept)
            model[2].weight[:, carrier] += model[2].weight[:, gone].sum(1)
        else:
            model[2].bias += model[2].weight[:, gone].sum((1, 2, 3)) / 2
    columns = torch.ones(1, 6, 1, 1, dtype=torch.bool)
    columns[:, gone] = False
    spec = TensorSpec((4, 6, 3, 3), (None, 1, None, None))
    Ticket({"2.weight": columns}, {"2.weight": spec}).enforce(model, optimizer)
    ticket.enforce(model, optimizer)
    for k in range(4, 20):
        fit(model, optimizer, k)
        fit(small.model, small.optimizer, k)
    for name, param in small.model.named_parameters():
        whole = model.get_parameter(name)
        cuts = small.cuts.get(name, ())
        torch.testing.assert_close(param, cut_tensor(whole, cuts), rtol=1e-11, atol=1e-12)
        for key, value in small.optimizer.state[param].items():
            kept_state = cut_tensor(optimizer.state[whole][key], cuts)
            torch.testing.assert_close(value, kept_state, rtol=1e-11, atol=1e-12)
    if padding:
        place = kept.index(carrier)
        assert not small.model[0].weight[place].any()
        assert small.model[0].bias[place] == 0
        assert small.model[2].weight[:, place].any()


def test_an_added_bias_joins_the_biases_and_is_trained():
    model = constant_net(0, bias=False)
    ticket = close(rows(model, _0=[1, 3]), model, example_inputs=IMAGES[0])
    optimizer = lbi(model)
    small = compact(model, ticket, example_inputs=IMAGES[0], optimizer=optimizer)
    group = small.optimizer.param_groups[1]
    assert group["param_names"] == ["0.bias", "5.bias", "2.bias"]
    assert group["params"][2] is small.model[2].bias
    before = small.model[2].bias.detach().clone()
    fit(small.model, small.optimizer, 0)
    assert not torch.equal(small.model[2].bias, before)
    plain = torch.optim.SGD([model[0].weight, model[2].weight], lr=0.1)
    small = compact(model, ticket, example_inputs=IMAGES[0], optimizer=plain)
    assert small.optimizer.param_groups[0]["params"][2] is small.model[2].bias
    alone = DessiLBI([model[2].weight], structure="filter")
    with pytest.raises(ValueError, match=r"compaction adds 2\.bias"):
        compact(model, ticket, example_inputs=IMAGES[0], optimizer=alone)
    model[2].weight.requires_grad_(False)
    frozen = torch.optim.SGD([model[0].weight], lr=0.1)
    small = compact(model, ticket, example_inputs=IMAGES[0], optimizer=frozen)
    assert len(small.optimizer.param_groups[0]["params"]) == 1
    assert not small.model[2].bias.requires_grad
