# SPDX-License-Identifier: Apache-2.0
"""Reading Gamma and the support, and the names they come under."""

import pytest
import torch
from torch import nn

from dessilbi import DessiLBI


def small_net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def groups_of(model):
    """Weights by filter, biases without a structure."""
    named = list(model.named_parameters())
    return [
        {"params": [(n, p) for n, p in named if p.dim() > 1], "structure": "filter"},
        {"params": [(n, p) for n, p in named if p.dim() <= 1]},
    ]


def optimizer_of(model, **options):
    defaults = {"lr": 0.05, "nu": 2.0, "lam": 1.3, "momentum": 0.9}
    return DessiLBI(groups_of(model), **{**defaults, **options})


def loss_of(model, k=0):
    generator = torch.Generator().manual_seed(k)
    x = torch.randn(16, 6, generator=generator)
    return (model(x) - x[:, :3].sin()).square().mean()


def train(model, optimizer, steps, first=0):
    for k in range(first, first + steps):
        optimizer.zero_grad()
        loss_of(model, k).backward()
        optimizer.step()
    return [p.detach().clone() for p in model.parameters()]


def test_gamma_and_support_need_a_structured_group():
    optimizer = DessiLBI(small_net().named_parameters())
    for read in (optimizer.gamma, optimizer.support):
        with pytest.raises(ValueError, match=r"no param group .* dessilbi\.param_groups\(model\)"):
            read()


def test_unnamed_parameters_train_and_reading_names_says_how_to_give_them():
    model = small_net()
    optimizer = DessiLBI([{"params": [model[0].weight], "structure": "filter"}], lr=0.1)
    before = model[0].weight.detach().clone()
    train(model, optimizer, 2)
    assert not torch.equal(model[0].weight, before)
    for read in (optimizer.gamma, optimizer.support):
        with pytest.raises(ValueError, match=r"have no names: give it model\.named_parameters\(\)"):
            read()


def test_gamma_and_support_are_empty_before_the_first_step():
    model = small_net()
    optimizer = optimizer_of(model)
    assert optimizer.support().density == 0
    assert {name: tuple(g.shape) for name, g in optimizer.gamma().items()} == {
        "0.weight": (8, 6),
        "2.weight": (3, 8),
    }
    assert not any(g.any() for g in optimizer.gamma().values())
    assert not optimizer.state


def test_the_support_is_where_gamma_is_not_zero():
    model = small_net()
    optimizer = optimizer_of(model)
    train(model, optimizer, 80)
    support = optimizer.support()
    assert 0 < support.density < 1
    for name, gamma in optimizer.gamma().items():
        assert torch.equal(gamma != 0, support.mask_of(name))


class Compiled(nn.Module):
    """Names its part as torch.compile does, whose import takes many seconds."""

    def __init__(self, model):
        super().__init__()
        self._orig_mod = model


def test_names_are_those_of_the_plain_model_whatever_wraps_it():
    model = small_net()
    plain = list(optimizer_of(model).gamma())
    assert list(optimizer_of(nn.DataParallel(model)).gamma()) == plain
    assert list(optimizer_of(Compiled(model)).gamma()) == plain
    assert list(optimizer_of(nn.DataParallel(Compiled(model))).support()) == plain


def test_a_model_whose_only_part_is_called_module_takes_its_own_ticket():
    model = nn.ModuleDict({"module": nn.Linear(3, 2)})
    groups = [{"params": [("module.weight", model["module"].weight)], "structure": "filter"}]
    ticket = DessiLBI(groups).support()
    ticket.apply_(model)
    assert not model["module"].weight.any()


def test_two_tensors_of_one_name_are_refused_when_names_are_asked_for():
    groups = [{"params": [("w", nn.Parameter(torch.ones(2, 2)))]} for _ in range(2)]
    optimizer = DessiLBI(groups, structure="filter")
    with pytest.raises(ValueError, match="w"):
        optimizer.support()
