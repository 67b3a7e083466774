# SPDX-License-Identifier: Apache-2.0
"""Learning rates over a run, and the path time they add up to."""

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torch.testing import assert_close

from dessilbi import DessiLBI, Path
from dessilbi.training.recipes import ScheduleRecipe
from dessilbi.training.schedules import multiplier, path_time

SCHEDULES = [
    {"kind": "constant"},
    {"kind": "step", "milestones": (2, 3)},
    {"kind": "step", "milestones": (1,), "gamma": 0.5},
    {"kind": "step"},
    {"kind": "cosine"},
    {"kind": "hold"},
    {"kind": "hold", "warmup": 0.0, "hold": 0.5},
    {"kind": "hold", "warmup": 0.9, "hold": 0.5},
]
every_schedule = pytest.mark.parametrize("options", SCHEDULES, ids=str)


def factors(options, total=40, epochs=4):
    schedule = ScheduleRecipe(**options)
    return [multiplier(schedule, step, total, epochs) for step in range(total)]


@every_schedule
def test_path_time_is_what_the_optimizer_really_does(options):
    weight = nn.Parameter(torch.ones(2, 2))
    optimizer = DessiLBI([{"params": [("w", weight)], "structure": "filter"}], lr=0.3, lam=1e-3)
    path = Path(optimizer)
    schedule = ScheduleRecipe(**options)
    scheduler = LambdaLR(optimizer, lambda step: multiplier(schedule, step, 40, 4))
    used = 0.0
    for _ in range(40):
        weight.grad = torch.ones_like(weight)
        used += optimizer.param_groups[0]["lr"]
        optimizer.step()
        scheduler.step()
    assert path.step == 40
    assert_close(path_time(schedule, 0.3, 40, 4), used)
    assert_close(path.time, used)


@every_schedule
def test_no_step_of_a_run_is_without_a_learning_rate(options):
    assert all(0 < factor <= 1 for factor in factors(options))


def test_a_constant_schedule_is_constant():
    assert set(factors({"kind": "constant"})) == {1.0}


def test_steps_fall_at_the_beginning_of_their_epochs():
    expected = [1.0] * 20 + [0.1] * 10 + [0.01] * 10
    assert_close(factors({"kind": "step", "milestones": (2, 3)}), expected)


@pytest.mark.parametrize(("total", "epochs"), [(7 * 3, 3), (13 * 29, 29), (1407 * 60, 60)])
def test_steps_miss_no_epoch_by_rounding(total, epochs):
    schedule = ScheduleRecipe(kind="step", milestones=tuple(range(1, epochs)), gamma=0.5)
    each = total // epochs
    for epoch in range(1, epochs):
        before, after = (
            multiplier(schedule, s, total, epochs) for s in (epoch * each - 1, epoch * each)
        )
        assert after == before / 2


def test_a_milestone_after_the_end_never_comes():
    assert set(factors({"kind": "step", "milestones": (4, 9)})) == {1.0}


def test_cosine_falls_from_1_through_a_half_towards_0():
    found = factors({"kind": "cosine"})
    assert found[0] == 1
    assert_close(found[20], 0.5)
    assert found[-1] < 0.01
    assert found == sorted(found, reverse=True)


def test_hold_warms_up_holds_and_falls():
    found = factors({"kind": "hold", "warmup": 0.25, "hold": 0.5})
    assert_close(found[:10], [(k + 1) / 10 for k in range(10)])
    assert set(found[10:21]) == {1.0}
    assert found[20:] == sorted(found[20:], reverse=True)
    assert found[-1] < 0.02


def test_a_run_of_one_step_takes_it():
    for options in SCHEDULES:
        assert factors(options, total=1, epochs=1)[0] > 0
