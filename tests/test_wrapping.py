# SPDX-License-Identifier: Apache-2.0
"""wrap: DessiLBI around another optimizer. The contract suite covers what all optimizers share."""

import copy
import math
import pickle

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from dessilbi import DessiLBI, Path, wrap

SGD, AdamW = torch.optim.SGD, torch.optim.AdamW
BASES = {
    "sgd": lambda params, **o: SGD(params, **{"lr": 0.05, "momentum": 0.9, **o}),
    "adamw": lambda params, **o: AdamW(params, **{"lr": 0.02, **o}),
    "adamw-fused": lambda params, **o: AdamW(params, **{"lr": 0.02, "fused": True, **o}),
    "muon": lambda params, **o: torch.optim.Muon(params, **{"lr": 0.02, **o}),
    "rmsprop": lambda params, **o: torch.optim.RMSprop(params, **{"lr": 0.02, **o}),
}
every_base = pytest.mark.parametrize("base", BASES.values(), ids=BASES.keys())
ROWS = torch.linspace(0.1, 2, 6, dtype=torch.float64).unsqueeze(1)
COUPLING = {"nu": 0.5, "lam": 0.4, "structure": "filter"}


def weights(dtype=torch.float64, count=2):
    """Named matrices; later rows are larger, later matrices smaller."""
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(6, 4, generator=generator, dtype=torch.float64) for _ in range(count)]
    return [(f"w{i}", nn.Parameter((x * ROWS * 0.3**i).to(dtype))) for i, x in enumerate(start)]


def fill_gradients(named, step):
    generator = torch.Generator().manual_seed(100 + step)
    for i, (_, p) in enumerate(named):
        noise = torch.randn(6, 4, generator=generator, dtype=torch.float64)
        target = ROWS * 0.3**i
        p.grad = (p.detach().double() - target + 0.1 * noise).to(p.dtype)


def train(named, optimizer, steps=40, first=0):
    for step in range(first, first + steps):
        fill_gradients(named, step)
        optimizer.step()


def wrapped(base=BASES["sgd"], dtype=torch.float64, options=None, **coupling):
    named = weights(dtype)
    return named, wrap(base(named, **(options or {})), **{**COUPLING, **coupling})


def assert_equal(a, b):
    for (_, p), (_, q) in zip(a, b, strict=True):
        assert torch.isfinite(p).all()
        assert torch.equal(p, q)


def assert_partial(optimizer):
    assert 0 < optimizer.support().density < 1


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"momentum": 0.5},
        {"momentum": 0.5, "nesterov": True},
        {"momentum": 0.5, "dampening": 0.3, "weight_decay": 0.1},
        {"weight_decay": 0.1, "maximize": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("structure", ["filter", "element", (2, 2), "layer"], ids=str)
def test_wrap_of_sgd_with_lr_kappa_alpha_is_dessilbi(structure, options):
    kappa, alpha = 2.0, 0.02
    lam = {"element": 0.2, "layer": 2.0}.get(structure, 0.4)
    coupling = {"nu": 0.5, "lam": lam, "kappa": kappa, "structure": structure}
    ours, named = weights(), weights()
    dessilbi = DessiLBI(ours, lr=alpha, **coupling, **options)
    optimizer = wrap(SGD(named, lr=kappa * alpha, **options), **coupling)
    densities = set()
    for step in range(60):
        train(ours, dessilbi, 1, first=step)
        train(named, optimizer, 1, first=step)
        densities.add(optimizer.support().density)
    for (_, p), (_, q) in zip(ours, named, strict=True):
        assert_close(p, q, rtol=0, atol=1e-12)
        assert_close(dessilbi.state[p]["v"], optimizer.state[q]["v"], rtol=0, atol=1e-12)
    assert any(0 < density < 1 for density in densities)


@every_base
@pytest.mark.parametrize("kappa", [1.0, 2.0])
def test_w_plus_kappa_v_moves_by_exactly_the_displacement_of_the_base(base, kappa):
    named, optimizer = wrapped(base, kappa=kappa)
    own = weights()
    plain = base(own)
    for step in range(40):
        old = [
            (p.detach().clone(), optimizer.state[p].get("v", torch.zeros_like(p)).clone())
            for _, p in named
        ]
        fill_gradients(named, step)
        for (_, p), (_, q) in zip(named, own, strict=True):
            q.detach().copy_(p)
            q.grad = p.grad.clone()
        plain.step()
        optimizer.step()
        for (_, p), (_, q), (w, v) in zip(named, own, old, strict=True):
            moved = (p + kappa * optimizer.state[p]["v"]) - (w + kappa * v)
            assert_close(moved.detach(), (q - w).detach(), rtol=0, atol=1e-13)
    assert_partial(optimizer)


def test_alpha_is_the_lr_from_before_the_step_of_the_base():
    class Halving(SGD):
        def step(self, closure=None):
            loss = super().step(closure)
            for group in self.param_groups:
                group["lr"] = group["lr"] / 2
            return loss

    class HalvingInPlace(SGD):
        def step(self, closure=None):
            loss = super().step(closure)
            for group in self.param_groups:
                group["lr"].div_(2)
            return loss

    for kind, lr in ((Halving, 0.1), (HalvingInPlace, torch.tensor(0.1, dtype=torch.float64))):
        named = weights()
        optimizer = wrap(kind(named, lr=lr), **COUPLING)
        before = named[0][1].detach().clone()
        fill_gradients(named, 0)
        optimizer.step()
        assert_close(optimizer.state[named[0][1]]["v"], before * 0.1 / 0.5)
        assert float(optimizer.param_groups[0]["lr"]) == pytest.approx(0.05)


@every_base
@pytest.mark.parametrize("closure", [False, True])
def test_only_parameters_with_a_gradient_are_coupled(base, closure):
    named, optimizer = wrapped(base)
    (_, used), (_, unused) = named
    before = unused.detach().clone()
    calls = []

    def evaluate():
        assert torch.is_grad_enabled()
        calls.append(None)
        optimizer.zero_grad()
        loss = (used - ROWS).square().sum()
        loss.backward()
        return loss

    for _ in range(3):
        if closure:
            assert optimizer.step(evaluate) > 0
        else:
            evaluate()
            assert optimizer.step() is None
    assert len(calls) == 3
    assert optimizer.state[used]["v"].any()
    assert torch.equal(unused, before)
    assert not optimizer.state.get(unused)


def test_a_gradient_that_the_closure_drops_leaves_its_parameter_alone():
    named, optimizer = wrapped()
    train(named, optimizer, 2)
    (_, used), (_, dropped) = named
    before, v = dropped.detach().clone(), optimizer.state[dropped]["v"].clone()

    def evaluate():
        dropped.grad = None
        return 1.0

    fill_gradients(named, 5)
    optimizer.step(evaluate)
    assert torch.equal(dropped, before)
    assert torch.equal(optimizer.state[dropped]["v"], v)
    assert optimizer.state[used]["v"].any()


def test_the_groups_and_the_state_are_the_bases_own():
    named = weights()
    base = SGD(named, lr=0.1)
    optimizer = wrap(base, **COUPLING)
    assert optimizer.param_groups is base.param_groups
    assert optimizer.state is base.state
    base.param_groups = base.param_groups[:]
    assert optimizer.param_groups is base.param_groups


def test_groups_may_carry_their_own_options():
    (first, second), (third, _) = weights(), weights()
    groups = [
        {"params": [first], "structure": "element", "lam": 0.1, "nu": 2.0, "kappa": 3.0},
        {"params": [second], "structure": "filter", "unit": "rows"},
        {"params": [("third", third[1])], "structure": "filter", "unit": "rows", "nu": 5.0},
    ]
    optimizer = wrap(SGD(groups, lr=0.1), nu=0.5, lam=0.4)
    named = [first, second, ("third", third[1])]
    fill_gradients(named, 0)
    before = [p.detach().clone() for _, p in named]
    optimizer.step()
    for (_, p), old, step in zip(named, before, (0.1 / 3 / 2, 0.1 / 0.5, 0.1 / 5), strict=True):
        assert_close(optimizer.state[p]["v"], old * step)
    for step in range(1, 40):
        train(named, optimizer, 1, first=step)
    told = optimizer.support()
    assert torch.equal(told["w1"].reshape(-1), told["third"].reshape(-1))
    assert told["w0"].shape == (6, 4)
    assert_partial(optimizer)


def test_a_group_added_to_the_wrapped_or_to_its_base_gets_the_options_of_wrap():
    named, optimizer = wrapped()
    late = [(f"late{i}", p) for i, (_, p) in enumerate(weights())]
    optimizer.add_param_group({"params": late[:1], "lam": 7.0})
    optimizer.base.add_param_group({"params": late[1:]})
    train(named + late, optimizer, 2)
    assert [g["lam"] for g in optimizer.param_groups] == [0.4, 7.0, 0.4]
    assert all("v" in optimizer.state[p] for _, p in late)


def test_the_kernel_is_prepared_for_groups_that_are_added_with_a_structure(monkeypatch):
    prepared = []
    monkeypatch.setattr("dessilbi.optimizers.fusing.prepare", prepared.extend)
    first, plain, late = (nn.Parameter(torch.ones(4, 3)) for _ in range(3))
    optimizer = wrap(SGD([("first", first)], lr=0.1), nu=1.0, lam=1.0, fused=True)
    optimizer.add_param_group({"params": [("plain", plain)]})
    assert not prepared
    optimizer.add_param_group({"params": [("late", late)], "structure": "filter"})
    assert prepared == [late]


def test_a_group_that_is_refused_leaves_the_base_as_it_was():
    _, optimizer = wrapped()
    for bad in ({"lam": -1.0}, {"structure": (4, None)}, {"kappa": 0}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            optimizer.add_param_group({"params": [("late", nn.Parameter(torch.ones(6, 4)))], **bad})
        assert len(optimizer.base.param_groups) == 1


@every_base
def test_v_joins_the_state_after_the_keys_of_the_base(base):
    named, optimizer = wrapped(base)
    seen = []
    optimizer.base.register_step_pre_hook(
        lambda o, *_: seen.append([set(o.state.get(p, {})) for _, p in named])
    )
    train(named, optimizer, 1)
    assert seen == [[set(), set()]]
    assert next(iter(optimizer.state[named[0][1]])) != "v" or base is BASES["sgd"]
    assert "v" in optimizer.state[named[0][1]]


@pytest.mark.parametrize(
    "base",
    [pytest.param(base, id=name) for name, base in BASES.items()],
)
def test_a_checkpoint_with_v_alone_continues_under_another_base(base):
    """V of a plain SGD run is taken over by a base that has a state of its own to make."""
    source, sgd = wrapped(options={"momentum": 0.0})
    train(source, sgd, 30)
    assert set(sgd.state[source[0][1]]) == {"v"}
    named, optimizer = wrapped(base)
    options = {k: v for k, v in optimizer.param_groups[0].items() if k != "params"}
    optimizer.load_state_dict(sgd.state_dict())
    optimizer.param_groups[0].update(options)
    assert optimizer.support() == sgd.support()
    assert not any(optimizer.state.values())
    for (i, (_, p)), (_, q) in zip(enumerate(source), named, strict=True):
        assert torch.equal(optimizer.state_dict()["state"][i]["v"], sgd.state[p]["v"])
        q.detach().copy_(p)
    pairs = list(zip(source, named, strict=True))
    before = {q: (q.detach().clone(), sgd.state[p]["v"]) for (_, p), (_, q) in pairs}
    gamma = optimizer.gamma()
    assert any(g.any() for g in gamma.values())
    copied = copy.deepcopy((named, optimizer))
    for params, ours in ((named, optimizer), copied):
        train(params, ours, 1, first=30)
        for (name, q), (_, own) in zip(named, params, strict=True):
            w, v = before[q]
            alpha = options["lr"]
            assert_close(ours.state[own]["v"], v + alpha * (w - gamma[name]) / 0.5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["sgd", "adamw", "muon"])
def test_low_precision_weights_keep_a_float32_v_through_loading(kind, dtype):
    options = {"eps": 1e-3} if kind == "adamw" else {}
    named, optimizer = wrapped(BASES[kind], dtype, options)
    train(named, optimizer)
    assert_partial(optimizer)
    v = optimizer.state[named[0][1]]["v"]
    assert v.dtype == torch.float32
    assert not torch.equal(v.to(dtype).float(), v)
    again, other = wrapped(BASES[kind], dtype, options)
    other.load_state_dict(optimizer.state_dict())
    loaded = other.state[again[0][1]]["v"]
    assert torch.equal(loaded, v)
    assert loaded.data_ptr() != v.data_ptr()


@every_base
@pytest.mark.parametrize("way", ["deepcopy", "pickle", "state_dict"])
def test_a_copy_continues_as_the_original(base, way):
    named, optimizer = wrapped(base)
    train(named, optimizer, 20)
    if way == "state_dict":
        own, other = wrapped(base)
        other.load_state_dict(optimizer.state_dict())
        for (_, p), (_, q) in zip(named, own, strict=True):
            q.detach().copy_(p)
    elif way == "deepcopy":
        own, other = copy.deepcopy((named, optimizer))
    else:
        own, other = pickle.loads(pickle.dumps((named, optimizer)))
    train(named, optimizer, 20, first=20)
    train(own, other, 20, first=20)
    assert_equal(named, own)
    assert other.param_groups is other.base.param_groups
    assert_partial(other)


def test_a_checkpoint_of_the_bare_base_starts_the_coupling_at_zero():
    plain = weights()
    base = BASES["adamw"](plain)
    train(plain, base, 10)
    named, optimizer = wrapped(BASES["adamw"])
    optimizer.load_state_dict(base.state_dict())
    assert optimizer.param_groups[0]["structure"] == "filter"
    assert optimizer.support().density == 0
    train(named, optimizer, 1)
    assert optimizer.state[named[0][1]]["step"] == 11


@every_base
def test_an_overflow_under_grad_scaler_leaves_v_alone(base):
    named, optimizer = wrapped(base, torch.float32)
    train(named, optimizer)
    assert_partial(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(sum(p.square().sum() for _, p in named)).backward()
    named[0][1].grad[0, 0] = math.nan
    before = copy.deepcopy([(p.detach(), optimizer.state[p]) for _, p in named])
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0
    for (_, p), (w, state) in zip(named, before, strict=True):
        assert torch.equal(p, w)
        assert all(torch.equal(optimizer.state[p][key], state[key]) for key in state)


class ScheduleFree(SGD):
    def train(self):
        pass

    def eval(self):
        pass


class Prodigy(SGD):
    def __init__(self, params):
        super().__init__(params, lr=1.0)
        for group in self.param_groups:
            group["d_coef"] = 1.0


class NoLr(torch.optim.Optimizer):
    def __init__(self, params):
        super().__init__(params, {})

    def step(self, closure=None):
        pass


def already(params):
    return wrap(SGD(params, lr=0.1), **COUPLING)


@pytest.mark.parametrize(
    ("base", "message"),
    [
        (torch.optim.LBFGS, "LBFGS, which moves the weights several times in one step: use a base"),
        (ScheduleFree, r"ScheduleFree, whose train\(\) and eval\(\) swap the weights"),
        (Prodigy, "Prodigy, whose lr is not the step of the weights: .* path_lr"),
        (torch.optim.Adafactor, "Adafactor, whose lr is not the step of the weights: .* path_lr"),
        (NoLr, "NoLr, whose lr is not the step of the weights: .* path_lr"),
        (already, "Wrapped, which has a V already: use it as it is"),
        (DessiLBI, "DessiLBI, which has a V already: use it as it is"),
    ],
)
def test_a_base_that_cannot_be_wrapped_is_refused_in_one_message(base, message):
    params = weights() if base is not torch.optim.LBFGS else [p for _, p in weights()]
    built = base(params)
    keys = [set(group) for group in built.param_groups]
    with pytest.raises(ValueError, match=message) as caught:
        wrap(built, **COUPLING)
    assert "\n" not in str(caught.value)
    assert [set(group) for group in built.param_groups] == keys


@pytest.mark.parametrize("base", [None, nn.Linear(2, 2), SGD, "adamw"], ids=repr)
def test_what_is_no_optimizer_is_refused(base):
    with pytest.raises(TypeError, match="wrap takes a torch optimizer but was given"):
        wrap(base, **COUPLING)


@pytest.mark.parametrize(
    "options",
    [
        {"nu": 0.0},
        {"nu": math.inf},
        {"nu": "ten"},
        {"lam": 0.0},
        {"lam": math.nan},
        {"kappa": -1.0},
        {"path_lr": 0.0},
        {"path_lr": math.inf},
        {"path_lr": -0.1},
        {"block_scale": "cubic"},
        {"unit": ""},
        {"structure": "nothing"},
        {"structure": (4, None)},
    ],
    ids=str,
)
def test_an_option_out_of_range_is_refused_with_name_and_value(options):
    ((name, value),) = options.items()
    with pytest.raises(ValueError, match=name) as caught:
        wrapped(**options)
    assert repr(value) in str(caught.value)


def test_a_refused_option_leaves_the_base_as_it_was():
    base = SGD(weights(), lr=0.1)
    before = set(base.param_groups[0])
    for bad in ({"lam": -1.0}, {"structure": (4, None)}, {"structure": "filter", "unit": ""}):
        with pytest.raises(ValueError, match=r"is not allowed|does not divide"):
            wrap(base, **{"nu": 1.0, "lam": 1.0, **bad})
        assert set(base.param_groups[0]) == before
    wrap(base, nu=1.0, lam=1.0, structure="filter")
    assert base.param_groups[0]["lam"] == 1.0


def test_path_lr_is_the_step_of_the_coupling():
    named, optimizer = wrapped(lambda params: Prodigy(params), path_lr=0.03, kappa=2.0)
    before = named[0][1].detach().clone()
    path = Path(optimizer, every=1)
    train(named, optimizer, 1)
    assert_close(optimizer.state[named[0][1]]["v"], before * 0.03 / 2 / 0.5)
    assert path.time == pytest.approx(0.03 / 2)


def test_the_path_of_a_wrapped_optimizer_runs_on_lr_over_kappa():
    named, optimizer = wrapped(BASES["adamw"], kappa=2.0, lam=0.3)
    path = Path(optimizer, every=1)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.99)
    total = 0.0
    for step in range(40):
        total += optimizer.param_groups[0]["lr"] / 2.0
        train(named, optimizer, 1, first=step)
        schedule.step()
    assert path.time == pytest.approx(total)
    assert path.points[-1].step == 40
    assert path.points[-1].density == optimizer.support().density
    assert 0 < path.ticket(density=0.5).density <= 0.5
    assert_partial(optimizer)


def test_a_phantom_step_moves_nothing_and_is_not_on_the_path():
    named, optimizer = wrapped(BASES["adamw"])
    path = Path(optimizer, every=1)
    before = [p.detach().clone() for _, p in named]
    optimizer.param_groups[0]["lr"] = 0.0
    for _, p in named:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert path.points == []
    assert path.step == 0
    for (_, p), old in zip(named, before, strict=True):
        assert torch.equal(p, old)
        assert not optimizer.state[p]["v"].any()


class Net(nn.Module):
    def __init__(self, named):
        super().__init__()
        for name, p in named:
            self.register_parameter(name, p)


@pytest.mark.parametrize("kind", ["sgd", "adamw", "adamw-fused", "muon"])
def test_enforce_keeps_a_ticket_under_a_wrapped_optimizer(kind):
    named, optimizer = wrapped(BASES[kind])
    train(named, optimizer)
    ticket = optimizer.support()
    assert_partial(optimizer)
    net = Net(named)
    handle = ticket.enforce(net, optimizer)
    train(named, optimizer, 10, first=40)
    for name, p in named:
        dead = ~ticket.mask_of(name)
        assert not p[dead].any()
        assert not optimizer.state[p]["v"][dead].any()
        assert p[~dead].all()
    handle.remove()
    train(named, optimizer, 1, first=50)
    assert all(p[~ticket.mask_of(name)].all() for name, p in named)


@pytest.mark.parametrize(("nu", "lam", "selects"), [(1.0, 1.0, True), (100.0, 1.0, False)])
def test_the_advice_for_adamw_selects_something_and_the_defaults_of_sgd_never_do(nu, lam, selects):
    """lr 1e-3 over 10,000 steps is T = 10; here 500 steps of 2e-2 are the same path time."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
    x = torch.randn(256, 16)
    labels = x[:, :4].argmax(1)
    named = [(n, p) for n, p in net.named_parameters() if p.dim() == 2]
    optimizer = wrap(AdamW(named, lr=2e-2, weight_decay=0.0), nu=nu, lam=lam, structure="filter")
    most = 0.0
    for _ in range(500):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), labels).backward()
        optimizer.step()
        most = max(most, optimizer.support().density)
    assert (most > 0) is selects


def test_its_repr_shows_the_base_and_the_options():
    _, optimizer = wrapped(BASES["adamw"])
    text = repr(optimizer)
    assert text.startswith("wrap(AdamW (")
    assert "lam: 0.4" in text
    assert "structure: filter" in text


def test_a_base_is_wrapped_once():
    base = SGD(weights(), lr=0.1)
    wrap(base, nu=1.0, lam=1.0, structure="filter")
    with pytest.raises(ValueError, match="a SGD that is wrapped already: use the first wrapper"):
        wrap(base, nu=5.0, lam=2.0)


class OwnV(torch.optim.Optimizer):
    """Keeps its second moment under the name that V has."""

    def __init__(self, params, **options):
        super().__init__(params, {"lr": 0.01, **options})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.state[p].setdefault("v", torch.zeros_like(p)).addcmul_(p.grad, p.grad)


def test_a_base_that_keeps_a_v_of_its_own_is_refused_at_its_first_step():
    named = weights()
    optimizer = wrap(OwnV(named), **COUPLING)
    for _ in range(2):  # nor does it pass for ours the second time
        with pytest.raises(ValueError, match="the state of OwnV has a 'v' of its own"):
            train(named, optimizer, steps=1)


def test_a_base_that_has_stepped_with_a_v_of_its_own_is_refused():
    named = weights()
    base = OwnV(named)
    train(named, base, steps=1)
    with pytest.raises(ValueError, match="OwnV, whose state holds 'v' already"):
        wrap(base, **COUPLING)


def test_a_base_with_an_option_of_our_name_is_refused():
    with pytest.raises(ValueError, match="OwnV, whose own option 'nu' means something else"):
        wrap(OwnV(weights(), nu=0.7), **COUPLING)


def test_a_parameter_that_gets_its_first_gradient_late_gets_its_v_then():
    named = weights()
    optimizer = wrap(BASES["adamw"](named), **COUPLING)
    fill_gradients(named, 0)
    late, named[1][1].grad = named[1][1].grad, None
    optimizer.step()
    assert "v" not in optimizer.state[named[1][1]]
    named[1][1].grad = late
    optimizer.step()
    assert optimizer.state[named[1][1]]["v"].any()
