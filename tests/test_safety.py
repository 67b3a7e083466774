# SPDX-License-Identifier: Apache-2.0
"""The Lipschitz constant against exact eigenvalues, and the step it allows against divergence."""

import math

import pytest
import torch
from torch import nn

from dessilbi import DessiLBI
from dessilbi.dynamics.safety import check_step, largest_step, lipschitz


def quadratic(eigenvalues):
    """A layer whose loss has these curvatures."""
    layer = nn.Linear(len(eigenvalues), 1, bias=False).double()
    curvature = torch.tensor(eigenvalues, dtype=torch.float64)
    return layer, lambda _: (layer.weight.square() * curvature).sum() / 2


@pytest.mark.parametrize("eigenvalues", [[3.0, 1.0, 0.2], [0.5, -2.0, 1.0]], ids=str)
def test_the_estimate_is_the_largest_curvature_in_magnitude(eigenvalues):
    layer, loss = quadratic(eigenvalues)
    found = lipschitz(layer, loss, [None], iterations=100)
    assert found == pytest.approx(max(map(abs, eigenvalues)), rel=1e-3)


def test_the_estimate_is_that_of_the_hessian_of_the_mean_over_batches():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    batches = [torch.randn(8, 3, dtype=torch.float64) for _ in range(3)]

    def loss_at(flat, x):
        sizes = [p.numel() for p in model.parameters()]
        parts = [t.view_as(p) for t, p in zip(flat.split(sizes), model.parameters(), strict=True)]
        named = dict(zip(dict(model.named_parameters()), parts, strict=True))
        return (torch.func.functional_call(model, named, x) - 1).square().mean()

    flat = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    hessian = torch.stack(
        [torch.autograd.functional.hessian(lambda f, x=x: loss_at(f, x), flat) for x in batches]
    ).mean(0)
    exact = float(torch.linalg.eigvalsh(hessian).abs().max())
    found = lipschitz(model, lambda x: (model(x) - 1).square().mean(), batches, iterations=200)
    assert found == pytest.approx(exact, rel=1e-2)


def test_weights_gradients_and_statistics_are_left_as_they_are():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(12, 2))
    model[0].weight.grad = torch.ones_like(model[0].weight)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    lipschitz(model, lambda x: model(x).square().mean(), [torch.randn(6, 1, 4, 4)], iterations=2)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(model[0].weight.grad, torch.ones_like(model[0].weight))
    assert model[3].weight.grad is None


def test_a_loss_without_curvature_has_none():
    layer = nn.Linear(3, 1)
    assert lipschitz(layer, lambda x: layer(x).sum(), [torch.ones(1, 3)]) == 0.0


def run(lip, nu, kappa, share, steps=1000):
    """Train a quadratic of curvature ``lip`` at a share of the bound; return the last |W|."""
    param = nn.Parameter(torch.tensor([1.0], dtype=torch.float64))
    step = share * largest_step(lip, nu=nu, kappa=kappa)
    optimizer = DessiLBI([("w", param)], lr=step, nu=nu, kappa=kappa, lam=0.2, structure="element")
    for _ in range(steps):
        param.grad = lip * (param.detach() - 2.0)
        optimizer.step()
        if param.abs() > 1e6:
            break
    return float(param.detach().abs())


@pytest.mark.parametrize("lip", [0.5, 5.0])
@pytest.mark.parametrize("nu", [0.1, 1.0])
@pytest.mark.parametrize("kappa", [1.0, 4.0])
def test_below_the_bound_a_quadratic_converges_and_well_above_it_diverges(lip, nu, kappa):
    assert run(lip, nu, kappa, 0.98) == pytest.approx(2.0, abs=1e-3)
    assert run(lip, nu, kappa, 2.1) > 1e6


def test_a_step_above_the_bound_is_warned_about_and_named():
    layer = nn.Linear(4, 3)
    groups = [
        {"params": [("w", layer.weight)], "structure": "filter", "nu": 0.5, "kappa": 2.0},
        {"params": [("b", layer.bias)]},
    ]
    optimizer = DessiLBI(groups, lr=0.1)
    assert largest_step(3.0, nu=0.5, kappa=2.0) == pytest.approx(2 / (2 * 7))
    seen = check_step(optimizer, 3.0)
    assert seen.safe
    assert seen.bound == pytest.approx(1 / 7)
    with pytest.warns(UserWarning, match=r"alpha = 0\.1 is above .* = 0\.0833 with Lip = 8"):
        assert not check_step(optimizer, 8.0).safe
    with pytest.raises(ValueError, match="lipschitz=inf is not allowed"):
        check_step(optimizer, math.inf)


def test_nothing_to_estimate_from_is_refused():
    layer = nn.Linear(2, 1)
    with pytest.raises(ValueError, match="2 weights to train, 0 batches"):
        lipschitz(layer, lambda x: layer(x).sum(), [])
