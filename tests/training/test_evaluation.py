# SPDX-License-Identifier: Apache-2.0
"""Accuracy of W, of tickets and of Gamma, with batch statistics that fit."""

from contextlib import suppress
from functools import partial

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from dessilbi.blocks.ticket import TensorSpec, Ticket
from dessilbi.training.evaluation import (
    accuracy,
    answered,
    changed,
    masked,
    recalibrated,
    set_weights,
)
from dessilbi.training.feeding import InMemory, Split


def split_of(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    inputs = 3 + 2 * torch.randn(count, 1, 4, 4, generator=generator)
    return Split(InMemory(inputs, torch.arange(count) % 3))


def images_of(split):
    return split.examples(len(split))[0]


def net(norm=True):
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 4, 3), *([nn.BatchNorm2d(4)] if norm else []), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(16, 3))


def half_of_the_filters():
    mask = torch.tensor([True, False, True, False]).reshape(4, 1, 1, 1)
    return Ticket({"0.weight": mask}, {"0.weight": TensorSpec((4, 1, 3, 3), (1, None, None, None))})


def state_of(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(left, right):
    return all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("count", [1, 10, 128, 129, 2500])
def test_accuracy_is_the_share_of_right_answers(count):
    class Constant(nn.Module):
        def forward(self, x):
            return torch.tensor([0.0, 1.0, 0.5]).expand(len(x), 3)

    split = split_of(count)
    assert accuracy(Constant(), split) == int((split.examples(count)[1] == 1).sum()) / count


@pytest.mark.parametrize("training", [True, False])
def test_accuracy_judges_in_eval_mode_and_restores_the_mode(training):
    seen = []

    class Watch(nn.Module):
        def forward(self, x):
            seen.append((self.training, torch.is_grad_enabled()))
            return torch.zeros(len(x), 3)

    model = Watch().train(training)
    accuracy(model, split_of(5))
    assert seen == [(False, False)]
    assert model.training is training


def test_accuracy_changes_no_statistics():
    model = net().train()
    before = state_of(model)
    accuracy(model, split_of(50))
    assert same(before, model.state_dict())


def test_masking_leaves_the_model_untouched():
    model = net().train()
    before = state_of(model)
    judged = masked(model, half_of_the_filters(), split_of(50))
    assert judged is not model
    assert same(before, model.state_dict())
    assert model.training
    assert not judged[0].weight[1].any()
    assert torch.equal(judged[0].weight[0], model[0].weight[0])


def test_a_masked_model_has_the_batch_statistics_of_its_own_activations():
    train = split_of(128)
    judged = masked(net(), half_of_the_filters(), train)
    with torch.no_grad():
        out = judged[0](images_of(train))
    assert_close(judged[1].running_mean, out.mean((0, 2, 3)))
    assert_close(judged[1].running_var, out.var((0, 2, 3)))
    assert judged[1].running_var[1] < 1e-6 < judged[1].running_var[0]


def test_recalibration_averages_over_batches_and_restores_mode_and_momentum():
    model, train = net().eval(), split_of(1280)
    model[1].momentum = 0.3
    assert recalibrated(model, train) is model
    assert (model.training, model[1].training, model[1].momentum) == (False, False, 0.3)
    with torch.no_grad():
        parts = [model[0](part).mean((0, 2, 3)) for part in images_of(train).split(128)]
    assert_close(model[1].running_mean, torch.stack(parts).mean(0))


def test_recalibration_uses_the_first_samples_only():
    model, other, train = net(), net(), split_of(500)
    recalibrated(model, train, samples=100)
    recalibrated(other, Split(train.source, torch.arange(100)))
    assert same(model.state_dict(), other.state_dict())


def test_recalibration_changes_no_parameter():
    model = net()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    recalibrated(model, split_of(50))
    assert same(before, dict(model.named_parameters()))


def test_a_model_without_batch_norm_is_not_even_run():
    model = net(norm=False)
    model[0].register_forward_hook(lambda *_: pytest.fail("was run"))
    assert recalibrated(model, split_of(50)) is model


def test_a_norm_without_running_statistics_is_left_alone():
    model = nn.Sequential(nn.BatchNorm2d(1, track_running_stats=False))
    assert recalibrated(model, split_of(50))[0].running_mean is None


def test_a_last_batch_of_one_sample_is_no_obstacle():
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 3), nn.BatchNorm1d(3))
    recalibrated(model, split_of(129))


def test_changed_weights_are_judged_with_statistics_that_fit_and_every_bit_comes_back():
    model, train = net(), split_of(400)
    model[1].running_mean.fill_(7.0)
    before, training = state_of(model), model.training
    with changed(model, half_of_the_filters().apply_, train) as judged:
        assert judged is model
        assert not model[0].weight[1].any()
        assert same(model.state_dict(), masked(net(), half_of_the_filters(), train).state_dict())
    assert same(before, model.state_dict())
    assert model.training is training


def test_changed_weights_come_back_after_an_error():
    model = net()
    before = state_of(model)
    zero = partial(set_weights, weights={"3.weight": torch.zeros(3, 16)})
    with suppress(KeyboardInterrupt), changed(model, zero, split_of(50)):
        assert not model[3].weight.any()
        raise KeyboardInterrupt
    assert same(before, model.state_dict())


def test_dropout_stays_off_while_statistics_are_estimated():
    model = nn.Sequential(nn.Dropout(0.9), nn.BatchNorm2d(1)).train()
    train = split_of(100)
    recalibrated(model, train)
    assert_close(model[1].running_mean, images_of(train).mean((0, 2, 3)))
    assert model[0].training


def test_processes_share_the_samples_of_an_evaluation():
    model, split = net(), split_of(101)
    parts = [answered(model, split, rank=rank, world_size=3) for rank in range(3)]
    assert all(part[1] >= 33 for part in parts)
    assert torch.equal(sum(parts), answered(model, split))
