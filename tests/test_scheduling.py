# SPDX-License-Identifier: Apache-2.0
"""Schedules of nu, lambda and kappa beside the learning rate."""

import math

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from dessilbi import DensityControl, DessiLBI
from dessilbi.dynamics.scheduling import RAMP, Schedules, piecewise

STEPS = 40


def build(**options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    weights = [(n, p) for n, p in model.named_parameters() if p.dim() > 1]
    others = [(n, p) for n, p in model.named_parameters() if p.dim() == 1]
    optimizer = DessiLBI(
        [{"params": weights, "structure": "element"}, {"params": others}],
        **{"lr": 0.1, "nu": 0.5, "lam": 0.02, **options},
    )
    return model, optimizer


def train(model, optimizer, steps, start=0, each=lambda: None):
    for k in range(start, start + steps):
        x = torch.randn(8, 6, generator=torch.Generator().manual_seed(k), dtype=torch.float64)
        optimizer.zero_grad()
        (model(x) - x[:, :3]).square().mean().backward()
        optimizer.step()
        each()


def test_points_are_joined_by_lines_and_kept_outside():
    function = piecewise([(0.2, 1.0), (0.6, 3.0), (0.6, 0.0), (1.0, 2.0)])
    assert [function(x) for x in (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)] == pytest.approx(
        [1.0, 1.0, 2.0, 0.0, 1.0, 2.0]
    )


@pytest.mark.parametrize("points", [[], [(0.5, 1), (0.2, 1)], [(0, -1)], [(0, math.inf)]], ids=str)
def test_points_out_of_order_or_range_are_refused(points):
    with pytest.raises(ValueError, match="is not allowed: give"):
        piecewise(points)


def test_options_follow_their_functions_of_progress_in_path_time():
    model, optimizer = build()
    scheduler = LambdaLR(optimizer, lambda k: 1.0 if k < 20 else 0.1)
    schedules = Schedules(
        optimizer, total_time=2.2, coupling=piecewise(RAMP), lam=lambda p: 1 + p, kappa=lambda p: 2
    )
    seen = []

    def look():
        group = optimizer.param_groups[0]
        seen.append((schedules.time / 2.2, group["nu"], group["lam"], group["kappa"]))
        scheduler.step()

    train(model, optimizer, STEPS, each=look)
    assert seen[-1][0] == pytest.approx(1.0)
    for progress, nu, lam, kappa in seen:
        assert nu == pytest.approx(0.5 / min(1, progress / 0.3))
        assert lam == pytest.approx(0.02 * (1 + progress))
        assert kappa == 2
    assert optimizer.param_groups[1]["nu"] == 0.5  # no structure, no schedule


def test_a_coupling_of_zero_is_plain_sgd():
    model, optimizer = build()
    plain, sgd = build()
    sgd = torch.optim.SGD(plain.parameters(), lr=0.1)
    Schedules(optimizer, total_time=4.0, coupling=piecewise([(0.5, 0.0), (0.5, 1.0)]))
    train(model, optimizer, 19)
    train(plain, sgd, 19)
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(a, b)
    train(model, optimizer, 2, start=19)
    train(plain, sgd, 2, start=19)
    assert not torch.equal(model[0].weight, plain[0].weight)


def test_the_law_holds_under_a_moving_nu_and_lambda():
    model, optimizer = build(kappa=2.0)
    Schedules(optimizer, total_time=4.0, coupling=piecewise(RAMP), lam=lambda p: 2 - p)
    weight = model[0].weight
    start, total = weight.detach().clone(), torch.zeros_like(weight)

    def add():
        total.add_(weight.grad, alpha=0.1)

    train(model, optimizer, STEPS, each=add)
    assert 0 < optimizer.support().density < 1
    left = weight.detach() + 2.0 * optimizer.state[weight]["v"]
    torch.testing.assert_close(left, start - 2.0 * total, rtol=1e-10, atol=1e-12)


def test_resumed_schedules_go_on_bit_by_bit():
    def make():
        model, optimizer = build()
        return model, optimizer, Schedules(optimizer, total_time=4.0, coupling=piecewise(RAMP))

    whole, optimizer, _ = make()
    train(whole, optimizer, STEPS)
    model, optimizer, schedules = make()
    train(model, optimizer, 7)
    again, other, resumed = make()
    again.load_state_dict(model.state_dict())
    other.load_state_dict(optimizer.state_dict())
    resumed.load_state_dict(schedules.state_dict())
    train(again, other, STEPS - 7, start=7)
    for a, b in zip(whole.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)


def test_lambda_has_one_writer():
    _, optimizer = build()
    schedules = Schedules(optimizer, total_time=4.0, lam=lambda p: 1.0)
    with pytest.raises(ValueError, match=r"Schedules writes the lambda .* DensityControl cannot"):
        DensityControl(optimizer, density=0.3, total_steps=40)
    schedules.close()
    DensityControl(optimizer, density=0.3, total_steps=40)


def test_what_makes_no_sense_is_refused():
    _, optimizer = build()
    with pytest.raises(ValueError, match="nothing is scheduled"):
        Schedules(optimizer, total_time=1.0)
    with pytest.raises(ValueError, match="total_time=0 is not allowed"):
        Schedules(optimizer, total_time=0, lam=lambda p: 1.0)
    schedules = Schedules(optimizer, total_time=1.0, lam=lambda p: 1.0)
    with pytest.raises(ValueError, match="of other param groups or options"):
        schedules.load_state_dict({"time": 0.0, "bases": [{"nu": 1.0}]})


@pytest.mark.parametrize("option", ["lam", "kappa"])
@pytest.mark.parametrize("factor", [0.0, -1.0, math.inf, math.nan])
def test_a_factor_that_no_group_may_hold_is_refused_and_nothing_moves(option, factor):
    model, optimizer = build()
    Schedules(optimizer, total_time=4.0, **{option: lambda p: factor if p > 0.04 else 1.0})
    train(model, optimizer, 1)
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(ValueError, match=f"schedule of {option} gives .* must be > 0 and finite"):
        train(model, optimizer, 1, start=1)
    assert all(map(torch.equal, before, model.parameters()))


def test_a_group_that_joins_is_scheduled_from_the_value_it_was_given():
    model, optimizer = build()
    schedules = Schedules(optimizer, total_time=STEPS * 0.1, coupling=piecewise(RAMP))
    train(model, optimizer, 4)
    late = nn.Parameter(torch.ones(3, 3, dtype=torch.float64))
    optimizer.add_param_group({"params": [("late", late)], "structure": "filter", "nu": 2.0})
    train(model, optimizer, STEPS - 4, start=4)
    assert [group["nu"] for group in optimizer.param_groups] == [0.5, 0.5, 2.0]
    assert len(schedules.state_dict()["bases"]) == 2  # of the groups with a structure
