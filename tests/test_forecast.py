# SPDX-License-Identifier: Apache-2.0
"""When blocks will enter: against runs that are then taken."""

import math

import pytest
import torch
from torch import nn

from dessilbi import DessiLBI, Path
from dessilbi.dynamics.clock import PathClock
from dessilbi.dynamics.forecast import entry_times, forecast, warn_if_frozen


class Pulled:
    """Weights that stay near targets of very different size."""

    def __init__(self, *, lr=0.05, strength=1.0, **options):
        generator = torch.Generator().manual_seed(0)
        size = torch.logspace(-1.5, 0.3, 24)[torch.randperm(24, generator=generator)]
        self.want = size.reshape(4, 6)
        self.w = nn.Parameter(self.want.clone())
        self.strength = strength
        options = {"nu": 1.0, "lam": 2.0, "structure": "element", **options}
        self.optimizer = DessiLBI([("w", self.w)], lr=lr, **options)

    def step(self, count):
        for _ in range(count):
            self.w.grad = self.strength * (self.w.detach() - self.want)
            self.optimizer.step()


@pytest.mark.parametrize("strength", [0.0, 1.0, 20.0], ids=["free", "pulled", "held"])
@pytest.mark.parametrize("structure", ["element", "filter"])
def test_predicted_entry_comes_true_within_a_factor_of_three(strength, structure):
    lam = 0.3 if structure == "element" else 1.0
    toy = Pulled(strength=strength, lam=lam, structure=structure, lr=0.02)
    path = Path(toy.optimizer, every=1)
    toy.step(10)
    told = entry_times(toy.optimizer, time=0.2)["w"].flatten()
    toy.step(290)
    entry = path.entry()["w"].flatten()
    pairs = [
        (float(t), 0.02 * int(k))
        for t, k in zip(told, entry, strict=True)
        if k > 10  # not yet in when it was asked
    ]
    assert len(pairs) >= 2
    for predicted, true in pairs:
        assert true / 3 < predicted < 3 * true


def test_blocks_that_are_in_are_in_now_and_those_that_shrink_never_enter():
    toy = Pulled(lam=0.5)
    toy.step(20)
    support = toy.optimizer.support()["w"]
    assert support.any()
    assert not support.all()
    with torch.no_grad():
        toy.w[~support] *= -1  # V shrinks from now on
    times = entry_times(toy.optimizer, time=1.0)["w"]
    assert (times[support] == 1.0).all()
    assert (times[~support] > 1.0).all()
    with torch.no_grad():
        toy.w.zero_()
    assert (entry_times(toy.optimizer, time=1.0)["w"][~support] == math.inf).all()


def test_units_enter_together():
    a, b = nn.Parameter(torch.rand(5, 3)), nn.Parameter(torch.rand(5, 4))
    optimizer = DessiLBI(
        [
            {"params": [("a", a)], "structure": "filter", "unit": "u", "nu": 2.0},
            {"params": [("b", b)], "structure": "filter", "unit": "u"},
        ],
        nu=1.0,
        lam=0.5,
    )
    times = entry_times(optimizer)
    assert torch.equal(times["a"], times["b"])
    assert torch.isfinite(times["a"]).all()


def test_the_forecast_counts_what_can_enter_before_the_end():
    toy = Pulled(lam=0.2)
    times = entry_times(toy.optimizer)["w"]
    clock = PathClock([0.05] * 40)
    seen = forecast(toy.optimizer, clock)
    assert seen.first == float(times.min())
    assert seen.blocks == pytest.approx(float((times <= 2.0).double().mean()))
    assert 0 < seen.blocks < 1
    assert seen.elements == pytest.approx(seen.blocks)
    assert seen.at_constant_rate == seen.blocks


def test_a_schedule_that_freezes_the_path_is_warned_about_with_what_to_do():
    decaying = PathClock([0.05] * 10 + [0.0002] * 90)
    held = PathClock([0.05] * 100)
    toy = Pulled(lam=0.4)
    toy.step(5)
    with pytest.warns(
        UserWarning, match=r"stands still for the last [789]\d% of the steps"
    ) as seen:
        assert warn_if_frozen(toy.optimizer, decaying, step=5)
    message = str(seen[0].message)
    told = float(message.split("nu = ")[1].split(" ")[0])
    assert 0 < told < 1
    assert not warn_if_frozen(toy.optimizer, held, step=5)
    # What it told would have helped: half of what a constant rate gives can enter.
    wanted = forecast(toy.optimizer, decaying, step=5).at_constant_rate / 2
    assert forecast(toy.optimizer, decaying, step=5).blocks < wanted
    toy.optimizer.param_groups[0]["lam"] = float(message.split("lam = ")[1])
    assert forecast(toy.optimizer, decaying, step=5).blocks >= 0.9 * wanted


def test_a_path_predicts_the_future_and_remembers_the_past():
    toy = Pulled(lam=0.5)
    path = Path(toy.optimizer, every=5)
    toy.step(30)
    entry = path.entry()["w"]
    assert (entry > 0).any()
    assert (entry == -1).any()
    told = path.predict()["w"]
    expected = entry_times(toy.optimizer, time=path.time)["w"]
    assert torch.equal(told[entry == -1], expected[entry == -1])
    torch.testing.assert_close(told[entry > 0], 0.05 * entry[entry > 0].double())
    path.close()
    with pytest.raises(ValueError, match="watches no optimizer"):
        path.predict()
