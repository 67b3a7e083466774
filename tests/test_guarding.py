# SPDX-License-Identifier: Apache-2.0
"""A compacted program refuses inputs that it was not made for, wherever it goes."""

import copy
import io

import pytest
import torch
from torch import nn

from dessilbi import compact, export, load_compact, save_compact
from dessilbi.testing import random_ticket


class Fixed(nn.Module):
    """A forward that holds a size, a number and a switch."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 2)

    def forward(self, x, scale=1.0, flag=True):
        h = self.a(x).relu()[:, :8].reshape(-1, 8)
        return self.b(h * 2 if flag else h) * scale


class Steps(nn.Module):
    """Weights of time steps, whose number is fixed."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 2)

    def forward(self, x, m):
        h = self.a(x).relu()[..., :8].reshape(-1, x.shape[1], 8)
        return self.b(h) * m[:, None]


@pytest.fixture
def x():
    torch.manual_seed(0)
    return torch.randn(6, 4)


@pytest.fixture
def made(x):
    model, example = Fixed().eval(), (x, 1.0, True)
    ticket = random_ticket(model, example_inputs=example, density=0.5)
    result = compact(model, ticket, example_inputs=example)
    assert result.proof.form == "program"
    return result, ticket.apply_(copy.deepcopy(model))


def refused(model, *inputs, told):
    with pytest.raises(ValueError, match=told) as caught:
        model(*inputs)
    assert "\n" not in str(caught.value)
    assert "this program was made for" in str(caught.value)


def checked(model, masked, x):
    for batch in (x, x[:1], torch.cat([x, x])):
        torch.testing.assert_close(model(batch, 1.0, True), masked(batch, 1.0, True))
    refused(model, x, 3.0, True, told=r"scale is 3.0, .* for 1.0")
    refused(model, x, 1.0, False, told="flag is False, .* for True")
    refused(model, x[:, :3], 1.0, True, told=r"x is \(6, 3\), .* for \(batch, 4\)")
    refused(model, x[None], 1.0, True, told=r"x is \(1, 6, 4\)")
    refused(model, 1.0, 1.0, True, told=r"x is 1.0")


def test_what_was_written_into_the_program_is_checked_and_noted(made, x):
    result, masked = made
    checked(result.model, masked, x)
    assert result.proof.notes[-1] == (
        "the program takes these inputs, and checks them: x (batch, 4), scale 1.0, flag True"
    )


def test_keywords_keep_the_batch_open_beside_a_switch(x):
    model, example = Fixed().eval(), {"x": x, "flag": True}
    ticket = random_ticket(model, example_inputs=example, density=0.5)
    result = compact(model, ticket, example_inputs=example)
    masked = ticket.apply_(copy.deepcopy(model))
    torch.testing.assert_close(result.model(x=x[:2], flag=True), masked(x[:2], flag=True))
    assert result.proof.notes[-1].endswith(": x (batch, 4), flag True")
    with pytest.raises(ValueError, match="flag is False"):
        result.model(x=x, flag=False)


def test_the_check_is_saved_copied_and_pickled(made, x, tmp_path):
    result, masked = made
    save_compact(result, tmp_path / "small")
    checked(load_compact(Fixed, tmp_path / "small"), masked, x)
    checked(copy.deepcopy(result.model), masked, x)
    file = io.BytesIO()
    torch.save(result.model, file)
    checked(torch.load(io.BytesIO(file.getvalue()), weights_only=False), masked, x)
    assert list(result.model.state_dict()) == list(masked.state_dict())


def test_a_checked_program_trains(made, x):
    model = made[0].model
    model(x, 1.0, True).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_a_checked_program_is_exported_with_an_open_batch(made, x, tmp_path):
    result, masked = made
    done = export(result.model, tmp_path / "small.pt2", example_inputs=(x, 1.0, True))
    assert done.dynamic_batch
    again = torch.export.load(done.file).module()
    y = torch.cat([x, x])
    torch.testing.assert_close(again(y, 1.0, True), masked(y, 1.0, True))


def test_a_checked_program_is_exported_to_onnx(made, x, tmp_path):
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    done = export(made[0].model, tmp_path / "small.onnx", example_inputs=(x, 1.0, True))
    assert done.dynamic_batch
    assert done.max_abs_diff < 1e-5


def test_sizes_that_could_not_stay_open_are_refused_instead_of_broadcast():
    torch.manual_seed(0)
    model, example = Steps().eval(), (torch.randn(1, 5, 4), torch.randn(5))
    ticket = random_ticket(model, example_inputs=example, density=0.5)
    result = compact(model, ticket, example_inputs=example)
    assert result.proof.form == "program"
    masked = ticket.apply_(copy.deepcopy(model))
    torch.testing.assert_close(result.model(*example), masked(*example))
    assert "x (1, 5, 4), m (5,)" in result.proof.notes[-1]
    refused(result.model, torch.randn(1, 1, 4), torch.randn(1), told=r"x is \(1, 1, 4\)")
    refused(result.model, torch.randn(2, 5, 4), torch.randn(5), told=r"x is \(2, 5, 4\)")
    refused(result.model, torch.randn(1, 5, 4), torch.randn(1), told=r"m is \(1,\)")
