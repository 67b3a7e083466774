# SPDX-License-Identifier: Apache-2.0
"""A smaller model that is to go on training can be trained."""

import copy

import pytest
import torch
from torch import nn

from dessilbi import compact
from dessilbi.testing import random_ticket


class Auxiliary(nn.Module):
    """A head that is read in training alone."""

    def __init__(self, end=lambda m, h: m.aux(h)):
        super().__init__()
        self.a, self.b, self.aux, self.end = nn.Linear(4, 8), nn.Linear(8, 2), nn.Linear(8, 3), end

    def forward(self, x):
        h = self.a(x).relu()
        return (self.b(h), self.end(self, h)) if self.training else self.b(h)


@pytest.fixture
def x():
    torch.manual_seed(0)
    return torch.randn(6, 4)


def half(model, x, **options):
    ticket = random_ticket(model, example_inputs=x, density=0.5)
    return compact(model, ticket, example_inputs=x, **options)


def trained(model, x):
    return half(model, x, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))


@pytest.mark.parametrize("training", [True, False])
def test_a_head_that_only_training_reads_is_refused_in_words(training, x):
    model = Auxiliary().train(training)
    with pytest.raises(ValueError, match="cannot go on training once it is smaller") as caught:
        trained(model, x)
    assert "\n" not in str(caught.value)
    assert half(model, x).proof.removed == 4  # for inference it is exact


def test_answers_of_another_shape_are_refused(x):
    with pytest.raises(ValueError, match=r"its answers are \[\(6, 2\), \(6, 4\)\], not"):
        trained(Auxiliary(lambda _, h: h), x)


def test_neither_statistics_nor_random_states_move(x):
    model = nn.Sequential(
        nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(), nn.ReLU(), nn.Linear(8, 2)
    ).train()
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    result = trained(model, x)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    kept = result.cuts["1.running_mean"][0].index
    assert torch.equal(result.model[1].running_mean, before["1.running_mean"][kept])
    assert int(result.model[1].num_batches_tracked) == 0
    result.model(x)[0].sum().backward()


def test_an_example_that_the_model_itself_cannot_train_on_is_no_reason(x):
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2)).train()
    with pytest.raises(ValueError, match="more than 1 value"):
        model(x[:1])
    assert trained(model, x[:1]).proof.removed == 4
