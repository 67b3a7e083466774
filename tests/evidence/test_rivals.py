# SPDX-License-Identifier: Apache-2.0
"""Each rival does what its paper's formula says, or reproduces a known result."""

import pytest
import torch
from benchmarks.evidence.methods import bregman, group_lasso, magnitude, plain, slimming
from benchmarks.evidence.methods.torch_pruner import pruned, pruner_for
from benchmarks.evidence.training import structured
from torch import nn


def two_layers():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 4))


def stepped(optimizer, param, gradients):
    for gradient in gradients:
        param.grad = gradient.clone()
        optimizer.step()
    return param.detach().clone()


def test_linbreg_follows_its_formula():
    torch.manual_seed(0)
    start, gradients = torch.randn(7).double(), [torch.randn(7).double() for _ in range(5)]
    lr, lam, delta, momentum = 0.3, 0.2, 1.5, 0.6
    v, m = start / delta + lam * start.sign(), torch.zeros_like(start)
    for gradient in gradients:
        m = momentum * m + (1 - momentum) * lr * gradient
        v = v - m
        theta = delta * torch.sign(v) * torch.clamp(v.abs() - lam, min=0)
    param = nn.Parameter(start.clone())
    optimizer = bregman.Bregman([param], lr, lam=lam, delta=delta, momentum=momentum)
    torch.testing.assert_close(stepped(optimizer, param, gradients), theta)
    assert (theta == 0).any()
    assert (theta != 0).any()


def test_linbreg_is_sgd_where_nothing_is_penalised():
    start, gradients = torch.randn(5).double(), [torch.randn(5).double() for _ in range(4)]
    one, two = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    ours = stepped(bregman.Bregman([one], 0.2, momentum=0.5), one, gradients)
    # torch's momentum buffer is larger by 1/(1 - momentum) when dampening is as large
    theirs = torch.optim.SGD([two], lr=0.2, momentum=0.5, dampening=0.5)
    theirs.state[two]["momentum_buffer"] = torch.zeros_like(start)
    torch.testing.assert_close(ours, stepped(theirs, two, gradients))


def test_linbreg_solves_the_lasso_limit_of_sparse_recovery():
    # Known result: linearised Bregman iteration recovers a sparse solution of an underdetermined
    # system that minimum norm does not (Cai, Osher, Shen 2009).
    torch.manual_seed(0)
    matrix = torch.randn(30, 40).double() / 30**0.5
    wanted = torch.zeros(40).double()
    wanted[[3, 17, 31]] = torch.tensor([2.0, -1.5, 1.0]).double()
    param = nn.Parameter(torch.zeros(40).double())
    optimizer = bregman.Bregman([param], 0.05, lam=10.0, momentum=0.0)
    for _ in range(3000):
        param.grad = matrix.T @ (matrix @ param.detach() - matrix @ wanted)
        optimizer.step()
    found = param.detach()
    assert set(found.nonzero().flatten().tolist()) == {3, 17, 31}
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=0)
    assert (torch.linalg.pinv(matrix) @ matrix @ wanted - wanted).abs().max() > 0.1


def test_adabreg_is_adam_where_nothing_is_penalised():
    start, gradients = torch.randn(5).double(), [torch.randn(5).double() for _ in range(6)]
    one, two = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    ours = bregman.Bregman([one], 0.01, betas=(0.9, 0.999))
    theirs = torch.optim.Adam([two], lr=0.01)
    torch.testing.assert_close(
        stepped(ours, one, gradients), stepped(theirs, two, gradients), rtol=1e-6, atol=1e-8
    )


def test_a_sparse_start_keeps_the_variance():
    weight = torch.randn(400, 400)
    kept = weight.clone()
    bregman.start_sparse([kept], 0.1, seed=0)
    assert (kept != 0).float().mean().item() == pytest.approx(0.1, abs=0.01)
    assert kept.std().item() == pytest.approx(weight.std().item(), rel=0.05)


def test_the_cubic_schedule_has_its_known_values():
    found = [magnitude.cubic(p, 0.8, begin=0.2, end=0.6) for p in (0.0, 0.2, 0.4, 0.6, 1.0)]
    assert found == pytest.approx([0.0, 0.0, 0.8 * (1 - 0.5**3), 0.8, 0.8])


def test_magnitude_keeps_the_largest_weights_of_all_layers():
    net = two_layers()
    ticket = magnitude.by_magnitude(net, 0.25)
    everything = torch.cat([w.detach().abs().flatten() for w in structured(net).values()])
    bound = everything.sort(descending=True).values[int(0.25 * everything.numel()) - 1]
    for name, weight in structured(net).items():
        assert torch.equal(ticket[name], weight.detach().abs() >= bound)
    assert ticket.density == pytest.approx(0.25)


def test_pruning_twice_prunes_what_is_left():
    net = two_layers()
    magnitude.prune_to(net, 0.5)
    magnitude.prune_to(net, 0.25)
    nested, at_once = magnitude.made_permanent(net), magnitude.by_magnitude(two_layers(), 0.25)
    assert all(torch.equal(nested[name], at_once[name]) for name in at_once)


def test_the_proximal_step_solves_its_problem():
    # argmin_u ||u - w||^2 / 2 + t sqrt(|g|) ||u||, here for a unit of two tensors
    torch.manual_seed(1)
    unit = [nn.Parameter(torch.randn(3, 4).double()), nn.Parameter(torch.randn(3, 2).double())]
    before = torch.cat([p.detach().clone() for p in unit], 1)
    with torch.no_grad():
        for p in unit:
            p[0] *= 0.05
    before[0] *= 0.05
    group_lasso.shrink_unit(unit, 0.3)
    after = torch.cat([p.detach() for p in unit], 1)
    weight = 0.3 * 6**0.5
    assert (after[0] == 0).all()
    assert before[0].norm() <= weight
    for row in (1, 2):  # optimality: w - u is the gradient of the penalty
        torch.testing.assert_close(
            before[row] - after[row], weight * after[row] / after[row].norm()
        )


def test_slimming_adds_the_sign_of_the_scales_alone():
    net = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3))
    with torch.no_grad():
        net[1].weight.copy_(torch.tensor([1.0, -2.0, 0.5]))
    net(torch.randn(2, 1, 5, 5)).square().mean().backward()
    before = {name: p.grad.clone() for name, p in net.named_parameters()}
    slimming.add_penalty(net, 0.1)
    moved = net[1].weight.grad - before["1.weight"]
    torch.testing.assert_close(moved, torch.tensor([0.1, -0.1, 0.1]))
    assert torch.equal(net[0].weight.grad, before["0.weight"])


def test_the_l1_subgradient_is_the_sign_of_the_weights():
    net = two_layers()
    net(torch.randn(3, 8)).square().mean().backward()
    before = {name: p.grad.clone() for name, p in net.named_parameters()}
    plain.add_l1(net, 0.01)
    for name, p in net.named_parameters():
        expected = 0.01 * p.detach().sign() if name.endswith("weight") else torch.zeros_like(p)
        torch.testing.assert_close(p.grad - before[name], expected)


def test_torch_pruning_gets_below_the_limit_and_its_regulariser_pulls_weights_in():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3),
    )  # fmt: skip
    x = torch.randn(2, 1, 6, 6)

    def size(model):
        return sum(p.numel() for p in model.parameters())

    small = pruned(net, x, 0.5 * size(net), size)
    assert size(small) <= 0.5 * size(net)
    assert small(x).shape == (2, 3)
    net(x).sum().backward()
    before = net[0].weight.grad.clone()
    pruner_for(net, x, 0.1).regularize(net)
    pulled = (net[0].weight.grad - before) * net[0].weight.detach()
    assert (pulled >= 0).all()
    assert pulled.max() > 0
