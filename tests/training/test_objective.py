# SPDX-License-Identifier: Apache-2.0
"""Loss and right answers of classes and of texts."""

import pytest
import torch
from torch.testing import assert_close

from dessilbi.training.objective import loss_of, num_correct


def test_the_loss_is_the_mean_over_samples_or_over_all_characters():
    generator = torch.Generator().manual_seed(0)
    outputs = torch.randn(3, 5, 7, generator=generator)
    targets = torch.randint(7, (3, 5), generator=generator)
    by_hand = -outputs.log_softmax(-1).gather(-1, targets[..., None]).squeeze(-1)
    assert_close(loss_of(outputs, targets), by_hand.mean())
    assert_close(loss_of(outputs[0], targets[0]), by_hand[0].mean())


def test_right_answers_are_counted_one_by_one():
    outputs = torch.eye(3).expand(2, 3, 3)
    assert num_correct(outputs, torch.tensor([[0, 1, 2], [0, 0, 0]])) == 4
    assert num_correct(outputs[0], torch.tensor([0, 1, 0])) == 2


@pytest.mark.parametrize("function", [loss_of, num_correct])
def test_outputs_that_do_not_answer_the_targets_are_refused(function):
    with pytest.raises(ValueError, match=r"shape \(4, 10\) do not answer targets of shape \(4, 9"):
        function(torch.zeros(4, 10), torch.zeros(4, 9, dtype=torch.int64))
    with pytest.raises(TypeError, match="the model returned a tuple, not a tensor of logits"):
        function((torch.zeros(4, 10),), torch.zeros(4, dtype=torch.int64))
