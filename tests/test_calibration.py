# SPDX-License-Identifier: Apache-2.0
"""DensityControl: the density that was asked for, and nothing broken on the way."""

import json
import math

import pytest
import torch
from oracle import STRUCTURES
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR

from dessilbi import DensityControl, DessiLBI, Path, wrap
from dessilbi.files.storage import to_json
from dessilbi.optimizers.dual import OWN_LAM, OWN_LAM_AT, members, norms_of, units_of

STEPS = 120


class Toy:
    """Tensors pulled towards targets of very different size, with noise, under one optimizer."""

    def __init__(self, groups=None, *, lr=0.1, seed=0, scheduler=None, dtype=None, **options):
        generator = torch.Generator().manual_seed(seed)
        self.generator = torch.Generator().manual_seed(seed + 1)
        groups = groups or {"a": ((12, 8), {"structure": "element"}), "b": ((9, 7), None)}
        self.params, self.wants, listed = {}, {}, []
        for name, (shape, own) in groups.items():
            start = 0.1 * torch.randn(shape, generator=generator, dtype=torch.float64)
            size = torch.rand(shape[0], *[1] * (len(shape) - 1), generator=generator).double()
            want = torch.randn(shape, generator=generator, dtype=torch.float64) * size
            self.params[name] = nn.Parameter(start.to(dtype or torch.float32))
            self.wants[name] = want.to(dtype or torch.float32)
            own = {"structure": "element"} if own is None else own
            listed.append({"params": [(name, self.params[name])], **own})
        self.optimizer = DessiLBI(listed, lr=lr, **{"nu": lr * STEPS / 10, **options})
        self.scheduler = scheduler(self.optimizer) if scheduler else None

    def step(self, count=1, watch=None):
        for _ in range(count):
            for name, param in self.params.items():
                noise = torch.randn(param.shape, generator=self.generator, dtype=param.dtype)
                param.grad = param.detach() - self.wants[name] + 0.3 * noise
            self.optimizer.step()
            if self.scheduler:
                self.scheduler.step()
            if watch:
                watch()
        return self

    def control(self, density, **options):
        options = {"scheduler": self.scheduler, "total_steps": STEPS, **options}
        return DensityControl(self.optimizer, density=density, **options)

    def values(self):
        v = [self.optimizer.state[p]["v"] for p in self.params.values()]
        return [p.detach().clone() for p in self.params.values()] + [x.clone() for x in v]


def cosine(optimizer):
    return CosineAnnealingLR(optimizer, T_max=STEPS)


def step_decay(optimizer):
    return LambdaLR(optimizer, lambda k: 1.0 if k < STEPS // 2 else 0.1)


SCHEDULES = {"constant": None, "cosine": cosine, "step": step_decay}
MIXED = {
    "conv": ((6, 3, 2, 2), {"structure": "filter"}),
    "fc": ((10, 12), {"structure": "filter"}),
    "out": ((5, 10), {"structure": "filter"}),
}
ELEMENTS = {"a": ((12, 8), {"structure": "element"}), "b": ((9, 7), {"structure": "element"})}


def largest_block(optimizer):
    return max(sum(m.size for m in unit) for unit in units_of(members(optimizer)))


def total_elements(optimizer):
    return sum(m.param.numel() for m in members(optimizer))


# track


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("density", [0.1, 0.3, 0.6])
@pytest.mark.parametrize("groups", [ELEMENTS, MIXED], ids=["element", "filter"])
@pytest.mark.parametrize("scale", ["unit", "sqrt"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_kept_to_the_end_track_meets_the_density_from_below_within_one_block(
    groups, density, schedule, scale, dtype
):
    toy = Toy(groups, scheduler=SCHEDULES[schedule], block_scale=scale, dtype=dtype)
    control = toy.control(density, floor=None)
    toy.step(STEPS)
    reached = toy.optimizer.support().density
    one = largest_block(toy.optimizer) / total_elements(toy.optimizer)
    assert reached <= density
    assert reached > density - one
    assert control.density() == {"*": reached}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_frozen_at_a_share_of_the_path_lambda_is_constant_from_there_on(schedule):
    toy = Toy(scheduler=SCHEDULES[schedule])
    control = toy.control(0.3, freeze=0.6)
    lams = []
    toy.step(STEPS, lambda: lams.append((control.time / control.total_time, control.lam)))
    early = {lam for share, lam in lams if 0.12 < share < 0.58}
    assert len(early) > 5
    assert len({lam for share, lam in lams if share >= 0.6}) == 1
    assert 0.15 < toy.optimizer.support().density < 0.45


def test_lambda_is_infinite_before_a_tenth_of_the_path():
    toy = Toy()
    control = toy.control(0.3)
    assert toy.optimizer.param_groups[0]["lam"] == math.inf
    toy.step(STEPS // 10 - 1)
    assert control.lam == math.inf
    assert toy.optimizer.support().density == 0
    toy.step(2)
    assert 0 < control.lam < math.inf


def test_one_lambda_serves_all_layers_and_ratios_between_groups_are_kept():
    groups = {
        "conv": ((6, 3, 2, 2), {"structure": "filter", "lam": 6.0}),
        "fc": ((10, 12), {"structure": "element", "lam": 0.5}),
    }
    toy = Toy(groups)
    control = toy.control(0.3, floor=None)
    toy.step(STEPS)
    lams = [group["lam"] for group in toy.optimizer.param_groups]
    assert lams[0] / lams[1] == pytest.approx(12.0)
    assert control.lam == lams[0]
    assert 0.3 - 12 / 192 < toy.optimizer.support().density <= 0.3


def test_each_pattern_gets_a_lambda_of_its_own_and_the_rest_keeps_what_it_has():
    model = nn.Sequential(nn.Linear(10, 20), nn.Tanh(), nn.Linear(20, 12), nn.Linear(12, 4))
    weights = [(n, p) for n, p in model.named_parameters() if n.endswith("weight")]
    # One group on purpose: lambda is per tensor where rules differ.
    optimizer = DessiLBI([{"params": weights, "structure": "element", "lam": 0.02}], lr=0.1, nu=1.0)
    control = DensityControl(
        optimizer, density={"0.weight": 0.5, "2.*": 0.1}, total_steps=STEPS, floor=None
    )
    torch.manual_seed(0)
    for _ in range(STEPS):
        optimizer.zero_grad()
        x = torch.randn(16, 10)
        (model(x) - x[:, :4]).square().mean().backward()
        optimizer.step()
    support = optimizer.support()
    densities = {n: int(support[n].sum()) / support[n].numel() for n, _ in weights}
    assert densities["0.weight"] == 0.5
    assert densities["2.weight"] == 0.1
    assert densities["3.weight"] > 0
    assert control.density() == pytest.approx({"0.weight": 0.5, "2.*": 0.1})
    assert set(control.lam) == {"0.weight", "2.*"}
    assert members(optimizer)[2].lam == 0.02


def starved_layer():
    """Two layers, one of which is so small that one lambda for both would empty it."""
    groups = {
        "big": ((10, 12), {"structure": "element"}),
        "small": ((8, 10), {"structure": "element"}),
        "rows": ((10, 3), {"structure": "filter"}),
    }
    toy = Toy(groups)
    with torch.no_grad():
        for name in ("small", "rows"):
            toy.params[name].mul_(0.01)
            toy.wants[name].mul_(0.01)
    return toy


@pytest.mark.parametrize("freeze", [None, 0.3, 0.6])
def test_no_layer_falls_below_its_floor(freeze):
    toy = starved_layer()
    control = toy.control(0.25, floor=0.4, freeze=freeze)
    toy.step(STEPS)
    kept = {n: int(mask.sum()) for n, mask in toy.optimizer.support().items()}
    assert kept["small"] >= 8  # 0.4 * 0.25 of 80
    assert kept["rows"] >= 1
    assert any(OWN_LAM in group for group in toy.optimizer.param_groups) or any(
        m.lam != control.lam for m in members(toy.optimizer)
    )
    if freeze is None:
        assert 0.25 - 3 / 230 < toy.optimizer.support().density <= 0.25


def test_without_a_floor_a_layer_may_die():
    toy = starved_layer()
    toy.control(0.25, floor=None)
    toy.step(STEPS)
    kept = {n: int(mask.sum()) for n, mask in toy.optimizer.support().items()}
    assert kept["small"] == 0
    assert kept["big"] > 0


@pytest.mark.parametrize("kernel", ["reference", "foreach", "fused"])
def test_a_layers_own_lambda_in_a_shared_group_moves_gamma_as_a_group_of_its_own_would(
    kernel, request
):
    if kernel == "fused":
        request.getfixturevalue("built_kernel")
    asked = {"foreach": kernel == "foreach", "fused": kernel == "fused"}

    def run(shared):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 3))
        named = [(n, p) for n, p in model.named_parameters() if p.dim() > 1]
        groups = [{"params": [pair], "structure": "element"} for pair in named]
        if shared:
            groups = [{"params": named, "structure": "element"}]
        optimizer = DessiLBI(groups, lr=0.1, nu=1.0, momentum=0.9, lam=0.1, **asked)
        for k in range(60):
            second = 0.02 if k < 50 else 0.01  # it may move, too
            if shared:
                optimizer.param_groups[0][OWN_LAM] = [0.1, second]
            else:
                optimizer.param_groups[1]["lam"] = second
            optimizer.zero_grad()
            x = torch.randn(16, 6)
            (model(x) - x[:, :3]).square().mean().backward()
            optimizer.step()
        return optimizer, [p.detach() for _, p in named]

    one, ones = run(True)
    two, twos = run(False)
    assert one.support() == two.support()
    assert 0 < one.support().density < 1
    for a, b in zip(ones, twos, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_the_law_holds_under_a_moving_lambda():
    toy = Toy(dtype=torch.float64, kappa=2.0)
    start = [p.detach().clone() for p in toy.params.values()]
    total = [torch.zeros_like(p) for p in start]
    toy.control(0.3)
    lams = set()
    for _ in range(STEPS):
        alpha = toy.optimizer.param_groups[0]["lr"]
        toy.step()
        lams.add(toy.optimizer.param_groups[0]["lam"])
        for t, p in zip(total, toy.params.values(), strict=True):
            t += alpha * p.grad
    assert len(lams) > 20
    for w0, t, p in zip(start, total, toy.params.values(), strict=True):
        left = p.detach() + 2.0 * toy.optimizer.state[p]["v"]
        torch.testing.assert_close(left, w0 - 2.0 * t, rtol=1e-10, atol=1e-10)


# late


def from_the_start(groups, lams, **options):
    groups = {
        name: (shape, {**own, "lam": lam})
        for (name, (shape, own)), lam in zip(groups.items(), lams, strict=True)
    }
    return Toy(groups, **options)


@pytest.mark.parametrize(("alias", "shape", "block"), STRUCTURES, ids=lambda v: str(v))
@pytest.mark.parametrize("floor", [None, 0.5])
def test_late_is_the_same_run_as_its_lambda_from_the_start(alias, shape, block, floor):
    groups = {"a": (shape, {"structure": alias}), "b": (shape, {"structure": block})}
    if math.prod(shape) == math.prod(s or n for s, n in zip(block, shape, strict=True)):
        density = 0.5  # a layer of one block
        floor = None
    else:
        density = 0.4
    toy = Toy(groups, momentum=0.9)
    control = toy.control(density, mode="late", floor=floor)
    toy.step(STEPS)
    lams = [member.lam for member in members(toy.optimizer)]
    assert all(lam < math.inf for lam in lams)
    assert toy.optimizer.support().density > 0
    other = from_the_start(groups, lams, momentum=0.9).step(STEPS)
    assert all(torch.equal(a, b) for a, b in zip(toy.values(), other.values(), strict=True))
    first = next(record for record in control.targets[0].history if record.lam < math.inf)
    assert first.step > 1


def test_late_never_chooses_below_what_any_block_has_reached():
    toy = Toy()
    control = toy.control(0.6, mode="late", floor=None)  # wants a lambda far below the largest norm
    reached = []

    def look():
        if control.lam == math.inf:
            units = units_of(members(toy.optimizer))
            reached.append(max(float(n.max()) for n in norms_of(toy.optimizer, units)))

    toy.step(STEPS, look)
    assert control.lam >= max(reached)
    assert len(reached) >= 1


def test_late_counts_the_running_maximum_not_the_last_norm():
    param = nn.Parameter(torch.tensor([1.5, 0.2, 0.2]))
    optimizer = DessiLBI([("w", param)], lr=0.1, nu=1.0, structure="element")
    control = DensityControl(optimizer, density=0.34, total_steps=100, mode="late", floor=None)
    norms = []
    for k in range(100):
        param.grad = torch.zeros(3)
        param.grad[0] = 25.0 if k == 3 else 0.0  # W turns round, and V after it
        param.grad[1:] = 1.0 if k == 6 else 0.0  # little is wanted from then on
        optimizer.step()
        if control.lam == math.inf:
            norms.append(float(optimizer.state[param]["v"].abs().max()))
    assert max(norms) > 1.5 * norms[-1]
    assert control.lam >= max(norms)


def test_late_says_which_layer_it_could_not_keep_at_its_floor():
    toy = starved_layer()
    toy.control(0.25, mode="late", floor=0.4)
    with pytest.warns(UserWarning, match="^small ended with fewer blocks than the floor"):
        toy.step(STEPS)
    kept = {n: int(mask.sum()) for n, mask in toy.optimizer.support().items()}
    assert kept["small"] < 8
    assert kept["rows"] >= 1


# observers, checkpoints, other optimizers


@pytest.mark.filterwarnings("ignore:small.* ended with fewer blocks than the floor")
@pytest.mark.parametrize("mode", ["track", "late"])
def test_a_resumed_control_goes_on_bit_by_bit(mode):
    def build():
        toy = starved_layer()
        return toy, toy.control(0.25, mode=mode, floor=0.4)

    whole, _ = build()
    whole.step(STEPS)
    for stop in (5, 40, 90):
        toy, control = build()
        toy.step(stop)
        saved = toy.optimizer.state_dict()
        told = json.loads(to_json(control.state_dict()))
        resumed, again = build()
        resumed.params["big"].data.copy_(toy.params["big"].data)
        for name, param in resumed.params.items():
            param.data.copy_(toy.params[name].data)
        resumed.optimizer.load_state_dict(saved)
        again.load_state_dict(told)
        resumed.generator = toy.generator
        resumed.step(STEPS - stop)
        pairs = zip(whole.values(), resumed.values(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
        assert whole.optimizer.support() == resumed.optimizer.support()
    assert 0 < whole.optimizer.support().density < 1


@pytest.mark.parametrize("first", ["control", "path"])
def test_a_path_records_the_support_under_the_new_lambda_whichever_came_first(first):
    toy = Toy()
    if first == "path":
        path = Path(toy.optimizer, every=1)
        toy.control(0.3)
    else:
        toy.control(0.3)
        path = Path(toy.optimizer, every=1)
    toy.step(STEPS)
    assert path.points[-1].density == toy.optimizer.support().density
    assert 0.3 - 2 / 159 < path.points[-1].density <= 0.3


def test_a_wrapped_adamw_with_kappa_is_controlled_by_its_own_clock():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))
    groups = [
        {"params": [("a", model[0].weight)], "structure": "filter"},
        {"params": [("b", model[2].weight)], "structure": "element", "kappa": 4.0},
    ]
    base = torch.optim.AdamW(groups, lr=0.02)
    optimizer = wrap(base, nu=0.4, lam=1.0, kappa=2.0)
    scheduler = CosineAnnealingLR(optimizer, T_max=STEPS)
    control = DensityControl(
        optimizer, density=0.3, scheduler=scheduler, total_steps=STEPS, floor=None
    )
    for _ in range(STEPS):
        optimizer.zero_grad()
        x = torch.randn(16, 8)
        (model(x) - x[:, :4]).square().mean().backward()
        optimizer.step()
        scheduler.step()
    assert control.time == pytest.approx(control.total_time)
    assert 0.3 - 8 / 192 < optimizer.support().density <= 0.3


def test_units_are_controlled_as_one():
    groups = {
        "a": ((6, 5), {"structure": "filter", "unit": "u"}),
        "b": ((6, 7), {"structure": "filter", "unit": "u"}),
        "c": ((4, 12), {"structure": "filter"}),
    }
    toy = Toy(groups)
    toy.control(0.5)
    toy.step(STEPS)
    support = toy.optimizer.support()
    assert torch.equal(support["a"], support["b"])
    assert 0.5 - 12 / 120 < support.density <= 0.5


def test_a_phantom_step_is_not_counted():
    toy = Toy()
    control = toy.control(0.3)
    for group in toy.optimizer.param_groups:
        group["lr"] = 0.0
    for param in toy.params.values():
        param.grad = torch.zeros_like(param)
    toy.optimizer.step()
    assert (control.step, control.time) == (0, 0.0)


def test_closing_leaves_lambda_and_lets_another_control_begin():
    toy = Toy()
    control = toy.control(0.3)
    toy.step(30)
    control.close()
    lam = control.lam
    toy.step(20)
    assert toy.optimizer.param_groups[0]["lam"] == lam
    assert toy.control(0.2).lam == math.inf


# what is refused or warned about


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"density": 0.0}, "density=0.0 is not allowed"),
        ({"density": 1}, "density=1 is not allowed"),
        ({"density": {}}, "at least one pattern"),
        ({"density": {"zzz*": 0.1}}, "'zzz\\*' of density decides for no structured tensor"),
        ({"mode": "soon"}, "mode='soon' is not known"),
        ({"freeze": 0.05}, "freeze=0.05 is not allowed"),
        ({"mode": "late", "freeze": 0.5}, "for mode='track'"),
        ({"floor": 2.0}, "floor=2.0 is not allowed"),
        ({"density": 0.01}, "less than its layers' floor"),
        ({"total_steps": None}, "give DensityControl total_steps"),
        ({"total_steps": None, "total_time": -1.0}, "total_time=-1.0 is not allowed"),
    ],
    ids=str,
)
def test_what_is_not_allowed_is_refused_in_one_sentence(options, message):
    toy = Toy()
    lams = [group["lam"] for group in toy.optimizer.param_groups]
    with pytest.raises(ValueError, match=message):
        toy.control(**{"density": 0.3, **options})
    assert [group["lam"] for group in toy.optimizer.param_groups] == lams
    toy.control(0.3)  # nothing is left behind


def test_a_second_writer_of_lambda_is_refused():
    toy = Toy()
    toy.control(0.3)
    with pytest.raises(ValueError, match=r"DensityControl writes the lambda .* already"):
        toy.control(0.2)


def test_a_weak_coupling_is_warned_about_before_the_first_step():
    toy = Toy(nu=100.0)
    with pytest.warns(UserWarning, match=r"R = kappa T/nu is 0\.12: under 3"):
        toy.control(0.3)


def test_weights_that_do_not_move_are_warned_about():
    toy = Toy()
    for name, param in toy.params.items():
        param.data.zero_()
        toy.wants[name].zero_()
    toy.control(0.3)
    for param in toy.params.values():
        param.grad = torch.zeros_like(param)
    for _ in range(STEPS // 10 - 1):
        toy.optimizer.step()
    with pytest.warns(UserWarning, match="has not moved by step 12"):
        toy.optimizer.step()


def test_a_state_of_another_density_is_refused():
    a, b = Toy(), Toy()
    state = a.control(0.3).state_dict()
    with pytest.raises(ValueError, match="go on with what was begun"):
        b.control(0.2).load_state_dict(state)


def test_who_writes_lambda_after_a_control_writes_it_for_every_tensor():
    listed = [("a", nn.Parameter(torch.ones(4, 4))), ("b", nn.Parameter(torch.ones(4, 4)))]
    optimizer = DessiLBI([{"params": listed, "structure": "filter"}], lam=2.0)
    (group,) = optimizer.param_groups
    group[OWN_LAM], group[OWN_LAM_AT] = [2.0, 0.5], 2.0
    assert [m.lam for m in members(optimizer)] == [2.0, 0.5]
    group["lam"] = 4.0
    assert [m.lam for m in members(optimizer)] == [4.0, 1.0]
    group["lam"] = math.inf
    assert [m.lam for m in members(optimizer)] == [math.inf, math.inf]


def test_a_v_that_is_not_finite_is_refused_by_name():
    toy = Toy()
    toy.control(0.2)
    toy.step(20)
    with torch.no_grad():
        toy.params["b"][0, 0] = math.nan
    with pytest.raises(ValueError, match="V of b is not finite at step 2"):
        toy.step(10)
