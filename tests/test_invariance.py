# SPDX-License-Identifier: Apache-2.0
"""Which weights a normalisation keeps at their size, read off their gradients."""

import torch
from torch import nn

from dessilbi import DensityControl, DessiLBI, param_groups
from dessilbi.dynamics.invariance import is_scale_free
from dessilbi.dynamics.targets import Target
from dessilbi.optimizers import dual

X = torch.linspace(-1, 1, 16 * 3 * 8 * 8).reshape(16, 3, 8, 8).sin()


def with_gradients(model, x=X):
    torch.manual_seed(0)
    out = model(x)
    (out * torch.randn(out.shape)).sum().backward()
    return model


def conv_net(norm):
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, bias=False), norm(6), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.Flatten()
    )


def test_a_filter_before_a_batch_norm_is_scale_free_and_others_are_not():
    model = with_gradients(conv_net(nn.BatchNorm2d))
    assert is_scale_free([model[0].weight])
    assert not is_scale_free([model[3].weight])
    assert not is_scale_free([model[0].weight, model[3].weight])
    assert not is_scale_free([with_gradients(conv_net(lambda _: nn.Identity()))[0].weight])


def test_it_holds_in_half_precision_too():
    model = conv_net(nn.BatchNorm2d).bfloat16()
    assert is_scale_free([with_gradients(model, X.bfloat16())[0].weight])


def test_rows_as_long_as_those_of_large_layers_are_not_taken_for_scale_free():
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(64, 4608))
    weight.grad = torch.randn(64, 4608)
    assert not is_scale_free([weight])


def test_what_has_no_gradient_or_rows_is_not_scale_free():
    weight = nn.Parameter(torch.ones(2, 2))
    assert not is_scale_free([weight])
    weight.grad = torch.zeros(2, 2)
    assert not is_scale_free([weight])
    vector = nn.Parameter(torch.tensor([1.0, -1.0]))
    vector.grad = torch.ones(2)
    assert not is_scale_free([vector])


def test_growth_of_scale_free_units_is_taken_to_last_and_of_others_to_slow_down():
    weights = [nn.Parameter(torch.ones(3, 2)) for _ in range(2)]
    groups = [{"params": list(zip("ab", weights, strict=True)), "structure": "filter"}]
    optimizer = DessiLBI(groups, lr=0.1, nu=1.0, lam=0.1)
    target = Target("*", dual.units_of(dual.members(optimizer)), 0.5, None)
    target.steady = [True, False]
    norms, growth = [torch.ones(3, dtype=torch.float64)] * 2, torch.ones(3, dtype=torch.float64)
    for time in (5.2, 5.4, 5.6, 5.8):
        slopes = [growth, growth * torch.tensor(-(time - 5)).exp()]
        steady, slowing = target.expect(target.blocks(norms), slopes, time, 10.0)
    assert torch.equal(steady, torch.full_like(steady, 1 + 4.2))
    assert bool((slowing < 1 + 4.2 * slopes[1]).all())
    assert bool((slowing > 1).all())


def test_a_control_knows_before_it_looks_and_remembers_it_over_a_resume():
    model = conv_net(nn.BatchNorm2d)
    optimizer = DessiLBI(param_groups(model, {"3.weight": "filter"}), lr=0.05, nu=0.1)
    control = DensityControl(optimizer, density=0.4, total_steps=20)
    for _ in range(12):
        optimizer.zero_grad()
        with_gradients(model)
        optimizer.step()
    assert control.targets[0].steady == [True, False]
    again = DensityControl(
        DessiLBI(param_groups(model, {"3.weight": "filter"}), lr=0.05, nu=0.1),
        density=0.4,
        total_steps=20,
    )
    again.load_state_dict(control.state_dict())
    assert again.targets[0].steady == [True, False]
