# SPDX-License-Identifier: Apache-2.0
"""What low precision does to the step: V stays exact to float32, W is rounded once per step."""

import pytest
import torch
from torch import nn

from dessilbi import DessiLBI


def run(dtype, *, steps=400, lr=0.01, momentum=0.0):
    """A weight under constant gradients; returns W, V and the sum of what the gradients moved."""
    generator = torch.Generator().manual_seed(0)
    w = nn.Parameter(torch.randn(8, 16, generator=generator).to(dtype))
    start = w.detach().double().clone()
    named = [("w", w)]
    optimizer = DessiLBI(named, lr=lr, nu=1.0, lam=4.0, momentum=momentum, structure="filter")
    moved = torch.zeros(8, 16, dtype=torch.float64)
    for _ in range(steps):
        grad = torch.randn(8, 16, generator=generator).to(dtype)
        w.grad = grad
        optimizer.step()
        moved += lr * grad.double()
    return start, w.detach().double(), optimizer.state[w]["v"], moved, optimizer


@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-4), (torch.bfloat16, 0.5)]
)
def test_the_law_holds_up_to_the_rounding_of_w(dtype, bound):
    start, w, v, moved, optimizer = run(dtype)
    gap = (w + v.double() - (start - moved)).abs().max()
    assert gap < bound
    assert 0 < optimizer.support().density < 1
    assert v.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_steps_below_half_a_unit_in_the_last_place_of_bfloat16_are_lost_on_w_but_not_on_v():
    w = nn.Parameter(torch.ones(4, 4, dtype=torch.bfloat16))
    optimizer = DessiLBI([("w", w)], lr=1e-4, nu=1.0, lam=1e6, structure="filter")
    for _ in range(1000):
        w.grad = torch.zeros_like(w)
        optimizer.step()
    # W should have decayed to exp(-0.1) = 0.905: each step of 1e-4 is rounded away ...
    assert torch.equal(w, torch.ones_like(w))
    # ... while V has integrated 1000 of them.
    torch.testing.assert_close(optimizer.state[w]["v"], torch.full((4, 4), 0.1))


def test_low_precision_gives_the_support_of_float32_on_a_short_run():
    supports = [run(dtype)[4].support() for dtype in (torch.float32, torch.bfloat16)]
    agreement = (supports[0]["w"] == supports[1]["w"]).float().mean()
    assert 0 < supports[0].density < 1
    assert agreement >= 0.75
