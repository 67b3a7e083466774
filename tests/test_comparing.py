# SPDX-License-Identifier: Apache-2.0
"""One comparison for compact, grow, save and export: no number hides what is wrong with another."""

import copy

import pytest
import torch
from torch import nn

from dessilbi import compact, export, grow, load_compact, save_compact
from dessilbi.compaction.comparing import compare, compared, rounding, sharpness, unseen
from dessilbi.testing import random_ticket

INF = float("inf")


class Net(nn.Module):
    """Two layers and what becomes of their answer."""

    def __init__(self, end=lambda y, x: y):
        super().__init__()
        self.a, self.b, self.end = nn.Linear(4, 8), nn.Linear(8, 2), end

    def forward(self, x):
        return self.end(self.b(self.a(x).relu()), x)


ENDS = {
    "finfo.min": lambda y, x: y.masked_fill(x[:, :2] > 0, torch.finfo(x.dtype).min),
    "mostly finfo.min": lambda y, x: y.masked_fill(x[:, :2] > -1, torch.finfo(x.dtype).min),
    "-1e9": lambda y, x: y.masked_fill(x[:, :2] > 0, -1e9),
    "added -1e9": lambda y, x: y - 1e9 * (x[:, :2] > 0),
    "column": lambda y, x: torch.cat([y, 1e10 * x[:, :1]], 1),
    "columns": lambda y, x: torch.cat([y, 1e10 * x], 1),
    "constant": lambda y, x: (y, torch.full((x.shape[0],), -1e9)),
}


@pytest.fixture
def x():
    torch.manual_seed(0)
    return torch.randn(6, 4)


def half(model, x, **options):
    ticket = random_ticket(model, example_inputs=x, density=0.5)
    return compact(model, ticket, example_inputs=x, **options)


def small_and_wrong(end, x, factor):
    result = half(Net(end).eval(), x)
    wrong = copy.deepcopy(result.model)
    with torch.no_grad():
        wrong.b.weight.mul_(factor)
    return result, wrong


# the certificate


class Divided(nn.Module):
    """A forward that divides by its width: the small module computes twice as much."""

    def __init__(self, end):
        super().__init__()
        self.a, self.b, self.end = nn.Linear(4, 8), nn.Linear(8, 2), end
        self.width = 8

    def forward(self, x):
        h = self.a(x).relu().view(-1, self.width)
        return self.end(self.b(h) / self.width, x)


@pytest.mark.parametrize("end", ENDS)
def test_huge_numbers_do_not_hide_that_the_others_are_wrong(end, x):
    model = Divided(ENDS[end]).eval()
    ticket = random_ticket(model, example_inputs=x, density=0.5)
    result = compact(model, ticket, example_inputs=x)
    masked = ticket.apply_(copy.deepcopy(model))
    with torch.no_grad():
        expected, found = compared(masked(x))[0], compared(result.model(x))[0]
    torch.testing.assert_close(found, expected)
    assert result.proof.relative_diff < 1e-12
    assert result.proof.removed > 0


@pytest.mark.parametrize("end", ENDS)
def test_a_saved_model_that_was_changed_is_refused(end, x, tmp_path):
    result, _ = small_and_wrong(ENDS[end], x, 1.0)
    save_compact(result, tmp_path / "good")
    assert load_compact(lambda: Net(ENDS[end]), tmp_path / "good") is not None
    with torch.no_grad():
        result.model.b.weight.mul_(-3)
    with pytest.raises(ValueError, match="changed after compaction"):
        save_compact(result, tmp_path / "bad")


@pytest.mark.parametrize("end", ENDS)
def test_growth_that_changes_small_numbers_is_refused(end, x, monkeypatch):
    model = Net(ENDS[end]).eval()
    assert grow(model, {"a": 12}, example_inputs=x).proof.relative_diff < 1e-12

    def broken(model, change, plant):
        wide = built(model, change, plant)
        with torch.no_grad():
            wide.b.weight.mul_(1.5)
        return wide

    from dessilbi.growth import growth

    built = growth.built
    monkeypatch.setattr(growth, "built", broken)
    with pytest.raises(ValueError, match="computes something else once a"):
        grow(model, {"a": 12}, example_inputs=x)


@pytest.mark.parametrize("factor", [-3, 1.03])
@pytest.mark.parametrize(
    "end", ["finfo.min", "mostly finfo.min", "-1e9", "column", "constant", "bfloat16"]
)
def test_an_export_is_compared_output_by_output(end, factor, x, tmp_path, monkeypatch):
    ends = ENDS | {"bfloat16": lambda y, x: (y, x.bfloat16())}
    model = Net(ends[end]).eval()
    assert export(model, tmp_path / "good.pt2", example_inputs=x).max_abs_diff < 1e-5
    load = torch.export.load

    def tampered(file):
        program = load(file)
        with torch.no_grad():
            program.state_dict["b.weight"].mul_(factor)
        return program

    monkeypatch.setattr(torch.export, "load", tampered)
    with pytest.raises(ValueError, match="answers differently"):
        export(model, tmp_path / "bad.pt2", example_inputs=x)
    assert not (tmp_path / "bad.pt2").exists()


# what rounding does is not held against anybody


def in_float64(make, count=3):
    """Answers, and the same in another order of the sums."""
    generator = torch.Generator().manual_seed(0)
    one, two = [], []
    for _ in range(count):
        h = torch.randn(50, 64, generator=generator, dtype=torch.float64)
        w = torch.ones(64, 7, dtype=torch.float64) / 3 + torch.arange(7) / 10
        order = torch.randperm(64, generator=generator)
        one.append([make(h @ w)])
        two.append([make(h[:, order] @ w[order])])
    assert any(not torch.equal(a, b) for (a,), (b,) in zip(one, two, strict=True))
    return one, two


@pytest.mark.parametrize(
    "make",
    [
        lambda y: y,
        lambda y: torch.cat([y, y - y.mean(0)], 1) - y.mean(),
        lambda y: torch.cat([y, 0 * y, 1 + 0 * y], 1),  # constant outputs
        lambda y: torch.cat([y, y.sum(1, keepdim=True) - 7 * y.mean(1, keepdim=True)], 1),  # noise
        lambda y: y.mean(0, keepdim=True).expand(50, 7),  # equal for all samples
        lambda y: (1e4 * y[:, :2]).log_softmax(1),  # saturated
        lambda y: (10 * y[:, :2]).log_softmax(1),
        lambda y: (1e3 * y).softmax(1),
        lambda y: y.relu(),
        lambda y: 100 + y,
    ],
)
def test_rounding_is_no_difference(make):
    gap = compare(*in_float64(make))
    assert 0 < gap.relative < 1e-10


def test_an_element_is_compared_with_what_the_input_does_to_it():
    base = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    expected = [[100 + base], [100 + 2 * base]]
    found = [[100 + base], [100 + 2 * base + torch.tensor([0.0, 0.0, 0.3])]]
    assert compare(expected, found).relative == pytest.approx(0.1)
    assert compare(expected, expected).relative == 0


def test_other_shapes_other_kinds_and_other_infinities_are_infinitely_far():
    one = [[torch.ones(2)]]
    assert compare(one, [[torch.ones(3)]]).relative == INF
    assert compare(one, [[torch.ones(2).long()]]).relative == INF
    assert compare(one, [[torch.tensor([1.0, INF])]]).relative == INF
    assert compare([[torch.tensor([1.0, INF])]], one).relative == INF
    assert compare(one, [[torch.ones(2), torch.ones(2)]]).relative == INF
    assert not compare(one, [[torch.ones(3)]]).within(lambda _: 1.0)


def test_a_mask_that_depends_on_the_input_is_not_what_tells():
    fill = torch.tensor([[1.0, 2.0, -1e9], [-1e9, 2.0, 3.0]])
    assert sharpness([[fill[0]], [fill[1]]]) == 0
    assert sharpness([[fill[0]], [2 * fill[1]]]) > 0.1


# answers that are no real numbers


def test_complex_answers_are_compared(x):
    model = Net(lambda y, x: torch.view_as_complex(y)).eval()
    result = half(model, x)
    assert result.proof.relative_diff < 1e-12
    divided = Divided(lambda y, x: torch.view_as_complex(y)).eval()
    found = half(divided, x)
    assert found.proof.relative_diff < 1e-12
    assert found.proof.max_abs_diff < 1e-6


@pytest.mark.parametrize("kind", ["whole numbers", "truth values"])
def test_whole_numbers_and_truth_values_are_compared(kind, x, tmp_path):
    def end(y, x):
        return x + 0 * y.sum(), (8 * y).round().long() if kind == "whole numbers" else y > 0.1

    result, wrong = small_and_wrong(end, x, -3)
    assert result.proof.relative_diff < 1e-12
    assert result.witness.judge(result.model).relative_diff < 1e-12
    assert result.witness.judge(wrong).relative_diff > 0.05
    result.model.b.weight.data.mul_(-3)
    with pytest.raises(ValueError, match="changed after compaction"):
        save_compact(result, tmp_path / "bad")


def test_a_wrong_choice_is_refused_in_an_export(x, tmp_path, monkeypatch):
    model = Net(lambda y, x: y.argmax(1)).eval()
    export(model, tmp_path / "good.pt2", example_inputs=x)
    load = torch.export.load

    def tampered(file):
        program = load(file)
        with torch.no_grad():
            program.state_dict["b.weight"].mul_(-3)
        return program

    monkeypatch.setattr(torch.export, "load", tampered)
    with pytest.raises(ValueError, match="answers differently"):
        export(model, tmp_path / "bad.pt2", example_inputs=x)


def test_few_whole_numbers_may_follow_rounding_and_are_noted():
    one = [[torch.arange(100)]]
    two = [[torch.cat([torch.arange(99), torch.tensor([5])])]]
    gap = compare(one, two, exact=False)
    assert gap.relative == 0.01
    assert gap.within(lambda dtype: 0.05)
    assert "1.0% of its places" in gap.notes()[0]


def test_what_is_no_tensor_is_named_in_the_notes(x, tmp_path):
    model = Net(lambda y, x: {"y": y, "k": 3, "name": "net", "none": None}).eval()
    told = "what the model returns as int, str was not compared"
    assert told in half(model, x).proof.notes
    assert told in grow(model, {"a": 12}, example_inputs=x).proof.notes
    assert unseen(model(x)) == ["int", "str"]


def test_the_tails_of_a_sharp_softmax_are_rounding_in_a_narrow_type():
    logits, noise = torch.randn(2, 64, 1000, generator=torch.Generator().manual_seed(0))
    one = (100 * logits).softmax(-1)
    other = (100 * logits * (1 + 1e-7 * noise)).softmax(-1)
    assert not torch.equal(one, other)
    assert compare([[one]], [[other]], exact=False).within(rounding)


def test_what_a_runtime_takes_for_zero_is_no_difference_in_a_narrow_type():
    one = torch.tensor([1.0, 0.5, 1e-39, 2e-45])
    other = torch.tensor([1.0, 0.5, 0.0, 0.0])
    assert compare([[one]], [[other]], exact=False).within(rounding)
    assert not compare([[one]], [[torch.tensor([1.0, 0.5, 1e-12, 0.0])]], exact=False).within(
        rounding
    )
