# SPDX-License-Identifier: Apache-2.0
"""Monitors against brute force, and the theory they watch, where it is known to hold."""

import math
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from dessilbi import DessiLBI, Path
from dessilbi.dynamics.monitors import (
    EDGES,
    Lyapunov,
    coupling_gap,
    dead_units,
    norm_histogram,
    warn_about_dead_units,
)
from dessilbi.dynamics.safety import largest_step


def regression(seed=0, *, samples=120, features=20):
    """Sparse linear regression: five coefficients that differ in size, the rest are zero."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, features, generator=generator, dtype=torch.float64)
    truth = torch.zeros(features, dtype=torch.float64)
    truth[[3, 7, 11, 2, 17]] = torch.tensor([5.0, -4.0, 3.0, -2.0, 1.2], dtype=torch.float64)
    y = x @ truth + 0.1 * torch.randn(samples, generator=generator, dtype=torch.float64)
    return x, y, truth


def logistic(seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(60, 6, generator=generator, dtype=torch.float64)
    y = (x[:, 0] - x[:, 1] + 0.5 * torch.randn(60, generator=generator) > 0).double()
    return x, y


def linear(features, **options):
    layer = nn.Linear(features, 1, bias=False).double()
    nn.init.zeros_(layer.weight)
    optimizer = DessiLBI(layer.named_parameters(), **{"structure": "element", **options})
    return layer, optimizer


def descend(layer, optimizer, loss_of, steps, watch=None):
    values = []
    for _ in range(steps):
        loss = loss_of(layer)
        if watch:
            values.append(watch.value(loss.item()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return values


PROBLEMS = {
    "regression": (
        regression()[0].shape[1],
        lambda layer: (layer(regression()[0])[:, 0] - regression()[1]).square().mean() / 2,
        float(torch.linalg.matrix_norm(regression()[0], 2) ** 2 / 120),
    ),
    "logistic": (
        6,
        lambda layer: nn.functional.binary_cross_entropy_with_logits(
            layer(logistic()[0])[:, 0], logistic()[1]
        ),
        float(torch.linalg.matrix_norm(logistic()[0], 2) ** 2 / 240),
    ),
}


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("structure", ["element", (1, 2), "layer"], ids=str)
@pytest.mark.parametrize("kappa", [1.0, 3.0])
def test_below_the_bound_the_lyapunov_function_never_rises(problem, structure, kappa):
    features, loss_of, lip = PROBLEMS[problem]
    step = 0.95 * largest_step(lip, nu=0.5, kappa=kappa)
    layer, optimizer = linear(features, lr=step, nu=0.5, kappa=kappa, lam=0.2, structure=structure)
    nn.init.normal_(layer.weight, generator=torch.Generator().manual_seed(1))
    values = descend(layer, optimizer, loss_of, 150, Lyapunov(optimizer))
    assert optimizer.support().density > 0
    assert all(b <= a + 1e-12 * abs(a) for a, b in pairwise(values))
    assert values[-1] < 0.9 * values[0]


def test_above_the_bound_the_lyapunov_function_does_rise():
    features, loss_of, lip = PROBLEMS["regression"]
    layer, optimizer = linear(features, lr=2.1 * largest_step(lip, nu=0.5), nu=0.5, lam=0.2)
    values = descend(layer, optimizer, loss_of, 60, Lyapunov(optimizer))
    assert max(values) > 2 * values[0]


def test_the_iterates_converge_to_a_critical_point():
    features, loss_of, lip = PROBLEMS["regression"]
    layer, optimizer = linear(features, lr=0.9 * largest_step(lip, nu=0.5), nu=0.5, lam=0.05)
    descend(layer, optimizer, loss_of, 2000)
    loss_of(layer).backward()
    (gamma,) = optimizer.gamma().values()
    # grad_W = grad L + (W - Gamma)/nu, grad_Gamma = (Gamma - W)/nu
    assert float((layer.weight.detach() - gamma).abs().max()) < 1e-4
    optimizer.zero_grad()
    loss_of(layer).backward()
    assert float(layer.weight.grad.abs().max()) < 1e-4


@pytest.mark.parametrize("seed", range(3))
def test_on_sparse_regression_the_support_enters_in_order_of_size_before_anything_else(seed):
    x, y, truth = regression(seed)
    lip = float(torch.linalg.matrix_norm(x, 2) ** 2 / len(x))
    layer, optimizer = linear(20, lr=0.3 * largest_step(lip, nu=5.0), nu=5.0, lam=1.0)
    path = Path(optimizer, every=1)
    descend(layer, optimizer, lambda m: (m(x)[:, 0] - y).square().mean() / 2, 600)
    entry = path.entry()["weight"][0]
    wanted = truth.abs().argsort(descending=True)[:5]
    steps = [int(entry[i]) for i in wanted]
    assert all(step > 0 for step in steps)
    assert steps == sorted(steps)
    assert len(set(steps)) == 5
    others = [int(s) for i, s in enumerate(entry) if truth[i] == 0]
    assert all(step == -1 or step > steps[-1] for step in others)


def trained_pair():
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(6, 4)), nn.Parameter(torch.randn(6, 3))]
    third = nn.Parameter(torch.randn(5, 4))
    groups = [
        {"params": [("a", params[0])], "structure": "filter", "unit": "u", "nu": 2.0},
        {"params": [("b", params[1])], "structure": "filter", "unit": "u", "nu": 1.0},
        {"params": [("c", third)], "structure": "element", "nu": 0.7},
    ]
    optimizer = DessiLBI(groups, lr=0.1, lam=1.0, kappa=1.5)
    for _ in range(25):
        for p in (*params, third):
            p.grad = 0.5 * torch.randn_like(p) - 0.3
        optimizer.step()
    assert 0 < optimizer.support().density < 1
    return optimizer


def test_the_gap_is_that_of_brute_force():
    optimizer = trained_pair()
    gammas, total = optimizer.gamma(), 0.0
    for group in optimizer.param_groups:
        for name, p in zip(group["param_names"], group["params"], strict=True):
            for w, g in zip(p.flatten().tolist(), gammas[name].flatten().tolist(), strict=True):
                total += (w - g) ** 2 / (2 * group["nu"])
    assert coupling_gap(optimizer) == pytest.approx(total, rel=1e-5)


def test_the_histogram_is_that_of_brute_force_and_agrees_with_the_support():
    optimizer = trained_pair()
    found, support = norm_histogram(optimizer), optimizer.support()
    v = {
        name: optimizer.state[p]["v"]
        for group in optimizer.param_groups
        for name, p in zip(group["param_names"], group["params"], strict=True)
    }
    joint = torch.cat([v["a"], v["b"]], dim=1).norm(dim=1).tolist()
    single = v["c"].abs().flatten().tolist()
    for name, norms in (("a", joint), ("b", joint), ("c", single)):
        counts = [0] * (len(EDGES) - 1)
        for norm in norms:
            counts[next(i for i, edge in enumerate(EDGES[1:]) if norm <= edge or i == 9)] += 1
        assert found[name] == counts
        assert sum(found[name]) == len(norms)
        assert sum(found[name][EDGES.index(1.0) :]) == int(support[name].sum())


def test_the_lyapunov_function_is_that_of_brute_force():
    features, loss_of, _ = PROBLEMS["logistic"]
    layer, optimizer = linear(features, lr=0.3, nu=0.5, kappa=2.0, lam=0.1)
    monitor = Lyapunov(optimizer)
    before = torch.zeros(features, dtype=torch.float64)
    for _ in range(40):
        loss = loss_of(layer).item()
        told = monitor.value(loss)
        v = optimizer.state.get(layer.weight, {}).get("v", torch.zeros(1, features)).double()[0]
        gamma = optimizer.gamma()["weight"][0].double()
        w = layer.weight.detach()[0]
        energy = loss + float((w - gamma).square().sum()) / (2 * 0.5)
        bregman = 0.1 * float(gamma.abs().sum()) - float((before * gamma).sum())
        assert_close(told, 0.3 * energy + bregman, rtol=1e-9, atol=1e-12)
        before = v - gamma / 2.0
        descend(layer, optimizer, loss_of, 1)
    assert float(gamma.abs().sum()) > 0


def test_the_lyapunov_function_refuses_what_the_theory_does_not_cover():
    _, optimizer = linear(3, lr=0.1)
    monitor = Lyapunov(optimizer)
    optimizer.param_groups[0]["lr"] = 0.2
    with pytest.raises(ValueError, match="alpha has changed"):
        monitor.value(1.0)
    layer = nn.Linear(3, 2)
    groups = [
        {"params": [("w", layer.weight)], "structure": "filter", "lr": 0.1},
        {"params": [("b", layer.bias)], "lr": 0.2},
    ]
    with pytest.raises(ValueError, match="alpha differs between param groups"):
        Lyapunov(DessiLBI(groups))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 8, 3)
        self.norm = nn.BatchNorm2d(8)
        self.up = nn.ConvTranspose2d(8, 6, 2)
        self.out = nn.Linear(6, 3)

    def forward(self, x):
        y = self.norm(self.conv(x)).relu()
        return self.out(self.up(y).relu().mean(dim=(2, 3)))


def test_dead_units_are_found_and_named_by_layer():
    torch.manual_seed(0)
    model = Net()
    with torch.no_grad():
        model.norm.bias[:3] = -100.0  # never fire
        model.up.bias[:] = 1.0
        model.up.weight[:, 4] *= 1e-6  # faded: units of a transposed convolution are dimension 1
    batches = [torch.randn(8, 1, 6, 6) for _ in range(2)]
    before = {n: b.clone() for n, b in model.named_buffers()}
    shares = dead_units(model, lambda x: model(x).square().mean(), batches)
    assert shares == {"conv.weight": 3 / 8, "up.weight": pytest.approx(1 / 6), "out.weight": 0.0}
    assert all(torch.equal(b, before[n]) for n, b in model.named_buffers())
    assert all(p.grad is None for p in model.parameters())
    assert not warn_about_dead_units(shares)
    with pytest.warns(UserWarning, match=r"many units are dead: conv\.weight \(38%\); warm"):
        assert warn_about_dead_units(shares, at_most=0.2)


def test_dead_units_need_layers_and_batches():
    with pytest.raises(ValueError, match="0 layers and 1 batches"):
        dead_units(nn.ReLU(), lambda x: x.sum(), [torch.ones(1)])


def test_edges_end_open():
    assert EDGES[0] == 0
    assert EDGES[-1] == math.inf
