# SPDX-License-Identifier: Apache-2.0
"""The path's clock: T without touching the scheduler, and R."""

import copy

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler as lrs

from dessilbi import DessiLBI, wrap
from dessilbi.dynamics.clock import (
    PathClock,
    alphas,
    coupling_of,
    set_coupling,
    total_time,
    warn_about_coupling,
)

STEPS = 30


def optimizer_of(kind="dessilbi", **options):
    layer = nn.Linear(4, 3)
    groups = [
        {"params": [("bias", layer.bias)]},
        {"params": [("weight", layer.weight)], "structure": "filter"},
    ]
    if kind == "wrap":
        base = torch.optim.AdamW(groups, lr=0.02)
        return wrap(base, nu=1.0, lam=1.0, kappa=2.0, **options)
    return DessiLBI(groups, lr=0.1, momentum=0.9, **options)


SCHEDULERS = {
    "none": lambda o: None,
    "cosine": lambda o: lrs.CosineAnnealingLR(o, T_max=STEPS),
    "step": lambda o: lrs.MultiStepLR(o, [10, 20]),
    "onecycle": lambda o: lrs.OneCycleLR(o, max_lr=0.3, total_steps=STEPS + 5),
    "lambda": lambda o: lrs.LambdaLR(o, lambda k: 1 / (1 + k)),
    "restarts": lambda o: lrs.CosineAnnealingWarmRestarts(o, T_0=7),
    "sequential": lambda o: lrs.SequentialLR(
        o, [lrs.LinearLR(o, 0.1, total_iters=5), lrs.ExponentialLR(o, 0.9)], milestones=[5]
    ),
    "chained": lambda o: lrs.ChainedScheduler(
        [lrs.LinearLR(o, 0.1, total_iters=5), lrs.ExponentialLR(o, 0.9)], optimizer=o
    ),
}


def observed(optimizer, scheduler, steps, every=1):
    """alpha of each step, by taking them."""
    seen = []
    for k in range(1, steps + 1):
        group = optimizer.param_groups[1]
        told = getattr(optimizer, "alpha_of", lambda g: g["lr"])
        seen.append(float(told(group)))
        for g in optimizer.param_groups:
            for p in g["params"]:
                p.grad = torch.zeros_like(p)
        optimizer.step()
        if scheduler is not None and k % every == 0:
            scheduler.step()
    return seen


def plain(state):
    """A scheduler's state without the objects in it."""
    if isinstance(state, dict):
        return {k: plain(v) for k, v in state.items()}
    if isinstance(state, list):
        return [plain(v) for v in state]
    return state if isinstance(state, int | float | str) else None


@pytest.mark.parametrize("kind", ["dessilbi", "wrap"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_steps_ahead_are_those_that_come_and_nothing_is_disturbed(name, kind):
    optimizer = optimizer_of(kind)
    scheduler = SCHEDULERS[name](optimizer)
    before = copy.deepcopy([{**g, "params": None} for g in optimizer.param_groups])
    state = None if scheduler is None else copy.deepcopy(scheduler.state_dict())
    ahead = alphas(optimizer, scheduler, STEPS)
    assert [{**g, "params": None} for g in optimizer.param_groups] == before
    if scheduler is not None:
        assert plain(scheduler.state_dict()) == plain(state)
    seen = observed(optimizer, scheduler, STEPS)
    assert ahead == pytest.approx(seen, rel=1e-12)
    assert len(set(seen)) > 1 or name == "none"


def test_from_the_middle_of_a_run_the_rest_is_counted():
    optimizer = optimizer_of()
    scheduler = SCHEDULERS["cosine"](optimizer)
    whole = alphas(optimizer, scheduler, STEPS)
    observed(optimizer, scheduler, 12)
    assert alphas(optimizer, scheduler, STEPS - 12) == pytest.approx(whole[12:])


def test_a_scheduler_that_steps_once_per_epoch_is_followed():
    optimizer = optimizer_of()
    scheduler = lrs.MultiStepLR(optimizer, [2, 4])
    ahead = alphas(optimizer, scheduler, STEPS, every=5)
    assert ahead == pytest.approx(observed(optimizer, scheduler, STEPS, every=5))
    assert total_time(optimizer_of(), None, steps=10) == pytest.approx(1.0)


def test_schedulers_that_cannot_be_known_ahead_are_refused():
    optimizer = optimizer_of()
    with pytest.raises(ValueError, match="under ReduceLROnPlateau cannot be known ahead"):
        alphas(optimizer, lrs.ReduceLROnPlateau(optimizer), 10)
    with pytest.raises(TypeError, match="under function cannot be known ahead"):
        alphas(optimizer, lambda k: 1.0, 10)
    with pytest.raises(ValueError, match="steps=0 is not allowed"):
        alphas(optimizer, None, 0)
    with pytest.raises(ValueError, match="sums to 0"):
        PathClock([0.0, 0.0])


def test_the_clock_finds_steps_and_times():
    clock = PathClock([0.5, 0.25, 0.25])
    assert (clock.total, clock.num_steps, clock.largest) == (1.0, 3, 0.5)
    assert [clock.time_at(k) for k in (0, 1, 2, 3, 9)] == [0.0, 0.5, 0.75, 1.0, 1.0]
    assert [clock.step_at(t) for t in (0.1, 0.5, 0.6, 1.0, 5.0)] == [1, 1, 2, 3, 3]


def test_r_sets_nu_for_every_kappa_and_reads_back():
    layer = nn.Linear(4, 3)
    optimizer = DessiLBI(
        [
            {"params": [("w", layer.weight)], "structure": "filter", "kappa": 2.0},
            {"params": [("b", layer.bias)], "structure": "element"},
        ],
        lr=0.1,
    )
    assert set_coupling(optimizer, 10, total_time=30.0) == 6.0
    assert [group["nu"] for group in optimizer.param_groups] == [6.0, 3.0]
    assert coupling_of(optimizer, 30.0) == pytest.approx(10.0)


def test_a_weak_and_a_violent_coupling_are_warned_about():
    optimizer = optimizer_of()
    with pytest.warns(UserWarning, match=r"R = kappa T/nu is 2: under 3 .* use nu <= 10\b"):
        set_coupling(optimizer, 2, total_time=30.0)
    with pytest.warns(UserWarning, match=r"kappa alpha/nu is 1: above 0\.5"):
        set_coupling(optimizer, 10, total_time=1.0)
    set_coupling(optimizer, 10, total_time=30.0)  # says nothing
    with pytest.warns(UserWarning, match=r"kappa alpha/nu is 0\.67"):
        warn_about_coupling(optimizer, 30.0, largest_alpha=2.0)


def test_coupling_out_of_range_is_refused():
    with pytest.raises(ValueError, match="coupling=0 is not allowed"):
        set_coupling(optimizer_of(), 0, total_time=1.0)
    with pytest.raises(ValueError, match="no param group of this optimizer has a structure"):
        set_coupling(DessiLBI(nn.Linear(2, 2).parameters()), total_time=1.0)
